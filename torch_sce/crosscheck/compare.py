"""Two answers, and whether they are the same as far as rounding can tell."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .answers import Answer
from .bounds import LEAST, UNIT, Expected
from .cases import Case, command
from .differences import Disagreement
from .profiles import PROFILES
from .reference import LARGEST, Refused, overflowed

AGREES, DELIBERATE, MISMATCH = "agrees", "deliberate", "mismatch"
GRADIENTS = ("gradient", "target_gradient", "weight_gradient", "bias_gradient")


@dataclass(frozen=True)
class Verdict:
    """The verdict on one case. Errors are in ulps of the value's and the gradient row's size."""

    case: Case
    outcome: str  # AGREES, MISMATCH or DELIBERATE
    reason: str = ""  # what differs, the name of a deliberate difference, "raises" if both do
    ulps: dict[str, float] = field(default_factory=dict)  # "ours, value", ...
    apart: dict[str, float] = field(default_factory=dict)  # ours and tf.keras's, by part, in ulps

    def __str__(self) -> str:
        """The case, its outcome, and the command that shows it, if it was drawn."""
        case, mismatch = self.case, self.outcome == MISMATCH
        said = self.reason if mismatch else f"{self.outcome} {self.reason}".strip()
        if not case.features:
            return f"{case.form} {case.name}({case.options}): {said}"
        return f"case {case.index}: {said}; {command(case.seed, case.index, case.arguments)}"


def mismatches(verdicts: Iterable[Verdict]) -> list[str]:
    """Those cases, for an assertion that there are none."""
    return [str(verdict) for verdict in verdicts if verdict.outcome == MISMATCH]


def judge(case: Case, keras: Answer | None, ours: Answer, poisons: bool = False) -> Verdict:
    """Whether our answer is the right one, and Keras's the same or one we mean to differ from.

    `keras`: None if ours is compared only with the float64 answer.
    `poisons`: bad labels give NaN instead of an error, as they do on devices.
    """
    return judge_against(*reference(case, poisons), case, keras, ours, poisons)


def judge_against(
    right: Expected | None,
    refused: str,
    case: Case,
    keras: Answer | None,
    ours: Answer,
    poisons: bool = False,
) -> Verdict:
    """As `judge`, with what `reference` returns."""
    wrong = differs_from_reference(ours, right, case)
    if wrong is not None:
        return Verdict(case, MISMATCH, f"float64 and ours: {wrong}")
    difference = None if keras is None else differs(keras, ours, right, case)
    if keras is None or difference is None:
        raises = "raises" if ours.error else ""
        return Verdict(case, AGREES, raises, *_errors(case, keras, ours, right))
    found = Disagreement(case, keras, ours, refused)
    profile = PROFILES[case.profile]
    for each in profile.differences:
        if each.applies(found):
            return Verdict(case, DELIBERATE, each.name)
    if poisons and keras.error and right is not None:
        return Verdict(case, DELIBERATE, "bad labels on a device")
    return Verdict(case, MISMATCH, f"{profile.keras} and ours: {difference}")


def reference(case: Case, poisons: bool = False) -> tuple[Expected | None, str]:
    """The right answer, or None and the name of the rule for which the case is refused."""
    try:
        return PROFILES[case.profile].expected(case, poisons), ""
    except Refused as refusal:
        return None, str(refusal)


def differs(keras: Answer, ours: Answer, right: Expected | None, case: Case) -> str | None:
    """How two answers differ, in words; None if they agree within both their bounds.

    Each answer has the bound of the dtype it is computed in: Keras computes in the loss's.
    """
    if keras.error or ours.error:
        if keras.error and ours.error:
            return None
        who, raising = ("first", keras) if keras.error else ("second", ours)
        return f"only the {who} raises {raising.error}: {raising.message}"
    if right is None:
        return "a value where the rules refuse"
    return _values_differ(keras, ours, right, case, 2, UNIT[case.loss_dtype])


def differs_from_reference(ours: Answer, right: Expected | None, case: Case) -> str | None:
    """How our answer differs from the right one, in words; Keras's does not matter."""
    if right is None:
        intended = ours.error in ("ValueError", "TypeError")
        return None if intended else f"should raise a ValueError or TypeError, not {ours.error}"
    if ours.error:
        return f"raises {ours.error}: {ours.message}"
    parts = {}
    for part in GRADIENTS:
        gradient, dtype = getattr(right, part), getattr(right, f"{part}_dtype")
        if gradient is not None and getattr(ours, part) is not None:
            # Predictions are cast to the loss's dtype, targets to the one rows are computed in.
            halves = part == "target_gradient" and right.dtype in ("float16", "bfloat16")
            through = "float32" if halves else right.dtype
            through = through if case.head is None else dtype  # products are in this one
            parts[part] = overflowed(overflowed(gradient, through), dtype)
            parts[f"{part}_dtype"] = dtype
    wanted = Answer(overflowed(right.value, right.dtype), right.dtype, **parts)
    # Halves are computed in float32: only the last rounding is theirs.
    unit = min(UNIT[case.loss_dtype], UNIT["float32"])
    return _values_differ(wanted, ours, right, case, 1, unit)


def _values_differ(
    a: Answer, b: Answer, right: Expected, case: Case, sides: int, unit: float
) -> str | None:
    dtypes = [[getattr(each, f"{part}_dtype") for part in ("value", *GRADIENTS)] for each in (a, b)]
    if dtypes[0] != dtypes[1]:
        return f"dtype {', '.join(map(str, dtypes[0]))} and {', '.join(map(str, dtypes[1]))}"
    assert a.value is not None and b.value is not None
    if a.value.shape != b.value.shape:
        return f"shape {a.value.shape} and {b.value.shape}"
    bound = sides * (unit * right.value_scale + UNIT[right.dtype] * np.abs(right.value))
    if not _close(a.value, b.value, bound + LEAST[case.loss_dtype], right.dtype):
        return f"value {_worst(a.value, b.value)}"
    for part in GRADIENTS:
        found, other, size = (getattr(each, part) for each in (a, b, right))
        if found is None or other is None:
            if found is not other:
                return f"only one has a {part.replace('_', ' ')}"
            continue
        # The gradient is rounded to the loss's dtype, and to that of what it is of.
        dtype = getattr(right, f"{part}_dtype")
        last = (UNIT[case.loss_dtype] + UNIT[dtype]) * np.abs(size)
        bound = sides * (unit * getattr(right, f"{part}_scale") + last)
        found, other, bound = (b.have(part, a.have(part, x)) for x in (found, other, bound))
        bound = bound + LEAST[dtype] + LEAST[case.loss_dtype]
        if not _close(found, other, bound, dtype):
            return f"{part.replace('_', ' ')} {_worst(found, other)}"
    return None


def _close(a: np.ndarray, b: np.ndarray, bound: np.ndarray, dtype: str) -> bool:
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | np.isposinf(bound)
    largest = LARGEST.get(dtype, np.inf)  # an infinity may be a number near it that has overflowed
    with np.errstate(all="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        clipped = [np.clip(x.astype(np.float64), -largest, largest) for x in (a, b)]
        overflow = np.isfinite(bound) & (np.abs(clipped[0] - clipped[1]) <= bound)
        return bool((same | overflow | (np.isfinite(gap) & (gap <= bound))).all())


def _worst(a: np.ndarray, b: np.ndarray) -> str:
    with np.errstate(all="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    odd = np.isnan(a) != np.isnan(b)
    where = int(np.argmax(np.where(odd, np.inf, np.nan_to_num(gap, nan=0.0))))
    return f"{a.reshape(-1)[where]:.9g} and {b.reshape(-1)[where]:.9g}"


def _errors(
    case: Case, keras: Answer | None, ours: Answer, right: Expected | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors against the float64 answer, and how far the two are apart, for losses in float32 that
    have one and no head.
    """
    plain = case.is_loss and case.loss_dtype == case.y_pred_dtype == "float32"
    if right is None or not plain or case.head is not None:
        return {}, {}
    found, apart = {}, {}
    for who, answer in {"ours": ours, "Keras": keras}.items():
        for part, truth, size in (
            ("value", right.value, right.value_size),
            ("gradient", right.gradient, right.gradient_size),
        ):
            got = getattr(answer, part, None)
            if got is None or truth is None or size is None:
                continue
            truth, size = answer.have(part, truth), answer.have(part, size)
            if (np.isfinite(got) & np.isfinite(truth)).any():
                found[f"{who}, {part}"] = _ulps(got, truth, size)
                if who == "Keras":
                    apart[part] = _ulps(answer.have(part, getattr(ours, part)), got, size)
    return found, apart


def _ulps(got: np.ndarray, truth: np.ndarray, size: np.ndarray) -> float:
    """The largest error among finite entries, in units of float32's spacing at `size`."""
    with np.errstate(all="ignore"):
        spacing = np.spacing(np.abs(size).astype(np.float32)).astype(np.float64)
        errors = np.abs(got.astype(np.float64) - truth) / spacing
    return float(errors[np.isfinite(errors)].max(initial=0))
