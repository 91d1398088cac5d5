"""How far rounding may move an answer from the float64 one of `reference`.

The bounds follow from the operations, in units of u, half the spacing of the dtype at 1. A sum of
n terms loses at most n * u of the sum of their magnitudes, and hardly more than GROWTH * sqrt(n)
times u (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis": for
independent roundings the chance of more is below 2 exp(-GROWTH^2 / 2)). Every other operation
loses one or two u of its result; exp multiplies the loss of its argument by the argument. `SLACK`
counts the operations on the longest path from input to result.

A result below the dtype's least normal number may become 0: TensorFlow flushes it to zero, where
others keep some of its digits. What is lost then, up to `LEAST`, is multiplied by what follows:
`flushed` is that in units of u.
"""

from dataclasses import dataclass

import numpy as np

from .cases import Case, one_hot
from .reference import (
    LARGEST,
    Given,
    Losses,
    Positions,
    Reduced,
    Right,
    answer,
    at_label,
    clip_bounds,
    clipped,
    divide,
    exponentials,
    in_layout,
    losses,
    read,
    reduced,
    row_dtype,
    smoothed,
)

GROWTH = 6
SLACK = 8
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
LEAST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


@dataclass(frozen=True, kw_only=True)
class Expected(Right):
    """The right answer with its bounds. Scales are in units of u: times `UNIT[dtype]` a bound.

    The sizes are the magnitudes an error is compared with to be counted in ulps: the terms a
    result is made of, before they cancel.
    """

    value_scale: np.ndarray
    value_size: np.ndarray
    gradient_scale: np.ndarray | None = None
    gradient_size: np.ndarray | None = None
    target_gradient_scale: np.ndarray | None = None
    weight_gradient_scale: np.ndarray | None = None
    bias_gradient_scale: np.ndarray | None = None


@dataclass(frozen=True)
class RowBounds:
    """The scales and sizes of `Losses`: of losses (...), of gradients (..., C)."""

    loss: np.ndarray
    loss_size: np.ndarray
    gradient: np.ndarray
    gradient_size: np.ndarray
    after: np.ndarray | float = 1.0  # what a product with g may be multiplied by going back
    target_gradient: np.ndarray | None = None
    keep: float = 1.0  # what smoothing leaves of a target


def expected(case: Case, poisons: bool = False) -> Expected:
    """As `right`, with bounds."""
    with np.errstate(all="ignore"):
        given = read(case, poisons)
        rows = losses(case, given)
        total = reduced(case, given.positions, rows.loss)
        return bounded(case, given, rows, total, row_bounds(case, given))


def bounded(case: Case, given: Given, rows: Losses, total: Reduced, off: RowBounds) -> Expected:
    """The answer from these steps, with its bounds."""
    lost = flushed(case.loss_dtype)
    value_scale, value_size = value_bounds(given.positions, total, off, lost)
    g = np.abs(total.gradient)[..., None]
    lost_of_product = lost * (1 + off.after)
    size = np.maximum(g * off.gradient_size, lost_of_product).max(-1, keepdims=True)
    # Upstream over the divisor, that times the weight, and their products with what is the row's.
    lost_of_g = lost * (np.abs(total.factor) + 1)[..., None]
    scale = g * (SLACK * off.gradient_size + off.gradient)
    scale = scale + lost_of_g * off.gradient_size + lost_of_product
    # Infinite even if g is NaN; and where the row overflows, inf - inf may occur.
    unsure = np.isinf(off.gradient) | (size >= LARGEST.get(row_dtype(case), np.inf))
    scale, target_scale = np.where(unsure, np.inf, scale), None
    if rows.target_gradient is not None and off.target_gradient is not None:
        slope = np.abs(rows.target_gradient)
        target_scale = g * (off.target_gradient + SLACK * slope) + lost_of_g * slope + lost
        # It may overflow before it is multiplied by what smoothing leaves of a target.
        overflows = g * slope / off.keep >= LARGEST.get(row_dtype(case), np.inf)
        target_scale = np.where(overflows, np.inf, target_scale)
        target_scale = in_layout(target_scale, given, case.y_true)
    return Expected(
        **vars(answer(case, given, rows, total)),
        value_scale=value_scale,
        value_size=value_size,
        gradient_scale=in_layout(scale, given, case.y_pred),
        gradient_size=in_layout(size, given, case.y_pred),
        target_gradient_scale=target_scale,
    )


def value_bounds(
    positions: Positions, total: Reduced, off: RowBounds, lost: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and size of the value."""
    factor = np.abs(total.factor)
    sizes = np.maximum(off.loss_size * factor, lost)
    if total.divisor is None:
        scale = off.loss * factor + SLACK * np.abs(total.value) + lost
        return np.asarray(scale), np.asarray(sizes)
    terms = factor * (off.loss + (growth(factor.size) + SLACK) * np.abs(total.loss)) + lost
    weighed = positions.counts & (factor != 0)  # the scale of another may be infinite
    scale, size = (np.abs(np.where(weighed, each, 0)).sum() for each in (terms, sizes))
    divisor = abs(total.divisor)
    return np.asarray(divide(scale, divisor)), np.asarray(divide(size, divisor))


def row_bounds(case: Case, given: Given) -> RowBounds:
    """The bounds of each row by its rule."""
    rows, labels, dtype = given.rows, given.labels, case.loss_dtype
    if case.is_sparse:
        rule = _from_logits if case.options["from_logits"] else _from_probabilities
        return rule(rows, labels, dtype)
    logits = case.options["from_logits"]
    rule = _targets_from_logits if logits else _targets_from_probabilities
    return rule(rows, smoothed(labels, given.smoothing), 1 - given.smoothing, dtype)


def _from_logits(z: np.ndarray, y: np.ndarray, dtype: str) -> RowBounds:
    distance, e, s = exponentials(z)
    share, label = e / s, one_hot(y, z.shape[-1])
    sums = growth(z.shape[-1]) + SLACK
    reach = np.where(e == 0, 0, distance)
    weighted = 2 * (share * reach).sum(-1, keepdims=True)
    gap = at_label(distance, y)
    loss = (sums + weighted + 2 * np.log(s))[..., 0] + 2 * gap
    loss_size = np.maximum(np.abs(np.log(s)[..., 0] + gap), 1)
    slope = share * (2 * reach + weighted + sums)
    slope = slope + flushed(dtype)  # the exp and the share
    return RowBounds(loss, loss_size, slope + SLACK * label, share + label)


def _from_probabilities(q: np.ndarray, y: np.ndarray, dtype: str) -> RowBounds:
    c, inside = clipped(q, dtype)
    s = c.sum(-1, keepdims=True)
    label = one_hot(y, q.shape[-1])
    # Keras takes logarithms first: their rounding is relative to them, not to their differences.
    depth = np.abs(np.log(c))
    sums = growth(q.shape[-1]) + SLACK
    weighted = 2 * (c / s * depth).sum(-1, keepdims=True)
    deepest = depth.max(-1, keepdims=True)
    log_s, log_c = np.log(s), np.log(at_label(c, y))[..., None]
    logs = np.abs(log_s) - log_c
    loss = (sums + weighted + 2 * deepest + 2 * logs)[..., 0]
    loss_size = np.maximum(np.abs(log_s - log_c)[..., 0], 1)
    size = np.where(inside, 1 / s + label / c, 0)
    scale = np.where(inside, (2 * depth + 2 * deepest + weighted + sums) / s + SLACK * label / c, 0)
    return RowBounds(loss, loss_size, scale, size, np.where(inside, 1 / c, 0))


def _targets_from_logits(z: np.ndarray, t: np.ndarray, keep: float, dtype: str) -> RowBounds:
    distance, e, s = exponentials(z)
    share, nats = e / s, np.log(s) + distance
    total = np.abs(t).sum(-1, keepdims=True)
    sums = growth(z.shape[-1]) + SLACK
    reach = np.where(e == 0, 0, distance)
    weighted = 2 * (share * reach).sum(-1, keepdims=True)
    log_scale = sums + weighted + 2 * np.log(s) + 2 * distance
    loss = (np.abs(t) * (log_scale + sums * nats)).sum(-1)
    loss_size = np.maximum((np.abs(t) * nats).sum(-1), 1)
    slope = share * total * (2 * reach + weighted + 2 * np.log(s) + 2 * sums)
    slope = slope + total * flushed(dtype) + SLACK * np.abs(t)
    size = share * total + np.abs(t)
    return RowBounds(loss, loss_size, slope, size, target_gradient=keep * log_scale, keep=keep)


def _targets_from_probabilities(q: np.ndarray, t: np.ndarray, keep: float, dtype: str) -> RowBounds:
    s = q.sum(-1, keepdims=True)
    n = q / s
    c, inside = clipped(n, dtype)
    # How many u the sum, and so n, may be off, relative to itself. One term alone is exact.
    terms = (q != 0).sum(-1, keepdims=True)
    off = np.where(terms > 1, growth(q.shape[-1]) * np.abs(q).sum(-1, keepdims=True) / np.abs(s), 0)
    off = off + 2 * (terms > 1)
    depth = np.abs(np.log(c))
    log_scale = np.where(c == n, off, 0) + 2 * depth + SLACK
    sums = growth(q.shape[-1]) + SLACK
    w = np.where(inside, t / c, 0)
    size = (np.abs(w * n).sum(-1, keepdims=True) + np.abs(w)) / np.abs(s)
    unit = min(UNIT[dtype], UNIT["float32"])  # halves are computed in float32
    # Where rounding decides whether an entry is clipped, the gradient may be one or the other.
    low, high = (np.abs(n - bound) <= 2 * off * unit * bound for bound in clip_bounds(dtype))
    near = low | high
    lost = off * unit > 0.01  # nothing is left of a sum that cancels
    unsure = (near & (t != 0)).any(-1, keepdims=True) | lost
    # If all are clipped the gradient is 0, even for a g that is NaN.
    unsure |= (near | (c != n)).all(-1, keepdims=True) & near.any(-1, keepdims=True)
    loss = (np.abs(t) * (log_scale + sums * depth)).sum(-1)
    worse = np.maximum(off / sums, 1)
    loss_size = worse[..., 0] * np.maximum((np.abs(t) * depth).sum(-1), 1)
    after = np.where(inside, 1 / c, 0)
    after = (after + (after * np.abs(n) + 1).sum(-1, keepdims=True)) / np.abs(s)
    return RowBounds(
        np.where(lost[..., 0], np.inf, loss),
        loss_size,
        np.where(unsure, np.inf, size * (2 * off + sums)),
        np.where(unsure, np.inf, worse * size),
        after,
        np.where(lost, np.inf, keep * log_scale),
        keep,
    )


def flushed(dtype: str) -> float:
    """What flushing two results to zero may cost, in units of u."""
    return 2 * LEAST[dtype] / min(UNIT[dtype], UNIT["float32"])


def growth(terms: int) -> float:
    """How many u a sum of positive terms may lose, relative to itself."""
    return min(terms, GROWTH * np.sqrt(terms))
