"""Where the loss differs from tf.keras on purpose, one row each.

A difference excuses a case only if it applies to it and our answer is the one that `reference`
derives from our rule; anything else is a mismatch. The README shows these rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .answers import Answer
from .cases import Case, to_bfloat16

HALVES = ("float16", "bfloat16")
Condition = Callable[[Case, Answer, Answer, str], bool]


@dataclass(frozen=True)
class Difference:
    """`condition(case, Keras's answer, ours, rule for which we refuse the case or "")`.

    `raises` says whether Keras raises in such a case.
    """

    name: str
    where: str
    keras: str
    here: str
    raises: bool | None  # None: it may or may not
    condition: Condition

    def applies(self, case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
        as_raised = self.raises in (None, keras.error is not None)
        return as_raised and self.condition(case, keras, ours, refused)


def _weights_are_refused(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    return refused == "shape of a weight"


def _weight_meets_the_wrong_axis(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    return refused == "weight along the wrong axis"


def _only_the_shape_differs(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    if case.options.get("reduction", "none") not in ("none", None):
        return False
    theirs, mine = keras.value, ours.value
    if theirs is None or mine is None or theirs.size != mine.size or theirs.shape == mine.shape:
        return False
    return np.allclose(theirs.ravel(), mine.ravel(), rtol=2e-2, atol=1e-5, equal_nan=True)


def _labels_are_rounded(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    labels = np.asarray(case.y_true).astype(np.float64)
    if case.loss_dtype == "bfloat16":
        cast = to_bfloat16(labels.astype(np.float32))
    else:
        cast = labels.astype(case.loss_dtype)
    return bool((cast != labels)[np.isfinite(labels)].any())


def _something_is_masked(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    if case.mask is None or np.all(case.mask):
        return False
    parts = (keras.value, keras.gradient)
    return bool(keras.error) or any(part is not None and np.isnan(part).any() for part in parts)


def _mask_meets_others(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    ignores = case.options["ignore_class"] is not None
    return case.mask is not None and (ignores or case.sample_weight is not None)


def _is_empty(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    return case.y_pred.size == 0 and case.options.get("reduction", "none") not in ("none", None)


def _other_axis(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    return case.options["axis"] not in (-1, case.y_pred.ndim - 1)


def _labels_lead_with_one(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    ignores = case.options["ignore_class"] is not None
    return refused == "shape of y_true" and ignores and case.y_true.shape[:1] == (1,)


def _there_is_one_class(case: Case, keras: Answer, ours: Answer, refused: str) -> bool:
    return case.y_pred.shape[-1:] == (1,) or case.y_pred.ndim == 1 < case.y_true.ndim


DIFFERENCES = (
    Difference(
        "lists",
        "Python lists as `y_true`, `y_pred`",
        "raises",
        "accepted as arrays, as Keras's own documentation examples do",
        True,
        lambda case, keras, ours, refused: case.as_lists,
    ),
    Difference(
        "auto",
        '`reduction="auto"`',
        "raises (Keras 2: the default)",
        'the same as `"sum_over_batch_size"`, which it meant',
        True,
        lambda case, keras, ours, refused: case.options.get("reduction") == "auto",
    ),
    Difference(
        "axis",
        "class axis other than the last",
        "raises",
        "any axis works: PyTorch data is often channels-first",
        True,
        _other_axis,
    ),
    Difference(
        "rounded labels",
        "labels that the loss's dtype cannot hold",
        "rounded: under float16, 2049 becomes 2048; under float32, 1.999999999 becomes 2",
        "never rounded; labels stay integers, `ignore_class` is compared exactly",
        None,
        _labels_are_rounded,
    ),
    Difference(
        "half-precision arithmetic",
        "sums and gradients under a half-precision `dtype`",
        "in that dtype: they overflow to inf",
        "computed in float32, the result is cast",
        False,
        lambda case, keras, ours, refused: case.form == "class" and case.loss_dtype in HALVES,
    ),
    Difference(
        "half-precision function",
        "`sparse_categorical_crossentropy` of half-precision predictions",
        "computed and returned in that dtype",
        "computed and returned in float32",
        False,
        lambda case, keras, ours, refused: case.form == "function" and case.y_pred_dtype in HALVES,
    ),
    Difference(
        "larger than the losses",
        "`sample_weight` or mask that would enlarge the loss, `(B, B)` on `(B,)`",
        "outer product",
        "`ValueError`: a weight must broadcast to the losses' shape",
        False,
        _weights_are_refused,
    ),
    Difference(
        "wrong axis",
        "`sample_weight` or mask `(B,)` on losses `(B, T)` with B = T",
        "silently weights the time axis (with B != T it raises)",
        "`ValueError` naming `sample_weight[:, None]`",
        False,
        _weight_meets_the_wrong_axis,
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
        "what stands under a zero mask",
        "NaN * 0 = NaN; a label outside `[0, C)` raises",
        "contributes exactly 0, gradient exactly 0, as ignored classes do; labels may be anything",
        None,
        _something_is_masked,
    ),
    Difference(
        "mask with company",
        "a mask together with `ignore_class` or `sample_weight`",
        "matched to each other before the losses: raises for an integer mask or `(B, T, 1)` on "
        "`(B, T)`, or enlarges the result",
        "each is matched to the losses' shape; a sample counts if both say so",
        None,
        _mask_meets_others,
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
        "accepted by the class; refused or left in the result's shape by the function",
        "accepted by both",
        None,
        lambda case, keras, ours, refused: (
            case.form == "function" and case.y_true.ndim > case.y_pred.ndim
        ),
    ),
    Difference(
        "one class",
        "labels `(B, T)` for one class, `(B, T, 1)`; labels `(B, 1)` for predictions `(B,)`",
        "raises, or drops an axis of the result; takes `(B,)` for one class, loss 0",
        "as with more classes; `ValueError`",
        None,
        _there_is_one_class,
    ),
    Difference(
        "no samples",
        "reduced loss of an empty batch",
        "shape `(0,)`",
        "a scalar 0.0: a reduced loss is always a scalar",
        False,
        _is_empty,
    ),
)
