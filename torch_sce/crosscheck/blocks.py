"""Judging a case that is too large for float64 copies of it: some of its rows at a time.

    the gradient   of a row needs its predictions, and the gradient with respect to its loss
    the value      needs the losses of all rows, one number each

So `reference`'s rules look at one block of rows after the other, and at all losses together.
Cases are those of `batch`: integer labels and a reduced loss. N samples, C classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .answers import Answer
from .cases import Case
from .compare import AGREES, DELIBERATE, MISMATCH, Verdict, judge, judge_against, reference
from .reference import (
    Expected,
    _broadcastable,
    _cast_predictions,
    _factor,
    _from_logits,
    _from_probabilities,
    _reduce,
    _Rows,
    counted,
    flushed,
)

ELEMENTS = 2**18  # of a block: a float64 copy of it stays in the caches
ZERO = np.zeros(())


@dataclass(frozen=True)
class Rows:
    """Some of the samples, by their numbers, and where they are."""

    shape: tuple[int, ...]  # of the losses
    axis: int
    numbers: np.ndarray

    def of(self, array: np.ndarray) -> np.ndarray:
        """(n, C)"""
        moved = np.moveaxis(array, self.axis, -1)
        return moved[np.unravel_index(self.numbers, self.shape)] if self.shape else moved[None]


def blocks_of(shape: tuple[int, ...], axis: int, elements: int = 0) -> Iterator[Rows]:
    """All samples of predictions of this shape, in parts of about so many elements."""
    axis %= len(shape)
    samples = shape[:axis] + shape[axis + 1 :]
    per_block = max((elements or ELEMENTS) // shape[axis], 1)
    total = math.prod(samples)
    for start in range(0, total, per_block):
        yield Rows(samples, axis, np.arange(start, min(start + per_block, total)))


class Gaps:
    """How long a gradient is and how far from another, from parts of it that come one by one."""

    def __init__(self, other: np.ndarray | None) -> None:
        self.other = other
        self.squares = np.zeros(3)

    def add(self, gradient: np.ndarray, rows: Rows) -> None:
        """(n, C), the gradient's part for these rows."""
        own = gradient.astype(np.float64).ravel()
        other = own * 0 if self.other is None else rows.of(self.other).astype(np.float64).ravel()
        self.squares += [np.square(each).sum() for each in (own, other, own - other)]

    @property
    def length(self) -> float:
        return math.sqrt(self.squares[0])

    @property
    def distance(self) -> float | None:
        """In units of the other's length; None without another."""
        _, other, between = map(math.sqrt, self.squares)
        if self.other is None:
            return None
        return between / other if other else between


def measured(gradient: np.ndarray, other: np.ndarray | None) -> Gaps:
    gaps = Gaps(other)
    for rows in blocks_of(gradient.shape, -1):
        gaps.add(rows.of(gradient), rows)
    return gaps


def refusal(case: Case) -> str:
    """The rule for which the case must raise, "" if there is none: one class is enough to tell."""
    axis, shape = case.options["axis"], case.y_pred.shape
    if not -len(shape) <= axis < len(shape):
        return "axis"
    with np.errstate(invalid="ignore"):
        labels = case.y_true.astype(np.float64)
        is_class = (np.trunc(labels) >= 0) & (labels < shape[axis])
    y_true = np.where(is_class, np.zeros((), case.y_true.dtype), case.y_true)
    y_pred = case.y_pred.take(range(min(shape[axis], 1)), axis)
    return reference(_with(case, y_true=y_true, y_pred=y_pred))[1]


def judge_in_blocks(case: Case, keras: Answer, ours: Answer) -> Verdict:
    """As `judge`, with the float64 answer of one block of rows at a time."""
    if case.y_pred.size <= ELEMENTS:
        return judge(case, keras, ours)
    refused = refusal(case)
    if refused:
        return judge_against(None, refused, case, keras, ours)
    verdicts = [
        judge_against(right, "", case, _part(keras, right, rows), _part(ours, right, rows))
        for rows, right in expected_in_blocks(case)
    ]
    order = (MISMATCH, DELIBERATE, AGREES)
    return min(verdicts, key=lambda verdict: order.index(verdict.outcome))


def _part(answer: Answer, right: Expected, rows: Rows | None) -> Answer:
    """What `right` is compared with: the value, or the gradient of these rows."""
    if answer.error or rows is None:
        return replace(answer, gradient=None, gradient_dtype=None)
    gradient = None if answer.gradient is None else rows.of(answer.gradient)
    return replace(answer, value=ZERO, value_dtype=right.dtype, gradient=gradient)


def expected_in_blocks(case: Case) -> Iterator[tuple[Rows | None, Expected]]:
    """The gradient for some rows after the other, and at last, with None for rows, the value."""
    whole = _Whole(case)
    parts = []
    for rows in blocks_of(case.y_pred.shape, case.options["axis"]):
        model, right = whole.block(rows)
        parts.append((model.loss, model.loss_scale))
        yield rows, replace(right, value=ZERO, value_scale=ZERO)
    value = whole.reduced(*map(np.concatenate, zip(*parts, strict=True)))
    yield None, replace(value, gradient=None)


class _Whole:
    """What the rules need of all rows together, one number of each."""

    def __init__(self, case: Case) -> None:
        self.case, shape = case, case.y_pred.shape
        axis = case.options["axis"] % len(shape)
        shape = shape[:axis] + shape[axis + 1 :]
        self.labels = case.y_true.reshape(shape)
        self.weight = _broadcastable(case.sample_weight, shape)
        mask = _broadcastable(case.mask, shape)
        self.counts, self.mask = counted(self.labels, case.options["ignore_class"], mask)
        factor = _factor(self.weight, self.mask, case.options["reduction"])
        self.factor = np.broadcast_to(np.abs(factor), shape)
        nothing = np.zeros(self.labels.size)
        slopes = self.reduced(nothing, nothing).gradient
        assert slopes is not None
        self.upstream = slopes.reshape(-1)

    @np.errstate(all="ignore")
    def reduced(self, loss: np.ndarray, loss_scale: np.ndarray) -> Expected:
        """The value of these losses, (N,), and its gradient with respect to each, (..., 1)."""
        shape = self.counts.shape
        one = np.ones((*shape, 1))
        rows = _Rows(loss.reshape(shape), loss_scale.reshape(shape), one, one, one)
        case = _with(self.case, y_pred=one)
        return self._reduce(case, rows, self.counts, self.weight, self.mask, len(shape))

    @np.errstate(all="ignore")
    def block(self, rows: Rows) -> tuple[_Rows, Expected]:
        """What the rules say of these rows, and the gradient that the value has for them."""
        case = _with(self.case, y_pred=rows.of(self.case.y_pred))
        z = _cast_predictions(case)[0]
        counts = self.counts.reshape(-1)[rows.numbers]
        y = np.where(counts, self.labels.reshape(-1)[rows.numbers], 0).astype(np.int64)
        model = _from_logits if case.options["from_logits"] else _from_probabilities
        found = model(np.where(counts[:, None], z, 0), y, case.loss_dtype)
        unreduced = replace(
            case,
            options=case.options | {"reduction": "none"},
            upstream=self.upstream[rows.numbers],
        )
        right = self._reduce(unreduced, found, counts, None, None, 1)
        # What flushing the upstream gradient to zero may cost is multiplied by the weight.
        more = flushed(case.loss_dtype) * (self.factor.reshape(-1)[rows.numbers] - 1)
        more = np.where(counts, more, 0)[:, None] * found.slope_size
        return found, replace(right, gradient_scale=right.gradient_scale + more)

    def _reduce(self, case, rows, counts, weight, mask, axis) -> Expected:
        bad, reduction = np.zeros(counts.shape, bool), case.options["reduction"]
        return _reduce(case, rows, counts, bad, weight, mask, reduction, axis, case.loss_dtype)


def _with(case: Case, **parts: np.ndarray) -> Case:
    return replace(case, batch=replace(case.batch, **parts))
