"""The view of an explanation: as text, as HTML in a notebook, and as a picture."""

import html
import textwrap
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ..linear import LinearSparseCategoricalCrossentropy
from ..losses import CategoricalCrossentropy
from .batch import Finding, Loss, in_words

SHOWN = 12  # a longer batch is summarised by this many positions
LARGEST = 8  # of them those with the largest losses
CELL = "style='text-align:right;padding:.1em .7em'"
WIDTH = 120  # characters of a line in a picture
BINS = 40
MOST_CLASSES = 25
BLUE, ORANGE, NEUTRAL, WRONG, RIGHT = "#1f6fb2", "#d1622b", "#57606a", "#c62828", "#2f7d4f"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` returns: print it, show it in a notebook, or look at its parts.

    Attributes:
        loss: the loss that was explained.
        value: what it returns for the batch, on the host; None if it raises.
        error: what it raises, "" if it returns.
        positions: for each position what the table shows, in arrays of the losses' shape: "label",
            "probability" (of the label, as the loss sees it), "rank" (1: the largest prediction is
            the label's), "loss" in nats, "weight", "mask", and "contribution" to the value. NaN
            for a position that does not count and is not read. Empty if the loss raises.
        numerator, denominator: the value is their quotient; None if there is no reduction or the
            loss raises.
        findings: what looks wrong, and what is good to know. Each has a `name`, the `evidence`,
            the `fix`, and `is_wrong`.
        arguments: what each argument is and how it is treated, in words.
        added, divided_by: what the numerator is the sum of, and what the denominator is, in words.
        classes: the number of classes, 0 if the loss raises.
    """

    loss: Loss | LinearSparseCategoricalCrossentropy
    value: Tensor | None = None
    error: str = ""
    positions: dict[str, np.ndarray] = field(default_factory=dict)
    numerator: float | None = None
    denominator: float | None = None
    findings: tuple[Finding, ...] = ()
    arguments: tuple[str, ...] = ()
    added: str = ""
    divided_by: str = ""
    classes: int = 0

    def __str__(self) -> str:
        lines = [self._headline(), *(f"  {line}" for line in self.arguments), ""]
        if self.positions:
            lines += [*_columns(self._table()), *self._summary(), "", *self._steps(), ""]
        lines += self._verdict()
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, *rows = self._table() if self.positions else [[]]
        cells = "".join(f"<th {CELL}>{html.escape(name)}</th>" for name in header)
        body = "".join(
            "<tr>" + "".join(f"<td {CELL}>{cell}</td>" for cell in row) + "</tr>" for row in rows
        )
        found = "".join(
            f"<p style='border-left:4px solid {'#c62828' if f.is_wrong else '#8c959f'};"
            f"padding-left:.6em'><b>{html.escape(f.name)}</b><br>{html.escape(f.evidence)}<br>"
            f"<i>{html.escape(f.fix)}</i></p>"
            for f in self.findings
        )
        if not any(f.is_wrong for f in self.findings):
            found = ("" if self.error else "<p>Nothing looks wrong.</p>") + found
        about = "<br>".join(map(html.escape, self.arguments))
        steps = "\n".join(self._steps()) if self.positions else ""
        summary = "".join(f"<p>{html.escape(line)}</p>" for line in self._summary())
        return (
            f"<p><b>{html.escape(self._headline())}</b><br>{about}</p>"
            f"<table><tr>{cells}</tr>{body}</table>{summary}"
            f"<pre>{html.escape(steps)}</pre>{found}"
        )

    def plot(self) -> Any:
        """The distribution of the losses, what each class adds to the value, and the findings.

        The first picture has a line where a model that guesses would be, log C. A few positions are
        shown one by one in the second. If the loss raises, the figure has only the findings.

        Needs matplotlib.

        Returns:
            A `matplotlib.figure.Figure`. A notebook shows it at the end of a cell, and
            `.savefig(FILE)` writes it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib import figure as drawing
            from matplotlib import layout_engine
        except ModuleNotFoundError as missing:
            if missing.name != "matplotlib":
                raise
            message = "plot() needs matplotlib: pip install matplotlib"
            raise ModuleNotFoundError(message, name=missing.name) from missing

        lines = self._shown_findings()
        has_panels = bool(self.positions) and bool(self._counted().any())
        below = 0.25 + 0.17 * len(lines)  # inches
        height = below + (3.6 if has_panels else 0.2)
        rect = (0, below / height, 1, 1 - below / height)
        layout = layout_engine.ConstrainedLayoutEngine(rect=rect)
        figure = drawing.Figure(figsize=(9, height), layout=layout)
        if has_panels:
            left, right = figure.subplots(1, 2)
            self._plot_losses(left)
            self._plot_contributions(right)
        for index, (line, color) in enumerate(lines):
            y = (below - 0.1 - 0.17 * index) / height
            figure.text(0.015, y, line, color=color, fontsize=9, va="top", parse_math=False)
        return figure

    def _shown_findings(self) -> list[tuple[str, str]]:
        """Lines for a picture, and their colours."""
        shown = []
        if self.error:
            shown += [(line, WRONG) for line in textwrap.wrap(self._headline(), WIDTH)]
        for finding in self.findings:
            color = WRONG if finding.is_wrong else NEUTRAL
            shown += [(line, color) for line in textwrap.wrap(str(finding), WIDTH)]
        nothing = [("Nothing looks wrong.", RIGHT)]
        return shown if self.error or any(f.is_wrong for f in self.findings) else nothing + shown

    def _plot_losses(self, panel: Any) -> None:
        losses = self.positions["loss"][self._counted()]
        seen = losses[np.isfinite(losses)]
        lost = len(losses) - len(seen)
        guess = np.log(self.classes)
        top = max(float(seen.max(initial=0.0)), 1.2 * guess, 0.1)
        panel.hist(seen, bins=BINS, range=(min(float(seen.min(initial=0.0)), 0.0), top), color=BLUE)
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.axvline(guess, color=NEUTRAL, ls="--", lw=1.2, label=f"guessing, log {self.classes}")
        if len(seen):
            plain = "unweighted " if (self.positions["weight"] != 1).any() else ""
            mean = seen.mean()
            panel.axvline(mean, color=ORANGE, lw=1.5, label=f"{plain}mean, {mean:.4g}")
        panel.set(
            xlabel="loss of a position [nats]", ylabel="positions",
            title=f"{len(losses)} positions that count" + (f", {lost} not finite" if lost else ""),
        )  # fmt: skip
        panel.margins(y=0.25)  # for the legend
        panel.legend(loc="upper right", edgecolor="none", framealpha=0.9, fontsize=9)

    def _plot_contributions(self, panel: Any) -> None:
        """Of each position if there are few, otherwise of each class."""
        counted = self._counted()
        parts, labels = (self.positions[key][counted] for key in ("contribution", "label"))
        if len(parts) <= SHOWN:
            names = [in_words(place) for place in np.argwhere(counted).tolist()]
            heights, share = parts, np.full(len(parts), parts.mean())
            kind, evenly = "position", "their mean"
        else:
            labels, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
            heights = np.bincount(places.ravel(), parts)
            share = counts * (parts.sum() / len(parts))
            order = np.sort(np.argsort(-np.nan_to_num(np.abs(heights), nan=np.inf))[:MOST_CLASSES])
            names = [f"{label:g}" for label in labels[order]]
            heights, share = heights[order], share[order]
            kind, evenly = "class", "if all positions added the same"
            if len(labels) > MOST_CLASSES:
                kind = f"class, the {MOST_CLASSES} of {len(labels)} that add most"
        panel.bar(names, np.nan_to_num(heights, nan=0, posinf=0, neginf=0), color=BLUE)
        panel.plot(names, share, "_", color=ORANGE, ms=9, mew=2, label=evenly)
        for name, height in zip(names, heights, strict=True):
            if not np.isfinite(height):
                panel.annotate(f"{height}", (name, 0), ha="center", color=WRONG)
        panel.tick_params(axis="x", rotation=90 if len(names) > SHOWN else 0)
        if kind == "position" and self.positions["loss"].ndim > 1:
            panel.tick_params(axis="x", rotation=45)
        panel.set(xlabel=kind, ylabel="contribution to the value [nats]",
                  title=f"What each {kind.split(',')[0]} adds")  # fmt: skip
        panel.margins(y=0.25)  # for the legend
        panel.legend(loc="upper right", edgecolor="none", framealpha=0.9, fontsize=9)

    def _counted(self) -> np.ndarray:
        return self.positions["mask"] != 0

    def _headline(self) -> str:
        if self.value is None:
            kind, _, message = self.error.partition(": ")
            said = any(finding.evidence == message for finding in self.findings)
            return f"{self.loss!r} raises {kind if said else self.error}"
        shown = (
            f"{self.value.item():.7g}" if self.value.ndim == 0 else "one value for each position"
        )
        return f"{self.loss!r} gives {shown}"

    def _table(self) -> list[list[str]]:
        """The header and a row for each position that is shown."""
        keys = {"label": "label", "probability": "p(label)", "rank": "rank", "loss": "loss",
                "weight": "weight", "mask": "mask", "contribution": "contribution"}  # fmt: skip
        if not isinstance(self.loss, CategoricalCrossentropy) and not self.loss.label_smoothing:
            keys["loss"] = "-log p"
        for key in ("weight", "mask"):
            if (self.positions[key] == 1).all():
                del keys[key]
        rows = [["position", *keys.values()]]
        gap = LARGEST if self.positions["loss"].size > SHOWN else None
        for index, place in enumerate(self._places()):
            if index == gap:
                rows.append(["...", *("" for _ in keys)])
            values = {key: self.positions[key][place] for key in keys}
            hidden = () if self._counted()[place] else ("probability", "rank", "loss")
            shown = ("-" if key in hidden else f"{value:.5g}" for key, value in values.items())
            rows.append([in_words(place), *shown])
        return rows

    def _places(self) -> list[tuple[int, ...]]:
        """All positions of a small batch, otherwise those with the largest and smallest losses."""
        losses, counted = self.positions["loss"], self._counted()
        if losses.size <= SHOWN:
            return list(np.ndindex(losses.shape))
        sizes = np.where(counted, np.nan_to_num(losses, nan=np.inf), -1)
        order = np.argsort(-sizes, axis=None, kind="stable")[: counted.sum()]
        chosen = [*order[:LARGEST], *order[LARGEST:][LARGEST - SHOWN :]]
        return [tuple(map(int, np.unravel_index(i, losses.shape))) for i in chosen]

    def _summary(self) -> list[str]:
        losses = self.positions["loss"] if self.positions else np.empty(0)
        if losses.size <= SHOWN:
            return []
        shown, seen = len(self._places()), losses[~np.isnan(losses)]
        lines = [f"... {losses.size - shown} of {losses.size} positions are not shown."]
        if seen.size:
            values = np.quantile(seen, QUANTILES, method="inverted_cdf")
            parts = (f"{q:.0%}: {v:.4g}" for q, v in zip(QUANTILES, values, strict=True))
            kind = "that count" if seen.size == self._counted().sum() else "that are numbers"
            lines.append(f"Quantiles of the {seen.size} losses {kind}: {', '.join(parts)}.")
        return lines

    def _steps(self) -> list[str]:
        """From losses to the value."""
        if self.numerator is None or self.denominator is None or self.value is None:
            return [
                f"value        {self.added}, for each position by itself: there is no reduction"
            ]
        named = f'numerator / denominator, reduction "{self.loss.reduction}"'
        if self.denominator == 0:
            named += "; a division by 0 gives 0"
        return [
            f"numerator    {self.numerator:<14.7g} the sum of {self.added}",
            f"denominator  {self.denominator:<14.7g} {self.divided_by}",
            f"value        {self.value.item():<14.7g} {named}",
        ]

    def _verdict(self) -> list[str]:
        wrong = [finding for finding in self.findings if finding.is_wrong]
        notes = [finding for finding in self.findings if not finding.is_wrong]
        lines = [] if wrong or self.error else ["Nothing looks wrong."]
        for title, found in (("Looks wrong:", wrong), ("Good to know:", notes)):
            lines += [title] if found else []
            for finding in found:
                lines += textwrap.wrap(
                    str(finding), 100, initial_indent="- ", subsequent_indent="  "
                )
        return lines


def _columns(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]
