"""Errors against float64, ours and Keras's, as pictures."""

import numpy as np

from .page import Picture, picture, pyplot
from .results import Results
from .tally import PARTS, WHO

EXACT = 0.02  # ulps drawn for 0 on a logarithmic axis
COLORS = {"ours": "#1f6fb2", "Keras": "#d1622b"}


def pictures(results: Results) -> list[Picture]:
    """None if no loss is in float32: only those are plotted."""
    if not all(results.tally.errors("ours", part).size for part in PARTS):
        return []
    found = [_curves(results)] if results.alone else [_scatter(results), _curves(results)]
    pyplot().close("all")
    return found


def _scatter(results: Results) -> Picture:
    """Our error over Keras's."""
    tally, other = results.tally, results.profile.keras
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for panel, part in zip(panels, PARTS, strict=True):
        keys = [f"{who}, {part}" for who in WHO]
        found = [p.ulps for p in tally.points if all(key in p.ulps for key in keys)]
        ours, keras = (np.maximum([ulps[key] for ulps in found], EXACT) for key in keys)
        limit = 2 * max(ours.max(initial=1), keras.max(initial=1))
        panel.fill_between([EXACT / 2, limit], [EXACT / 2, limit], EXACT / 2, color="#eef5fb")
        panel.plot([EXACT / 2, limit], [EXACT / 2, limit], color="#8c959f", lw=1)
        panel.scatter(keras, ours, s=9, alpha=0.35, color=COLORS["ours"], edgecolors="none")
        nearer, farther = (tally.nearer[key] for key in keys)
        panel.text(0.97, 0.05, f"ours nearer: {nearer}", transform=panel.transAxes, ha="right")
        panel.text(0.03, 0.93, f"{other} nearer: {farther}", transform=panel.transAxes)
        total = tally.errors("ours", part).size
        plotted = "" if len(found) == total else f", {len(found)} plotted"
        panel.set(
            xscale="log", yscale="log", xlim=(EXACT / 2, limit), ylim=(EXACT / 2, limit),
            xlabel=f"error of {other} [ulp]", ylabel="error of torch_sce [ulp]",
            title=f"{part}: {total} cases{plotted} ({EXACT} means exact)",
        )  # fmt: skip
    return picture(figure, "error of both against float64")


def _curves(results: Results) -> Picture:
    """How many cases are below an error; the gradient's by number of classes."""
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for who, aside in zip(results.who, (0.96, 1.04), strict=False):
        label = {"ours": "torch_sce", "Keras": results.profile.keras}[who]
        for part, style in zip(PARTS, ("--", "-"), strict=True):
            errors, counts = np.unique(results.tally.errors(who, part), return_counts=True)
            share = counts.cumsum() / max(counts.sum(), 1)
            panels[0].step(np.maximum(errors, EXACT), share, style, color=COLORS[who],
                           where="post", label=f"{label}, {part}")  # fmt: skip
        key = f"{who}, gradient"
        found = [point for point in results.tally.points if key in point.ulps]
        classes = [aside * point.classes for point in found]
        heights = [max(point.ulps[key], EXACT) for point in found]
        panels[1].scatter(classes, heights, s=9, alpha=0.4, color=COLORS[who], label=label,
                          edgecolors="none")  # fmt: skip
    panels[0].set(
        xscale="log", title="All float32 cases", xlabel="error [ulp]",
        ylabel="share of cases with at most this error",
    )  # fmt: skip
    panels[1].set(
        xscale="log", yscale="log", title="Gradient, by number of classes",
        xlabel="classes", ylabel="error [ulp]",
    )  # fmt: skip
    for panel in panels:
        panel.legend(frameon=False, fontsize=9)
    return picture(figure, "share of cases below an error; error by number of classes")
