"""What the accuracies and metrics should give, in float64, as `reference` does for the losses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .bounds import SLACK, Expected, expected, growth
from .cases import LOSSES, Batch, Case
from .reference import Refused

# Total, count, and for rounding: the sum of |w v|, of |w| times the scale of v, of |w|.
Sums = tuple[float, float, float, float, float]
Add = Callable[[Case, Batch, bool], Sums]


def expected_metric(case: Case, poisons: bool = False, add: Add | None = None) -> Expected:
    """The results after every update; for a function, one value per position.

    `add`: what a batch adds; by default as in Keras 3.

    Raises:
        Refused: where an error is the right answer.
    """
    if "TopK" in case.name and case.options["k"] < 1:
        raise Refused("k")
    with np.errstate(all="ignore"):
        if case.form == "function":
            values = accuracies(case, case.batch)
            exact = np.zeros(values.shape)
            return Expected(value=values, dtype="float32", value_scale=exact, value_size=exact)
        return _results(case, poisons, add or _add)


def _results(case: Case, poisons: bool, add: Add) -> Expected:
    total = count = size = scale = weight_size = 0.0
    terms, rows = 0, []
    for batch in case.steps:
        if batch is None:
            total = count = size = scale = weight_size = 0.0
        else:
            added = add(case, batch, poisons)
            total, count = total + added[0], count + added[1]
            size, scale, weight_size = size + added[2], scale + added[3], weight_size + added[4]
            terms += batch.y_pred.size + 1
        lost = growth(terms) + SLACK
        if count == 0:
            rows.append((0.0, 0.0))
        else:
            result = total / count
            doubt = scale + lost * (size + abs(result) * weight_size)
            rows.append((result, doubt / abs(count)))
    values, scales = np.array(rows, dtype=np.float64).T
    dtype = case.options["dtype"] or "float32"
    return Expected(value=values, dtype=dtype, value_scale=scales, value_size=np.abs(values))


def _add(case: Case, batch: Batch, poisons: bool) -> Sums:
    shape = _values_shape(case, batch)
    weight, mask = leading(batch.sample_weight, shape), leading(batch.mask, shape)
    shown = spread(mask, shape)
    values, scale, kept = _values(case, batch, shown, poisons)
    values, scale = values.reshape(shape), scale.reshape(shape)
    if shown is not None:
        values, scale = np.where(shown != 0, values, 0), np.where(shown != 0, scale, 0)
    given = [each for each in (weight, mask) if each is not None]
    if given and kept is not None:
        given.append(kept.reshape(shape).astype(float))
    if not given:
        each = [_sample_means(x) for x in (values, scale)]
        n = float(len(values)) if values.ndim else 1.0
        return float(each[0].sum()), n, float(np.abs(each[0]).sum()), float(each[1].sum()), n
    return tuple(float(_sample_means(x).sum()) for x in weighed(values, scale, given))  # pyright: ignore[reportReturnType] there are five


def weighed(values: np.ndarray, scale: np.ndarray, given: list[np.ndarray]) -> list[np.ndarray]:
    """What is added up, see `Sums`; averaged over the axes that no weight or mask has."""
    rank = max(each.ndim for each in given)
    given = [each.reshape(each.shape + (1,) * (rank - each.ndim)) for each in given]
    factors = np.array(np.broadcast_arrays(*given))
    factor = np.where((factors != 0).all(0), np.prod(factors, axis=0), 0)  # even of a NaN
    over = tuple(range(rank, values.ndim))
    values, scale = (_mean(x, over) for x in (values, scale))
    factor = np.broadcast_to(factor, values.shape)
    w = np.abs(factor)
    scale = np.where(w == 0, 0, w * scale)  # which may be infinite
    return [values * factor, factor, w * np.abs(values), scale, w]


def spread(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """A mask of the first axes, for all elements."""
    if mask is None:
        return None
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def _sample_means(x: np.ndarray) -> np.ndarray:
    return _mean(x, tuple(range(1, x.ndim)))


def _mean(x: np.ndarray, over: tuple[int, ...]) -> np.ndarray:
    """NumPy's own warns for an empty array."""
    return x.sum(over) / np.prod([x.shape[axis] for axis in over]) if over else x


def leading(value, shape: tuple[int, ...]) -> np.ndarray | None:
    """A weight or a mask for the first axes of values of this shape."""
    if value is None:
        return None
    value = np.asarray(value, dtype=np.float64)
    while value.ndim > len(shape) and value.shape[-1] == 1:
        value = value[..., 0]
    pairs = zip(value.shape, shape, strict=False)
    if value.ndim > len(shape) or any(have not in (1, want) for have, want in pairs):
        raise Refused("shape of a weight")
    return value


def _values_shape(case: Case, batch: Batch) -> tuple[int, ...]:
    """The shape of the values, without trailing axes of size 1."""
    if case.name == "Accuracy":
        return batch.y_pred.shape
    return batch.y_pred.shape[:-1]


def _values(
    case: Case, batch: Batch, shown: np.ndarray | None, poisons: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A value for every position, its scale, and which are not ignored."""
    if case.name in LOSSES:
        loss = replace(
            case, form="function", options={"axis": -1} | case.options, batch=_bare(batch),
            upstream=np.ones(batch.y_pred.size + 1),
        )  # fmt: skip
        kept = None
        if case.options.get("ignore_class") is not None:
            kept = np.asarray(batch.y_true != case.options["ignore_class"])
        if shown is not None:
            loss = replace(loss, options=loss.options | {"reduction": "none"}, batch=replace(
                loss.batch, mask=shown != 0))  # fmt: skip
        right = expected(loss, poisons)
        return right.value, right.value_scale, kept
    values = accuracies(case, batch)
    return values, np.zeros(values.shape), None


def _bare(batch: Batch) -> Batch:
    return Batch(batch.y_true, batch.y_pred, batch.y_pred_dtype)


def accuracies(case: Case, batch: Batch) -> np.ndarray:
    """1 or 0 for every position."""
    y_true, y_pred = (x.astype(np.float64) for x in (batch.y_true, batch.y_pred))
    if case.name == "Accuracy":
        one_longer = (*y_pred.shape, 1) == y_true.shape or (*y_true.shape, 1) == y_pred.shape
        if y_true.shape != y_pred.shape and not one_longer:
            raise Refused("shape of y_true")
        return (y_true.reshape(y_pred.shape) == y_pred).astype(float)
    if y_pred.ndim < (2 if "TopK" in case.name else 1):
        raise Refused("rank of y_pred")
    shape, classes = y_pred.shape[:-1], y_pred.shape[-1]
    result_shape = shape
    if case.is_sparse:
        fits = [shape, (*shape, 1)]
        if len(shape):
            fits.append((*shape, 1, 1))
        if y_true.shape not in fits:
            raise Refused("shape of y_true")
        result_shape = y_true.shape
        if "TopK" not in case.name and len(result_shape) > 1 and result_shape[-1] == 1:
            result_shape = result_shape[:-1]
        labels = y_true.reshape(shape)
    else:
        if y_true.shape != y_pred.shape:
            raise Refused("shape of y_true")
        labels = np.array([_first_largest(y_true[at]) for at in np.ndindex(shape)]).reshape(shape)
    found = np.zeros(shape)
    for at in np.ndindex(shape):
        row, label = y_pred[at], labels[at]
        if "TopK" not in case.name:
            found[at] = _first_largest(row) == label
            continue
        k = case.options["k"]
        if case.options.get("from_sorted_ids"):
            whole = np.trunc(label) if batch.y_pred_dtype.startswith("int") else label
            found[at] = whole in row[:k]
            continue
        label = int(np.trunc(label)) if np.isfinite(label) else -1
        if 0 <= label < classes and np.isfinite(row).all():
            found[at] = (row > row[label]).sum() < k
    return found.reshape(result_shape)


def _first_largest(row: np.ndarray) -> int:
    """The lowest index of the largest number; a NaN is none, and -0.0 is smaller than 0.0."""
    best, index = (-np.inf, False), 0
    for j, value in enumerate(row):
        if (value, not np.signbit(value)) > best:
            best, index = (value, not np.signbit(value)), j
    return index
