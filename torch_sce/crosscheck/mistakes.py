"""Which mistake gives a number: what ported code does in the place of one of the loss's rules.

    rows      the losses of rows of predictions
    axis      where their classes are
    labels    and which labels they have
    ignored   which positions `ignore_class` leaves out
    masked    which the mask leaves out
    weights   what each loss is multiplied by
    divided   what the sum is divided by
    unit      what is done with the quotient

`search` computes the loss with one other choice, then with two, then with three, and stops where
it meets the number.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..options import MEANS
from ..samples import CLIP
from .blocks import blocks_of
from .cases import Case
from .rules import ELEMENTS, Inputs

ROUNDING = 2.0**-18  # of float32, 64 times: code of others adds up in other orders
FEW_DIGITS = 5  # with fewer, three choices meet any number by chance
SMOOTHING = 0.1
PARTS = (2, 3, 4, 5, 8, 16)  # numbers of micro-batches or ranks
MARKS = (-100, -1, 255, 0)  # labels that often mean padding
NEAR = 0.1  # candidates this near show how many there are by chance


@dataclass(frozen=True)
class Number:
    """A number as it was printed."""

    text: str

    def __post_init__(self) -> None:
        Decimal(self.text)  # raises an ArithmeticError if it is none

    @property
    def value(self) -> float:
        return float(self.text)

    @property
    def digits(self) -> int:
        return len(Decimal(self.text).as_tuple().digits)

    @property
    def tolerance(self) -> float:
        """Half a unit of the last digit that was printed, and rounding."""
        exponent = Decimal(self.text).as_tuple().exponent
        last = 10.0**exponent if isinstance(exponent, int) else 0.0
        return last / 2 + ROUNDING * abs(self.value)

    def fits(self, value: float) -> bool:
        if not math.isfinite(value) or not math.isfinite(self.value):
            return value == self.value or (math.isnan(value) and math.isnan(self.value))
        return abs(value - self.value) <= self.tolerance


@dataclass(frozen=True)
class Rule:
    """Another choice in one step, and what code does that makes it, in words."""

    step: str
    choice: Any
    words: str


@dataclass(frozen=True)
class Match:
    """The value that code gives, and what it does, in words."""

    words: str
    value: float

    def __str__(self) -> str:
        return f"{self.words} ({self.value:.7g})"


@dataclass(frozen=True)
class Search:
    """What a search met."""

    matches: list[Match]
    nearest: Match | None  # of a single other choice, if nothing matches
    tried: int
    by_chance: float  # how many matches are to be expected if the number has another cause


def search(number: Number, case: Case, own: list[Match], usual: list[Match]) -> Search:
    """The fewest other choices that give the number.

    `own` are the values without any, `usual` others that have a name.
    """
    matches = [match for match in own if number.fits(match.value)]
    if matches:
        return Search(matches[:1], None, len(own), 0.0)
    mistakes = Mistakes(case)
    rules, seen, single = list(mistakes.rules()), [], []
    for count in (1, 2, 3):
        if count == 3 and number.digits < FEW_DIGITS:
            break
        for chosen in combinations(rules, count):
            choices = {rule.step: rule.choice for rule in chosen}
            value = mistakes.value(choices) if len(choices) == count else None
            if value is not None:
                seen.append(Match(", and ".join(rule.words for rule in chosen), value))
        if count == 1:
            seen += usual
            single = [match for match in seen if math.isfinite(match.value)]
        matches = [match for match in seen if number.fits(match.value)]
        if matches:
            return Search(matches, None, len(seen), _by_chance(number, seen))
    nearest = min(single, key=lambda match: abs(match.value - number.value), default=None)
    return Search([], nearest, len(seen), 0.0)


def _by_chance(number: Number, seen: list[Match]) -> float:
    """From how many different values are in the number's neighbourhood."""
    if not math.isfinite(number.value):
        return 0.0
    window = NEAR * abs(number.value)
    near = {f"{m.value:.6g}" for m in seen if abs(m.value - number.value) <= window}
    return len(near) * number.tolerance / window if window else 0.0


class Mistakes:
    """A case as tensors, with other choices. B examples, C classes; losses are (B, ...)."""

    def __init__(self, case: Case) -> None:
        plain = replace(case, batch=replace(case.batch, sample_weight=None))
        self.case, self.inputs = case, Inputs(plain)
        self.axis, self.shape = self.inputs.axis, self.inputs.labels.shape
        self.classes = self.inputs.classes
        self.weight, self.misfit = self._own_weight()
        self.rows: dict[tuple[str, int], list[Tensor]] = {}  # norms and scales, see _losses

    def _own_weight(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight that broadcasts to the losses; or one that does not, (B,)."""
        if self.case.sample_weight is None:
            return None, None
        try:
            weight = Inputs(self.case).weight
            return None if weight is None else weight.double(), None
        except ValueError:
            return None, torch.as_tensor(np.asarray(self.case.sample_weight)).double()

    @cached_property
    def class_weights(self) -> dict[int, float] | None:
        """The weight of each class, if the labels decide it."""
        if self.weight is None or self.weight.numel() < 2:
            return None
        y, counted = self._counted({})
        given = torch.stack([y.double(), self.weight.expand(self.shape)])[:, counted]
        labels, weights = given.unique(dim=1).tolist()
        table = {int(y): weight for y, weight in zip(labels, weights, strict=True)}
        is_one_each = len(table) == len(labels) and len(set(weights)) > 1
        return table if is_one_each else None

    def rules(self) -> Iterator[Rule]:
        """The other choices that this case has, the usual ones first."""
        yield from self._divisions()
        yield from self._rows()
        yield from self._positions()
        yield from self._weights()
        yield from self._labels()
        yield from self._units()

    def _divisions(self) -> Iterator[Rule]:
        def rule(choice: Any, words: str) -> Rule:
            return Rule("divided", choice, words)

        by_class, reduction = self.class_weights is not None, self.case.options["reduction"]
        if self.weight is not None and reduction != "mean_with_sample_weight":
            what = (
                "F.cross_entropy(weight=...)" if by_class else 'reduction="mean_with_sample_weight"'
            )
            yield rule("weights", f"divides by the weights, as `{what}` does")
        if not self._counted({})[1].any():
            yield rule("count", "divides 0 by 0, as means of PyTorch do if nothing counts")
        elif reduction not in MEANS:
            yield rule("count", "divides by the number of positions that count")
        yield rule("all", "divides by all positions, also by those that are left out")
        if reduction != "sum":
            yield rule("one", 'adds up the losses, as `reduction="sum"`')
        if not self.shape:
            return
        batch = self.shape[0]
        if len(self.shape) > 1:
            yield rule("batch", f"divides by the batch size {batch}, not by the positions")
        words = "takes the mean of each example, and then the mean of these"
        yield rule(("means", batch), words)
        for parts in PARTS:
            if parts < batch:
                words = f"the means of {parts} micro-batches or ranks"
                yield rule(("means", parts), f"takes the mean of {words}")
                yield rule(("sums", parts), f"adds up {words}")
        words = (
            f"averages over the {self.classes} classes, too, as `.mean()` of one-hot losses does"
        )
        yield rule("classes", words)

    def _rows(self) -> Iterator[Rule]:
        def rule(choice: str, words: str) -> Rule:
            return Rule("rows", choice, words)

        if self.case.options["from_logits"]:
            yield rule("clipped", "treats logits as probabilities, without `from_logits=True`")
            yield rule("twice", "takes a softmax before a loss that takes another")
            words = "takes the softmax first, whose probabilities the loss clips"
            yield rule("softmax, clipped", words)
            yield rule("raw", "takes no softmax and no logarithm, as `F.nll_loss` of logits")
        else:
            sums = torch.as_tensor(self.case.y_pred).sum(self.axis)
            twice = "takes a softmax of probabilities, as `F.cross_entropy` does"
            right = "treats the predictions as logits, as with `from_logits=True`"
            yield rule("logits", twice if (sums - 1).abs().max() < 1e-2 else right)
            yield rule("log", "does not clip the probabilities, as a loss of the logits under them")
            words = "normalises before it clips, as Keras 3 on PyTorch or JAX"
            yield rule("normalised, clipped", words)
            yield rule("raw", "takes no logarithm, as `F.nll_loss` of probabilities")
        yield rule("smoothed", f"smooths the labels, with `label_smoothing={SMOOTHING}`")
        for axis in range(1, self.inputs.x.ndim):
            shape = self.inputs.x.shape
            if axis != self.axis and shape[:axis] + shape[axis + 1 :] == self.shape:
                words = f"has the classes on axis {axis}, not {self.axis}"
                named = ", as `F.cross_entropy`" if axis == 1 else ""
                yield Rule("axis", axis, words + named)

    def _positions(self) -> Iterator[Rule]:
        inputs, ignored = self.inputs, self.inputs.ignored
        label = self.case.options["ignore_class"]
        if ignored.any():
            if 0 <= label < self.classes:
                words = f"counts the positions with the label {label}, without `ignore_class`"
                yield Rule("ignored", "none", words)
            words = f"counts the positions with the label {label}, as class "
            if label != 0:
                yield Rule("ignored", ("as", 0), f"{words}0")
            if label == -1:
                last = self.classes - 1
                yield Rule("ignored", ("as", last), f"{words}{last}, since an index of -1 wraps")
        for mark in MARKS:
            if mark != label and (inputs.y == mark).any():
                words = f"leaves out the positions with the label {mark}"
                default = ", PyTorch's default `ignore_index`" if mark == -100 else ""
                yield Rule("ignored", ("too", mark), words + default)
        if inputs.mask is not None and not (inputs.mask == 1).all():
            yield Rule("masked", "none", "has no mask, so that padding counts")
            yield Rule("masked", "inverted", "inverts the mask, so that only padding counts")

    def _weights(self) -> Iterator[Rule]:
        def rule(choice: str, words: str) -> Rule:
            return Rule("weights", choice, words)

        square = len(self.shape) > 1 and self.shape[0] == self.shape[1]
        if self.weight is not None:
            yield rule("none", "has no weights")
            yield rule("twice", "multiplies by the weights twice")
        if self._by_example() is not None and square:
            yield rule("time", "has the weights `(B,)` along the time axis, as Keras 3 broadcasts")
        if self.misfit is not None and self._by_example() is not None:
            yield rule("examples", "has one weight for each example, `(B, 1)`")
        if self.class_weights is not None and square and len(self.shape) == 2:
            words = "has the class weights of the largest label along the time, as "
            yield rule("fit", words + "`fit(class_weight=...)` of Keras")

    def _labels(self) -> Iterator[Rule]:
        def rule(choice: Any, words: str) -> Rule:
            return Rule("labels", choice, words)

        yield rule(("plus", 1), "has labels that are one too large")
        yield rule(("plus", -1), "has labels that are one too small")
        if len(self.shape) > 1 and self.shape[-1] > 1:
            words = "compares each position with the label of the {} one"
            yield rule(("shift", 1), words.format("next"))
            yield rule(("shift", -1), words.format("previous"))
        for name in ("float16", "bfloat16"):
            y = self.inputs.y
            if not torch.equal(y.to(getattr(torch, name)).long(), y):
                yield rule(
                    ("round", name), f"rounds the labels to {name}, as Keras with this dtype"
                )

    def _units(self) -> Iterator[Rule]:
        def rule(choice: Callable[[float], float], words: str) -> Rule:
            return Rule("unit", choice, words)

        yield rule(lambda x: x / math.log(2), "takes the logarithm to base 2")
        yield rule(lambda x: x / math.log(10), "takes the logarithm to base 10")
        yield rule(lambda x: math.exp(min(x, 700.0)), "returns the perplexity, exp of the loss")
        for k in (2, 4, 8):
            words = f"divides once more by {k}, the number of micro-batches or ranks"
            yield rule(lambda x, k=k: x / k, words)

    def value(self, choices: dict[str, Any]) -> float | None:
        """The loss with these choices; None where such code raises."""
        shift = choices["labels"][1] if choices.get("labels", " ")[0] == "shift" else 0
        y, counted = self._counted(choices)
        weight = self._weight(choices.get("weights"), y)
        if weight is None:
            return None
        exists = torch.ones(self.shape, dtype=torch.bool)
        if shift:
            y, counted, weight = (each.roll(-shift, -1) for each in (y, counted, weight))
            exists[..., -1 if shift > 0 else 0] = False
            counted = counted & exists
        if (counted & ((y < 0) | (y >= self.classes))).any():
            return None
        losses = self._losses(choices, y.clamp(0, self.classes - 1))
        terms = torch.where(counted, weight * losses, 0.0)
        value = self._quotient(choices.get("divided"), terms, weight, counted, exists)
        return choices["unit"](value) if "unit" in choices else value

    def _counted(self, choices: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The labels, and which of them count."""
        inputs, y, ignored = self.inputs, self.inputs.y, choices.get("ignored")
        kind, by = choices.get("labels", ("", 0))
        if kind == "plus":
            y = torch.where(y + by == -1, self.classes - 1, y + by)
        elif kind == "round":
            y = y.to(getattr(torch, by)).long()
        counted = ~inputs.ignored
        if ignored == "none":
            counted = torch.ones_like(counted)
        elif ignored and ignored[0] == "too":
            counted = counted & (inputs.y != ignored[1])
        elif ignored:
            counted, y = torch.ones_like(counted), torch.where(counted, y, ignored[1])
        masked = choices.get("masked")
        if inputs.mask is not None and masked != "none":
            counted = counted & (inputs.mask.bool() != (masked == "inverted"))
        return y, counted

    def _by_example(self) -> Tensor | None:
        """(B,), the weights, if there is one for each example."""
        given = self.weight if self.misfit is None else self.misfit
        if given is None or not self.shape or given.numel() != self.shape[0]:
            return None
        return given.flatten() if given.shape[:1] == self.shape[:1] else None

    def _weight(self, choice: str | None, y: Tensor) -> Tensor | None:
        """Of the losses' shape; None if such weights do not fit."""
        one, own, each = (
            torch.ones(self.shape, dtype=torch.float64),
            self.weight,
            self._by_example(),
        )
        if choice == "none" or (choice is None and own is None and self.misfit is None):
            return one
        if choice == "time" and each is not None:
            return one * each.reshape(-1, *[1] * (len(self.shape) - 2))
        if choice == "examples" and each is not None:
            return one * each.reshape(-1, *[1] * (len(self.shape) - 1))
        table = self.class_weights
        if choice == "fit" and table:
            largest = y.argmax(-1).tolist()
            return one * torch.tensor([table.get(k, math.nan) for k in largest])
        return None if own is None else one * own ** (2 if choice == "twice" else 1)

    def _losses(self, choices: dict[str, Any], y: Tensor) -> Tensor:
        """norm - score of the prediction at the label; rows are read once for all labels."""
        kind, axis = choices.get("rows") or self.right, choices.get("axis", self.axis)
        if (kind, axis) not in self.rows:
            blocks = blocks_of(self.inputs.x.shape, axis, ELEMENTS)
            parts = [self._norm_and_scale(kind, block.of(self.case.y_pred)) for block in blocks]
            norms, scales = zip(*parts, strict=True)
            self.rows[kind, axis] = [torch.cat(x).reshape(self.shape) for x in (norms, scales)]
        norm, scale = self.rows[kind, axis]
        at = np.take_along_axis(self.case.y_pred, np.expand_dims(y.numpy(), axis), axis)
        return norm - self._score(kind, torch.as_tensor(at).double().squeeze(axis), scale)

    @property
    def right(self) -> str:
        return "logits" if self.case.options["from_logits"] else "clipped"

    def _norm_and_scale(self, kind: str, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of rows (n, C), what all losses of a row have, and what its predictions are scaled by."""
        z = torch.as_tensor(rows).double()
        zero = torch.zeros(len(z), dtype=torch.float64)
        if kind in ("raw", "log"):
            return zero, zero
        if kind == "normalised, clipped":
            return zero, z.sum(-1)
        if kind == "smoothed":
            norm, _ = self._norm_and_scale(self.right, rows)
            return norm - SMOOTHING * self._score(self.right, z, zero).mean(-1), zero
        scale = zero
        if kind in ("twice", "softmax, clipped"):
            scale = z.logsumexp(-1)
            z = (z - scale[:, None]).exp()
        return self._clip(z).sum(-1).log() if "clipped" in kind else z.logsumexp(-1), scale

    def _score(self, kind: str, z: Tensor, scale: Tensor) -> Tensor:
        """What is subtracted for predictions z of labels."""
        if kind == "smoothed":
            return (1 - SMOOTHING) * self._score(self.right, z, scale)
        if kind in ("twice", "softmax, clipped"):
            z = (z - scale).exp()
        if kind == "normalised, clipped":
            z = z / scale
        if kind == "log":
            return z.log()
        return self._clip(z).log() if "clipped" in kind else z

    def _clip(self, p: Tensor) -> Tensor:
        return p.clamp(*CLIP[self.inputs.dtype])

    def _quotient(
        self, choice: Any, terms: Tensor, weight: Tensor, counted: Tensor, exists: Tensor
    ) -> float:
        """The sum of the terms, divided; the choice None is that of the reduction."""
        if isinstance(choice, tuple):
            kind, count = choice
            split = [each.tensor_split(count) for each in (terms, weight, counted)]
            found = [self._quotient(None, t, w, c, exists) for t, w, c in zip(*split, strict=True)]
            return sum(found) / (count if kind == "means" else 1)
        reduction = self.case.options["reduction"]
        by_weights = choice == "weights" or (
            choice is None and reduction == "mean_with_sample_weight"
        )
        count = float(counted.sum())
        if by_weights:
            whole = choice is None and bool(counted.all()) and self.weight is not None
            given = self.weight if whole and weight.shape == self.shape else None
            count = float((weight * counted).sum() if given is None else given.sum())
        elif choice == "all":
            count = float(exists.sum())
        elif choice == "one" or (choice is None and reduction == "sum"):
            count = 1.0
        elif choice == "batch":
            count = float(self.shape[0])
        elif choice == "classes":
            count *= self.classes
        total = float(terms.sum())
        return total / count if count else (math.nan if choice == "count" else 0.0)
