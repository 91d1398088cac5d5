"""The view of an explanation: as text, as HTML in a notebook, and as a plot."""

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
CELL = "style='text-align:right;padding:.1em .7em'"
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

    def plot(self) -> tuple[Any, Any]:
        """Two pictures: the losses on the curve -log p, and what each adds to the result.

        Needs matplotlib.

        Returns:
            The figure and its two axes.

        Raises:
            ValueError: the loss raises for this batch, or nothing counts in it.
        """
        if not self.positions or not self._counted().any():
            reason = self.error or "no position counts"
            raise ValueError(f"there is nothing to plot: {reason}")
        try:
            from matplotlib import pyplot as plt
        except ModuleNotFoundError as missing:
            if missing.name != "matplotlib":
                raise
            message = "plot() needs matplotlib: pip install matplotlib"
            raise ModuleNotFoundError(message, name=missing.name) from missing

        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        self._plot_losses(axes[0])
        self._plot_contributions(axes[1])
        return figure, axes

    def _plot_losses(self, panel: Any) -> None:
        counted = self._counted()
        p, losses = (self.positions[key][counted] for key in ("probability", "loss"))
        seen = np.isfinite(losses)
        lowest = max(min(float(p[seen].min(initial=1)), 0.05), 1e-30)
        curve = np.geomspace(lowest, 1, 200)
        panel.plot(curve, -np.log(curve), color="#8c959f", lw=1, label="-log p")
        panel.scatter(np.maximum(p[seen], lowest), losses[seen], s=18 if seen.sum() < 99 else 7,
                      alpha=0.9 if seen.sum() < 99 else 0.3, color="#1f6fb2", zorder=3,
                      label="positions")  # fmt: skip
        mean = losses[seen].mean() if seen.any() else np.nan
        plain = "unweighted " if (self.positions["weight"] != 1).any() else ""
        panel.axhline(mean, color="#d1622b", lw=1.2, label=f"their {plain}mean, {mean:.4g}")
        lost = int((~seen).sum())
        panel.set(
            xscale="log", xlabel="probability of the label", ylabel="loss of the position [nats]",
            title=f"{len(seen)} positions that count" + (f", {lost} not finite" if lost else ""),
        )  # fmt: skip
        panel.legend(frameon=False, fontsize=9)

    def _plot_contributions(self, panel: Any) -> None:
        parts = self.positions["contribution"][self._counted()]
        if len(parts) <= SHOWN:
            names = [in_words(place) for place in np.argwhere(self._counted()).tolist()]
            panel.bar(names, parts, color="#1f6fb2")
            panel.tick_params(axis="x", rotation=45 if self.positions["loss"].ndim > 1 else 0)
            for name, part in zip(names, parts, strict=True):
                if not np.isfinite(part):
                    panel.annotate(f"{part}", (name, 0), ha="center", color="#c62828")
            panel.set(xlabel="position", ylabel="contribution to the value [nats]",
                      title="What each position adds")  # fmt: skip
            return
        sizes = np.sort(np.abs(parts[np.isfinite(parts)]))[::-1]
        share = np.cumsum(sizes) / max(sizes.sum(), np.finfo(float).tiny)
        first = share[max(len(share) // 10, 1) - 1] if len(share) else 0
        panel.plot(np.arange(1, len(share) + 1) / len(share), share, color="#1f6fb2")
        panel.plot([0, 1], [0, 1], color="#8c959f", lw=1)
        panel.set(
            xlabel="share of the positions, the largest first", ylabel="share of the value",
            title=f"The largest tenth makes {first:.0%}", xlim=(0, 1), ylim=(0, 1.02),
        )  # fmt: skip

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
        for place in self._places():
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
        chosen = [*order[: SHOWN - 4], *order[SHOWN - 4 :][-4:]]
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
