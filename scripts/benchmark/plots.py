"""What the benchmark draws: speed-ups, and time and memory over numbers of classes and rows."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .cases import (
    COMPILED,
    CROSS_ENTROPY,
    FUSED,
    HEAD,
    HEAD_CLASSES,
    HEAD_ROWS,
    LINEAR,
    OURS,
    PRODUCTS,
    SWEEP_ELEMENTS,
    TF_KERAS,
)
from .measuring import BOTH, FORWARD, PASSES
from .results import Result

COLORS = {OURS: "#1f6fb2", CROSS_ENTROPY: "#d1622b", COMPILED: "#5a8f3c"}
HEAD_COLORS = {OURS: "#1f6fb2", LINEAR: "#d1622b", FUSED: "#5a8f3c", PRODUCTS: "#57606a"}


def draw_speed(path: Path, results: Sequence[Result], where: str) -> None:
    """Bars of the ratios that have a floor, and of tf.keras's, from 1 on a logarithmic axis.

    Without busy cases; of heads both passes only.
    """
    pairs = [
        (result, peer)
        for result in results
        for peer in result.peers
        if not result.case.busy and (peer in result.case.floors or peer == TF_KERAS)
    ]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(pairs)), layout="constrained")
    panel = figure.subplots()
    floors = []
    for which, color, aside in zip(PASSES, ("#8fbbe0", COLORS[OURS]), (-0.2, 0.2), strict=True):
        for row, (result, peer) in enumerate(pairs):
            if result.case.kind == HEAD and which == FORWARD:
                continue  # ours computes the gradients, too
            height, ratio = row + aside, result.ratio(peer, which)
            floor = result.case.floor(peer, which)
            if floor:
                floors.append((floor, height - 0.19, height + 0.19))
            label = which if row == 0 else None
            panel.barh(height, ratio - 1, 0.38, left=1, color=color, label=label)
            write_ratio(panel, height, ratio, floor or ratio)
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


def write_ratio(panel: Axes, height: float, ratio: float, floor: float) -> None:
    """Beyond the end of the bar and the floor."""
    right = ratio >= 1
    panel.annotate(
        f"{ratio:.2f}", (max(ratio, floor) if right else min(ratio, floor), height),
        (4 if right else -4, 0), textcoords="offset points", va="center",
        ha="left" if right else "right", fontsize=8,
    )  # fmt: skip


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


def draw_heads(path: Path, results: Sequence[Result], where: str) -> None:
    """Time and peak memory of a linear head, over the number of classes and of rows."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    sweeps = (
        (f"classes; {HEAD_ROWS} rows", 1, [r for r in results if r.case.shape[0] == HEAD_ROWS]),
        (
            f"rows; {HEAD_CLASSES} classes",
            0,
            [r for r in results if r.case.classes == HEAD_CLASSES],
        ),
    )
    for (times, peaks), (label, axis, found) in zip(panels.T, sweeps, strict=True):
        found = sorted(found, key=lambda result: result.case.shape[axis])
        sizes = [result.case.shape[axis] for result in found]
        for name, color in HEAD_COLORS.items():
            seconds = [result.median(name, BOTH) for result in found]
            if not all(map(math.isnan, seconds)):
                line = "o:" if name == PRODUCTS else "o-"
                times.plot(sizes, [1e3 * s for s in seconds], line, color=color, ms=4, label=name)
            memory = [mebibytes(result, name) for result in found]
            if not all(map(math.isnan, memory)):
                peaks.plot(sizes, memory, "o-", color=color, ms=4, label=name)
        times.set(xscale="log", yscale="log", ylabel="time of both passes [ms]")
        peaks.set(
            yscale="log", xlabel=label, ylabel="peak memory beyond inputs and gradients [MiB]"
        )
    for panel in panels.flat:
        panel.grid(color="#e5e8eb", lw=0.7)
        if panel.lines:
            panel.legend(frameon=False, fontsize=9)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    width = results[0].case.width if results else 0
    figure.suptitle(f"float32 linear heads of {width} features on {where}", fontsize=11)
    figure.savefig(path, dpi=130)


def mebibytes(result: Result, name: str) -> float:
    return result.peak(name, BOTH) * math.prod(result.case.shape) * 4 / 2**20
