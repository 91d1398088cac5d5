"""Keras 2's rules for labels, weights, masks and averages, where they are not Keras 3's.

With losses l, weights w (1 if none are given) and a mask v (its values as given):

    "none"                          w l v
    "sum"                           sum(w l v)
    "sum_over_batch_size", "auto"   sum(w l v) / (number of losses), or with a mask / sum(v)

A sum of a mask of 0 makes the mean NaN; a batch without losses has the mean 0. The sources are
`tf_keras.src.utils.losses_utils.apply_valid_mask` and `compute_weighted_loss`.

A metric adds w v to its count and w v times the value to its total, for every element of the
values: `element_sums`. The source is `tf_keras.src.metrics.base_metric.Reduce.update_state`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..options import parse_ignore_class
from ..reduction import mask_sum, weighed, weighted
from ..samples import class_axis, leading, over_leading_axes, require_broadcasting

REDUCTIONS = ("auto", "sum_over_batch_size", "sum", "none")


def parse_reduction(reduction: Any) -> str:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def parse_ignored(ignore_class: Any) -> Any:
    """`ignore_class` truncated toward zero, as labels are."""
    found = parse_ignore_class(ignore_class)
    return found if found is None or not math.isfinite(found) else math.trunc(found)


def labels_of(y_true: Tensor, y_pred: Tensor, axis: int) -> Tensor:
    """Labels truncated toward zero; those of another rank than the losses in the losses' shape.

    Labels in the losses' rank must have their shape. Others, which `tf_keras` flattens, may be flat
    or have axes of size 1 more or less.

    Differs from Keras: labels (T, B, 1) for losses (B, T) would be flattened in the wrong order.
    They are left as they are, for an error.
    """
    labels = y_true.trunc() if y_true.is_floating_point() else y_true
    axis = class_axis(axis, y_pred)
    shape = (*y_pred.shape[:axis], *y_pred.shape[axis + 1 :])
    same = [n for n in labels.shape if n != 1] == [n for n in shape if n != 1]
    fits = same or (labels.ndim == 1 and labels.numel() == math.prod(shape))
    return labels.reshape(shape) if fits and labels.ndim != len(shape) else labels


def squeezed(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and predictions without a last axis of size 1 that only one of them has."""
    if y_true.ndim == y_pred.ndim + 1 and y_true.shape[-1] == 1:
        y_true = y_true.squeeze(-1)
    elif y_pred.ndim == y_true.ndim + 1 and y_pred.shape[-1] == 1:
        y_pred = y_pred.squeeze(-1)
    return y_true, y_pred


def align(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value`, a weight or a mask of a loss, reshaped so that it broadcasts to the losses' shape.

    Where ranks differ by one, a last axis of size 1 is added or dropped: (B,) on (B, T) has one
    value for each example.

    Differs from Keras: a ValueError if the result would be larger than the losses, or if (B,) would
    broadcast along the last axis of (B, H, W).
    """
    given = tuple(value.shape)
    if value.ndim == len(shape) + 1 and given[-1] == 1:
        value = value.squeeze(-1)
    require_broadcasting(name, value := _with_last_axis(value, shape), shape, given)
    return value


def reduce(
    losses: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> Tensor:
    """The reduced value of `losses`, which are already 0 where the mask is 0; see above."""
    # In a sum, a mask's entries count as they are.
    terms = weighted(losses, sample_weight, mask, "sum")
    if reduction == "none":
        return terms
    if reduction == "sum":
        return terms.sum()
    if mask is None or losses.numel() == 0:
        return terms.sum() / max(losses.numel(), 1)
    return terms.sum() / mask_sum(losses, mask)


def lead(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value`, a weight or a mask of a metric, for the leading axes of values of this shape.

    (B,) on (B, T) has one value for each example, a scalar one for every element. Over axes that a
    weight does not have, two or more, values are averaged.
    """
    value = _with_last_axis(value, shape)
    return leading(name, value, shape) if value.ndim else value.expand(shape)


def lead_over(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """As `lead`, so that it broadcasts to this shape."""
    return over_leading_axes(name, _with_last_axis(value, shape), shape)


def element_sums(
    values: Tensor, sample_weight: Tensor | None, *masks: Tensor | None
) -> tuple[Tensor, Tensor | int]:
    """What a batch adds to a metric's total and count, both in float64.

        without weights:    total = sum(v)      count = number of values
        with weights:       total = sum(w v)    count = sum(w)

    >>> values = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> total, count = element_sums(values, torch.tensor([[2], [1]]))
    >>> total.item(), count.item()
    (4.0, 6.0)
    """
    values, factor = weighed(values, sample_weight, *masks)
    if factor is None:
        return values.sum(), values.numel()
    return (values * factor).sum(), factor.sum()


def _with_last_axis(value: Tensor, shape: torch.Size) -> Tensor:
    return value.unsqueeze(-1) if 0 < value.ndim == len(shape) - 1 else value
