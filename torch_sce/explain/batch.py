"""A batch as the checks see it, as far as its parts fit together, and what they report."""

# The private methods of a loss are private to torch_sce.
# pyright: reportPrivateUsage=false

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arrays import HALVES, to_tensor
from ..losses import CategoricalCrossentropy, SparseCategoricalCrossentropy
from ..samples import (
    align,
    class_axis,
    class_numbers,
    combine_masks,
    labels_for,
    match_ranks,
    not_ignored,
)

Loss = SparseCategoricalCrossentropy | CategoricalCrossentropy

FEW = 8  # fewer rows are weak evidence


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong, or that is good to know if `is_wrong` is false."""

    name: str
    evidence: str
    fix: str
    is_wrong: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence} {self.fix}".strip()


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of a call, and what the checks use."""

    loss: Loss
    arguments: tuple[Any, Any, Any, Any]  # as they were given
    y_true: Tensor
    y_pred: Tensor
    axis: int
    counted: Tensor  # which positions count, in the losses' shape
    rows: Tensor  # (N, C), the predictions
    all_labels: Tensor | None  # in the losses' shape; None if theirs does not fit
    targets: Tensor | None  # (N, C), None if there are none or their shape does not fit
    weight: Tensor | None  # (N,), None if there are none, or one for all
    mask: Tensor | None  # as given, in the losses' shape, or one that broadcasts to it

    @property
    def classes(self) -> int:
        return self.rows.shape[1]

    @property
    def labels(self) -> Tensor | None:
        """(N,), of those that count."""
        return None if self.all_labels is None else self.all_labels[self.counted]

    @property
    def tolerance(self) -> float:
        """How far the sums of rows may be from 1 if they are to show that these are probabilities.

        Many rows may have been rounded to half precision; a few logits may be close by chance.
        """
        half = self.y_pred.dtype in HALVES or self.loss.dtype in HALVES
        if len(self.rows) >= FEW or half:
            return 1e-2 if len(self.rows) > 1 else 5e-3
        return 1e-3 if len(self.rows) > 1 or self.classes > 3 else 1e-5

    def position(self, flags: Tensor) -> str:
        """Where the first of these positions is."""
        return in_words(self.counted.nonzero()[flags.nonzero()[0, 0]].tolist())

    @property
    def left_out_by(self) -> str:
        """What may leave positions out, in words."""
        ignored = getattr(self.loss, "ignore_class", None)
        causes = [] if ignored is None else [f"ignore_class={ignored}"]
        return " and ".join(causes if self.arguments[3] is None else [*causes, "the mask"])

    def are_distributions(self, rows: Tensor, tolerance: float | None = None) -> bool:
        """Whether each row could be the result of a softmax."""
        tolerance = self.tolerance if tolerance is None else tolerance
        low, high = rows.aminmax()
        if not (low >= 0 and high <= 1 + tolerance):
            return False
        return (rows.sum(-1) - 1).abs().max().item() <= tolerance

    def another(self, **options: Any) -> Loss:
        """A loss that differs in these options."""
        return self.loss._with(**options)

    def among_rows(self, **options: Any) -> Loss:
        """A loss for `rows`, in which every position counts."""
        if isinstance(self.loss, SparseCategoricalCrossentropy):
            options["ignore_class"] = None
        return self.another(axis=-1, **options)


def batch_of(loss: Loss, arguments: tuple[Any, Any, Any, Any]) -> Batch | None:
    """The batch, as far as its parts fit together; None if the predictions cannot be read."""
    y_true, y_pred, sample_weight, mask = arguments
    try:
        predictions = to_tensor("y_pred", y_pred)
        given = to_tensor("y_true", y_true)
        if isinstance(loss, CategoricalCrossentropy):
            given, predictions = match_ranks(given, predictions)
        axis = class_axis(loss.axis, predictions)
    except (ValueError, TypeError):
        return None
    x = predictions.movedim(axis, -1)
    x = x if x.dtype == torch.float64 else x.float()
    shape = x.shape[:-1]
    labels = targets = None
    if isinstance(loss, SparseCategoricalCrossentropy):
        with suppress(ValueError):
            labels = labels_for(given, predictions, axis)
            if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
                labels = class_numbers(labels)  # which PyTorch 2.6 to 2.9 do not index
    elif given.shape == predictions.shape:
        targets = given.movedim(axis, -1).to(x.dtype)
    mask = own_mask = _if_it_fits("mask", mask, predictions, shape)
    if labels is not None and isinstance(loss, SparseCategoricalCrossentropy):
        mask = combine_masks(mask, not_ignored(labels, loss.ignore_class))
    counted = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().expand(shape)
    weight = _if_it_fits("sample_weight", sample_weight, predictions, shape)
    return Batch(
        loss, arguments, given, predictions, axis, counted,
        rows=x.reshape(-1, x.shape[-1]) if counted.all() else x[counted],
        all_labels=labels,
        targets=None if targets is None else targets[counted],
        weight=None if weight is None or weight.numel() < 2 else weight.expand(shape)[counted],
        mask=own_mask,
    )  # fmt: skip


def _if_it_fits(name: str, value: Any, y_pred: Tensor, shape: torch.Size) -> Tensor | None:
    """A weight or a mask, None if it does not fit: the loss's own error says why."""
    with suppress(ValueError, TypeError):
        return align(name, to_tensor(name, value, y_pred), shape)
    return None


def in_words(place: Sequence[int]) -> str:
    """An index into the positions: a number, or several in parentheses."""
    return str(place[0]) if len(place) == 1 else str(tuple(map(int, place)))
