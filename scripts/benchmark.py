"""Times torch_sce beside its peers, and measures the memory of both; `--help` says how.

A candidate is ours or a peer: a function of labels and predictions that returns the mean loss. All
candidates of a case get the same tensors in one process. After a warm-up they run in rounds, each
once a round in a shuffled order, so that what else the machine does meets all of them. A sample is
one call, or enough calls of a small input to last SAMPLE seconds; medians are compared. tf.keras
has a process of its own, and runs after the others.

"forward" is the loss under grad mode, "both" the loss and its backward pass. A copy of the
predictions into a tensor at hand runs in the same rounds: one read and one write, which is the
least that both passes can do. A copy into a fresh tensor shows what the first touch of its pages
costs.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import torch_sce

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from torch_sce.crosscheck.command import check_device
except ModuleNotFoundError as missing:
    if missing.name not in ("matplotlib", "rich"):
        raise
    print("The benchmark needs rich and matplotlib: pip install rich matplotlib", file=sys.stderr)
    sys.exit(2)

SEED = 0
SAMPLE = 1e-2  # seconds; in less, what the call before left in the caches would count
FULL, QUICK = (10.0, 5), (1.0, 3)  # of a case: seconds to spend, and rounds it gets in any case
TF_EFFORT = (4.0, 5)
MOST_ROUNDS = 60
MEASURABLE = 10e6  # bytes; below, what the allocator does anyway drowns the peak
FORWARD, BOTH = PASSES = ("forward", "both")
LOGITS, PROBABILITIES = "logits", "probabilities"

OURS = "torch_sce"
CROSS_ENTROPY = "F.cross_entropy"
COMPILED = "compiled F.cross_entropy"
OF_FLOAT = "F.cross_entropy of .float()"
OF_LOG = "F.cross_entropy of .clamp().log()"
NONE_IGNORED = "torch_sce with none ignored"
KERAS_TORCH = "Keras on torch"
TF_KERAS = "tf.keras"
LIGER = "liger-kernel"
COPY, AT_HAND, FRESH = "copy", "at hand", "fresh"
MOVES = "1 and 3 moves"  # the time to read once, and to read twice and write, as fast as a copy
MEMORY_OF = (OURS, CROSS_ENTROPY, OF_LOG, COMPILED)

# Peak memory over the predictions, in units of their size, where there are many classes and
# labels are integers.
MEMORY_LIMITS = {FORWARD: 0.05, BOTH: 1.05}
MANY_CLASSES = 1000
BUSY = 0.1  # cores that others use; from here on a table says so

Loss = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[float, float]  # forward, both


@dataclass(frozen=True)
class Case:
    """Predictions to measure on, and the ratios peer / ours of the time that we mean to reach."""

    shape: tuple[int, ...]
    kind: str = LOGITS
    floors: Mapping[str, Pair] = field(default_factory=dict)
    dtype: str = "float32"
    axis: int = -1
    half_ignored: bool = False
    soft: bool = False  # a target for every class, and `CategoricalCrossentropy`
    quick: bool = False

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == "float32" else f"{self.dtype} "
        axis = "" if self.axis == -1 else f", axis {self.axis}"
        ignored = ", half ignored" if self.half_ignored else ""
        soft = ", soft targets" if self.soft else ""
        return f"{dtype}{self.kind} {self.shape}{axis}{ignored}{soft}"

    def floor(self, peer: str, which: str) -> float | None:
        pair = self.floors.get(peer)
        return None if pair is None else pair[PASSES.index(which)]

    @property
    def for_keras(self) -> bool:
        """Whether this is measured with Keras, which takes classes last and casts to float32."""
        return self.axis == -1 and self.dtype == "float32" and not self.half_ignored


LARGE: Pair = (2.2, 1.9)
KERAS_AND_COMPILED = {KERAS_TORCH: (2.0, 1.9), COMPILED: (0.8, 1.0)}
CASES = (
    Case((1024, 32000), floors={CROSS_ENTROPY: LARGE} | KERAS_AND_COMPILED, quick=True),
    Case((256, 128256), floors={CROSS_ENTROPY: LARGE}),
    Case((16, 64, 32000), floors={CROSS_ENTROPY: LARGE}),
    Case((4096, 1000), floors={CROSS_ENTROPY: (1.1, 1.5)}),
    Case((131072, 21), floors={CROSS_ENTROPY: (1.2, 1.2)}),
    Case((8, 21, 256, 256), floors={CROSS_ENTROPY: (1.2, 1.3)}, axis=1),
    Case((4096, 10), floors={CROSS_ENTROPY: (1.5, 1.5)}, quick=True),
    Case((32, 10), floors={CROSS_ENTROPY: (0.2, 0.3)}, quick=True),
    Case(
        (1024, 32000),
        floors={CROSS_ENTROPY: (1.3, 1.2), OF_FLOAT: (3.0, 2.5)},
        dtype="bfloat16",
        quick=True,
    ),
    Case((1024, 32000), floors={NONE_IGNORED: (1.5, 1.3)}, half_ignored=True),
    Case((1024, 32000), PROBABILITIES, {OF_LOG: (8.0, 2.8), KERAS_TORCH: (5.0, 3.0)}, quick=True),
    Case((4096, 1000), PROBABILITIES, {OF_LOG: (3.0, 2.0)}),
    Case((1024, 32000), floors={CROSS_ENTROPY: (1.0, 1.0)}, soft=True),
    Case((4096, 1000), floors={CROSS_ENTROPY: (1.0, 1.0)}, soft=True, quick=True),
    Case((1024, 32000), PROBABILITIES, {OF_LOG: (1.0, 1.0)}, soft=True),
)
# On a GPU memory is the limit: nine tenths of its speed forward, as published for Hopper, and
# 0.55 ms for both passes of (8192, 32000) in bfloat16 at 3 TB/s.
VOCABULARY = {CROSS_ENTROPY: (1.0, 2.5), MOVES: (0.9, 0.95)}
MAP = {CROSS_ENTROPY: (1.0, 1.0), MOVES: (0.0, 0.67)}
CUDA_CASES = (
    Case((128, 1000), floors={CROSS_ENTROPY: (0.0, 1.0)}, quick=True),
    Case((4096, 10)),
    Case((4096, 1000), floors={CROSS_ENTROPY: (1.0, 2.5)}),
    Case((8, 512, 512, 21), floors=MAP, dtype="bfloat16"),
    Case((8, 21, 512, 512), floors=MAP, dtype="bfloat16", axis=1, quick=True),
    Case((8192, 32000), floors=VOCABULARY, dtype="bfloat16", quick=True),
    Case((4096, 128256), floors=VOCABULARY, dtype="bfloat16"),
    Case((8192, 131072), floors=VOCABULARY, dtype="bfloat16"),
    Case((16384, 151936), floors=VOCABULARY, dtype="bfloat16"),
    Case((8192, 262144), floors=VOCABULARY, dtype="bfloat16"),
    Case((8192, 32000), floors=VOCABULARY),
    Case((16, 512, 32000), floors=VOCABULARY, dtype="bfloat16"),
    Case((8, 262144), dtype="bfloat16"),
    Case((64, 128256), dtype="bfloat16"),
    Case((8192, 32000), floors={NONE_IGNORED: (1.5, 1.3)}, dtype="bfloat16", half_ignored=True),
    Case((8192, 32000), PROBABILITIES, {MOVES: (0.9, 0.95)}, dtype="bfloat16"),
    Case((4096, 1000), PROBABILITIES),
    Case((8192, 32000), floors={CROSS_ENTROPY: (1.0, 1.0)}, dtype="bfloat16", soft=True),
)
SWEEP_ELEMENTS = 2**24
SWEEP = tuple(
    Case((SWEEP_ELEMENTS // classes, classes), quick=classes in (10, 1000, 100000))
    for classes in (10, 32, 100, 316, 1000, 3200, 10000, 32000, 100000, 262144)
)
SWEEP_PEERS = (CROSS_ENTROPY, COMPILED)


def labels(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    if case.soft:
        targets = torch.randn(case.shape, generator=generator).softmax(case.axis)
        return targets.to(getattr(torch, case.dtype))
    axis = case.axis % len(case.shape)
    shape = (*case.shape[:axis], *case.shape[axis + 1 :])
    y_true = torch.randint(case.classes, shape, generator=generator)
    if case.half_ignored:
        order = torch.randperm(y_true.numel(), generator=generator)
        y_true.view(-1)[order[: y_true.numel() // 2]] = -100
    return y_true


def predictions(case: Case, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(SEED + 1)
    z = torch.randn(case.shape, generator=generator, device=device).mul_(2)
    y_pred = z if case.kind == LOGITS else z.softmax(case.axis)
    return y_pred.to(getattr(torch, case.dtype))


# Each of these builds a candidate for a case, or returns None if there is nothing to compare.


def ours(case: Case, device: str) -> Loss:
    if case.soft:
        return torch_sce.CategoricalCrossentropy(case.kind == LOGITS, axis=case.axis)
    return torch_sce.SparseCategoricalCrossentropy(
        from_logits=case.kind == LOGITS,
        ignore_class=-100 if case.half_ignored else None,
        axis=case.axis,
    )


def ours_none_ignored(case: Case, device: str) -> Loss | None:
    if not case.half_ignored:
        return None
    all_counted = replace(case, half_ignored=False)
    loss, y_true = ours(all_counted, device), labels(all_counted).to(device)
    return lambda _, y_pred: loss(y_true, y_pred)


def cross_entropy(case: Case, device: str, function: Loss = F.cross_entropy) -> Loss | None:
    """Of the tensor as it is where the classes are second, else of rows; it ignores -100."""
    if case.kind != LOGITS:
        return None
    return of_rows(case, function)


def of_rows(case: Case, function: Loss) -> Loss:
    if case.axis == 1:
        return lambda y_true, y_pred: function(y_pred, y_true)
    last = -2 if case.soft else -1
    return lambda y_true, y_pred: function(y_pred.flatten(0, -2), y_true.flatten(0, last))


def compiled_cross_entropy(case: Case, device: str) -> Loss | None:
    if case.half_ignored or (case.dtype != "float32" and device == "cpu"):
        return None
    torch._dynamo.reset()  # else a second shape makes it compile for any shape
    return cross_entropy(case, device, torch.compile(F.cross_entropy, dynamic=False))


def cross_entropy_of_float(case: Case, device: str) -> Loss | None:
    if case.dtype == "float32":
        return None
    return cross_entropy(case, device, lambda z, y: F.cross_entropy(z.float(), y))


def cross_entropy_of_log(case: Case, device: str) -> Loss | None:
    if case.kind != PROBABILITIES:
        return None
    return of_rows(case, lambda q, y: F.cross_entropy(q.clamp(1e-7, 1 - 1e-7).log(), y))


def keras_on_torch(case: Case, device: str) -> Loss | None:
    if not case.for_keras:
        return None
    # Keras reads both when it is first imported.
    os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE=device)
    import keras

    if keras.backend.backend() != "torch":
        raise ImportError(f"Keras runs on {keras.backend.backend()} in this process")
    return keras_loss(keras.losses, case)


def keras_loss(losses: Any, case: Case) -> Any:
    made = losses.CategoricalCrossentropy if case.soft else losses.SparseCategoricalCrossentropy
    return made(from_logits=case.kind == LOGITS)


def liger_kernel(case: Case, device: str) -> Loss | None:
    if device == "cpu" or case.kind != LOGITS or case.axis != -1 or case.soft:
        return None
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerCrossEntropyLoss,
    )

    return cross_entropy(case, device, LigerCrossEntropyLoss())


CANDIDATES: dict[str, Callable[[Case, str], Loss | None]] = {
    OURS: ours,
    CROSS_ENTROPY: cross_entropy,
    COMPILED: compiled_cross_entropy,
    OF_FLOAT: cross_entropy_of_float,
    OF_LOG: cross_entropy_of_log,
    NONE_IGNORED: ours_none_ignored,
    KERAS_TORCH: keras_on_torch,
    LIGER: liger_kernel,
}
PEERS = tuple(name for name in CANDIDATES if name != OURS)
NAMES = (*PEERS, TF_KERAS)


@dataclass
class Result:
    """What was measured on a case."""

    case: Case
    # Seconds of each sample, by candidate and pass; of COPY by kind.
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # Peaks over the predictions in units of their size; "forward" is without grad.
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    # Cores that other processes kept busy meanwhile. They hurt parallel code, and most of all
    # what is parallel in many short steps: each step waits for the slowest thread.
    others: float | None = None

    def median(self, candidate: str, which: str) -> float:
        """Seconds, NaN for what is missing."""
        return float(np.median(self.seconds.get(candidate, {}).get(which, math.nan)))

    def nanoseconds(self, candidate: str, which: str) -> float:
        """Per element of the predictions."""
        return 1e9 * self.median(candidate, which) / math.prod(self.case.shape)

    @property
    def fastest_copy(self) -> float:
        """Nanoseconds per element: what the memory allows, whatever else went on."""
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


def measure(case: Case, peers: Sequence[str], device: str, effort: tuple[float, int]) -> Result:
    """Ours and these peers on a case."""
    result = Result(case)
    y_true, y_pred = labels(case).to(device), predictions(case, device)
    calls: dict[tuple[str, str], Callable[[], Any]] = {
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
    start, before = time.perf_counter(), other_cpu_seconds()
    result.seconds = interleaved(calls, device, effort)
    if device != "cpu":
        copies = result.seconds[COPY][AT_HAND]  # two moves
        moves = {FORWARD: 0.5, BOTH: 1.5}
        result.seconds[MOVES] = {which: [n * t for t in copies] for which, n in moves.items()}
    elapsed, after = time.perf_counter() - start, other_cpu_seconds()
    # The system counts in hundredths of seconds.
    if before is not None and after is not None and elapsed > 0.5:
        result.others = (after - before) / elapsed
    for name in set(MEMORY_OF) & set(result.seconds) if y_pred.nbytes >= MEASURABLE else ():
        peaks = {which: peak_memory(calls[name, which], device, which) for which in PASSES}
        result.memory[name] = {w: p / y_pred.nbytes for w, p in peaks.items() if p is not None}
    return result


def forward_and_backward(loss: Loss, y_true: Tensor, leaf: Tensor) -> Tensor | None:
    """The gradient; the next call finds none."""
    loss(y_true, leaf).backward()
    gradient, leaf.grad = leaf.grad, None
    return gradient


def reason(error: Exception) -> str:
    """Of an error, what fits on a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


def interleaved(
    calls: Mapping[tuple[str, str], Callable[[], Any]], device: str, effort: tuple[float, int]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call, in samples taken in turn."""
    warm = {key: min(duration(call, 1, device) for _ in range(2)) for key, call in calls.items()}
    samples: dict[str, dict[str, list[float]]] = {}
    budget, least_rounds = effort
    order, shuffler, start = list(calls), random.Random(SEED), time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= least_rounds and time.perf_counter() - start > budget:
            break
        shuffler.shuffle(order)
        for name, which in order:
            repetitions = math.ceil(SAMPLE / warm[name, which])
            seconds = duration(calls[name, which], repetitions, device)
            samples.setdefault(name, {}).setdefault(which, []).append(seconds)
    return {name: samples[name] for name, _ in calls}


def other_cpu_seconds() -> float | None:
    """CPU time that other processes have had; None where the system does not say."""
    if not Path("/proc/stat").exists():
        return None
    ticks = [int(number) for number in Path("/proc/stat").read_text().split()[1:9]]
    idle_and_waiting = sum(ticks[3:5])
    return (sum(ticks) - idle_and_waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


def duration(call: Callable[[], Any], repetitions: int, device: str) -> float:
    """Seconds that one call takes."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repetitions - 1):
        call()
    kept = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del kept  # only now: a result outlives the call it came from
    return elapsed / repetitions


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], Any], device: str, which: str = BOTH) -> int | None:
    """Bytes at the peak of a call over those in use before; None where that cannot be measured.

    The least of three: what else a process does only adds.
    """
    peak = cuda_peak if device != "cpu" else linux_peak
    with torch.set_grad_enabled(which == BOTH):
        try:
            return min(peak(call, device) for _ in range(3))
        except (OSError, AttributeError):  # no /proc, no right to write there, another C library
            return None


def cuda_peak(call: Callable[[], Any], device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def linux_peak(call: Callable[[], Any], _device: str) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # else a call could live on what the last one left
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(entry: str) -> int:
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {entry}")
    return 1024 * int(found[1])


def measure_tf_keras(results: Sequence[Result], options: argparse.Namespace) -> dict[str, str]:
    """Adds tf.keras to the results, from a process of its own; returns its versions."""
    asked = [result for result in results if result.case.for_keras]
    try:
        answer = _ask_worker([result.case for result in asked], options)
    except RuntimeError as error:
        for result in asked:
            result.missing[TF_KERAS] = str(error)
        return {}
    for result, (seconds, loss) in zip(asked, answer["results"], strict=True):
        result.seconds[TF_KERAS], result.losses[TF_KERAS] = seconds, loss
    return answer["versions"]


def _ask_worker(cases: Sequence[Case], options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        raise RuntimeError("left out by --quick")
    if options.device != "cpu":
        raise RuntimeError("measured with --device cpu only")
    question = {
        "cases": [(case.shape, case.kind, case.soft) for case in cases],
        "threads": options.threads,
    }
    variables = {
        "KERAS_BACKEND": "tensorflow",
        "TF_USE_LEGACY_KERAS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    ended = subprocess.run(
        [sys.executable, __file__, "--worker"],
        input=json.dumps(question),
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError((ended.stderr.splitlines() or ["crashed"])[-1][:120])
    return json.loads(ended.stdout.splitlines()[-1])


def tf_keras_worker() -> None:
    """Measures tf.keras on the cases of standard input, for `measure_tf_keras`."""
    asked = json.load(sys.stdin)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(asked["threads"])

    def timed(shape: list[int], kind: str, soft: bool) -> tuple[dict[str, list[float]], float]:
        case = Case(tuple(shape), kind, soft=soft)
        y_true, y_pred = tf.constant(labels(case).numpy()), tf.constant(predictions(case).numpy())
        loss = keras_loss(tf.keras.losses, case)

        def forward() -> tuple[Any, Any]:
            with tf.GradientTape() as tape:
                tape.watch(y_pred)
                return loss(y_true, y_pred), tape

        def both() -> Any:
            value, tape = forward()
            return tape.gradient(value, y_pred)

        calls = {(TF_KERAS, FORWARD): forward, (TF_KERAS, BOTH): both}
        return interleaved(calls, "cpu", TF_EFFORT)[TF_KERAS], float(forward()[0])

    results = [timed(*case) for case in asked["cases"]]
    versions = {"tensorflow": tf.__version__, "tf.keras": tf.keras.__version__}
    print(json.dumps({"results": results, "versions": versions}))


def print_times(console: Console, results: Sequence[Result]) -> None:
    table = Table(
        title="Time in ms: median \\[quartiles]. Ratio: peer / ours (its floor); forward is under "
        "grad mode, both is with the backward pass. tf.keras ran after the others.",
        title_justify="left",
    )
    for column in ("", *PASSES, "ratio, forward", "ratio, both"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for result in results:
        table.add_section()
        used = result.others or 0.0
        others = f"[red]others use {used:.1f} cores[/]" if used >= BUSY else ""
        table.add_row(f"[bold]{escape(result.case.name)}[/]", others)
        for name in (OURS, *result.peers):
            times = [_milliseconds(result.seconds[name][which]) for which in PASSES]
            ratios = [_ratio(result, name, which) for which in PASSES if name != OURS]
            table.add_row(f"  {name}", *map(escape, times), *ratios)
        for name in result.missing:
            table.add_row(f"  {name}", "missing", "missing")
    console.print(table)
    reasons = {item: None for result in results for item in result.missing.items()}
    for name, why in reasons:
        console.print(f"Missing: {name} ({why})", markup=False, highlight=False, soft_wrap=True)


def _milliseconds(seconds: Sequence[float]) -> str:
    low, median, high = (f"{1e3 * x:.4g}" for x in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return f"{median} [{low} - {high}]"


def _ratio(result: Result, peer: str, which: str) -> str:
    text, floor = f"{result.ratio(peer, which):.2f}", result.case.floor(peer, which)
    if floor is None:
        return text
    return f"{text} ({floor})" if result.reaches(peer, which) else f"[red]below {text} ({floor})[/]"


def print_memory(console: Console, results: Sequence[Result]) -> None:
    limits = ", ".join(f"{which} {limit}" for which, limit in MEMORY_LIMITS.items())
    table = Table(
        title="Copies of the predictions in ms, and peak memory in units of the predictions' size, "
        f"without them; forward is without grad. Our limits, {limits}, are for {MANY_CLASSES} "
        "classes or more and integer labels. A dash is not measured.",
        title_justify="left",
    )
    table.add_column("", overflow="fold")
    for column in ("copy", "copy into\nfresh pages", "both of ours\n/ copy",
                   *(f"{which},\n{who}" for which in PASSES for who in ("ours", "F.cross_entropy")),
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for result in results:
        copies = [f"{1e3 * result.median(COPY, kind):.4g}" for kind in (AT_HAND, FRESH)]
        over_copy = f"{result.median(OURS, BOTH) / result.median(COPY, AT_HAND):.2f}"
        theirs = OF_LOG if result.case.kind == PROBABILITIES else CROSS_ENTROPY
        memory = [_memory(result, name, which) for which in PASSES for name in (OURS, theirs)]
        table.add_row(escape(result.case.name), *copies, over_copy, *memory)
    console.print(table)


def _memory(result: Result, name: str, which: str) -> str:
    peak = result.peak(name, which)
    case = result.case
    limited = name == OURS and case.classes >= MANY_CLASSES and not case.soft
    if limited and peak > MEMORY_LIMITS[which]:
        return f"[red]above {peak:.2f}[/]"
    return _number(peak, ".2f")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def print_sweep(console: Console, results: Sequence[Result]) -> None:
    names = {OURS: "ours", CROSS_ENTROPY: "F.ce", COMPILED: "compiled"}
    table = Table(
        title=f"By number of classes, {SWEEP_ELEMENTS} logits: ns per element, and peak memory of "
        f"both passes. F.ce is {CROSS_ENTROPY}.",
        title_justify="left",
    )
    headings = [f"{heading}\n{who}" for heading in (*PASSES, "memory") for who in names.values()]
    for column in ("classes", *headings, "fastest\ncopy"):
        table.add_column(column, justify="right")
    for result in results:
        times = [_number(result.nanoseconds(n, w), ".3g") for w in PASSES for n in names]
        memory = [_memory(result, name, BOTH) for name in names]
        copy = f"{result.fastest_copy:.3g}"
        table.add_row(str(result.case.classes), *times, *memory, copy)
    console.print(table)


def conclusion(results: Sequence[Result]) -> str:
    reached = [r.reaches(peer, which) for r in results for peer in r.peers for which in PASSES]
    return f"{reached.count(True)} of {len(reached) - reached.count(None)} ratios reach their floor"


COLORS = {OURS: "#1f6fb2", CROSS_ENTROPY: "#d1622b", COMPILED: "#5a8f3c"}


def draw_speed(path: Path, results: Sequence[Result], where: str) -> None:
    """Bars of the ratios that have a floor, and of tf.keras's, from 1 on a logarithmic axis."""
    pairs = [
        (result, peer)
        for result in results
        for peer in result.peers
        if peer in result.case.floors or peer == TF_KERAS
    ]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(pairs)), layout="constrained")
    panel = figure.subplots()
    floors = []
    for which, color, aside in zip(PASSES, ("#8fbbe0", COLORS[OURS]), (-0.2, 0.2), strict=True):
        for row, (result, peer) in enumerate(pairs):
            height, ratio = row + aside, result.ratio(peer, which)
            floor = result.case.floor(peer, which)
            if floor is not None:
                floors.append((floor, height - 0.19, height + 0.19))
            label = which if row == 0 else None
            panel.barh(height, ratio - 1, 0.38, left=1, color=color, label=label)
            ends = (ratio, floor or ratio)  # the number stands beyond both
            panel.annotate(
                f"{ratio:.2f}", (max(ends) if ratio >= 1 else min(ends), height),
                (4 if ratio >= 1 else -4, 0), textcoords="offset points", va="center",
                ha="left" if ratio >= 1 else "right", fontsize=8,
            )  # fmt: skip
    if floors:
        panel.vlines(*zip(*floors, strict=True), color="#1b1f24", lw=1.5, label="floor")
    panel.axvline(1, color="#8c959f", lw=1)
    names = [f"{result.case.name}\nagainst {peer}" for result, peer in pairs]
    panel.set_yticks(range(len(pairs)), names, fontsize=9)
    panel.set(xscale="log", xlabel="time of the peer / time of torch_sce")
    panel.set_title(f"Speed-up on {where}", fontsize=11)
    panel.invert_yaxis()
    panel.margins(x=0.1, y=0.01)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")
    if pairs:
        figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_classes(path: Path, results: Sequence[Result], where: str) -> None:
    """Time per element and peak memory, over the number of classes."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    times, peaks = figure.subplots(1, 2)
    classes = [result.case.classes for result in results]
    for name in (name for name in COLORS if any(name in result.seconds for result in results)):
        color = COLORS[name]
        for which, style in zip(PASSES, ("o--", "o-"), strict=True):
            heights = [result.nanoseconds(name, which) for result in results]
            times.plot(classes, heights, style, color=color, ms=4, label=f"{name}, {which}")
        heights = [result.peak(name, BOTH) for result in results]
        peaks.plot(classes, heights, "o-", color=color, ms=4, label=name)
    heights = [result.fastest_copy for result in results]
    times.plot(classes, heights, ":", color="#57606a", label="fastest copy: one read, one write")
    peaks.axhline(1, color="#57606a", ls=":", label="the gradient alone")
    times.set(yscale="log", ylabel="time per element [ns]")
    peaks.set_ylabel("peak memory of both passes [size of the predictions]")
    peaks.set_ylim(bottom=0)
    for panel in (times, peaks):
        panel.set(xscale="log", xlabel=f"classes; {SWEEP_ELEMENTS} logits in all")
        panel.set_xlim(min(classes) / 1.5, max(classes) * 1.5)
        panel.grid(color="#e5e8eb", lw=0.7)
        panel.legend(frameon=False, fontsize=9)
    times.yaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"float32 logits on {where}", fontsize=11)
    figure.savefig(path, dpi=130)


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found[1] if found else model
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    about = {"cpu": model, "cores": os.cpu_count(), "memory in bytes": memory}
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about | {"platform": platform.platform()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch-sce", "torch", "numpy", "keras", "tensorflow", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit code is 0 whatever the ratios are, 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.worker:
        tf_keras_worker()
        return 0
    _check_usage(parser, options)
    torch.set_num_threads(options.threads)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "options": vars(options),
             "machine": machine(options.device), "versions": versions()}  # fmt: skip
    chosen = CASES if options.device == "cpu" else CUDA_CASES
    cases = measure_all(chosen, options.peers, options)
    if TF_KERAS in options.peers:
        about["versions"] |= measure_tf_keras(cases, options)
    sweep = measure_all(SWEEP, [name for name in SWEEP_PEERS if name in options.peers], options)
    options.json.write_text(_to_json(about | {"cases": cases, "sweep": sweep}))

    console = Console()
    if not console.is_terminal:
        console.width = 130  # what reads it does not break lines
    print_times(console, cases)
    print_memory(console, cases)
    print_sweep(console, sweep)
    where = f"{about['machine'].get('gpu', about['machine']['cpu'])}, {options.threads} threads"
    draw_speed(options.plots / "benchmark-speed.png", cases, where)
    draw_classes(options.plots / "benchmark-classes.png", sweep, where)
    console.print(conclusion(cases), style="bold", highlight=False)
    return 0


def measure_all(
    cases: Sequence[Case], peers: Sequence[str], options: argparse.Namespace
) -> list[Result]:
    chosen = [case for case in cases if case.quick or not options.quick]
    in_process = [name for name in PEERS if name in peers]
    results = []
    for number, case in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {case.name}", file=sys.stderr, flush=True)
        effort = QUICK if options.quick else FULL
        results.append(measure(case, in_process, options.device, effort))
    return results


def _to_json(everything: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else asdict(value)

    return json.dumps(everything, default=plain, indent=1) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Times torch_sce beside other implementations and measures the memory of both.",
        epilog="Exit code: 0, or 2 for wrong usage.",
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--quick", action="store_true", help="fewer shapes, fewer rounds, no tf.keras")
    add(
        "--peers", metavar="NAME[,NAME]", default=NAMES, type=_names,
        help=f"whom to measure ours beside; all there are: {', '.join(NAMES)}",
    )  # fmt: skip
    add("--threads", type=int, default=2, help="of the CPU (%(default)s)")
    add("--json", type=Path, metavar="FILE", default=Path("benchmark.json"), help="(%(default)s)")
    add("--plots", type=Path, metavar="FOLDER", default=Path("."),
        help="for benchmark-speed.png and benchmark-classes.png (%(default)s)")  # fmt: skip
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            listed = "\n  ".join(NAMES)
            raise argparse.ArgumentTypeError(f"{name!r} is none of these:\n  {listed}")
    return names


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What argparse cannot check by itself; ends the program with exit code 2."""
    check_device(parser, options.device)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: must be at least 1")
    if not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.json.is_dir():
        parser.error(f"--json {options.json}: is a folder")
    if not options.plots.is_dir():
        parser.error(f"--plots {options.plots}: there is no such folder")


if __name__ == "__main__":
    sys.exit(main())
