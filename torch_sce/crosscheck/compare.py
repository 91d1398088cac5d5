"""Two answers, and whether they are the same as far as rounding can tell."""

from dataclasses import dataclass, field

import numpy as np

from .answers import Answer
from .cases import Case
from .differences import DIFFERENCES
from .reference import LEAST, UNIT, Expected, Refused, expected

AGREES, DELIBERATE, MISMATCH = "agrees", "deliberate", "mismatch"


@dataclass(frozen=True)
class Verdict:
    """What came of one case. Errors are in ulps of the value's and the gradient row's size."""

    case: Case
    outcome: str  # AGREES, MISMATCH or DELIBERATE
    reason: str = ""  # what differs, the name of a deliberate difference, "raises" if both do
    ulps: dict[str, float] = field(default_factory=dict)  # "our value", "Keras's gradient", ...


def judge(case: Case, keras: Answer, ours: Answer, poisons: bool = False) -> Verdict:
    """Whether we agree with Keras on a case, and if not, whether we mean to.

    `poisons`: bad labels give NaN instead of an error, as they do on devices.
    """
    right, refused = reference(case, poisons)
    difference = differs(keras, ours, right, case)
    if difference is None:
        raises = "raises" if keras.error else ""
        return Verdict(case, AGREES, raises, _errors(case, keras, ours, right))
    if differs_from_reference(ours, right, case) is None:
        names = [each.name for each in DIFFERENCES if each.applies(case, keras, refused)]
        if names:
            return Verdict(case, DELIBERATE, names[0])
        if poisons and keras.error and right is not None:
            return Verdict(case, DELIBERATE, "bad labels on a device")
    return Verdict(case, MISMATCH, difference)


def reference(case: Case, poisons: bool = False) -> tuple[Expected | None, str]:
    """The right answer, or None and the name of the rule for which the case is refused."""
    try:
        return expected(case, poisons), ""
    except Refused as refusal:
        return None, str(refusal)


def differs(a: Answer, b: Answer, right: Expected | None, case: Case) -> str | None:
    """In what two answers differ, in words; None if they agree within twice the bound."""
    if a.error or b.error:
        if b.error and b.error.startswith("unintended"):
            return f"raises {b.error.split()[-1]}: {b.message}"
        if a.error and b.error:
            return None
        return f"raises {a.error}: {a.message}" if a.error else f"raises {b.error}: {b.message}"
    if a.value_dtype != b.value_dtype or a.gradient_dtype != b.gradient_dtype:
        return f"dtype {a.value_dtype}, {a.gradient_dtype} and {b.value_dtype}, {b.gradient_dtype}"
    assert a.value is not None and b.value is not None
    if a.value.shape != b.value.shape:
        return f"shape {a.value.shape} and {b.value.shape}"
    if right is None:
        return "a value where the rules refuse"
    unit = UNIT[case.loss_dtype]
    if not _close(a.value, b.value, 2 * unit * right.value_scale + LEAST[case.loss_dtype]):
        return f"value {_worst(a.value, b.value)}"
    if a.gradient is None or b.gradient is None:
        return None if a.gradient is b.gradient else "only one has a gradient"
    bound = _gradient_bound(right, case)
    return (
        None
        if _close(a.gradient, b.gradient, bound)
        else f"gradient {_worst(a.gradient, b.gradient)}"
    )


def differs_from_reference(ours: Answer, right: Expected | None, case: Case) -> str | None:
    """In what our answer differs from the right one, whatever Keras says."""
    if right is None:
        intended = ours.error in ("ValueError", "TypeError")
        return None if intended else "should raise a ValueError or TypeError"
    gradient = None if case.as_lists or ours.gradient_dtype is None else right.gradient
    gradient_dtype = None if gradient is None else right.gradient_dtype
    if gradient is not None:  # it goes through the loss's dtype on its way back
        gradient = _overflowed(_overflowed(gradient, right.dtype), right.gradient_dtype)
    value = _overflowed(right.value, right.dtype)
    wanted = Answer(value, right.dtype, gradient, gradient_dtype)
    return differs(wanted, ours, right, case)


def _overflowed(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` with infinities where `dtype` has no such number."""
    largest = {"float16": 65520, "bfloat16": 3.39615e38, "float32": 3.4028235677973366e38}
    too_large = np.abs(array) >= largest.get(dtype, np.inf)
    return np.where(too_large & np.isfinite(array), np.copysign(np.inf, array), array)


def _gradient_bound(right: Expected, case: Case) -> np.ndarray:
    """Rounding in the loss's dtype, and once more on the way back to the predictions' dtype."""
    dtype = case.y_pred_dtype if case.y_pred_dtype in LEAST else "float32"
    rounding = UNIT[case.loss_dtype] * right.gradient_scale + UNIT[dtype] * np.abs(right.gradient)
    return 2 * rounding + LEAST[dtype] + LEAST[case.loss_dtype]


def _close(a: np.ndarray, b: np.ndarray, bound: np.ndarray) -> bool:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        return bool((same | (np.isfinite(gap) & (gap <= bound))).all())


def _worst(a: np.ndarray, b: np.ndarray) -> str:
    with np.errstate(all="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    odd = np.isnan(a) != np.isnan(b)
    where = int(np.argmax(np.where(odd, np.inf, np.nan_to_num(gap, nan=0.0))))
    return f"{a.reshape(-1)[where]:.9g} and {b.reshape(-1)[where]:.9g}"


def _errors(case: Case, keras: Answer, ours: Answer, right: Expected | None) -> dict[str, float]:
    """Errors against the float64 answer, for cases in float32 that have one."""
    if right is None or case.loss_dtype != "float32" or case.y_pred_dtype != "float32":
        return {}
    found = {}
    for who, answer in {"ours": ours, "Keras": keras}.items():
        for part, truth, size in (
            ("value", right.value, right.value_size),
            ("gradient", right.gradient, right.gradient_size),
        ):
            got = getattr(answer, part)
            if got is not None and got.size:
                found[f"{who}, {part}"] = _ulps(got, truth, size)
    return found


def _ulps(got: np.ndarray, truth: np.ndarray, size: np.ndarray) -> float:
    """The largest error, in units of float32's spacing at `size`."""
    with np.errstate(all="ignore"):
        spacing = np.spacing(np.abs(size).astype(np.float32)).astype(np.float64)
        errors = np.abs(got.astype(np.float64) - truth) / spacing
    usable = np.isfinite(errors)
    return float(errors[usable].max()) if usable.any() else 0.0
