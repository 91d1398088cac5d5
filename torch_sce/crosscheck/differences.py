"""Where the loss differs from tf.keras on purpose, one row each.

A difference accounts for a case only if it applies to it and our answer is the one that `reference`
derives from our rule; anything else is a mismatch. docs/differences.md shows these rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .answers import Answer
from .bounds import UNIT
from .cases import Batch, Case, to_bfloat16
from .reference import HALVES, matched


@dataclass(frozen=True)
class Disagreement:
    """A case for which tf.keras and we have different answers."""

    case: Case
    keras: Answer
    ours: Answer
    refused: str  # the rule for which we refuse the case, or ""


Condition = Callable[[Disagreement], bool]


@dataclass(frozen=True)
class Difference:
    name: str
    where: str
    keras: str
    here: str
    raises: bool | None  # whether tf.keras does; None: it may or may not
    condition: Condition

    def applies(self, found: Disagreement) -> bool:
        as_raised = self.raises in (None, found.keras.error is not None)
        return as_raised and self.condition(found)


def of_case(holds: Callable[[Case], bool]) -> Condition:
    return lambda found: holds(found.case)


def refused_for(rule: str) -> Condition:
    return lambda found: found.refused == rule


def _only_the_shape_differs(found: Disagreement) -> bool:
    if not found.case.is_loss or found.case.options.get("reduction", "none") not in ("none", None):
        return False
    theirs, mine = found.keras.value, found.ours.value
    if theirs is None or mine is None or theirs.size != mine.size or theirs.shape == mine.shape:
        return False
    return np.allclose(theirs.ravel(), mine.ravel(), rtol=2e-2, atol=1e-5, equal_nan=True)


def _one_position(found: Disagreement) -> bool:
    shapes = [x.value is not None and x.value.shape for x in (found.keras, found.ours)]
    return _only_the_shape_differs(found) and shapes == [(), (1,)]


def _labels_are_rounded(case: Case) -> bool:
    return (case.is_sparse or case.name == "Accuracy") and any(
        _rounds(batch.y_true, case.loss_dtype if case.is_loss else batch.y_pred_dtype)
        for batch in case.steps
        if batch is not None
    )


def _rounds(y_true: np.ndarray, dtype: str) -> bool:
    labels = np.asarray(y_true).astype(np.float64)
    half = dtype == "bfloat16"
    with np.errstate(over="ignore"):
        cast = to_bfloat16(labels.astype(np.float32)) if half else labels.astype(dtype)
    return bool((cast != labels)[np.isfinite(labels)].any())


def _in_half_precision(case: Case) -> bool:
    return case.form != "function" and case.loss_dtype in HALVES


def _function_of_halves(case: Case) -> bool:
    return case.form == "function" and case.is_loss and case.y_pred_dtype in HALVES


def _something_is_masked(found: Disagreement) -> bool:
    if not any(_hides(found.case, batch) for batch in found.case.steps if batch is not None):
        return False
    gradients = ("gradient", "target_gradient", "weight_gradient")
    parts = (getattr(found.keras, part) for part in ("value", *gradients))
    has_nan = any(part is not None and np.isnan(part).any() for part in parts)
    return has_nan or found.keras.error is not None


def _hides(case: Case, batch: Batch) -> bool:
    """Whether a mask has zeros, or weights or rows of a head with an ignored label may be NaN."""
    if batch.mask is not None and not np.all(batch.mask):
        return True
    ignored, weight = case.options.get("ignore_class"), batch.sample_weight
    multiplied = [] if weight is None else [np.asarray(weight, np.float64)]
    multiplied += [] if case.head is None else [batch.y_pred]
    if ignored is None or all(np.isfinite(values).all() for values in multiplied):
        return False
    return bool((batch.y_true == ignored).any())


def _mask_meets_others(case: Case) -> bool:
    """For a metric, `ignore_class` acts as a mask if there is another factor."""
    ignores = case.options.get("ignore_class") is not None
    return any(
        (batch.mask is not None) + (batch.sample_weight is not None) + ignores > 1
        and (batch.mask is not None or not case.is_loss)
        for batch in case.steps
        if batch is not None
    )


def _is_empty(case: Case) -> bool:
    reduces = case.options.get("reduction", "none") not in ("none", None)
    return case.is_loss and case.y_pred.size == 0 and reduces


def _other_axis(case: Case) -> bool:
    return case.is_loss and case.options["axis"] not in (-1, case.y_pred.ndim - 1)


def _labels_lead_with_one(found: Disagreement) -> bool:
    ignores = found.case.options.get("ignore_class") is not None
    return found.refused == "shape of y_true" and ignores and found.case.y_true.shape[:1] == (1,)


def _two_trailing_ones(case: Case) -> bool:
    function = case.is_loss and case.is_sparse and case.form == "function"
    return function and case.y_true.ndim > case.y_pred.ndim


def _there_is_one_class(case: Case) -> bool:
    one = case.shape[-1:] == (1,) or len(case.shape) == 1 < case.y_true.ndim
    return case.is_loss and case.is_sparse and one


def _targets_are_no_distribution(case: Case) -> bool:
    if case.is_sparse or not case.is_loss or not case.options["from_logits"]:
        return False
    targets = matched(case.y_true, case.y_pred).astype(np.float64)
    with np.errstate(all="ignore"):
        total = targets.sum(case.options["axis"])
    return not np.allclose(total, 1, rtol=0, atol=4 * UNIT[case.loss_dtype])


def _smooths_along_another_axis(case: Case) -> bool:
    smooths = bool(case.options.get("label_smoothing"))
    return smooths and _other_axis(case)


def _shapes_only_broadcast(found: Disagreement) -> bool:
    longer = any(b is not None and b.y_true.ndim > b.y_pred.ndim for b in found.case.steps)
    return not found.case.is_loss and (
        found.refused == "shape of y_true" or (found.case.is_sparse and longer)
    )


def _axes_of_1_follow(case: Case) -> bool:
    given = [x for b in case.steps if b is not None for x in (b.sample_weight, b.mask)]
    long = any(x is not None and np.shape(x)[-2:] == (1, 1) for x in given)
    return not case.is_loss and long


def _top_k_of_other_dtypes(case: Case) -> bool:
    scores = not case.options.get("from_sorted_ids")
    return "TopK" in case.name and scores and case.y_pred_dtype != "float32"


DIFFERENCES = (
    Difference(
        "lists",
        "Python lists as `y_true`, `y_pred`",
        "raises",
        "accepted as arrays, as Keras's own documentation examples do",
        True,
        of_case(lambda case: case.as_lists),
    ),
    Difference(
        "auto",
        '`reduction="auto"`',
        "raises (Keras 2: the default)",
        'the same as `"sum_over_batch_size"`, which it meant',
        True,
        of_case(lambda case: case.options.get("reduction") == "auto"),
    ),
    Difference(
        "axis",
        "class axis other than the last",
        "raises",
        "any axis works: PyTorch data is often channels-first",
        True,
        of_case(_other_axis),
    ),
    Difference(
        "rounded labels",
        "labels that the loss's dtype (for an accuracy the predictions' dtype) cannot represent",
        "rounded: under float16, 2049 becomes 2048; under float32, 1.999999999 becomes 2",
        "never rounded; labels stay integers, `ignore_class` is compared exactly",
        None,
        of_case(_labels_are_rounded),
    ),
    Difference(
        "half-precision arithmetic",
        "sums and gradients under a half-precision `dtype`",
        "in that dtype: they overflow to inf",
        "computed in float32, the result is cast",
        False,
        of_case(_in_half_precision),
    ),
    Difference(
        "half-precision function",
        "the crossentropy functions and metrics, for half-precision predictions",
        "computed and returned in that dtype",
        "computed and returned in float32",
        False,
        of_case(_function_of_halves),
    ),
    Difference(
        "larger than the losses",
        "`sample_weight` or mask that broadcasts the losses to a larger shape, `(B, B)` on `(B,)`",
        "outer product",
        "`ValueError`: a weight must broadcast to the losses' shape",
        False,
        refused_for("shape of a weight"),
    ),
    Difference(
        "wrong axis",
        "`sample_weight` or mask `(B,)` on losses `(B, T)` with B = T",
        "silently weights the time axis (with B != T it raises)",
        "`ValueError` that suggests `sample_weight[:, None]`",
        False,
        refused_for("weight along the wrong axis"),
    ),
    Difference(
        "one position",
        'a scalar `sample_weight` or mask, losses `(1,)`, reduction "none"',
        "the result is `()`",
        "the result keeps the losses' shape `(1,)`",
        False,
        _one_position,
    ),
    Difference(
        "result's shape",
        '`sample_weight` or mask `(B, 1)` on losses `(B,)`, reduction "none"',
        "the result is `(B, 1)`",
        "the result keeps the losses' shape `(B,)`",
        False,
        _only_the_shape_differs,
    ),
    Difference(
        "masked values",
        "predictions, labels and weights where a mask is 0; a weight, and a row that goes into a "
        "linear head, whose label is ignored",
        "NaN * 0 = NaN; a label outside `[0, C)` raises",
        "not read: they contribute exactly 0, gradient exactly 0; labels may have any value",
        None,
        _something_is_masked,
    ),
    Difference(
        "combined masks",
        "a mask with `ignore_class` or `sample_weight`; for a metric also these two together",
        "matched to each other before the losses: raises for an integer mask or `(B, T, 1)` on "
        "`(B, T)`, or enlarges the result, or weights the wrong axis",
        "each is matched to the losses' shape; a position counts if it counts in both",
        None,
        of_case(_mask_meets_others),
    ),
    Difference(
        "leading 1",
        "labels `(1, B)` for predictions `(B, C)`, with an `ignore_class`",
        "accepted, and the result may be `(1, B)` (without an `ignore_class` it raises)",
        "`ValueError`, with and without",
        False,
        _labels_lead_with_one,
    ),
    Difference(
        "two trailing 1",
        "labels `(B, T, 1, 1)` for predictions `(B, T, C)`",
        "accepted by the class; the function raises, or keeps the axes in the result",
        "accepted by both",
        None,
        of_case(_two_trailing_ones),
    ),
    Difference(
        "one class",
        "labels `(B, T)` for one class, `(B, T, 1)`; labels `(B, 1)` for predictions `(B,)`",
        "raises, or drops an axis of the result; treats `(B,)` as one class, with loss 0",
        "as for more classes; `ValueError`",
        None,
        of_case(_there_is_one_class),
    ),
    Difference(
        "no positions",
        "reduced loss of an empty batch",
        "shape `(0,)`",
        "a scalar 0.0: a reduced loss is always a scalar",
        False,
        of_case(_is_empty),
    ),
    Difference(
        "targets that do not sum to 1",
        "`CategoricalCrossentropy` from logits, targets that do not sum to 1",
        "gradient softmax - y, as if they did",
        "the gradient of the loss: Σy · softmax - y",
        False,
        of_case(_targets_are_no_distribution),
    ),
    Difference(
        "smoothing along the axis",
        "`label_smoothing` with a class axis other than the last",
        "divides by the size of the last axis (3.15; 3.16 by the number of classes)",
        "divides by the number of classes",
        False,
        of_case(_smooths_along_another_axis),
    ),
    Difference(
        "smoothing out of range",
        "`label_smoothing` outside [0, 1], or True",
        "accepted: targets become negative, or all equal",
        "`ValueError`, `TypeError`",
        False,
        refused_for("label_smoothing"),
    ),
    Difference(
        "no classes",
        "`CategoricalCrossentropy` of predictions with 0 classes",
        "0",
        "`ValueError`, as for integer labels",
        False,
        lambda found: found.refused == "classes" and not found.case.is_sparse,
    ),
    Difference(
        "shapes of metrics",
        "labels of an accuracy in a shape that does not fit the predictions'",
        "broadcast, or flattened if the numbers of elements agree",
        "`ValueError`, except for one or two trailing axes of size 1",
        None,
        _shapes_only_broadcast,
    ),
    Difference(
        "trailing axes of size 1 of a weight",
        "`sample_weight` or mask of a metric with two axes of size 1 too many, `(B, 1, 1)` on "
        "values `(B,)`",
        "raises, but accepts a mask and a weight if only one has these axes",
        "both are dropped, as a single one is",
        True,
        of_case(_axes_of_1_follow),
    ),
    Difference(
        "top-k of other dtypes",
        "top-k accuracy of predictions that are not float32",
        "raises",
        "computed in their dtype",
        True,
        of_case(_top_k_of_other_dtypes),
    ),
    Difference(
        "k below 1",
        "top-k accuracy with a k below 1",
        "accepted: the accuracy is 0",
        "`ValueError`",
        None,
        refused_for("k"),
    ),
)
