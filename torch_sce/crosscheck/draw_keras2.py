"""Random cases for Keras 2: those of `draw`, with its options.

Its losses have no `dtype`, the one for class numbers no `axis`, and there are other reductions.
Batches stay as drawn, except where Keras 2 has a rule that they would seldom show.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from .bits import Bits
from .cases import Batch, Case, Keras2Case
from .draw import LARGE_SIZES
from .reference import HALVES

REDUCTIONS = {"auto": 8, "sum_over_batch_size": 5, "sum": 5, "none": 6, "mean": 0.4, None: 0.2}


def as_keras2(case: Case) -> Keras2Case:
    """The case with Keras 2's options."""
    bits = Bits(case.seed, case.index, 2)
    options, features, steps = dict(case.options), dict(case.features), case.steps
    options.pop("from_sorted_ids", None)
    if case.is_loss:
        steps = (_loss(bits, case, options, features),)
    elif case.name in ("SparseCategoricalAccuracy", "CategoricalAccuracy"):
        steps = tuple(step and _with_minus_zeros(bits, step) for step in steps)
    if case.form == "metric" and case.is_sparse and bits.chance(0.6):
        # Weights are matched to values in the labels' shape.
        steps = tuple(step and _with_last_axis(step) for step in steps)
        features["shape of y_true"] = "trailing 1"
    given: dict[str, Any] = {each.name: getattr(case, each.name) for each in fields(case)}
    given |= {"options": options, "features": features, "batch": steps[0], "more": steps[1:]}
    return Keras2Case(**given)


def _loss(bits: Bits, case: Case, options: dict[str, Any], features: dict[str, str]) -> Batch:
    """The batch; changes options and features in place."""
    for known in (options, features):
        known.pop("dtype", None)
    if options.get("label_smoothing", 0) is None:
        options["label_smoothing"], features["label_smoothing"] = 0.0, "0.0"
    if case.form == "class":
        options["reduction"] = bits.pick(REDUCTIONS)
        features["reduction"] = str(options["reduction"])
    batch = _with_classes_last(case, options, features)
    if features.get("labels") == "fractional" and bits.chance(0.7):
        # Labels are truncated before they are compared with it, and so is itself.
        first = np.nan_to_num(batch.y_true.ravel()[:1].astype(np.float64), posinf=0, neginf=0)
        options["ignore_class"] = float(np.trunc(first).sum()) + bits.choice([0.0, 0.25])
        features["ignore_class"] = "of fractional labels"
    scales = {features["upstream"], features.get("values of sample_weight")}
    if case.y_pred_dtype in HALVES and scales & {"tiny", "huge", "tiny or huge"}:
        wide = batch.y_pred.astype(np.float32)  # no such numbers in half precision
        batch = replace(batch, y_pred=wide, y_pred_dtype="float32")
        features["dtype of y_pred"] = "float32"
    return batch


def _with_classes_last(case: Case, options: dict[str, Any], features: dict[str, str]) -> Batch:
    """The batch, with the classes on the last axis where they have to be there.

    Along another axis TensorFlow adds one by one, and the roundings of many are not independent.
    """
    batch, axis, is_other = case.batch, options["axis"], features["axis"] == "other"
    if case.form == "class" and case.is_sparse:
        options.pop("axis")
        features.pop("axis")
    elif case.is_sparse or features["size"] not in LARGE_SIZES:
        return batch
    elif is_other:
        options["axis"], features["axis"] = -1, "-1"
        batch = replace(batch, y_true=_moved(batch.y_true, axis))
    return replace(batch, y_pred=_moved(batch.y_pred, axis)) if is_other else batch


def _moved(array: np.ndarray, axis: int) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, axis, -1))


def _with_minus_zeros(bits: Bits, batch: Batch) -> Batch:
    """With 0 for the largest of predictions that may tie, and -0.0 for some zeros."""
    q = batch.y_pred
    if not q.size or q.dtype.kind != "f" or not (q == np.trunc(q)).all():
        return batch
    q = q - q.max(-1, keepdims=True)
    return replace(batch, y_pred=np.where((q == 0) & bits.flags(0.5, q.shape), -q, q))


def _with_last_axis(batch: Batch) -> Batch:
    """Labels (...) as (..., 1)."""
    if batch.y_true.ndim != batch.y_pred.ndim - 1:
        return batch
    return replace(batch, y_true=batch.y_true[..., None])
