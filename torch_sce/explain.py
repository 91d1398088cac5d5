"""What the loss did with one batch, step by step, and what looks wrong in it.

    from a sample to its loss:     p = the probability of its label,  loss = -log p
    from losses to the result:     numerator = sum of factor * loss
                                   result = numerator / denominator
    from a sample to the result:   contribution = factor * loss / denominator

So the contributions add up to the result. The factor is made of the weight and the mask;
`reduction` has the rules for it and for the denominator, `diagnosis` those for what looks wrong.
"""

import html
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .diagnosis import Batch, Finding, Loss, batch_of, findings, in_words
from .functional import (
    CLIP,
    ArrayLike,
    class_numbers,
    sparse_categorical_crossentropy,
    to_tensor,
)
from .kernels import is_traced
from .losses import CategoricalCrossentropy, SparseCategoricalCrossentropy, _Loss
from .options import family_class
from .reduction import MEANS, fraction, reduce

SHOWN = 12  # a longer batch is summarised by so many samples
CELL = "style='text-align:right;padding:.1em .7em'"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` returns: print it, show it in a notebook, or look at its parts.

    Attributes:
        loss: the loss that was explained.
        value: what it returns for the batch, on the host; None if it raises.
        error: what it raises, "" if it returns.
        samples: for each sample what the table shows, in arrays of the losses' shape: "label",
            "probability" (of the label, as the loss sees it), "rank" (1: the largest prediction is
            the label's), "loss" in nats, "weight", "mask", and "contribution" to the value. NaN
            stands where a sample does not count and is not looked at. Empty if the loss raises.
        numerator, denominator: the value is their quotient; None if there is no reduction or the
            loss raises.
        findings: what looks wrong, and what is good to know. Each has a `name`, the `evidence`,
            the `mend`, and `is_wrong`.
        arguments: what each argument is and is taken for, in words.
        added, divided_by: what the numerator is the sum of, and what the denominator is, in words.
    """

    loss: Loss
    value: Tensor | None = None
    error: str = ""
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    numerator: float | None = None
    denominator: float | None = None
    findings: tuple[Finding, ...] = ()
    arguments: tuple[str, ...] = ()
    added: str = ""
    divided_by: str = ""

    def __str__(self) -> str:
        lines = [self._headline(), *(f"  {line}" for line in self.arguments), ""]
        if self.samples:
            lines += [*_columns(self._table()), *self._summary(), "", *self._steps(), ""]
        lines += self._verdict()
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, *rows = self._table() if self.samples else [[]]
        cells = "".join(f"<th {CELL}>{html.escape(name)}</th>" for name in header)
        body = "".join(
            "<tr>" + "".join(f"<td {CELL}>{cell}</td>" for cell in row) + "</tr>" for row in rows
        )
        found = "".join(
            f"<p style='border-left:4px solid {'#c62828' if f.is_wrong else '#8c959f'};"
            f"padding-left:.6em'><b>{html.escape(f.name)}</b><br>{html.escape(f.evidence)}<br>"
            f"<i>{html.escape(f.mend)}</i></p>"
            for f in self.findings
        )
        if not any(f.is_wrong for f in self.findings):
            found = ("" if self.error else "<p>Nothing looks wrong.</p>") + found
        about = "<br>".join(map(html.escape, self.arguments))
        steps = "\n".join(self._steps()) if self.samples else ""
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
        if not self.samples or not self._counted().any():
            reason = self.error or "no sample counts"
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
        p, losses = (self.samples[key][counted] for key in ("probability", "loss"))
        seen = np.isfinite(losses)
        lowest = max(min(float(p[seen].min(initial=1)), 0.05), 1e-30)
        curve = np.geomspace(lowest, 1, 200)
        panel.plot(curve, -np.log(curve), color="#8c959f", lw=1, label="-log p")
        panel.scatter(np.maximum(p[seen], lowest), losses[seen], s=18 if seen.sum() < 99 else 7,
                      alpha=0.9 if seen.sum() < 99 else 0.3, color="#1f6fb2", zorder=3,
                      label="samples")  # fmt: skip
        mean = losses[seen].mean() if seen.any() else np.nan
        plain = "unweighted " if (self.samples["weight"] != 1).any() else ""
        panel.axhline(mean, color="#d1622b", lw=1.2, label=f"their {plain}mean, {mean:.4g}")
        lost = int((~seen).sum())
        panel.set(
            xscale="log", xlabel="probability of the label", ylabel="loss of the sample [nats]",
            title=f"{len(seen)} samples that count" + (f", {lost} not finite" if lost else ""),
        )  # fmt: skip
        panel.legend(frameon=False, fontsize=9)

    def _plot_contributions(self, panel: Any) -> None:
        parts = self.samples["contribution"][self._counted()]
        if len(parts) <= SHOWN:
            names = [in_words(place) for place in np.argwhere(self._counted()).tolist()]
            panel.bar(names, parts, color="#1f6fb2")
            panel.tick_params(axis="x", rotation=45 if self.samples["loss"].ndim > 1 else 0)
            for name, part in zip(names, parts, strict=True):
                if not np.isfinite(part):
                    panel.annotate(f"{part}", (name, 0), ha="center", color="#c62828")
            panel.set(xlabel="sample", ylabel="contribution to the value [nats]",
                      title="What each sample adds")  # fmt: skip
            return
        sizes = np.sort(np.abs(parts[np.isfinite(parts)]))[::-1]
        share = np.cumsum(sizes) / max(sizes.sum(), np.finfo(float).tiny)
        first = share[max(len(share) // 10, 1) - 1] if len(share) else 0
        panel.plot(np.arange(1, len(share) + 1) / len(share), share, color="#1f6fb2")
        panel.plot([0, 1], [0, 1], color="#8c959f", lw=1)
        panel.set(
            xlabel="share of the samples, the largest first", ylabel="share of the value",
            title=f"The largest tenth makes {first:.0%}", xlim=(0, 1), ylim=(0, 1.02),
        )  # fmt: skip

    def _counted(self) -> np.ndarray:
        return self.samples["mask"] != 0

    def _headline(self) -> str:
        if self.value is None:
            kind, _, message = self.error.partition(": ")
            said = any(finding.evidence == message for finding in self.findings)
            return f"{self.loss!r} raises {kind if said else self.error}"
        shown = f"{self.value.item():.7g}" if self.value.ndim == 0 else "one value for each sample"
        return f"{self.loss!r} gives {shown}"

    def _table(self) -> list[list[str]]:
        """The header and a row for each sample that is shown."""
        keys = {"label": "label", "probability": "p(label)", "rank": "rank", "loss": "loss",
                "weight": "weight", "mask": "mask", "contribution": "contribution"}  # fmt: skip
        if isinstance(self.loss, SparseCategoricalCrossentropy):
            keys["loss"] = "-log p"
        for key in ("weight", "mask"):
            if (self.samples[key] == 1).all():
                del keys[key]
        rows = [["sample", *keys.values()]]
        for place in self._places():
            values = {key: self.samples[key][place] for key in keys}
            hidden = () if self._counted()[place] else ("probability", "rank", "loss")
            shown = ("-" if key in hidden else f"{value:.5g}" for key, value in values.items())
            rows.append([in_words(place), *shown])
        return rows

    def _places(self) -> list[tuple[int, ...]]:
        """All samples of a small batch; of others those with the largest and smallest losses."""
        losses, counted = self.samples["loss"], self._counted()
        if losses.size <= SHOWN:
            return list(np.ndindex(losses.shape))
        sizes = np.where(counted, np.nan_to_num(losses, nan=np.inf), -1)
        order = np.argsort(-sizes, axis=None, kind="stable")[: counted.sum()]
        chosen = [*order[: SHOWN - 4], *order[SHOWN - 4 :][-4:]]
        return [tuple(map(int, np.unravel_index(i, losses.shape))) for i in chosen]

    def _summary(self) -> list[str]:
        losses = self.samples["loss"] if self.samples else np.empty(0)
        if losses.size <= SHOWN:
            return []
        shown, seen = len(self._places()), losses[~np.isnan(losses)]
        lines = [f"... {losses.size - shown} of {losses.size} samples are not shown."]
        if seen.size:
            values = np.quantile(seen, QUANTILES, method="inverted_cdf")
            parts = (f"{q:.0%}: {v:.4g}" for q, v in zip(QUANTILES, values, strict=True))
            kind = "that count" if seen.size == self._counted().sum() else "that are numbers"
            lines.append(f"Quantiles of the {seen.size} losses {kind}: {', '.join(parts)}.")
        return lines

    def _steps(self) -> list[str]:
        """From losses to the value."""
        if self.numerator is None or self.denominator is None or self.value is None:
            return [f"value        {self.added}, for each sample by itself: there is no reduction"]
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


def explain(
    loss: Loss,
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sample_weight: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Explanation:
    """What `loss` does with a batch, sample by sample, and what looks wrong in it.

    For people, not for training or `torch.compile`: everything is moved to the host, and the
    values are read. It works where the loss itself raises, too, and says why.

    Args:
        loss: a `SparseCategoricalCrossentropy` or `CategoricalCrossentropy`.
        y_true, y_pred, sample_weight, mask: as in the call `loss(y_true, y_pred, sample_weight,
            mask)`.

    Returns:
        An `Explanation`, which prints as text, is shown as a table in a notebook, and has `plot()`.

    Raises:
        TypeError: a `loss` that is neither of the two, a tensor whose values cannot be read here,
            such as a DTensor.
        RuntimeError: inside a transform of `torch.func` or a tracing mode.

    >>> loss = SparseCategoricalCrossentropy(from_logits=True)
    >>> print(explain(loss, [2, 1], [[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]]))
    SparseCategoricalCrossentropy(from_logits=True) gives 0.9133192
      y_pred (2, 4) float64: taken for logits; a softmax over axis 1 makes them probabilities
      y_true (2,) int64: 2 samples, 2 of them count
    <BLANKLINE>
    sample  label  p(label)  rank   -log p  contribution
         0      2   0.21135     2   1.5542       0.77711
         1      1   0.76153     1  0.27242       0.13621
    <BLANKLINE>
    numerator    1.826638       the sum of the losses
    denominator  2              the number of samples
    value        0.9133192      numerator / denominator, reduction "sum_over_batch_size"
    <BLANKLINE>
    Nothing looks wrong.
    """
    _require_loss(loss)
    if is_traced():
        raise RuntimeError(
            "explain reads values, which a transform of torch.func or a tracing mode hides: call "
            "it outside"
        )
    given = {"y_true": y_true, "y_pred": y_pred, "sample_weight": sample_weight, "mask": mask}
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        y_true, y_pred, sample_weight, mask = (_on_host(*each) for each in given.items())
        arguments = (y_true, y_pred, sample_weight, mask)
        plain = _plain(loss)
        batch = batch_of(plain, arguments)
        about = tuple(_in_words(batch)) if batch else ()
        found = tuple(findings(batch)) if batch else ()
        if type(loss).forward is not type(plain).forward:
            found = (*found, _own_forward(loss, plain))
        try:
            losses, weight, mask_ = plain._losses(*arguments)
        except (ValueError, TypeError) as error:
            if not any(finding.is_wrong for finding in found):
                found = (Finding("arguments that do not fit", str(error), ""), *found)
            message = f"{type(error).__name__}: {error}"
            return Explanation(loss, error=message, findings=found, arguments=about)
        assert batch is not None  # the loss has read it
        value = reduce(losses, weight, mask_, loss.reduction).to(loss.dtype)
        values, count = fraction(losses, weight, mask_, loss.reduction)
        numerator = denominator = None
        if loss.reduction not in ("none", None):
            numerator = values.double().sum().item()
            denominator = 1.0 if count is None else float(count)
        contributions = _contributions(values.double(), denominator, loss.reduction)
        samples = _samples(batch, losses, weight, mask_, contributions)
        if not value.isfinite().all() and not any(finding.is_wrong for finding in found):
            lost = ~torch.as_tensor(samples["contribution"]).isfinite()
            found = (_not_finite(lost), *found)
        words = _steps_in_words(loss.reduction, losses, weight, mask_, count)
        if denominator == 0 and not any(finding.is_wrong for finding in found):
            found = (_divided_by_0(words[1]), *found)
        return Explanation(loss, value, "", samples, numerator, denominator, found, about, *words)


def _contributions(values: Tensor, denominator: float | None, reduction: str | None) -> Tensor:
    """What each sample adds to the value; `reduce` has the rules for a division by 0."""
    if denominator == 0:
        return torch.zeros_like(values) if reduction not in MEANS else values * 0
    return values / (denominator or 1.0)


def _plain(loss: Loss) -> Loss:
    """A loss with the same options, where `loss` may be of a subclass that has others."""
    ours = family_class(type(loss), _Loss)
    return ours(**ours.get_config(loss))


def _own_forward(loss: Loss, plain: Loss) -> Finding:
    return Finding(
        "a forward of its own",
        f"{type(loss).__name__} overrides forward: its value may be another than the one shown, "
        f"which is that of {type(plain).__name__}.",
        "Look at what its forward changes.",
        is_wrong=False,
    )


def _divided_by_0(denominator: str) -> Finding:
    return Finding(
        "a denominator of 0",
        f"{denominator} is 0, and a division by 0 gives 0: there is no gradient.",
        'Look where it comes from; reduction="sum_over_batch_size" divides by the number of '
        "samples.",
    )


def _not_finite(lost: Tensor) -> Finding:
    where = f", the first is sample {in_words(lost.nonzero()[0].tolist())}" if lost.any() else ""
    return Finding(
        "a value that is not finite",
        f"{int(lost.sum())} of {lost.numel()} samples are NaN or infinite{where}.",
        "An infinite loss times a target or a weight of 0 is NaN.",
    )


def _steps_in_words(
    reduction: str | None,
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    count: Tensor | int | None,
) -> tuple[str, str]:
    """What is added up, and what it is divided by."""
    whole = mask is None or bool(((mask == 0) | (mask == 1)).all())
    counts_entries = reduction in MEANS or whole
    names = [] if weight is None else ["weight"]
    names += [] if counts_entries else ["mask"]
    added = " * ".join([*names, "loss"]) if names else "the losses"
    added += " over the samples that count" if mask is not None and counts_entries else ""
    if reduction == "sum":
        return added, "a sum is not divided"
    if count is None:
        return added, "a single sample is not divided"
    if reduction == "mean_with_sample_weight" and weight is not None:
        given = max(weight.numel(), 0 if mask is None else mask.numel())
        early = ", as they were given: before they broadcast" if given < losses.numel() else ""
        return added, f"the sum of the weights{'' if mask is None else ' that count'}{early}"
    if mask is None:
        return added, "the number of samples" if losses.numel() else "there are no samples"
    if not whole:
        return added, "the sum of the mask"
    aside = "" if weight is None else ", not the sum of their weights"
    return added, f"the number of samples that count{aside}"


def _in_words(batch: Batch) -> Iterator[str]:
    """What each argument is, and is taken for."""
    axis, low = batch.axis, CLIP[batch.loss.dtype][0]
    steps = [f"clipped to [{low:.3g}, 1 - {low:.3g}]", f"divided by their sum over axis {axis}"]
    if isinstance(batch.loss, CategoricalCrossentropy):
        steps.reverse()
    taken = f"probabilities; {', then '.join(steps)}"
    if batch.loss.from_logits:
        taken = f"logits; a softmax over axis {axis} makes them probabilities"
    yield f"y_pred {_kind(batch.y_pred)}: taken for {taken}"
    total, n = batch.counted.numel(), len(batch.rows)
    reasons = f" ({batch.left_out_by})" if batch.left_out_by else ""
    fits = batch.all_labels is not None or batch.targets is not None
    samples = "1 sample" if total == 1 else f"{total} samples"
    counts = f"{samples}, {n} of them count{reasons}" if fits else "does not fit y_pred"
    yield f"y_true {_kind(batch.y_true)}: {counts}"
    for name, value in zip(("sample_weight", "mask"), batch.arguments[2:], strict=True):
        if value is not None:
            with suppress(ValueError, TypeError):
                yield f"{name} {_kind(to_tensor(name, value))}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _columns(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]


def _require_loss(loss: Any) -> None:
    if isinstance(loss, (SparseCategoricalCrossentropy, CategoricalCrossentropy)):
        return
    kind = loss if isinstance(loss, type) else type(loss)
    got = f"{kind.__module__}.{kind.__qualname__}"
    hint = ", the class itself: make one" if isinstance(loss, type) else ""
    if isinstance(getattr(loss, "loss", None), Loss):
        hint = ": pass its .loss"
    raise TypeError(
        "loss must be a torch_sce.SparseCategoricalCrossentropy or CategoricalCrossentropy, got "
        f"{got}{hint}"
    )


def _on_host(name: str, value: Any) -> Any:
    """A tensor on the host, without its graph; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    own = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    if own or value.is_meta:
        kind = "a meta tensor" if value.is_meta else f"a {type(value).__name__}"
        hint = ""
        if hasattr(value, "full_tensor"):
            hint = f": pass {name}.full_tensor(), on every rank, or this rank's {name}.to_local()"
        raise TypeError(f"{name} must be a tensor whose values can be read, got {kind}{hint}")
    return value.detach().cpu()


def _samples(
    batch: Batch, losses: Tensor, weight: Tensor | None, mask: Tensor | None, contributions: Tensor
) -> dict[str, np.ndarray]:
    counted, shape = batch.counted, losses.shape

    def spread(values: Tensor) -> np.ndarray:
        whole = torch.full(shape, torch.nan, dtype=torch.float64)
        whole[counted] = values.double()
        return whole.numpy()

    def everywhere(values: Tensor | None) -> np.ndarray:
        return (torch.ones(()) if values is None else values).double().expand(shape).numpy()

    if batch.targets is None:
        assert batch.all_labels is not None
        label = batch.all_labels.double().numpy()
        y = class_numbers(batch.all_labels[counted])
        probability = torch.exp(-losses[counted].double())
    else:
        y = batch.targets.argmax(1)
        label = spread(y)
        if batch.loss.from_logits:
            probability = torch.exp(-sparse_categorical_crossentropy(y, batch.rows, True))
        else:
            share = batch.rows.gather(1, y[:, None])[:, 0] / batch.rows.sum(1)
            probability = share.clamp(*CLIP[batch.loss.dtype])
    at_label = batch.rows.gather(1, y[:, None])
    rank = 1 + (batch.rows > at_label).sum(1).double()
    rank[at_label[:, 0].isnan()] = torch.nan
    return {
        "label": label, "probability": spread(probability), "rank": spread(rank),
        "loss": spread(losses[counted]), "weight": everywhere(weight), "mask": everywhere(mask),
        "contribution": contributions.expand(shape).numpy(),
    }  # fmt: skip
