"""Sample weights, masks and averages: from one loss per sample to the value that is returned.

With losses l, weights w (1 if none are given) and a mask v (1 where a sample counts):

    "none", None              w l v
    "sum"                     sum(w l v)
    "sum_over_batch_size"     sum(w l v) / (number of samples that count)
    "mean"                    the same
    "auto"                    the same; Keras 2's name for its default
    "mean_with_sample_weight" sum(w l v) / sum(w v)

"Samples" are losses: (B, T) predictions have B * T of them, and the weights are not in the
denominator of a plain mean. A division by zero gives 0. `sum(w v)` runs over the weights as they
were given, before they broadcast: a scalar weight is divided by itself once. A loss without axes
is not averaged. The source is `keras.src.losses.loss.reduce_weighted_values`.

Metrics have a rule of their own, see `sample_means`.
"""

from typing import Any

import torch
from torch import Tensor

from .functional import float64_on, to_tensor

MEANS = ("sum_over_batch_size", "mean", "auto")
REDUCTIONS = (*MEANS, "sum", "mean_with_sample_weight", "none", None)


def check_reduction(reduction: str | None) -> str | None:
    if not isinstance(reduction, (str, type(None))) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def reduce(
    losses: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> Tensor:
    """The value of `losses`, whose masked entries are 0 already; the table above has the rules.

    `sample_weight` and `mask` have been through `align`; a result "none" has the losses' shape.
    """
    check_reduction(reduction)
    if sample_weight is None and mask is None and reduction in MEANS and losses.numel() > 0:
        return losses.mean()
    values, count = fraction(losses, sample_weight, mask, reduction)
    if reduction in ("none", None):
        return values
    total = values.sum()
    if not isinstance(count, Tensor):
        return total if count is None else total / count
    if reduction == "mean_with_sample_weight":
        return _ratio(total, count)
    # Where a mask adds up to 0 and yet something counts, a NaN still shows, as it does in Keras.
    return torch.where(count == 0, total * 0, _ratio(total, count))


def fraction(
    losses: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> tuple[Tensor, Tensor | int | None]:
    """What is added up, each loss times its weight, and what the sum is divided by, if at all."""
    factor = _factor(losses, sample_weight, mask, reduction)
    values = losses if factor is None else losses * factor
    if reduction in ("sum", "none", None):
        return values, None
    if reduction == "mean_with_sample_weight" and factor is not None:
        return values, None if _is_scalar(losses, sample_weight, mask) else factor.sum()
    if mask is None or reduction == "mean_with_sample_weight":
        return values, max(losses.numel(), 1)
    # Each entry of the mask stands for as many samples as it is broadcast to.
    share = losses.numel() / max(mask.numel(), 1)
    return values, mask.to(losses.dtype).sum() * share


def sample_means(
    values: Tensor, sample_weight: Tensor | None, *masks: Tensor | None
) -> tuple[Tensor, Tensor | int]:
    """What a batch adds to a metric's total and count: Keras 3 averages every sample first.

        without weights:    total = sum_b mean(v_b)       count = B
        with weights:       total = sum_b mean(w_b v_b)   count = sum_b mean(w_b)

    Weights and masks belong to the leading axes of the values: (B,) has one for each sample, (B,
    T) for each of its elements, and a scalar weight one for the batch, whose mean then counts as
    one sample. A mask is a weight, under which a zero hides even a NaN, of a value or a weight.

    The source is `keras.src.metrics.reduction_metrics.reduce_to_samplewise_values`.

    Args:
        values: (B, ...), or a single value ().
        sample_weight, masks: of shapes that broadcast to the values' leading axes; axes of size 1
            may follow.

    Returns:
        Total and count; sums in float64, in which counts stay exact up to 2^53.

    Raises:
        ValueError: a weight or a mask of another shape.

    >>> total, count = sample_means(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([2, 1]))
    >>> total.item(), count.item()
    (2.0, 3.0)
    """
    values = values.to(float64_on(values.device))
    factors = []
    if sample_weight is not None:
        factors.append(_leading("sample_weight", sample_weight, values.shape))
    for mask in masks:
        if mask is not None:
            factors.append(_leading("mask", mask, values.shape))
            values = values.masked_fill(_with_rank(factors[-1], values.ndim) == 0, 0)
    if not factors:
        return _sample_means(values).sum(), len(values) if values.ndim else 1
    rank = max(factor.ndim for factor in factors)
    factor = values.new_ones(())
    for each in factors:
        each = _with_rank(each, rank)
        factor = torch.where(each == 0, 0, factor * each.to(values.dtype))
    if values.ndim > rank:
        values = values.mean(tuple(range(rank, values.ndim)))
    factor = factor.expand(values.shape)
    return _sample_means(values * factor).sum(), _sample_means(factor).sum()


def over_leading_axes(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A weight or mask of a metric, so that it broadcasts to the values' shape.

    Raises:
        ValueError: a shape that does not fit.
    """
    return _with_rank(_leading(name, value, shape), len(shape))


def _leading(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value` so that its axes are the first of these."""
    given = tuple(value.shape)
    while value.ndim > len(shape) and value.shape[-1] == 1:
        value = value.squeeze(-1)
    pairs = zip(value.shape, shape, strict=False)
    if value.ndim > len(shape) or not all(have in (1, want) for have, want in pairs):
        raise ValueError(
            f"{name} must broadcast to the values' shape {tuple(shape)} from the first axis, as "
            f"{tuple(shape[:1])} does, got {given}"
        )
    return value


def _with_rank(x: Tensor, rank: int) -> Tensor:
    return x.reshape(x.shape + (1,) * (rank - x.ndim))


def _sample_means(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def aligned(name: str, value: Any, y_pred: Tensor, shape: torch.Size) -> Tensor | None:
    """What a caller gave as a weight or a mask, through `align` and on `y_pred`'s device."""
    return None if value is None else align(name, to_tensor(name, value, y_pred), shape)


def align(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value`, a weight or a mask, so that it broadcasts to the losses' shape and not beyond.

    Keras adds or drops a last axis of size 1 where the ranks differ by one, then broadcasts.

    Differs from Keras, which goes on where the result would be larger than the losses, or where
    a weight for each sample would meet the wrong axis: those raise a ValueError here.
    """
    rank = len(shape)
    given = tuple(value.shape)
    if value.ndim == rank + 1 and given[-1] == 1:
        value = value.squeeze(-1)
    elif value.ndim == rank - 1 and value.ndim > 0 and shape[-1] == 1:
        value = value.unsqueeze(-1)
    while value.ndim > max(rank, 1) and value.shape[0] == 1:
        value = value.squeeze(0)
    fits = value.ndim <= rank and all(
        have in (1, want)
        for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    # (B,) on (B, T) is meant per sample, but would broadcast along T if B == T.
    leads = 0 < value.ndim < rank and tuple(value.shape) == tuple(shape[: value.ndim])
    if leads and value.numel() > 1:
        index = ", ".join([":", *["None"] * (rank - value.ndim)])
        raise ValueError(
            f"{name} must broadcast to the losses' shape {tuple(shape)} from the last axis, "
            f"got {given}: for one value per sample pass {name}[{index}]"
        )
    if not fits:
        raise ValueError(f"{name} must broadcast to the losses' shape {tuple(shape)}, got {given}")
    return value


def combine_masks(mask: Tensor | None, counted: Tensor | None) -> Tensor | None:
    """One mask from the caller's (aligned) and from the labels that are not ignored."""
    if mask is None or counted is None:
        return counted if mask is None else mask
    return mask & counted if mask.dtype == torch.bool else torch.where(counted, mask.float(), 0)


def _factor(losses: Tensor, weight: Any, mask: Tensor | None, reduction: Any) -> Tensor | None:
    """What each loss is multiplied by. A plain mean counts a mask's entries as 0 or 1.

    Where the mask is 0 even an infinite weight or a NaN does not matter.
    """
    if mask is None:
        return None if weight is None else weight.to(losses.dtype)
    factor = (mask.bool() if reduction in MEANS else mask).to(losses.dtype)
    if weight is None:
        return factor
    weight = weight.to(losses.dtype)
    return factor * torch.where(factor == 0, weight.nan_to_num(0.0, 0.0, 0.0), weight)


def _is_scalar(losses: Tensor, weight: Tensor | None, mask: Tensor | None) -> bool:
    """Whether Keras's rank rule leaves a value without axes, which it does not average."""
    lowest = min(given.ndim for given in (weight, mask) if given is not None)
    return losses.ndim == 0 or (losses.ndim == 1 and losses.numel() == 1 and lowest == 0)


def _ratio(total: Tensor, divisor: Tensor) -> Tensor:
    """total / divisor, and 0 with gradient 0 where the divisor is 0."""
    is_zero = divisor == 0
    return torch.where(is_zero, 0, total / torch.where(is_zero, 1, divisor))
