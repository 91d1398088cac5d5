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
    FUSED,
    HEAD,
    LIGER,
    LINEAR,
    MOVES,
    OF_LOG,
    OURS,
    PRODUCTS,
    Case,
    head,
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
from .peers import CANDIDATES, forward_and_backward, products

COPY, AT_HAND, FRESH = "copy", "at hand", "fresh"
MEASURABLE = 10e6  # bytes; for less, the allocator's own memory hides the peak
MEMORY_OF = (OURS, CROSS_ENTROPY, OF_LOG, COMPILED, LINEAR, FUSED)


@dataclass
class Result:
    """What was measured on a case."""

    case: Case
    # Seconds of each measurement, by candidate and pass; of COPY by kind.
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # Peaks over the predictions in units of their size; "forward" is without grad. None if busy.
    # Of a head over what is given and the gradients, in units of the logits' size.
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
    y_true = labels(case).to(device)
    given = head(case, device) if case.kind == HEAD else (predictions(case, device),)
    calls = references(*given)
    for name in (OURS, *peers):
        # Liger writes the gradient over its input, and from the second call on reads that; it
        # takes as long.
        leaves = [(x.clone() if name == LIGER else x.detach()).requires_grad_() for x in given]
        try:
            loss = CANDIDATES[name](case, device)
            if loss is None:
                continue
            result.losses[name] = loss(y_true, *leaves).item()
            forward_and_backward(loss, y_true, *leaves)
        except Exception as error:
            if name == OURS:
                raise
            result.missing[name] = reason(error)
            continue
        calls[name, FORWARD] = partial(loss, y_true, *leaves)
        calls[name, BOTH] = partial(forward_and_backward, loss, y_true, *leaves)
    with busy_cores(case.busy):
        result.seconds, result.others = seconds_and_others(calls, device, effort)
    if COPY in result.seconds:
        add_moves(result.seconds, device)
    size = math.prod(case.shape) * given[0].itemsize
    without = {FORWARD: 0, BOTH: sum(x.nbytes for x in given) if case.kind == HEAD else 0}
    for name in result.seconds if size >= MEASURABLE and not case.busy else ():
        if name in MEMORY_OF:
            peaks = {which: peak_memory(calls[name, which], device, which) for which in PASSES}
            result.memory[name] = {
                w: (p - without[w]) / size for w, p in peaks.items() if p is not None
            }
    return result


def references(*given: Tensor) -> dict[tuple[str, str], Call]:
    """Copies of the predictions, or the products of a head."""
    if len(given) == 1:
        copy = torch.empty_like(given[0]).copy_
        return {(COPY, AT_HAND): partial(copy, given[0]), (COPY, FRESH): given[0].clone}
    return {(PRODUCTS, which): partial(products, *given, which) for which in PASSES}


def add_moves(seconds: dict[str, dict[str, list[float]]], device: str) -> None:
    """The time of reading once, and of reading once and copying."""
    reads = [copy / 2 for copy in seconds[COPY][AT_HAND]]
    # A GPU's allocator keeps its memory: no page is fresh.
    for name, kind in ((MOVES, AT_HAND), (FRESH_MOVES, FRESH))[: 2 if device == "cpu" else 1]:
        both = [read + copy for read, copy in zip(reads, seconds[COPY][kind], strict=True)]
        seconds[name] = {FORWARD: reads, BOTH: both}


def reason(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]
