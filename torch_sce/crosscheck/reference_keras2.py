"""The rules of Keras 2 in float64, as `reference` and `reference_metrics` have those of Keras 3.

The loss of a row is the same; labels, weights, masks, averages and what a metric counts are not.
"""

from dataclasses import replace

import numpy as np

from .bounds import Expected, bounded, row_bounds
from .cases import LOSSES, Batch, Case
from .reference import (
    FLOATS,
    Given,
    Positions,
    Reduced,
    Refused,
    broadcasting,
    cast,
    class_axis,
    located,
    located_targets,
    losses,
    overflowed,
    row_dtype,
    rows_of,
    shown,
)
from .reference_metrics import Sums, accuracies, expected_metric, leading, spread, weighed

REDUCTIONS = ("auto", "sum_over_batch_size", "sum", "none")


def expected_keras2(case: Case, poisons: bool = False) -> Expected:
    """The right answer, with bounds.

    Raises:
        Refused: where an error is the right answer.
    """
    if not case.is_loss:
        first, *more = (step and _with_one_zero(step) for step in case.steps)
        assert first is not None
        return expected_metric(replace(case, batch=first, more=tuple(more)), poisons, _add)
    case = replace(case, options={"axis": -1} | case.options)
    with np.errstate(all="ignore"):
        given = _read(case, poisons)
        rows = losses(case, given)
        total = _reduced(case, given.positions, rows.loss)
        found = bounded(case, given, rows, total, row_bounds(case, given))
    return replace(found, dtype=case.loss_dtype)


def _with_one_zero(batch: Batch) -> Batch:
    """-0.0 is as large as 0.0."""
    return replace(batch, y_true=batch.y_true + 0, y_pred=batch.y_pred + 0)


def _read(case: Case, poisons: bool) -> Given:
    if case.options.get("reduction", "none") not in REDUCTIONS:
        raise Refused("reduction")
    if case.loss_dtype not in FLOATS:
        raise Refused("y_pred's dtype")
    y_true, q = case.y_true, cast(case.y_pred, case.loss_dtype)
    if case.as_lists:  # lists do not say what follows an axis of size 0
        y_true, q = np.asarray(y_true.tolist()), np.asarray(q.tolist())
    if not case.is_sparse:
        if case.form == "class":
            y_true, q = _without_last_1(y_true, q), _without_last_1(q, y_true)
        return located_targets(case, y_true, q, _broadcastable)
    axis = class_axis(case, q.shape)
    labels = _in_losses_shape(y_true, q.shape[:axis] + q.shape[axis + 1 :])
    ignored = case.options["ignore_class"]
    ignored = None if ignored is None else int(ignored)
    truncated = np.trunc(labels) if labels.dtype.kind == "f" else labels
    whole = replace(case, options=case.options | {"ignore_class": ignored})
    y, positions = located(whole, truncated, q.shape[axis], _broadcastable, poisons)
    return Given(shown(rows_of(q, axis), positions), y, axis, positions)


def _without_last_1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] if a.ndim == b.ndim + 1 and a.shape[-1] == 1 else a


def _in_losses_shape(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels of another rank are flattened, if that keeps them in order."""
    if labels.ndim == len(shape):
        fits = labels.shape == shape
    elif labels.ndim == 1:
        fits = labels.size == np.prod(shape)
    else:
        fits = [n for n in labels.shape if n > 1 or n == 0] == [n for n in shape if n != 1]
    if not fits:
        raise Refused("shape of y_true")
    return labels.reshape(shape)


def _broadcastable(value, shape: tuple[int, ...]) -> np.ndarray | None:
    """A weight or a mask of a loss: where ranks differ by one, a last axis of size 1 does."""
    if value is None:
        return None
    value = np.asarray(value, dtype=np.float64)
    if value.ndim == len(shape) + 1 and value.shape[-1] == 1:
        value = value[..., 0]
    return broadcasting(_lengthened(value, shape), shape)


def _lengthened(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return value[..., None] if 0 < value.ndim == len(shape) - 1 else value


def _reduced(case: Case, positions: Positions, loss: np.ndarray) -> Reduced:
    """The value made of the losses (...), and its gradient with respect to each.

    value = sum(loss * weight * mask) / divisor, without a case for a divisor of 0
    """
    reduction, wide = case.options.get("reduction", "none"), row_dtype(case)
    loss = np.where(positions.counts, np.where(positions.bad, np.nan, loss), 0)
    loss = overflowed(loss, wide)
    weight, mask = (np.ones(()) if x is None else x for x in (positions.weight, positions.mask))
    factor = np.broadcast_to(np.where(mask != 0, weight * mask, 0), loss.shape)
    if reduction == "none":
        value, divisor = loss * factor, None
        g = case.upstream[: loss.size].reshape(loss.shape) * factor
    else:
        counted = mask.sum() * loss.size / max(mask.size, 1)
        divisor = 1.0 if reduction == "sum" or loss.size == 0 else float(counted)
        value = overflowed((loss * factor).sum(), wide) / np.float64(divisor)
        g = case.upstream[:1].item() * factor / np.float64(divisor)
    if wide == "float32":
        g = np.where(np.abs(g) < 2.0**-150, 0, g)  # float32 has no such numbers
    return Reduced(value, loss, factor, divisor, np.where(positions.bad, np.nan, g))


def _add(case: Case, batch: Batch, poisons: bool) -> Sums:
    """What a batch adds to a metric: every element counts, or its weight."""
    shape = _values_shape(case, batch)
    weight, mask = (_lead(each, shape) for each in (batch.sample_weight, batch.mask))
    hides = spread(mask, shape)
    values, scale, kept = _values(case, batch, hides, poisons)
    values, scale = values.reshape(shape), scale.reshape(shape)
    if hides is not None:
        values, scale = np.where(hides != 0, values, 0), np.where(hides != 0, scale, 0)
    given = [each for each in (weight, mask, kept) if each is not None] or [np.ones(shape)]
    return tuple(float(each.sum()) for each in weighed(values, scale, given))  # pyright: ignore[reportReturnType] there are five


def _values_shape(case: Case, batch: Batch) -> tuple[int, ...]:
    """The shape of the values, to which weights are matched: of an accuracy that of the labels."""
    if case.is_sparse and case.name not in LOSSES:
        return batch.y_true.shape
    shape = batch.y_pred.shape
    if case.name == "Accuracy":
        return shape
    longer = not case.is_sparse and len(shape) == batch.y_true.ndim + 1 and shape[-1:] == (1,)
    return shape[:-1][: -1 if longer else None]


def _lead(value, shape: tuple[int, ...]) -> np.ndarray | None:
    """A weight or a mask for the first axes of values of this shape; a scalar for all elements."""
    if value is None:
        return None
    value = _lengthened(np.asarray(value, dtype=np.float64), shape)
    return leading(value, shape) if value.ndim else np.broadcast_to(value, shape)


def _values(
    case: Case, batch: Batch, hides: np.ndarray | None, poisons: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A value for every position, its scale, and which are not ignored."""
    if case.name not in LOSSES:
        values = accuracies(case, batch)
        return values, np.zeros(values.shape), None
    dtype = case.loss_dtype
    mask = None if hides is None else hides != 0
    bare = Batch(batch.y_true, cast(batch.y_pred, dtype), dtype, mask=mask)
    options = {key: value for key, value in case.options.items() if key != "dtype"}
    upstream = np.ones(batch.y_pred.size + 1, np.float32)
    loss = replace(case, form="class", batch=bare, upstream=upstream)
    found = expected_keras2(replace(loss, options=options | {"reduction": "none"}), poisons)
    if case.options.get("ignore_class") is None:
        return found.value, found.value_scale, None
    kept = np.trunc(batch.y_true.astype(np.float64)) != int(case.options["ignore_class"])
    return found.value, found.value_scale, kept.reshape(found.value.shape).astype(np.float64)
