"""Measures torch_sce and its peers on a case."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .cases import (
    COMPILED,
    CROSS_ENTROPY,
    FRESH_MOVES,
    LIGER,
    MOVES,
    OF_LOG,
    OURS,
    Case,
    labels,
    predictions,
)
from .measuring import (
    BOTH,
    FORWARD,
    PASSES,
    Call,
    Effort,
    busy_cores,
    peak_memory,
    seconds_and_others,
)
from .peers import CANDIDATES, Loss

COPY, AT_HAND, FRESH = "copy", "at hand", "fresh"
MEASURABLE = 10e6  # bytes; for less, the allocator's own memory hides the peak
MEMORY_OF = (OURS, CROSS_ENTROPY, OF_LOG, COMPILED)


@dataclass
class Result:
    """What was measured on a case."""

    case: Case
    # Seconds of each measurement, by candidate and pass; of COPY by kind.
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # Peaks over the predictions in units of their size; "forward" is without grad. None if busy.
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    # Cores that other processes kept busy meanwhile, with those of a busy case. They hurt parallel
    # code, and most of all what is parallel in many short steps: each waits for the slowest thread.
    others: float | None = None

    def median(self, candidate: str, which: str) -> float:
        """Seconds, NaN for what is missing."""
        return float(np.median(self.seconds.get(candidate, {}).get(which, math.nan)))

    def nanoseconds(self, candidate: str, which: str) -> float:
        """Per element of the predictions."""
        return 1e9 * self.median(candidate, which) / math.prod(self.case.shape)

    @property
    def fastest_copy(self) -> float:
        """Nanoseconds per element: the limit set by memory."""
        return 1e9 * min(self.seconds[COPY][AT_HAND]) / math.prod(self.case.shape)

    def peak(self, candidate: str, which: str) -> float:
        return self.memory.get(candidate, {}).get(which, math.nan)

    def ratio(self, peer: str, which: str) -> float:
        """How many times our time the peer takes."""
        return self.median(peer, which) / self.median(OURS, which)

    def reaches(self, peer: str, which: str) -> bool | None:
        """Whether the ratio reaches its floor; None if it has none."""
        floor = self.case.floor(peer, which)
        return None if floor is None else self.ratio(peer, which) >= floor

    @property
    def peers(self) -> list[str]:
        return [name for name in self.seconds if name not in (OURS, COPY)]


def measure(case: Case, peers: Sequence[str], device: str, effort: Effort) -> Result:
    """Ours and these peers on a case."""
    result = Result(case)
    y_true, y_pred = labels(case).to(device), predictions(case, device)
    calls: dict[tuple[str, str], Call] = {
        (COPY, AT_HAND): partial(torch.empty_like(y_pred).copy_, y_pred),
        (COPY, FRESH): y_pred.clone,
    }
    for name in (OURS, *peers):
        # Liger writes the gradient over its input, and from the second call on reads that; it
        # takes as long.
        leaf = (y_pred.clone() if name == LIGER else y_pred.detach()).requires_grad_()
        try:
            loss = CANDIDATES[name](case, device)
            if loss is None:
                continue
            result.losses[name] = loss(y_true, leaf).item()
            forward_and_backward(loss, y_true, leaf)
        except Exception as error:
            if name == OURS:
                raise
            result.missing[name] = reason(error)
            continue
        calls[name, FORWARD] = partial(loss, y_true, leaf)
        calls[name, BOTH] = partial(forward_and_backward, loss, y_true, leaf)
    with busy_cores(case.busy):
        result.seconds, result.others = seconds_and_others(calls, device, effort)
    add_moves(result.seconds, device)
    for name in result.seconds if y_pred.nbytes >= MEASURABLE and not case.busy else ():
        if name in MEMORY_OF:
            peaks = {which: peak_memory(calls[name, which], device, which) for which in PASSES}
            result.memory[name] = {w: p / y_pred.nbytes for w, p in peaks.items() if p is not None}
    return result


def add_moves(seconds: dict[str, dict[str, list[float]]], device: str) -> None:
    """The time of reading once, and of reading once and copying."""
    reads = [copy / 2 for copy in seconds[COPY][AT_HAND]]
    # A GPU's allocator keeps its memory: no page is fresh.
    for name, kind in ((MOVES, AT_HAND), (FRESH_MOVES, FRESH))[: 2 if device == "cpu" else 1]:
        both = [read + copy for read, copy in zip(reads, seconds[COPY][kind], strict=True)]
        seconds[name] = {FORWARD: reads, BOTH: both}


def forward_and_backward(loss: Loss, y_true: Tensor, leaf: Tensor) -> Tensor | None:
    """The gradient; the next call finds none."""
    loss(y_true, leaf).backward()
    gradient, leaf.grad = leaf.grad, None
    return gradient


def reason(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]
