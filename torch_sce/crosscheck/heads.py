"""The right answer for the loss of a linear head, in float64 and with its bounds.

    x (N, H)       the rows that go into the head, W (C, H) its weight, b (C,) its bias
    z = x W' + b   (N, C) the logits; with a softcap c: z = c tanh((x W' + b) / c)
    dz (N, C)      the gradient with respect to z of the loss, by the rules of `reference`

    dx = dz W      dW = dz' x      db = sum_n dz

With a softcap dz is multiplied by the slope of z, 1 - (z / c)^2, before these products.

The bounds are added up along this path, as numbers. A logit may be off by the rounding of H
products and of their sum. The loss then moves by no more than the logits do, and a share of softmax
by no more than a factor exp(2 d), where d is the most that a logit of the row may be off. The
gradients are off by what dz is off, and by the rounding of sums of C or N products, which may be
added up in any order: chunks change nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .bounds import LEAST, SLACK, UNIT, Expected, RowBounds, bounded, row_bounds
from .cases import Case, Head
from .reference import LARGEST, Given, at_label, exponentials, losses, read, reduced, shown


@dataclass(frozen=True)
class Precision:
    """Of products. Logits and their gradients pass through two dtypes: the coarser of these."""

    u: float  # half the spacing at 1
    least: float  # what flushing a result to zero may cost
    largest: float


@dataclass(frozen=True)
class About:
    """Numbers, and how far each of them may be off."""

    values: np.ndarray
    off: np.ndarray

    @property
    def transposed(self) -> "About":
        return About(self.values.T, self.off.T)


def expected_of_head(case: Case, poisons: bool = False) -> Expected:
    """The right answer to a case with a head, with its bounds.

    Raises:
        Refused: where an error is the right answer.
    """
    assert case.head is not None
    head, precision = case.head, _precision(case)
    unfused = replace(case, head=None, batch=replace(case.batch, y_pred=np.zeros(case.shape)))
    with np.errstate(all="ignore"):
        given = read(unfused, poisons)
        x = shown(case.y_pred.astype(np.float64), given.positions)
        x = x.reshape(-1, x.shape[-1])
        z, slope = _capped(_logits(x, head, precision), head.softcap, precision)
        given = replace(given, rows=z.values.reshape(case.shape))
        answer = _of_logits(unfused, given, z.off.reshape(case.shape))
        # Where gradients are computed with the loss, they are multiplied by the upstream one last.
        lost = precision.least * max(1.0, np.abs(case.upstream).max())
        precision = replace(precision, least=lost)
        dz = _times(_gradient(answer, z.off.shape, _unit(case)), slope, precision)
        found = {
            "gradient": _product(dz, head.weight.astype(np.float64), precision),
            "weight_gradient": _product(dz.transposed, x, precision),
        }
        if head.bias is not None:
            found["bias_gradient"] = _product(dz.transposed, np.ones((len(x), 1)), precision)
        return replace(answer, gradient_size=None, **_parts(case, found))


def _precision(case: Case) -> Precision:
    dtypes = (case.y_pred_dtype, case.loss_dtype)
    u, least = (max(table.get(dtype, 0) for dtype in dtypes) for table in (UNIT, LEAST))
    return Precision(u, least, LARGEST.get(case.y_pred_dtype, np.inf))


def _unit(case: Case) -> float:
    """The unit of scales: rows are computed in float32 or float64."""
    return min(UNIT[case.loss_dtype], UNIT["float32"])


def _logits(x: np.ndarray, head: Head, precision: Precision) -> About:
    """x W' + b, the bias as one more product; a logit of minus infinity is exact."""
    weight = head.weight.astype(np.float64)
    if head.bias is not None:
        x = np.concatenate([x, np.ones((len(x), 1))], 1)
        weight = np.concatenate([weight, head.bias.astype(np.float64)[:, None]], 1)
    z = _product(About(x, np.zeros_like(x)), weight.T, precision)
    return About(z.values, np.where(np.isinf(z.values), 0, z.off))


def _product(a: About, b: np.ndarray, precision: Precision) -> About:
    """a @ b for an exact b, the terms added up in any order."""
    values, terms = a.values @ b, len(b)
    size = (np.abs(a.values) + a.off) @ np.abs(b)
    # Not `growth`: many small terms added to a large sum may all be rounded the same way.
    off = a.off @ np.abs(b) + precision.u * (terms + SLACK) * size + terms * precision.least
    return About(values, _known(values, np.where(size >= precision.largest, np.inf, off)))


def _times(a: About, b: About, precision: Precision) -> About:
    """The product of each two numbers."""
    values, size = a.values * b.values, np.abs(a.values)
    off = a.off * (np.abs(b.values) + b.off) + size * b.off
    off = off + SLACK * precision.u * np.abs(values) + 2 * precision.least
    return About(values, _known(values, off))


def _known(values: np.ndarray, off: np.ndarray) -> np.ndarray:
    """`off`, and infinity where 0 met an infinity in it: nothing is known of these values."""
    return np.where(np.isnan(off) & ~np.isnan(values), np.inf, off)


def _capped(z: About, softcap: float | None, precision: Precision) -> tuple[About, About]:
    """The logits and their slope. That of tanh is 1 at most, and that of tanh^2 below 2."""
    if softcap is None:
        return z, About(np.ones_like(z.values), np.zeros_like(z.off))
    t = np.tanh(z.values / softcap)
    off = z.off / softcap + SLACK * precision.u * np.abs(t)
    return About(softcap * t, softcap * off), About(1 - t**2, 2 * off + SLACK * precision.u)


def _of_logits(case: Case, given: Given, off: np.ndarray) -> Expected:
    """The answer to a case without a head, whose logits may be off by so much."""
    rows = losses(case, given)
    total = reduced(case, given.positions, rows.loss)
    return bounded(case, given, rows, total, _moved(case, given, off / _unit(case)))


def _moved(case: Case, given: Given, off: np.ndarray) -> RowBounds:
    """The bounds of these rows if their logits may be off by so many units."""
    rule, unit = row_bounds(case, given), _unit(case)
    _, e, s = exponentials(given.rows)
    most = off.max(-1, keepdims=True)
    loss = rule.loss + most[..., 0] + at_label(off, given.labels)
    share = e / s * np.expm1(unit * (off + most)) / unit
    return replace(rule, loss=loss, gradient=rule.gradient + share)


def _gradient(answer: Expected, shape: tuple[int, ...], unit: float) -> About:
    assert answer.gradient is not None and answer.gradient_scale is not None
    return About(answer.gradient.reshape(shape), unit * answer.gradient_scale.reshape(shape))


def _parts(case: Case, found: dict[str, About]) -> dict[str, Any]:
    """The fields of an `Expected`."""
    parts = {}
    for part, about in found.items():
        shape = {"gradient": case.y_pred.shape, "bias_gradient": (-1,)}.get(part, about.off.shape)
        parts[part] = about.values.reshape(shape)
        parts[f"{part}_scale"] = about.off.reshape(shape) / _unit(case)
        parts[f"{part}_dtype"] = case.y_pred_dtype
    return parts
