"""Judging a case that is too large for float64 copies of it: some of its rows at a time.

    the gradient   of a row needs its predictions, and the gradient with respect to its loss
    the value      needs the losses of all rows, one number each

So `reference`'s rules are applied to one block of rows after the other, and to all losses together.
Cases are those of `batch`: integer labels and a reduced loss. N positions, C classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .answers import Answer
from .bounds import Expected, RowBounds, bounded, flushed, row_bounds, value_bounds
from .cases import Case
from .compare import AGREES, DELIBERATE, MISMATCH, Verdict, judge, judge_against, reference
from .reference import Given, Positions, Reduced, cast, losses, read_labels, reduced, shown

ELEMENTS = 2**18  # of a block: a float64 copy of it stays in the caches
ZERO = np.zeros(())


@dataclass(frozen=True)
class Rows:
    """Some of the positions, by their numbers, and where they are."""

    shape: tuple[int, ...]  # of the losses
    axis: int
    numbers: np.ndarray

    def of(self, array: np.ndarray) -> np.ndarray:
        """(n, C)"""
        moved = np.moveaxis(array, self.axis, -1)
        return moved[np.unravel_index(self.numbers, self.shape)] if self.shape else moved[None]


def blocks_of(shape: tuple[int, ...], axis: int, elements: int = 0) -> Iterator[Rows]:
    """All positions of predictions of this shape, in parts of about this many elements."""
    axis %= len(shape)
    positions = shape[:axis] + shape[axis + 1 :]
    per_block = max((elements or ELEMENTS) // shape[axis], 1)
    total = math.prod(positions)
    for start in range(0, total, per_block):
        yield Rows(positions, axis, np.arange(start, min(start + per_block, total)))


class Gaps:
    """The length of a gradient and its distance from another, added up part by part."""

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
    with np.errstate(all="ignore"):
        y, positions = read_labels(case, case.y_true, case.y_pred.shape)
        whole = reduced(case, positions, np.zeros(y.shape))  # its gradient is that of any losses
    parts: list[tuple[np.ndarray, RowBounds]] = []
    for rows in blocks_of(case.y_pred.shape, case.options["axis"]):
        with np.errstate(all="ignore"):
            loss, off, right = _block(case, rows, y, positions, whole)
        parts.append((loss, RowBounds(off.loss, off.loss_size, ZERO, ZERO)))
        yield rows, replace(right, value=ZERO, value_scale=ZERO)
    with np.errstate(all="ignore"):
        yield None, _value(case, positions, parts)


def _block(
    case: Case, rows: Rows, y: np.ndarray, positions: Positions, whole: Reduced
) -> tuple[np.ndarray, RowBounds, Expected]:
    """The losses of these rows, their bounds, and the gradient that the value has for them."""
    labels, counts, bad, factor, gradient = (
        array.reshape(-1)[rows.numbers]
        for array in (y, positions.counts, positions.bad, whole.factor, whole.gradient)
    )
    part = replace(case, batch=replace(case.batch, y_pred=rows.of(case.y_pred)))
    here = Positions(counts, bad, None, None)
    given = Given(shown(cast(part.y_pred, part.loss_dtype), here), labels, 1, here)
    found, off = losses(part, given), row_bounds(part, given)
    total = Reduced(found.loss * factor, found.loss, factor, None, gradient)
    return found.loss, off, bounded(part, given, found, total, off)


def _value(case: Case, positions: Positions, parts: list[tuple[np.ndarray, RowBounds]]) -> Expected:
    """The value of the losses of all blocks."""
    shape = positions.counts.shape
    total = reduced(case, positions, np.concatenate([loss for loss, _ in parts]).reshape(shape))
    scale, size = (
        np.concatenate([getattr(off, name) for _, off in parts]).reshape(shape)
        for name in ("loss", "loss_size")
    )
    off = RowBounds(scale, size, ZERO, ZERO)
    scale, size = value_bounds(positions, total, off, flushed(case.loss_dtype))
    return Expected(
        value=np.asarray(total.value), dtype=case.loss_dtype, value_scale=scale, value_size=size
    )


def _with(case: Case, **parts: np.ndarray) -> Case:
    return replace(case, batch=replace(case.batch, **parts))
