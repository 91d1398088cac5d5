"""Weights, masks and averages: from one loss for each position to the value that is returned.

With losses l, weights w (1 if none are given) and a mask v (1 where a position counts):

    "none", None              w l v
    "sum"                     sum(w l v)
    "sum_over_batch_size"     sum(w l v) / (number of positions that count)
    "mean"                    the same
    "auto"                    the same; Keras 2's name for its default
    "mean_with_sample_weight" sum(w l v) / sum(w v)

Losses (B, T) have B * T positions, and the weights are not in the denominator of a plain mean. A
division by zero gives 0. `sum(w v)` is the sum of the weights as they were given, before
they broadcast: a scalar weight is divided by itself once. A loss without axes is not averaged. The
source is `keras.src.losses.loss.reduce_weighted_values`.

Metrics have their own rule, see `example_means`.
"""

from typing import Any

import torch
from torch import Tensor

from .arrays import float64_on
from .options import MEANS


def reduce(
    losses: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    reduction: str | None,
    denominator: Tensor | None = None,
) -> Tensor:
    """The reduced value of `losses`, which are already 0 where the mask is 0; see the table above.

    `sample_weight` and `mask` broadcast to the losses' shape, the shape of the result for "none".
    `denominator` takes the place of a mean's own.
    """
    if denominator is not None:
        return ratio(weighted(losses, sample_weight, mask, reduction).sum(), denominator)
    if sample_weight is None and mask is None and reduction in MEANS and losses.numel() > 0:
        return losses.mean()
    if reduction in ("none", None):
        return weighted(losses, sample_weight, mask, reduction)
    if reduction == "sum" or (mask is None and reduction in MEANS):  # divided by a number
        divisor = divisor_of(losses.numel(), reduction)
        return weighted(losses, sample_weight, mask, reduction).sum() / divisor
    parts = numerator_and_denominator(losses, sample_weight, mask, reduction)
    return quotient(*parts, reduction)


def divisor_of(number: int, reduction: str | None) -> int:
    """The number that the sum of the losses of so many positions is divided by.

    Weights are not in it: with "mean_with_sample_weight" it is that of losses without them.
    """
    return 1 if reduction == "sum" else max(number, 1)


def counts_positions(mask: Tensor | None, reduction: str | None) -> bool:
    """Whether a mask only says which positions count, and how many they are."""
    return mask is None or (mask.dtype == torch.bool and reduction != "mean_with_sample_weight")


def weighted(
    losses: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> Tensor:
    """Each loss times its weight: the terms of the sum."""
    factor = _factor(losses, sample_weight, mask, reduction)
    return losses if factor is None else losses * factor


def numerator_and_denominator(
    losses: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> tuple[Tensor, Tensor]:
    """The numerator and denominator of a mean or a sum, two scalars; that of a sum is 1."""
    factor = _factor(losses, sample_weight, mask, reduction)
    total = (losses if factor is None else losses * factor).sum()
    count = _denominator(losses, factor, sample_weight, mask, reduction)
    return total, count if isinstance(count, Tensor) else torch.full_like(total, count)


def divisor_and_factor(
    losses: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    reduction: str | None,
    number: int,
) -> tuple[float, Tensor | None]:
    """What the sum of the losses is divided by, and what each is multiplied by, None for 1.

    Of `losses` only shape and dtype are read; `number` of them count, the others are 0. Weights
    and masks are constants that can be read.
    """
    factor = None
    if sample_weight is not None or reduction not in MEANS:
        factor = _factor(losses, sample_weight, mask, reduction)
    if reduction in MEANS and counts_positions(mask, reduction):
        divisor = number
    else:
        divisor = _denominator(losses, factor, sample_weight, mask, reduction)
    if factor is not None and factor.shape != losses.shape:
        factor = factor.expand(losses.shape)
    return float(divisor), factor


def _denominator(
    losses: Tensor,
    factor: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    reduction: str | None,
) -> Tensor | int:
    if reduction in MEANS and mask is not None:
        return mask_sum(losses, mask)
    if reduction == "mean_with_sample_weight" and factor is not None:
        return 1 if is_scalar(losses, sample_weight, mask) else factor.sum()
    return 1 if reduction == "sum" else losses.numel()


def mask_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """The sum of a mask: each entry counts once for each position it is broadcast to."""
    return mask.to(losses.dtype).sum() * (losses.numel() / max(mask.numel(), 1))


def factors(
    losses: Tensor,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    reduction: str | None,
    denominator: Tensor | None = None,
) -> Tensor:
    """The derivative of the reduced value with respect to each loss, of the losses' shape."""
    factor = _factor(losses, sample_weight, mask, reduction)
    factor = losses.new_ones(()) if factor is None else factor
    if denominator is None:
        denominator = numerator_and_denominator(losses, sample_weight, mask, reduction)[1]
    return ratio(factor, denominator.to(losses.dtype)).expand(losses.shape)


def example_means(
    values: Tensor, sample_weight: Tensor | None, *masks: Tensor | None
) -> tuple[Tensor, Tensor | int]:
    """What a batch adds to a metric's total and count: Keras 3 averages every example first.

        without weights:    total = sum_b mean(v_b)       count = B
        with weights:       total = sum_b mean(w_b v_b)   count = sum_b mean(w_b)

    Weights and masks belong to the leading axes of the values: (B,) has one for each example, (B,
    T) for each of its elements, and a scalar weight one for the batch, whose mean then counts as
    one example. A mask acts as a weight, and where it is 0 even a NaN is ignored.

    The source is `keras.src.metrics.reduction_metrics.reduce_to_samplewise_values`.

    Args:
        values: (B, ...), or a single value ().
        sample_weight, masks: of shapes that broadcast to the values' leading axes, see
            `samples.leading`.

    Returns:
        Total and count; sums in float64, in which counts stay exact up to 2^53.

    >>> total, count = example_means(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([2, 1]))
    >>> total.item(), count.item()
    (2.0, 3.0)
    """
    values, factor = weighed(values, sample_weight, *masks)
    if factor is None:
        return _example_means(values).sum(), len(values) if values.ndim else 1
    return _example_means(values * factor).sum(), _example_means(factor).sum()


def weighed(
    values: Tensor, sample_weight: Tensor | None, *masks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The values in float64, 0 where a mask is, and their factors, None for 1.

    Values are averaged over the axes that no weight or mask has; so both have the same shape.
    """
    values = values.to(float64_on(values.device))
    factors = [each for each in (sample_weight, *masks) if each is not None]
    for mask in masks:
        if mask is not None:
            values = values.masked_fill(_with_rank(mask, values.ndim) == 0, 0)
    if not factors:
        return values, None
    rank = max(factor.ndim for factor in factors)
    factor = values.new_ones(())
    for each in factors:
        each = _with_rank(each, rank)
        factor = torch.where(each == 0, 0, factor * each.to(values.dtype))
    if values.ndim > rank:
        values = values.mean(tuple(range(rank, values.ndim)))
    return values, factor.expand(values.shape)


def _with_rank(x: Tensor, rank: int) -> Tensor:
    return x.reshape(x.shape + (1,) * (rank - x.ndim))


def _example_means(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _factor(losses: Tensor, weight: Any, mask: Tensor | None, reduction: Any) -> Tensor | None:
    """The factor of each loss. A plain mean counts a mask's entries as 0 or 1.

    Where the mask is 0 the factor is 0, even for an infinite or NaN weight.
    """
    weight = None if weight is None else weight.to(losses.dtype)
    if mask is None:
        return weight
    if weight is None:
        return (mask.bool() if reduction in MEANS else mask).to(losses.dtype)
    if _is_binary(mask, reduction):
        return torch.where(mask.bool(), weight, 0)
    factor = mask.to(losses.dtype)
    return factor * torch.where(factor == 0, weight.nan_to_num(0.0, 0.0, 0.0), weight)


def _is_binary(mask: Tensor, reduction: str | None) -> bool:
    return mask.dtype == torch.bool or reduction in MEANS


def is_scalar(losses: Tensor, weight: Tensor | None, mask: Tensor | None) -> bool:
    """Whether Keras's rank rule leaves a value without axes, which it does not average."""
    lowest = min(given.ndim for given in (weight, mask) if given is not None)
    return losses.ndim == 0 or (losses.ndim == 1 and losses.numel() == 1 and lowest == 0)


def quotient(total: Tensor, count: Tensor, reduction: str | None) -> Tensor:
    """The mean, from its numerator and denominator."""
    mean = ratio(total, count)
    # If the mask sums to 0 and yet something counts, a NaN stays NaN, as in Keras.
    return torch.where(count == 0, total * 0, mean) if reduction in MEANS else mean


def ratio(total: Tensor, divisor: Tensor) -> Tensor:
    """total / divisor, and 0 with gradient 0 where the divisor is 0."""
    is_zero = divisor == 0
    return torch.where(is_zero, 0, total / torch.where(is_zero, 1, divisor))
