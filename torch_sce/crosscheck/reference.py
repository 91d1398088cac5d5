"""The rules of tf.keras's crossentropies in float64, for all positions at once.

`right` is the answer to one case: a value and its gradients. It is written from Keras's
documentation and its measured behaviour, and shares no code with the loss
under test. It says what is right where Keras and we differ on purpose, and whose error is smaller
where we agree. `bounds` says how far rounding may move another answer from it.

    read      labels, targets, weights and masks in the losses' shape, or what must raise
    losses    the loss of each row, and its gradient
    reduced   the value made of the losses, and its gradient with respect to each

(...) is the losses' shape, one entry for each position; C is the number of classes; z are logits,
q probabilities, y labels, t targets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case, one_hot, to_bfloat16

EPSILON = 1e-7  # keras.config.epsilon()
HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64")
LARGEST = {"float16": 65520, "bfloat16": 3.39615e38, "float32": 3.4028235677973366e38}
UNREDUCED = (None, "none")
MEANS = ("mean", "auto", "sum_over_batch_size")
REDUCTIONS = (*UNREDUCED, *MEANS, "sum", "mean_with_sample_weight")

# The rule for a weight or a mask: given it and the losses' shape, None or what broadcasts to that.
Broadcastable = Callable[[Any, tuple[int, ...]], np.ndarray | None]


class Refused(ValueError):
    """The case is one that must raise; the text names the rule it breaks."""


@dataclass(frozen=True, kw_only=True)
class Right:
    """A value and its gradients in the layouts of y_pred and y_true, and the dtypes they have."""

    value: np.ndarray
    dtype: str
    gradient: np.ndarray | None = None
    gradient_dtype: str = ""
    target_gradient: np.ndarray | None = None
    target_gradient_dtype: str = ""
    weight_gradient: np.ndarray | None = None  # of a head
    weight_gradient_dtype: str = ""
    bias_gradient: np.ndarray | None = None
    bias_gradient_dtype: str = ""


@dataclass(frozen=True)
class Positions:
    """Which positions count, and what their losses are multiplied by."""

    counts: np.ndarray  # (...)
    bad: np.ndarray  # (...), their labels are outside [0, C)
    weight: np.ndarray | None  # broadcasts to (...)
    mask: np.ndarray | None  # as the weight; where a label is ignored it is 0


@dataclass(frozen=True)
class Given:
    """A case as the rules read it."""

    rows: np.ndarray  # (..., C), in the loss's precision
    labels: np.ndarray  # (...) classes, or (..., C) targets
    axis: int  # of the classes in y_pred, not negative
    positions: Positions
    smoothing: float = 0.0


@dataclass(frozen=True)
class Losses:
    """The loss of each row, (...), and its gradients, (..., C)."""

    loss: np.ndarray
    gradient: np.ndarray
    clipped: np.ndarray | bool = False  # entries that get no gradient, even if the upstream is NaN
    target_gradient: np.ndarray | None = None


@dataclass(frozen=True)
class Reduced:
    """The value, what it is made of, and its gradient with respect to each loss."""

    value: np.ndarray
    loss: np.ndarray  # (...), 0 where nothing counts
    factor: np.ndarray  # (...), weight and mask
    divisor: float | None  # None: the losses are not reduced
    gradient: np.ndarray  # (...), times the upstream gradient


def right(case: Case, poisons: bool = False) -> Right:
    """The right answer. `poisons`: a bad label gives NaN, as on devices whose values are not read.

    Raises:
        Refused: where an error is the right answer.
    """
    with np.errstate(all="ignore"):
        given = read(case, poisons)
        rows = losses(case, given)
        return answer(case, given, rows, reduced(case, given.positions, rows.loss))


def read(case: Case, poisons: bool = False) -> Given:
    """The case in the shapes of the rules.

    Raises:
        Refused: where an error is the right answer.
    """
    if case.options.get("reduction", "none") not in REDUCTIONS:
        raise Refused("reduction")
    if case.loss_dtype not in FLOATS:
        raise Refused("y_pred's dtype")
    y_true, q = case.y_true, cast(case.y_pred, case.loss_dtype)
    if case.as_lists:  # lists do not say what follows an axis of size 0
        y_true, q = np.asarray(y_true.tolist()), np.asarray(q.tolist())
    if not case.is_sparse:
        return _read_targets(case, y_true, q)
    axis = class_axis(case, q.shape)
    y, positions = read_labels(case, y_true, q.shape, poisons)
    return Given(shown(rows_of(q, axis), positions), y, axis, positions)


def cast(q: np.ndarray, dtype: str) -> np.ndarray:
    """Predictions in the precision the loss sees them in."""
    if dtype in HALVES:  # by way of float32, as PyTorch casts
        q = q.astype(np.float32)
    return (to_bfloat16(q) if dtype == "bfloat16" else q.astype(dtype)).astype(np.float64)


def read_labels(
    case: Case, y_true: np.ndarray, shape: tuple[int, ...], poisons: bool = False
) -> tuple[np.ndarray, Positions]:
    """The class of each position, (...), for predictions of this shape."""
    axis = class_axis(case, shape)
    labels = _squeezed(y_true, shape, axis)
    return located(case, labels, shape[axis], _broadcastable, poisons)


def located(
    case: Case, labels: np.ndarray, classes: int, broadcastable: Broadcastable, poisons: bool
) -> tuple[np.ndarray, Positions]:
    """The class of each position, (...), from labels (...), and which positions count."""
    weight = broadcastable(case.sample_weight, labels.shape)
    mask = broadcastable(case.mask, labels.shape)
    counts = np.ones(labels.shape, bool)
    ignored = case.options["ignore_class"]
    if ignored is not None:
        # NumPy would round the class to the labels' dtype.
        exact = labels.astype(np.float64) if labels.dtype.kind == "f" else labels
        counts &= exact != ignored
        mask = counts * (1.0 if mask is None else mask)
    if mask is not None:
        counts &= np.broadcast_to(mask != 0, labels.shape)
    whole = np.trunc(labels.astype(float))
    known = (whole >= 0) & (whole < classes)
    if not known[counts].all() and not poisons:
        raise Refused("labels")
    y = np.where(known & counts, labels, 0).astype(np.int64)
    return y, Positions(counts, counts & ~known, weight, mask)


def _read_targets(case: Case, t: np.ndarray, q: np.ndarray) -> Given:
    if case.form == "class" and abs(t.ndim - q.ndim) == 1:
        t, q = matched(t, q), matched(q, t)
    return located_targets(case, t, q, _broadcastable)


def located_targets(
    case: Case, t: np.ndarray, q: np.ndarray, broadcastable: Broadcastable
) -> Given:
    """A target for each class, of the same rank as predictions."""
    t = t.astype(row_dtype(case)).astype(np.float64)
    axis = class_axis(case, q.shape)
    if t.shape != q.shape:
        raise Refused("shape of y_true")
    smoothing = case.options["label_smoothing"] or 0
    if not 0 <= smoothing <= 1:
        raise Refused("label_smoothing")
    rows, targets = rows_of(q, axis), rows_of(t, axis)
    shape = rows.shape[:-1]
    weight, mask = broadcastable(case.sample_weight, shape), broadcastable(case.mask, shape)
    counts = np.ones(shape, bool) if mask is None else np.broadcast_to(mask != 0, shape)
    positions = Positions(counts, np.zeros(shape, bool), weight, mask)
    targets = np.where(counts[..., None], targets, 0)
    return Given(shown(rows, positions), targets, axis, positions, smoothing)


def shown(rows: np.ndarray, positions: Positions) -> np.ndarray:
    """The rows, with other numbers where nothing counts, since those may be anything."""
    return np.where(positions.counts[..., None], rows, 1)


def row_dtype(case: Case) -> str:
    """The dtype rows are computed in."""
    return "float64" if case.loss_dtype == "float64" else "float32"


def matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a` with as many axes as `b`, if the one that has more has a last axis of size 1."""
    if a.ndim > b.ndim != 1 and a.shape[-1] == 1:
        return a[..., 0]
    return a[..., None] if b.ndim > a.ndim == 1 and b.shape[-1] == 1 else a


def class_axis(case: Case, shape: tuple[int, ...]) -> int:
    axis = case.options["axis"]
    if not -len(shape) <= axis < len(shape):
        raise Refused("axis")
    if shape[axis] == 0:
        raise Refused("classes")
    return axis % len(shape)


def rows_of(array: np.ndarray, axis: int) -> np.ndarray:
    """The class axis last and contiguous: along another one NumPy adds up one by one."""
    return np.ascontiguousarray(np.moveaxis(array, axis, -1))


def _squeezed(y_true: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    if len(shape) > 1 and y_true.ndim == len(shape) + 1 and y_true.shape[-1] == 1:
        y_true = y_true[..., 0]
    if y_true.ndim == len(shape):
        for candidate in (axis, -1):
            if y_true.shape[candidate] == 1:
                y_true = y_true.squeeze(candidate)
                break
    if y_true.shape != shape[:axis] + shape[axis + 1 :]:
        raise Refused("shape of y_true")
    return y_true


def _broadcastable(value, shape: tuple[int, ...]) -> np.ndarray | None:
    """A weight or a mask, of a rank that broadcasts to `shape` as it is."""
    if value is None:
        return None
    value = np.asarray(value, dtype=np.float64)
    if value.ndim == len(shape) + 1 and value.shape[-1] == 1:
        value = value[..., 0]
    elif 0 < value.ndim == len(shape) - 1 and shape[-1] == 1:
        value = value[..., None]
    while value.ndim > max(len(shape), 1) and value.shape[0] == 1:
        value = value[0]
    return broadcasting(value, shape)


def broadcasting(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The value, if it broadcasts to `shape` and along the axes that were meant."""
    ambiguous = value.ndim < len(shape) and value.shape == shape[: value.ndim] and value.size > 1
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if ambiguous or not fits:
        raise Refused("weight along the wrong axis" if ambiguous else "shape of a weight")
    return value


def losses(case: Case, given: Given) -> Losses:
    """The loss of each row by its rule: for labels or targets, from logits or probabilities."""
    rows, labels, dtype = given.rows, given.labels, case.loss_dtype
    if case.is_sparse and case.options["from_logits"]:
        return from_logits(rows, labels)
    if case.is_sparse:
        return from_probabilities(rows, labels, dtype)
    if case.options["from_logits"]:
        return targets_from_logits(rows, labels, given.smoothing)
    return targets_from_probabilities(rows, labels, given.smoothing, dtype)


def from_logits(z: np.ndarray, y: np.ndarray) -> Losses:
    """For integer labels, of logits:

    loss = log(sum_j exp z_j) - z_y
    d loss / d z_j = softmax(z)_j - [j = y]
    """
    distance, e, s = exponentials(z)
    return Losses(at_label(np.log(s) + distance, y), e / s - one_hot(y, z.shape[-1]))


def from_probabilities(q: np.ndarray, y: np.ndarray, dtype: str = "float32") -> Losses:
    """For integer labels, of probabilities, which need not sum to 1:

    c = clip(q, epsilon, 1 - epsilon)
    loss = log(sum_j c_j) - log c_y
    d loss / d q_j = 1 / sum_k c_k - [j = y] / c_j, and 0 where q_j is clipped
    """
    c, inside = clipped(q, dtype)
    s = c.sum(-1, keepdims=True)
    loss = np.log(s)[..., 0] - np.log(at_label(c, y))
    slope = np.where(inside, 1 / s - one_hot(y, q.shape[-1]) / c, 0)
    return Losses(loss, slope, ~inside)


def targets_from_logits(z: np.ndarray, t: np.ndarray, smoothing: float = 0.0) -> Losses:
    """For targets, of logits:

    t' = t (1 - smoothing) + smoothing / C
    loss = -sum_j t'_j log softmax(z)_j
    d loss / d z_j = softmax(z)_j sum_k t'_k - t'_j
    """
    t = smoothed(t, smoothing)
    distance, e, s = exponentials(z)
    nats = np.log(s) + distance  # -log softmax(z)
    slope = t.sum(-1, keepdims=True) * (e / s) - t
    return Losses((t * nats).sum(-1), slope, target_gradient=(1 - smoothing) * nats)


def targets_from_probabilities(
    q: np.ndarray, t: np.ndarray, smoothing: float = 0.0, dtype: str = "float32"
) -> Losses:
    """For targets, of probabilities, which are divided by their sum:

    n = q / sum_j q_j, c = clip(n, epsilon, 1 - epsilon)
    loss = -sum_j t'_j log c_j
    d loss / d n_j = -w_j = -t'_j / c_j, and 0 where n_j is clipped
    d loss / d q_j = (sum_k w_k n_k - w_j) / sum_k q_k
    """
    t = smoothed(t, smoothing)
    s = q.sum(-1, keepdims=True)
    n = q / s
    c, inside = clipped(n, dtype)
    w = np.where(inside, t / c, 0)
    slope = ((w * n).sum(-1, keepdims=True) - w) / s
    low, high = clip_bounds(dtype)
    all_clipped = ((n < low) | (n > high)).all(-1, keepdims=True)  # a NaN is not
    nats = -np.log(c)
    return Losses((t * nats).sum(-1), slope, all_clipped, (1 - smoothing) * nats)


def exponentials(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m - z, exp(z - m) and its sum over the classes, for the maximum m of each row."""
    distance = z.max(-1, keepdims=True) - z
    e = np.exp(-distance)
    return distance, e, e.sum(-1, keepdims=True)


def clipped(q: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The entries clipped, and which are within the bounds and keep their gradient."""
    low, high = clip_bounds(dtype)
    return np.minimum(np.maximum(q, low), high), (low <= q) & (q <= high)  # NaN stays NaN


def clip_bounds(dtype: str) -> tuple[float, float]:
    """Epsilon and 1 - epsilon, rounded to the dtype."""
    bounds = np.array([EPSILON, 1 - EPSILON])
    low, high = to_bfloat16(bounds) if dtype == "bfloat16" else bounds.astype(dtype)
    return float(low), float(high)


def smoothed(t: np.ndarray, smoothing: float) -> np.ndarray:
    return t * (1 - smoothing) + smoothing / t.shape[-1]


def at_label(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(...), the entry of each row at its label."""
    return np.take_along_axis(rows, y[..., None], -1)[..., 0]


def reduced(case: Case, positions: Positions, loss: np.ndarray) -> Reduced:
    """The value made of the losses (...), and its gradient with respect to each.

    value = sum(loss * weight) / divisor
    """
    reduction, wide = case.options.get("reduction", "none"), row_dtype(case)
    loss = np.where(positions.counts, np.where(positions.bad, np.nan, loss), 0)
    loss = overflowed(loss, wide)  # which is part of the answer
    weights = _weights(positions, reduction)
    factor = np.broadcast_to(weights, loss.shape)
    if reduction in UNREDUCED:
        divisor, value = None, loss * factor
        g = case.upstream[: loss.size].reshape(loss.shape).astype(np.float64) * factor
    else:
        divisor = _divisor(loss, positions, weights, reduction)
        total = overflowed((loss * factor).sum(), wide)
        value = divide(total, divisor)
        if divisor == 0 and reduction != "mean_with_sample_weight":
            value = total * 0  # Keras multiplies by the mask's weight, 0: NaN stays NaN
        g = divide(case.upstream[:1].item() * factor, divisor)
    if wide == "float32":
        # float32 cannot hold these; and 0 times an infinite slope is NaN.
        g = np.where(np.abs(g) < 2.0**-150, 0, g)
    return Reduced(value, loss, factor, divisor, np.where(positions.bad, np.nan, g))


def _weights(positions: Positions, reduction) -> np.ndarray:
    """Weights times mask, broadcast to each other. Means count a mask's entries as 0 or 1."""
    weight, mask = positions.weight, positions.mask
    if mask is not None and reduction in MEANS:
        mask = (mask != 0).astype(float)
    given = [part for part in (weight, mask) if part is not None]
    product = np.prod(np.broadcast_arrays(*given), axis=0) if given else np.ones(())
    return product if mask is None else np.where(mask != 0, product, 0)  # even of a NaN


def _divisor(loss: np.ndarray, positions: Positions, weights: np.ndarray, reduction) -> float:
    """What the sum is divided by: a number of positions, or their weights."""
    mask = positions.mask
    given = [part.ndim for part in (positions.weight, mask) if part is not None]
    if reduction == "sum" or (loss.ndim == 0 and (mask is None or "weight" in reduction)):
        return 1.0
    if reduction == "mean_with_sample_weight" and given:
        unreduced = loss.shape == (1,) and 0 in given
        return 1.0 if unreduced else float(np.sum(weights))
    if mask is None:
        return float(loss.size)
    return float(mask.sum()) * loss.size / max(mask.size, 1)


def divide(a, b: float):
    """a / b, and 0 where b is 0."""
    return a / b if b != 0 else np.zeros_like(a)


def overflowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` with infinities where `dtype` has no such number."""
    too_large = (np.abs(array) >= LARGEST.get(dtype, np.inf)) & np.isfinite(array)
    return np.where(too_large, np.copysign(np.inf, array), array)


def answer(case: Case, given: Given, rows: Losses, total: Reduced) -> Right:
    """The value and, by the chain rule, its gradients in the layout of what was given."""
    g = total.gradient[..., None]
    gradient = np.where(rows.clipped, 0, g * rows.gradient)
    halved = case.form == "function" and case.loss_dtype in HALVES
    found = {
        "value": np.asarray(total.value),
        "dtype": "float32" if halved else case.loss_dtype,
        "gradient": in_layout(gradient, given, case.y_pred),
        "gradient_dtype": case.y_pred_dtype,
    }
    if rows.target_gradient is not None:
        found["target_gradient"] = in_layout(g * rows.target_gradient, given, case.y_true)
        found["target_gradient_dtype"] = case.y_true.dtype.name
    return Right(**found)


def in_layout(array: np.ndarray, given: Given, like: np.ndarray) -> np.ndarray:
    """(..., C) or (..., 1) in the layout of `like`, 0 where nothing counts."""
    array = np.broadcast_to(array, given.rows.shape)
    array = np.where(given.positions.counts[..., None], array, 0)
    return np.moveaxis(array, -1, given.axis).reshape(like.shape)
