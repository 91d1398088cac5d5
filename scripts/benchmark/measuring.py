"""The time and the peak memory of calls, on the CPU or a GPU.

Calls are timed in rounds: after a warm-up each runs once a round, in a shuffled order, so that
other load on the machine affects all of them. A measurement is one call, or enough short calls to
last MEASUREMENT seconds.
"""

import ctypes
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FORWARD, BOTH = PASSES = ("forward", "both")
MEASUREMENT = 1e-2  # seconds; in less, what the call before left in the caches would matter
MOST_ROUNDS = 60

Call = Callable[[], Any]
Effort = tuple[float, int]  # seconds to spend, and rounds to run in any case


def interleaved(
    calls: Mapping[tuple[str, str], Call], device: str, effort: Effort
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call, which has a name and a pass, measured in turn."""
    warm = {key: min(duration(call, 1, device) for _ in range(2)) for key, call in calls.items()}
    measured: dict[str, dict[str, list[float]]] = {name: {} for name, _ in calls}
    budget, least_rounds = effort
    order, shuffler, start = list(calls), random.Random(0), time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= least_rounds and time.perf_counter() - start > budget:
            break
        shuffler.shuffle(order)
        for name, which in order:
            repetitions = math.ceil(MEASUREMENT / warm[name, which])
            seconds = duration(calls[name, which], repetitions, device)
            measured[name].setdefault(which, []).append(seconds)
    return measured


def duration(call: Call, repetitions: int, device: str) -> float:
    """Seconds that one call takes."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repetitions - 1):
        call()
    kept = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del kept  # deleted after the clock is read, as a caller would
    return elapsed / repetitions


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


@contextmanager
def busy_cores(busy: bool) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A busy process on each core while the block runs, if `busy`; else none."""
    # The loop ends with this process, even if that is killed.
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**5))"
    processes = []
    try:
        for _ in range(os.cpu_count() or 1) if busy else ():
            # Without site-packages (-IS), and without the tracebacks that Ctrl-C would print.
            arguments = [sys.executable, "-ISc", spin]
            processes.append(subprocess.Popen(arguments, stderr=subprocess.DEVNULL))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_and_others(
    calls: Mapping[tuple[str, str], Call], device: str, effort: Effort
) -> tuple[dict[str, dict[str, list[float]]], float | None]:
    """What `interleaved` returns, and how many cores other processes kept busy meanwhile."""
    start, before = time.perf_counter(), other_cpu_seconds()
    seconds = interleaved(calls, device, effort)
    elapsed, after = time.perf_counter() - start, other_cpu_seconds()
    # The system counts in hundredths of seconds.
    if before is None or after is None or elapsed <= 0.5:
        return seconds, None
    return seconds, (after - before) / elapsed


def other_cpu_seconds() -> float | None:
    """CPU time that other processes have had; None where the system does not say."""
    if not Path("/proc/stat").exists():
        return None
    ticks = [int(number) for number in Path("/proc/stat").read_text().split()[1:9]]
    idle_and_waiting = sum(ticks[3:5])
    return (sum(ticks) - idle_and_waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


def peak_memory(call: Call, device: str, which: str = BOTH) -> int | None:
    """Bytes in use at the peak of a call beyond those before it; None where that is unknown.

    The least of three: other threads of the process only add to it. FORWARD is without grad.
    """
    peak = linux_peak if device == "cpu" else cuda_peak
    with torch.set_grad_enabled(which == BOTH):
        try:
            return min(peak(call, device) for _ in range(3))
        except (OSError, AttributeError):  # no /proc, no right to write there, another C library
            return None


def cuda_peak(call: Call, device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def linux_peak(call: Call, _device: str) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # else a call could live on what the last one left
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(entry: str) -> int:
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {entry}")
    return 1024 * int(found[1])
