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
"""

from typing import Any

import torch
from torch import Tensor

MEANS = ("sum_over_batch_size", "mean", "auto")
REDUCTIONS = (*MEANS, "sum", "mean_with_sample_weight", "none", None)


def check_reduction(reduction: str | None) -> str | None:
    if not isinstance(reduction, str | None) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def reduce(
    losses: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> Tensor:
    """The value of `losses`, whose masked entries are 0 already; the table above has the rules.

    `sample_weight` and `mask` have been through `align`; a result "none" has the losses' shape.
    """
    check_reduction(reduction)
    factor = _factor(losses, sample_weight, mask, reduction)
    if factor is None and reduction in MEANS and losses.numel() > 0:
        return losses.mean()
    values = losses if factor is None else losses * factor
    if reduction in ("none", None):
        return values
    total = values.sum()
    if reduction == "mean_with_sample_weight" and factor is not None:
        return total if _is_scalar(losses, sample_weight, mask) else _ratio(total, factor.sum())
    if reduction == "sum":
        return total
    if mask is None or reduction == "mean_with_sample_weight":
        return total / max(losses.numel(), 1)
    # Each entry of the mask stands for as many samples as it is broadcast to.
    share = losses.numel() / max(mask.numel(), 1)
    count = mask.to(losses.dtype).sum() * share
    # Where nothing counts, a NaN weight still shows, as it does in Keras.
    return torch.where(count == 0, total * 0, _ratio(total, count))


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
    return mask & counted if mask.dtype == torch.bool else mask.float() * counted


def _factor(losses: Tensor, weight: Any, mask: Tensor | None, reduction: Any) -> Tensor | None:
    """What each loss is multiplied by. A plain mean counts a mask's entries as 0 or 1."""
    if mask is None:
        return None if weight is None else weight.to(losses.dtype)
    factor = (mask.bool() if reduction in MEANS else mask).to(losses.dtype)
    return factor if weight is None else factor * weight.to(losses.dtype)


def _is_scalar(losses: Tensor, weight: Tensor | None, mask: Tensor | None) -> bool:
    """Whether Keras's rank rule leaves a value without axes, which it does not average."""
    lowest = min(given.ndim for given in (weight, mask) if given is not None)
    return losses.ndim == 0 or (losses.ndim == 1 and losses.numel() == 1 and lowest == 0)


def _ratio(total: Tensor, divisor: Tensor) -> Tensor:
    """total / divisor, and 0 with gradient 0 where the divisor is 0."""
    is_zero = divisor == 0
    return torch.where(is_zero, 0, total / torch.where(is_zero, 1, divisor))
