"""What the benchmark prints and writes: tables and JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import (
    COMPILED,
    CROSS_ENTROPY,
    HEAD,
    LINEAR,
    LOGITS,
    OF_LOG,
    OURS,
    PROBABILITIES,
    SWEEP_ELEMENTS,
)
from .measuring import BOTH, FORWARD, PASSES
from .results import Result

# Peak memory over the predictions, in units of their size, where there are many classes and
# labels are integers.
MEMORY_LIMITS = {FORWARD: 0.05, BOTH: 1.05}
MANY_CLASSES = 1000
UNFUSED = {LOGITS: CROSS_ENTROPY, PROBABILITIES: OF_LOG, HEAD: LINEAR}  # whose memory is shown
NOTICED = 0.1  # cores that others use; from here on a table says so


def to_json(everything: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else asdict(value)

    return json.dumps(everything, default=plain, indent=1) + "\n"


def print_all(where: str, cases: Sequence[Result], sweep: Sequence[Result]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 130  # a file or a pipe has no line width
    console.print(where, style="bold", highlight=False)
    print_times(console, cases)
    print_memory(console, [result for result in cases if not result.case.busy])
    print_sweep(console, sweep)
    console.print(conclusion(cases), style="bold", highlight=False)


def print_times(console: Console, results: Sequence[Result]) -> None:
    table = Table(
        title="Time in ms: median \\[quartiles]. Ratio: peer / ours (its floor); forward is under "
        "grad mode, both is with the backward pass. A move reads or writes the predictions once, "
        "as fast as a copy does; fresh: into new memory, with its page faults. Busy cores: beside "
        "a busy process on each. tf.keras ran after the others.",
        title_justify="left",
    )
    for column in ("", *PASSES, "ratio, forward", "ratio, both"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for result in results:
        table.add_section()
        used = 0.0 if result.case.busy else result.others or 0.0
        others = f"[red]others use {used:.1f} cores[/]" if used >= NOTICED else ""
        table.add_row(f"[bold]{escape(result.case.name)}[/]", others)
        for name in (OURS, *result.peers):
            times = [time_cell(result.seconds[name][which]) for which in PASSES]
            ratios = [ratio_cell(result, name, which) for which in PASSES if name != OURS]
            table.add_row(f"  {name}", *map(escape, times), *ratios)
        for name in result.missing:
            table.add_row(f"  {name}", "missing", "missing")
    console.print(table)
    for name, why in dict.fromkeys(item for result in results for item in result.missing.items()):
        console.print(f"Missing: {name} ({why})", markup=False, highlight=False, soft_wrap=True)


def time_cell(seconds: Sequence[float]) -> str:
    low, median, high = (f"{1e3 * x:.4g}" for x in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return f"{median} [{low} - {high}]"


def ratio_cell(result: Result, peer: str, which: str) -> str:
    text, floor = f"{result.ratio(peer, which):.2f}", result.case.floor(peer, which)
    if floor is None:
        return text
    return f"{text} ({floor})" if result.reaches(peer, which) else f"[red]below {text} ({floor})[/]"


def print_memory(console: Console, results: Sequence[Result]) -> None:
    limits = ", ".join(f"{which} {limit}" for which, limit in MEMORY_LIMITS.items())
    table = Table(
        title="Peak memory in units of the predictions' size, without them; forward is without "
        "grad. Of a head: in units of the logits' size, without inputs and gradients; and for "
        f"F.cross_entropy {LINEAR}. Our limits, {limits}, are for {MANY_CLASSES} classes or more, "
        "integer labels and given predictions. A dash is not measured.",
        title_justify="left",
    )
    table.add_column("", overflow="fold")
    for column in (f"{which},\n{who}" for which in PASSES for who in ("ours", "F.cross_entropy")):
        table.add_column(column, justify="right")
    for result in results:
        theirs = UNFUSED[result.case.kind]
        memory = [memory_cell(result, name, which) for which in PASSES for name in (OURS, theirs)]
        table.add_row(escape(result.case.name), *memory)
    console.print(table)


def memory_cell(result: Result, name: str, which: str) -> str:
    peak, case = result.peak(name, which), result.case
    limited = name == OURS and case.kind != HEAD and case.classes >= MANY_CLASSES and not case.soft
    if limited and peak > MEMORY_LIMITS[which]:
        return f"[red]above {peak:.2f}[/]"
    return number_cell(peak, ".2f")


def number_cell(value: float, form: str) -> str:
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
        times = [number_cell(result.nanoseconds(n, w), ".3g") for w in PASSES for n in names]
        memory = [memory_cell(result, name, BOTH) for name in names]
        copy = f"{result.fastest_copy:.3g}"
        table.add_row(str(result.case.classes), *times, *memory, copy)
    console.print(table)


def conclusion(results: Sequence[Result]) -> str:
    reached = [r.reaches(peer, which) for r in results for peer in r.peers for which in PASSES]
    return f"{reached.count(True)} of {len(reached) - reached.count(None)} ratios reach their floor"
