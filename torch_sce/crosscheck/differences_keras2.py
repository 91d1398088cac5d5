"""Where `torch_sce.keras2` differs from tf_keras on purpose, one row each, as `differences`.

docs/keras2.md shows these rows. Those of the main table that hold here, too, are the same rows.
"""

from dataclasses import replace

import numpy as np

from .differences import DIFFERENCES, Difference, Disagreement, refused_for
from .reference import HALVES

MAIN = {each.name: each for each in DIFFERENCES}


def _in_half_precision(found: Disagreement) -> bool:
    return found.case.loss_dtype in HALVES


def _listed_weights(found: Disagreement) -> bool:
    return found.case.loss_dtype == "float64" and isinstance(found.case.sample_weight, list)


def _listed_targets(found: Disagreement) -> bool:
    case = found.case
    return case.as_lists and not case.is_sparse and case.y_true.ndim != case.y_pred.ndim


def _weights_are_rounded(found: Disagreement) -> bool:
    case = found.case
    given = (b is not None and b.mask is not None for b in case.steps)
    coarse = case.y_pred_dtype in (*HALVES, "int32")
    return case.form == "metric" and coarse and any(given)


def _mask_meets_others(found: Disagreement) -> bool:
    """Only an error, or a mask or weight of fewer axes, which is matched to another axis."""
    if not MAIN["combined masks"].condition(found):
        return False
    axes = {np.ndim(x) for b in found.case.steps if b is not None for x in (b.mask, b.sample_weight)
            if x is not None}  # fmt: skip
    return found.keras.error is not None or axes != {found.case.y_pred.ndim - 1}


def _one_weight_of_a_metric(found: Disagreement) -> bool:
    """A weight with axes of size 1 that is not broadcast before it is added to the count."""
    return found.case.form == "metric" and any(
        0 < np.ndim(x) < b.y_true.ndim - 1 and np.shape(x) != b.y_true.shape[: np.ndim(x)]
        for b in found.case.steps
        if b is not None
        for x in (b.sample_weight, b.mask)
        if x is not None
    )


def _something_is_masked(found: Disagreement) -> bool:
    """As in the main table, where labels are not truncated before `ignore_class` is looked for."""
    case, nan = found.case, found.keras.value is not None and np.isnan(found.keras.value).any()
    ignores = case.is_loss and case.options.get("ignore_class") is not None
    weight = np.asarray(1 if case.sample_weight is None else case.sample_weight)
    hides = ignores and bool(nan) and not np.isfinite(weight).all()
    return hides or MAIN["masked values"].condition(found)


def _one_class(found: Disagreement) -> bool:
    return any(b is not None and b.y_pred.shape[-1:] == (1,) for b in found.case.steps)


def _one_position(found: Disagreement) -> bool:
    """Predictions (C,): nothing else may differ."""
    theirs, mine = found.keras.value, found.ours.value
    if found.case.y_pred.ndim != 1 or found.case.y_true.size != 1:
        return False
    if theirs is None or mine is None:
        return found.keras.error is not None and found.case.options.get("ignore_class") is not None
    return theirs.shape == (1,) != mine.shape and np.allclose(
        theirs, mine, rtol=1e-3, atol=1e-6, equal_nan=True
    )


def _negative_axis(found: Disagreement) -> bool:
    options = found.case.options
    return not found.case.is_sparse and bool(options.get("from_logits")) and options["axis"] < -1


def _is_scrambled(found: Disagreement) -> bool:
    return found.refused == "shape of y_true" and found.case.is_loss and found.case.is_sparse


def _top_k_of_other_dtypes(found: Disagreement) -> bool:
    case = found.case
    dtype = case.y_pred_dtype if case.form == "function" else case.loss_dtype
    return "TopK" in case.name and dtype != "float32"


DIFFERENCES_KERAS2 = (
    Difference(
        "half-precision arithmetic",
        "half-precision predictions; a metric with a half-precision `dtype`",
        "computed in that dtype: sums overflow to inf",
        "computed in float32, the result is cast",
        False,
        _in_half_precision,
    ),
    Difference(
        "weights as a list",
        "`sample_weight` as a Python list, for float64 predictions",
        "rounded to float32",
        "not rounded",
        False,
        _listed_weights,
    ),
    Difference(
        "lists with a last axis of size 1",
        "targets and predictions as Python lists, one of them with an extra last axis of size 1",
        "raises; of tensors the axis is dropped",
        "the axis is dropped",
        True,
        _listed_targets,
    ),
    Difference(
        "rounded weights",
        "weights and a mask for a metric, in `fit`, of half-precision or integer predictions",
        "weights are cast to the predictions' dtype",
        "weights are not rounded",
        False,
        _weights_are_rounded,
    ),
    MAIN["larger than the losses"],
    Difference(
        "wrong axis",
        "`sample_weight` or mask `(B,)` on losses `(B, H, W)` with B = W",
        "silently weights the last axis (with B != W it raises)",
        "`ValueError` that suggests `sample_weight[:, None, None]`",
        False,
        refused_for("weight along the wrong axis"),
    ),
    Difference(
        "one weight of a metric",
        "`sample_weight` or mask `(1,)` for a metric's values `(B, H, W)`",
        "in the count once, so the result is B times as large",
        "in the count for each example",
        False,
        _one_weight_of_a_metric,
    ),
    replace(MAIN["masked values"], condition=_something_is_masked),
    Difference(
        "combined masks",
        "a mask with `ignore_class` or `sample_weight`; for a metric also these two together",
        "matched to each other before the losses: raises for an integer mask, for `(B,)` with "
        "`(B, T)`, or weights the wrong axis",
        "each is matched to the losses' shape; a position counts if it counts in both",
        None,
        _mask_meets_others,
    ),
    Difference(
        "one position",
        "predictions `(C,)`",
        "raises with an `ignore_class`; for a label `(1,)` the losses are `(1,)`",
        "as for more positions: the losses are `()`",
        None,
        _one_position,
    ),
    Difference(
        "one class",
        "labels `(B,)` for one class, `(B, 1)`",
        "drops the class axis: raises, or the losses have another shape",
        "as for more classes",
        None,
        _one_class,
    ),
    Difference(
        "order of labels",
        "labels `(T, B, 1)` for predictions `(B, T, C)`",
        "flattened, whatever the order",
        "`ValueError`; labels may be flat, or have axes of size 1 more or less",
        False,
        _is_scrambled,
    ),
    Difference(
        "axis out of range",
        "an `axis` that the predictions do not have",
        "counted round: axis 2 of `(B, C)` is axis 0",
        "`ValueError`",
        False,
        refused_for("axis"),
    ),
    Difference(
        "negative axis",
        "`CategoricalCrossentropy` from logits, `axis` below -1",
        "raises",
        "counted from the end, as for probabilities",
        True,
        _negative_axis,
    ),
    MAIN["targets that do not sum to 1"],
    MAIN["smoothing out of range"],
    MAIN["no classes"],
    MAIN["shapes of metrics"],
    Difference(
        "trailing axes of size 1 of a weight",
        "`sample_weight` or mask of a metric with two axes of size 1 too many, `(B, 1, 1)` on "
        "values `(B,)`",
        "outer product",
        "both are dropped, as a single one is",
        None,
        MAIN["trailing axes of size 1 of a weight"].condition,
    ),
    Difference(
        "top-k of other dtypes",
        "top-k accuracy: a metric's `dtype`, or the function's predictions, other than float32",
        "raises",
        "computed in that dtype",
        True,
        _top_k_of_other_dtypes,
    ),
    MAIN["k below 1"],
)
