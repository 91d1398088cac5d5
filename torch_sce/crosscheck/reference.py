"""The answer in float64, with bounds on what rounding may do to it.

`expected` restates the rules for one case in NumPy, independently of the loss under test: what a
right answer is where Keras and we differ on purpose, and whose error is smaller where we agree.

The bounds follow from the operations, in units of u, half the spacing of the dtype at 1. A sum of
n terms loses at most n * u of the sum of their magnitudes, and hardly more than GROWTH * sqrt(n)
times u (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis": for
independent roundings the chance of more is below 2 exp(-GROWTH^2 / 2)). Every other operation
loses a u of its result, or two; exp multiplies what its argument has lost by the argument.
`SLACK` counts the operations on the longest way from input to result.

A result below the dtype's least normal number may become 0: TensorFlow flushes such to zero, where
others keep some of their digits. What is lost then, up to `LEAST`, is multiplied by what follows:
`flushed` is that in units of u.
"""

from dataclasses import dataclass

import numpy as np

from .cases import Case, one_hot, to_bfloat16

GROWTH = 6
SLACK = 8
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
LARGEST = {"float16": 65520, "bfloat16": 3.39615e38, "float32": 3.4028235677973366e38}
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
    value_scale: np.ndarray
    value_size: np.ndarray
    dtype: str
    gradient: np.ndarray | None = None
    gradient_scale: np.ndarray | None = None
    gradient_size: np.ndarray | None = None
    gradient_dtype: str = ""
    target_gradient: np.ndarray | None = None
    target_gradient_scale: np.ndarray | None = None
    target_gradient_dtype: str = ""


@dataclass(frozen=True)
class _Rows:
    """Per sample (..., ) and per entry (..., C): what the two row models have in common."""

    loss: np.ndarray
    loss_scale: np.ndarray
    slope: np.ndarray
    slope_scale: np.ndarray
    slope_size: np.ndarray
    clipped: np.ndarray | bool = False  # entries that get no gradient, whatever comes
    loss_size: np.ndarray | None = None  # what an error is compared with; None: |loss|, or 1
    target_slope: np.ndarray | None = None
    target_scale: np.ndarray | None = None
    after: np.ndarray | float = 1.0  # what a product with g may be multiplied by on its way back


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
    if not case.is_sparse:
        return _expected_of_targets(case, y_true, q, reduction, dtype)
    if not -q.ndim <= options["axis"] < q.ndim:
        raise Refused("axis")
    axis = options["axis"] % q.ndim
    classes = q.shape[axis]
    if classes == 0:
        raise Refused("classes")
    labels = _squeeze_labels(y_true, q, axis)
    rows = _rows_of(q, axis)
    shape = labels.shape
    weight = _broadcastable(case.sample_weight, shape)
    mask = _broadcastable(case.mask, shape)

    counts, mask = counted(labels, options["ignore_class"], mask)
    whole = np.trunc(labels.astype(float))
    known = (whole >= 0) & (whole < classes)
    if not known[counts].all() and not poisons:
        raise Refused("labels")
    y = np.where(known & counts, np.where(known, labels, 0), 0).astype(np.int64)

    model = _from_logits if options["from_logits"] else _from_probabilities
    safe = np.where(counts[..., None], rows, 0)
    result = model(safe, y, case.loss_dtype)
    bad = counts & ~known
    return _reduce(case, result, counts, bad, weight, mask, reduction, axis, dtype)


def counted(
    labels: np.ndarray, ignore_class, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which samples count, and the mask that says so; None if there is none."""
    counts = np.ones(labels.shape, bool)
    if ignore_class is not None:
        # NumPy would round the class to the labels' dtype.
        exact = labels.astype(np.float64) if labels.dtype.kind == "f" else labels
        counts &= exact != ignore_class
        mask = counts * (1.0 if mask is None else mask)
    if mask is not None:
        counts &= np.broadcast_to(mask != 0, labels.shape)
    return counts, mask


def _expected_of_targets(case: Case, y_true, q, reduction, dtype: str) -> Expected:
    options = case.options
    precise = case.loss_dtype if case.loss_dtype == "float64" else "float32"
    t = y_true.astype(precise).astype(np.float64)
    if case.form == "class" and abs(t.ndim - q.ndim) == 1:
        t, q = matched(t, q), matched(q, t)
    if not -q.ndim <= options["axis"] < q.ndim:
        raise Refused("axis")
    axis = options["axis"] % q.ndim
    if q.shape[axis] == 0:
        raise Refused("classes")
    if t.shape != q.shape:
        raise Refused("shape of y_true")
    smoothing = options["label_smoothing"] or 0
    if not 0 <= smoothing <= 1:
        raise Refused("label_smoothing")
    rows, targets = _rows_of(q, axis), _rows_of(t, axis)
    targets = targets * (1 - smoothing) + smoothing / q.shape[axis]
    shape = rows.shape[:-1]
    weight, mask = _broadcastable(case.sample_weight, shape), _broadcastable(case.mask, shape)
    counts = np.ones(shape, bool) if mask is None else np.broadcast_to(mask != 0, shape)
    model = _targets_from_logits if options["from_logits"] else _targets_from_probabilities
    safe = (np.where(counts[..., None], rows, 1), np.where(counts[..., None], targets, 0))
    result = model(*safe, 1 - smoothing, case.loss_dtype)
    bad = np.zeros(shape, bool)
    return _reduce(case, result, counts, bad, weight, mask, reduction, axis, dtype)


def matched(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a` with as many axes as `b`, if the one that has more has a last axis of size 1."""
    if a.ndim > b.ndim != 1 and a.shape[-1] == 1:
        return a[..., 0]
    return a[..., None] if b.ndim > a.ndim == 1 and b.shape[-1] == 1 else a


def _cast_predictions(case: Case) -> tuple[np.ndarray, str]:
    """Predictions in the precision the loss sees them in, and the dtype of the result."""
    q, dtype = case.y_pred.astype(np.float64), case.loss_dtype
    if dtype not in UNIT:
        raise Refused("y_pred's dtype")
    if dtype in ("float16", "bfloat16"):  # by way of float32, as PyTorch casts
        q = q.astype(np.float32)
    q = (to_bfloat16(q) if dtype == "bfloat16" else q.astype(dtype)).astype(np.float64)
    if case.form == "function" and dtype in ("float16", "bfloat16"):
        dtype = "float32"
    return q, dtype


def _rows_of(array: np.ndarray, axis: int) -> np.ndarray:
    """The class axis last, and in memory: along another one NumPy adds up one by one."""
    return np.ascontiguousarray(np.moveaxis(array, axis, -1))


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
    label = one_hot(y, z.shape[-1])
    gap = np.take_along_axis(distance, y[..., None], -1)
    loss = (np.log(s) + gap)[..., 0]
    reach = np.where(e == 0, 0, distance)
    sums = growth(z.shape[-1]) + SLACK
    weighted = 2 * (share * reach).sum(-1, keepdims=True)
    loss_scale = (sums + weighted + 2 * np.log(s) + 2 * gap)[..., 0]
    slope_scale = share * (2 * reach + weighted + sums)
    slope_scale = slope_scale + flushed(dtype)  # the exp and the share
    return _Rows(loss, loss_scale, share - label, slope_scale + SLACK * label, share + label)


def _from_probabilities(q: np.ndarray, y: np.ndarray, dtype: str) -> _Rows:
    low, high = (_rounded(bound, dtype) for bound in (1e-7, 1 - 1e-7))
    c = np.minimum(np.maximum(q, low), high)  # both let NaN through
    inside = (low <= q) & (q <= high)
    s = c.sum(-1, keepdims=True)
    label = one_hot(y, q.shape[-1])
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
    return _Rows(loss, loss_scale, slope, scale, size, size == 0, after=np.where(inside, 1 / c, 0))


def _targets_from_logits(z, t, keep: float, dtype: str) -> _Rows:
    m = z.max(-1, keepdims=True)
    distance = np.where(np.isnan(z - m), np.nan, m - z)
    e = np.exp(-distance)
    s = e.sum(-1, keepdims=True)
    share = e / s
    total = t.sum(-1, keepdims=True)
    size = np.abs(t).sum(-1, keepdims=True)
    logarithms = np.log(s) + distance
    sums = growth(z.shape[-1]) + SLACK
    reach = np.where(e == 0, 0, distance)
    weighted = 2 * (share * reach).sum(-1, keepdims=True)
    log_scale = sums + weighted + 2 * np.log(s) + 2 * distance
    loss = (t * logarithms).sum(-1)
    loss_scale = (np.abs(t) * (log_scale + sums * logarithms)).sum(-1)
    slope_scale = share * size * (2 * reach + weighted + 2 * np.log(s) + 2 * sums)
    slope_scale = slope_scale + size * flushed(dtype) + SLACK * np.abs(t)
    slope_size = share * size + np.abs(t)
    loss_size = np.maximum((np.abs(t) * logarithms).sum(-1), 1)
    return _Rows(loss, loss_scale, total * share - t, slope_scale, slope_size, False,
                 loss_size, keep * logarithms, keep * log_scale)  # fmt: skip


def _targets_from_probabilities(q, t, keep: float, dtype: str) -> _Rows:
    low, high = (_rounded(bound, dtype) for bound in (1e-7, 1 - 1e-7))
    s = q.sum(-1, keepdims=True)
    n = q / s
    c = np.minimum(np.maximum(n, low), high)
    inside = (low <= n) & (n <= high)
    # How many u the sum, and so n, may be off, relative to itself. One term alone is exact.
    terms = (q != 0).sum(-1, keepdims=True)
    off = np.where(terms > 1, growth(q.shape[-1]) * np.abs(q).sum(-1, keepdims=True) / np.abs(s), 0)
    off = off + 2 * (terms > 1)
    depth = np.abs(np.log(c))
    log_scale = np.where(c == n, off, 0) + 2 * depth + SLACK
    loss = -(t * np.log(c)).sum(-1)
    sums = growth(q.shape[-1]) + SLACK
    loss_scale = (np.abs(t) * (log_scale + sums * depth)).sum(-1)
    w = np.where(inside, t / c, 0)
    slope = ((w * n).sum(-1, keepdims=True) - w) / s
    size = (np.abs(w * n).sum(-1, keepdims=True) + np.abs(w)) / np.abs(s)
    scale = size * (2 * off + sums)
    unit = min(UNIT[dtype], UNIT["float32"])  # halves are computed in float32
    # Where rounding decides whether an entry is clipped, the gradient may be one or the other.
    near = sum(np.abs(n - bound) <= 2 * off * unit * bound for bound in (low, high)) > 0
    lost = off * unit > 0.01  # nothing is left of a sum that cancels
    unsure = (near & (t != 0)).any(-1, keepdims=True) | lost
    loss_scale = np.where(lost[..., 0], np.inf, loss_scale)
    target_scale = np.where(lost, np.inf, keep * log_scale)
    worse = np.maximum(off / sums, 1)
    loss_size = worse[..., 0] * np.maximum((np.abs(t) * depth).sum(-1), 1)
    clipped = ((n < low) | (n > high)).all(-1, keepdims=True)
    after = np.where(inside, 1 / c, 0)
    after = (after + (after * np.abs(n) + 1).sum(-1, keepdims=True)) / np.abs(s)
    return _Rows(loss, loss_scale, slope, np.where(unsure, np.inf, scale),
                 np.where(unsure, np.inf, worse * size), clipped, loss_size,
                 -keep * np.log(c), target_scale, after)  # fmt: skip


def _rounded(value: float, dtype: str) -> float:
    if dtype == "bfloat16":
        return float(to_bfloat16(np.array(value, np.float32)))
    return float(np.dtype(dtype).type(value))


def _reduce(case, rows, counts, bad, weight, mask, reduction, axis, dtype) -> Expected:
    shape = counts.shape
    loss_size = np.maximum(np.abs(rows.loss), 1) if rows.loss_size is None else rows.loss_size
    wide = "float64" if dtype == "float64" else "float32"  # an overflow is part of the answer
    loss = overflowed(np.where(counts, np.where(bad, np.nan, rows.loss), 0), wide)
    factor = _factor(weight, mask, reduction)
    each = np.broadcast_to(factor, shape) if np.ndim(factor) else np.full(shape, factor)
    n = max(loss.size, 1)
    lost = flushed(case.loss_dtype)
    if reduction in (None, "none"):
        divisor, upstream = 1.0, case.upstream[: loss.size].reshape(shape).astype(np.float64)
        value = loss * each
        scale_of_value = rows.loss_scale * np.abs(each) + SLACK * np.abs(value) + lost
        size = np.maximum(loss_size * np.abs(each), lost)
    else:
        divisor = _divisor(loss, weight, mask, factor, reduction)
        upstream = case.upstream[:1].item()
        total = overflowed((loss * each).sum(), wide)
        value = _divide(total, divisor)
        if divisor == 0 and reduction != "mean_with_sample_weight":
            value = total * 0  # Keras multiplies by the mask's weight, 0: a NaN stays one
        weighed = counts & (each != 0)  # the scale of another may be infinite
        terms = np.abs(each) * (rows.loss_scale + (growth(n) + SLACK) * np.abs(loss)) + lost
        scale_of_value = _divide(np.abs(np.where(weighed, terms, 0)).sum(), abs(divisor))
        terms = np.where(weighed, np.maximum(loss_size * np.abs(each), lost), 0)
        size = _divide(terms.sum(), abs(divisor))
    g = _divide(upstream * each, divisor)
    if wide == "float32":
        # float32 has no such number; and times an infinite slope 0 is NaN.
        g = np.where(np.abs(g) < 2.0**-150, 0, g)
    g = np.where(bad, np.nan, g)[..., None]
    on = counts[..., None]
    gradient = np.where(on, g * rows.slope, 0)
    gradient = np.where(rows.clipped, 0, gradient)  # even if g is NaN
    # Upstream over the divisor, that times the weight, and their products with what is the row's.
    lost_of_g = lost * (np.abs(each) + 1)[..., None]
    lost_of_product = lost * (1 + rows.after)
    row_size = np.maximum(np.abs(g) * rows.slope_size, lost_of_product).max(-1, keepdims=True)
    scale = np.abs(g) * (SLACK * rows.slope_size + rows.slope_scale)
    scale = scale + lost_of_g * rows.slope_size + lost_of_product
    # Infinite even if g is NaN; and where the row overflows, inf - inf may come on the way.
    unsure = np.isinf(rows.slope_scale) | (row_size >= LARGEST.get(wide, np.inf))
    scale = np.where(unsure, np.inf, scale)

    def in_place(array: np.ndarray, like: np.ndarray) -> np.ndarray:
        """Zero where a sample does not count, in the layout of what was given."""
        array = np.where(on, np.broadcast_to(array, rows.slope.shape), 0)
        return np.moveaxis(array, -1, axis).reshape(like.shape)

    parts = {
        "gradient": in_place(gradient, case.y_pred),
        "gradient_scale": in_place(scale, case.y_pred),
        "gradient_size": in_place(row_size, case.y_pred),
        "gradient_dtype": case.y_pred_dtype,
    }
    if rows.target_slope is not None and rows.target_scale is not None:
        slope = np.abs(rows.target_slope)
        scale = np.abs(g) * (rows.target_scale + SLACK * slope) + lost_of_g * slope + lost
        parts |= {
            "target_gradient": in_place(g * rows.target_slope, case.y_true),
            "target_gradient_scale": in_place(scale, case.y_true),
            "target_gradient_dtype": case.y_true.dtype.name,
        }
    return Expected(np.asarray(value), np.asarray(scale_of_value), np.asarray(size), dtype, **parts)


def flushed(dtype: str) -> float:
    """What flushing two results to zero may cost, in units of u."""
    return 2 * LEAST[dtype] / min(UNIT[dtype], UNIT["float32"])


def overflowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` with infinities where `dtype` has no such number."""
    too_large = (np.abs(array) >= LARGEST.get(dtype, np.inf)) & np.isfinite(array)
    return np.where(too_large, np.copysign(np.inf, array), array)


def growth(terms: int) -> float:
    """How many u a sum of positive terms may lose, relative to itself."""
    return min(terms, GROWTH * np.sqrt(terms))


def _factor(weight, mask, reduction):
    if mask is not None and reduction in ("mean", "auto", "sum_over_batch_size"):
        mask = (mask != 0).astype(float)
    given = [part for part in (weight, mask) if part is not None]
    factor = np.prod(np.broadcast_arrays(*given), axis=0) if given else 1.0
    return factor if mask is None else np.where(mask != 0, factor, 0)  # even of a NaN


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
