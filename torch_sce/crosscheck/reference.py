"""The answer in float64, with bounds on what rounding may do to it.

`expected` restates the rules for one case in NumPy, independently of the loss under test: what a
right answer is where Keras and we differ on purpose, and whose error is smaller where we agree.

The bounds follow from the operations, in units of u, half the spacing of the dtype at 1. A sum of
n terms loses at most n * u of the sum of their magnitudes, and hardly more than GROWTH * sqrt(n)
times u (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis": for
independent roundings the chance of more is below 2 exp(-GROWTH^2 / 2)). Every other operation
loses a u of its result, or two; exp multiplies what its argument has lost by the argument.
`SLACK` counts the operations on the longest way from input to result.
"""

from dataclasses import dataclass

import numpy as np

from .cases import Case, to_bfloat16

GROWTH = 6
SLACK = 8
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
LEAST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


class Refused(ValueError):
    """The case is one that must raise; the text names the rule it breaks."""


@dataclass(frozen=True)
class Expected:
    """A float64 answer. The scales are in units of u: multiply by `UNIT[dtype]` for a bound.

    `value_size` and `gradient_size` are the magnitudes an error is compared with to be counted in
    ulps: the terms a result is made of, before they cancel.
    """

    value: np.ndarray
    gradient: np.ndarray
    value_scale: np.ndarray
    gradient_scale: np.ndarray
    value_size: np.ndarray
    gradient_size: np.ndarray
    dtype: str
    gradient_dtype: str


@dataclass(frozen=True)
class _Rows:
    """Per sample (..., ) and per entry (..., C): what the two row models have in common."""

    loss: np.ndarray
    loss_scale: np.ndarray
    slope: np.ndarray
    slope_scale: np.ndarray
    slope_size: np.ndarray


def expected(case: Case, poisons: bool = False) -> Expected:
    """The right answer. `poisons`: a bad label gives NaN, as on devices whose values are not read.

    Raises:
        Refused: where an error is the right answer.
    """
    with np.errstate(all="ignore"):
        return _expected(case, poisons)


def _expected(case: Case, poisons: bool) -> Expected:
    options = case.options
    reduction = options.get("reduction", "none")
    if reduction not in (None, "none", "sum", "mean", "auto", "sum_over_batch_size",
                         "mean_with_sample_weight"):  # fmt: skip
        raise Refused("reduction")
    q, dtype = _cast_predictions(case)
    y_true = case.y_true
    if case.as_lists:  # which do not say what is behind an axis of size 0
        y_true, q = np.asarray(y_true.tolist()), np.asarray(q.tolist())
    if not -q.ndim <= options["axis"] < q.ndim:
        raise Refused("axis")
    axis = options["axis"] % q.ndim
    classes = q.shape[axis]
    if classes == 0:
        raise Refused("classes")
    labels = _squeeze_labels(y_true, q, axis)
    rows = np.moveaxis(q, axis, -1)
    shape = labels.shape
    weight = _broadcastable(case.sample_weight, shape)
    mask = _broadcastable(case.mask, shape)

    counts = np.ones(shape, bool)
    if options["ignore_class"] is not None:
        counts &= labels != options["ignore_class"]
        mask = counts * (1.0 if mask is None else mask)
    if mask is not None:
        counts &= np.broadcast_to(mask != 0, shape)
    known = np.isfinite(labels) & (np.trunc(np.where(np.isfinite(labels), labels, -1)) >= 0)
    known &= labels.astype(float) < classes
    if not known[counts].all() and not poisons:
        raise Refused("labels")
    y = np.where(known & counts, np.where(known, labels, 0), 0).astype(np.int64)

    model = _from_logits if options["from_logits"] else _from_probabilities
    safe = np.where(counts[..., None], rows, 0)
    result = model(safe, y, case.loss_dtype)
    bad = counts & ~known
    return _reduce(case, result, counts, bad, weight, mask, reduction, axis, dtype)


def _cast_predictions(case: Case) -> tuple[np.ndarray, str]:
    """Predictions in the precision the loss sees them in, and the dtype of the result."""
    q, dtype = case.y_pred.astype(np.float64), case.loss_dtype
    if dtype not in UNIT:
        raise Refused("y_pred's dtype")
    if dtype == "bfloat16":
        q = to_bfloat16(q.astype(np.float32)).astype(np.float64)
    else:
        q = q.astype(dtype).astype(np.float64)
    if case.form == "function" and dtype in ("float16", "bfloat16"):
        dtype = "float32"
    return q, dtype


def _squeeze_labels(y_true: np.ndarray, q: np.ndarray, axis: int) -> np.ndarray:
    if q.ndim > 1 and y_true.ndim == q.ndim + 1 and y_true.shape[-1] == 1:
        y_true = y_true[..., 0]
    if y_true.ndim == q.ndim:
        for candidate in (axis, -1):
            if y_true.shape[candidate] == 1:
                y_true = y_true.squeeze(candidate)
                break
    if y_true.shape != q.shape[:axis] + q.shape[axis + 1 :]:
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
    ambiguous = value.ndim < len(shape) and value.shape == shape[: value.ndim] and value.size > 1
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if ambiguous or not fits:
        raise Refused("weight along the wrong axis" if ambiguous else "shape of a weight")
    return value


def _from_logits(z: np.ndarray, y: np.ndarray, dtype: str) -> _Rows:
    m = z.max(-1, keepdims=True)
    distance = np.where(np.isnan(z - m), np.nan, m - z)
    e = np.exp(-distance)
    s = e.sum(-1, keepdims=True)
    share = e / s
    label = np.eye(z.shape[-1])[y]
    gap = np.take_along_axis(distance, y[..., None], -1)
    loss = (np.log(s) + gap)[..., 0]
    reach = np.where(e == 0, 0, distance)
    sums = growth(z.shape[-1]) + SLACK
    weighted = 2 * (share * reach).sum(-1, keepdims=True)
    loss_scale = (sums + weighted + 2 * np.log(s) + 2 * gap)[..., 0]
    slope_scale = share * (2 * reach + weighted + sums)
    slope_scale = slope_scale + 2 * LEAST[dtype] / UNIT[dtype]  # exp may flush its result to zero
    return _Rows(loss, loss_scale, share - label, slope_scale + SLACK * label, share + label)


def _from_probabilities(q: np.ndarray, y: np.ndarray, dtype: str) -> _Rows:
    low, high = (_rounded(bound, dtype) for bound in (1e-7, 1 - 1e-7))
    c = np.minimum(np.maximum(q, low), high)  # both let NaN through
    inside = (low <= q) & (q <= high)
    s = c.sum(-1, keepdims=True)
    label = np.eye(q.shape[-1])[y]
    at_label = np.take_along_axis(c, y[..., None], -1)
    loss = (np.log(s) - np.log(at_label))[..., 0]
    # Keras takes logarithms first: their rounding is relative to them, not to their differences.
    depth = np.abs(np.log(c))
    sums = growth(q.shape[-1]) + SLACK
    weighted = 2 * (c / s * depth).sum(-1, keepdims=True)
    deepest = depth.max(-1, keepdims=True)
    logs = np.abs(np.log(s)) - np.log(at_label)
    loss_scale = (sums + weighted + 2 * deepest + 2 * logs)[..., 0]
    slope = np.where(inside, 1 / s - label / c, 0)
    size = np.where(inside, 1 / s + label / c, 0)
    slope = np.where(np.isnan(s) & inside, np.nan, slope)
    scale = np.where(inside, (2 * depth + 2 * deepest + weighted + sums) / s + SLACK * label / c, 0)
    return _Rows(loss, loss_scale, slope, scale, size)


def _rounded(value: float, dtype: str) -> float:
    if dtype == "bfloat16":
        return float(to_bfloat16(np.array(value, np.float32)))
    return float(np.dtype(dtype).type(value))


def _reduce(case, rows, counts, bad, weight, mask, reduction, axis, dtype) -> Expected:
    shape = counts.shape
    wide = "float64" if dtype == "float64" else "float32"  # an overflow is part of the answer
    loss = overflowed(np.where(counts, np.where(bad, np.nan, rows.loss), 0), wide)
    factor = _factor(weight, mask, reduction)
    each = np.broadcast_to(factor, shape) if np.ndim(factor) else np.full(shape, factor)
    n = max(loss.size, 1)
    if reduction in (None, "none"):
        divisor, upstream = 1.0, case.upstream[: loss.size].reshape(shape).astype(np.float64)
        value = loss * each
        scale = rows.loss_scale * np.abs(each) + SLACK * np.abs(value)
        size = np.maximum(np.abs(loss), 1) * np.abs(each)
    else:
        divisor = _divisor(loss, weight, mask, factor, reduction)
        upstream = case.upstream[:1].item()
        total = overflowed((loss * each).sum(), wide)
        value = _divide(total, divisor)
        if divisor == 0 and reduction != "mean_with_sample_weight":
            value = total * 0  # Keras multiplies by the mask's weight, 0: a NaN stays one
        terms = np.abs(each) * (rows.loss_scale + (growth(n) + SLACK) * np.abs(loss))
        scale = _divide(np.abs(np.where(counts, terms, 0)).sum(), abs(divisor))
        size = _divide((np.maximum(np.abs(loss), 1) * np.abs(each) * counts).sum(), abs(divisor))
    g = _divide(upstream * each, divisor)
    g = np.where(bad, np.nan, g)[..., None]
    on = counts[..., None]
    gradient = np.where(on, g * rows.slope, 0)
    if not case.options["from_logits"]:
        gradient = np.where(rows.slope_size == 0, 0, gradient)  # a clipped entry, whatever g is
    relative = SLACK * rows.slope_size + rows.slope_scale
    arrays = [gradient, np.where(on, np.abs(g) * relative, 0)]
    row_size = (np.abs(g) * rows.slope_size).max(-1, keepdims=True)
    arrays.append(np.where(on, np.broadcast_to(row_size, gradient.shape), 0))
    arrays = [np.moveaxis(array, -1, axis).reshape(case.y_pred.shape) for array in arrays]
    return Expected(
        np.asarray(value), arrays[0], np.asarray(scale), arrays[1], np.asarray(size), arrays[2],
        dtype, case.y_pred_dtype,
    )  # fmt: skip


def overflowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` with infinities where `dtype` has no such number."""
    largest = {"float16": 65520, "bfloat16": 3.39615e38, "float32": 3.4028235677973366e38}
    too_large = (np.abs(array) >= largest.get(dtype, np.inf)) & np.isfinite(array)
    return np.where(too_large, np.copysign(np.inf, array), array)


def growth(terms: int) -> float:
    """How many u a sum of positive terms may lose, relative to itself."""
    return min(terms, GROWTH * np.sqrt(terms))


def _factor(weight, mask, reduction):
    if mask is not None and reduction in ("mean", "auto", "sum_over_batch_size"):
        mask = (mask != 0).astype(float)
    given = [part for part in (weight, mask) if part is not None]
    return np.prod(np.broadcast_arrays(*given), axis=0) if given else 1.0


def _divisor(loss, weight, mask, factor, reduction) -> float:
    given = [part.ndim for part in (weight, mask) if part is not None]
    if reduction == "sum" or (loss.ndim == 0 and (mask is None or "weight" in reduction)):
        return 1.0
    if reduction == "mean_with_sample_weight" and given:
        unreduced = loss.shape == (1,) and 0 in given
        return 1.0 if unreduced else float(np.sum(factor))
    if mask is None:
        return float(loss.size)
    return float(mask.sum()) * loss.size / max(mask.size, 1)


def _divide(a, b):
    return a / b if b != 0 else np.zeros_like(a)
