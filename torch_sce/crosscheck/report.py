"""What the cross-check found, for the terminal, as JSON, and as one HTML file with plots."""

import argparse
import base64
import html
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .answers import TARGET, Answer
from .cases import Case
from .compare import AGREES, DELIBERATE, MISMATCH, Verdict, differs, reference
from .differences import DIFFERENCES

SCRIPT = ("python", "scripts/cross_check.py")
PARTS = ("value", "gradient")
WHO = ("ours", "Keras")


@dataclass
class Row:
    """The cases that share a feature."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, verdict: Verdict) -> None:
        self.cases += 1
        self.outcomes[verdict.outcome] += 1
        for key, ulps in verdict.ulps.items():
            self.worst[key] = max(ulps, self.worst.get(key, 0.0))


@dataclass(frozen=True)
class Results:
    """All verdicts of a run and what it was run with."""

    verdicts: list[Verdict]
    seed: int
    oracle: str
    versions: dict[str, str]
    device: str
    arguments: list[str]  # of the command line: which oracle and device
    choice: list[str]  # and which cases of the seed
    seconds: float

    @property
    def mismatches(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome == MISMATCH]

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(verdict.outcome for verdict in self.verdicts)

    @property
    def deliberate(self) -> Counter[str]:
        return Counter(v.reason for v in self.verdicts if v.outcome == DELIBERATE)

    def features(self) -> dict[str, dict[str, Row]]:
        """Rows by feature and value, values in order of how often they were drawn."""
        rows: dict[str, dict[str, Row]] = {}
        for verdict in self.verdicts:
            for feature, value in verdict.case.features.items():
                rows.setdefault(feature, {}).setdefault(value, Row()).add(verdict)
        return {
            feature: dict(sorted(values.items(), key=lambda item: -item[1].cases))
            for feature, values in rows.items()
        }

    def errors(self, who: str, part: str) -> np.ndarray:
        """In ulps, of every case that has a float64 answer and agrees."""
        key = f"{who}, {part}"
        return np.array([v.ulps[key] for v in self.verdicts if key in v.ulps])

    def reproduce(self, case: Case) -> str:
        """The command that shows this case."""
        chosen = ("--seed", str(case.seed), "--case", str(case.index))
        return shlex.join([*SCRIPT, *chosen, *self.arguments])

    @property
    def command(self) -> str:
        """The command that draws all these cases."""
        return shlex.join([*SCRIPT, "--seed", str(self.seed), *self.choice, *self.arguments])


def print_tables(console: Console, results: Results) -> None:
    table = Table(
        title="Cases by feature. The last two columns are the worst errors, ours and tf.keras's, "
        "in ulps: units of float32's spacing at the size of what is added up, against float64.",
        title_justify="left",
    )
    columns = ("feature", "", "cases", "agree", "on purpose", "mismatch", "ours", "Keras's")
    for index, column in enumerate(columns):
        # A name that is cut short could not be given to --filter.
        table.add_column(column, justify="right" if index > 1 else "left", overflow="fold")
    for feature, rows in results.features().items():
        table.add_section()
        for index, (value, row) in enumerate(rows.items()):
            mismatches = row.outcomes[MISMATCH]
            table.add_row(
                "" if index else feature, value, str(row.cases), str(row.outcomes[AGREES]),
                str(row.outcomes[DELIBERATE] or ""), f"[red]{mismatches}[/]" if mismatches else "",
                *(_number(_worst(row, who)) for who in WHO),
            )  # fmt: skip
    console.print(table)

    table = Table(title="Differences on purpose", title_justify="left")
    for column in ("where", "tf.keras", "here", "cases"):
        table.add_column(column, justify="right" if column == "cases" else "left", overflow="fold")
    for difference in DIFFERENCES:
        count = results.deliberate[difference.name]
        if count == 0:
            continue
        texts = (difference.where, difference.keras, difference.here)
        table.add_row(*map(escape, texts), str(count))
    if "bad labels on a device" in results.deliberate:
        count = str(results.deliberate["bad labels on a device"])
        table.add_row("label outside [0, C), on a device", "raises", "NaN in that row", count)
    console.print(table)


def print_conclusion(console: Console, results: Results) -> None:
    for verdict in results.mismatches[:20]:
        reason = escape(verdict.reason)
        console.print(f"[red]Mismatch[/] of {reason}", highlight=False, soft_wrap=True)
        console.print(f"  {results.reproduce(verdict.case)}", highlight=False, soft_wrap=True)
    if len(results.mismatches) > 20:
        console.print(f"... and {len(results.mismatches) - 20} more", highlight=False)
    for line in _error_lines(results):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_sentence(results), style="bold", highlight=False, soft_wrap=True)


def _sentence(results: Results) -> str:
    count, agree = len(results.verdicts), results.outcomes[AGREES]
    raised = sum(v.outcome == AGREES and v.reason == "raises" for v in results.verdicts)
    deliberate, mismatch = results.outcomes[DELIBERATE], results.outcomes[MISMATCH]
    return (
        f"{agree} of {count} cases agree with tf.keras ({agree - raised} in value and gradient, "
        f"{raised} in raising an error), {deliberate} differ on purpose, "
        f"{mismatch} mismatch{'es' * (mismatch != 1)} ({results.seconds:.0f} s)."
    )


def _error_lines(results: Results) -> Iterator[str]:
    for part in PARTS:
        ours, keras = (results.errors(who, part) for who in WHO)
        if ours.size:
            yield (
                f"Error of the {part} in ulps against float64, {ours.size} float32 cases: "
                f"ours median {np.median(ours):.2f}, mean {ours.mean():.2f}, largest "
                f"{ours.max():.2f}; tf.keras median {np.median(keras):.2f}, mean "
                f"{keras.mean():.2f}, largest {keras.max():.2f}."
            )


def _worst(row: Row, who: str) -> float | None:
    found = [row.worst[f"{who}, {part}"] for part in PARTS if f"{who}, {part}" in row.worst]
    return max(found, default=None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def details(verdict: Verdict, keras: Answer, ours: Answer) -> str:
    """Everything about one case, for whoever has to find out why it differs."""
    case = verdict.case
    right, refused = reference(case)
    options = ", ".join(f"{key}={value!r}" for key, value in case.options.items())
    lines = [
        f"{case.form} {case.name}({options}), given as {'lists' if case.as_lists else 'arrays'}"
    ]
    for batch in case.steps:
        lines += ["reset"] if batch is None else [
            f"y_true, {_array(batch.y_true)}",
            f"y_pred, {_array(batch.y_pred, batch.y_pred_dtype)}",
            f"sample_weight, {_array(batch.sample_weight)}",
            f"mask, {_array(batch.mask)}",
        ]  # fmt: skip
    for who, answer in {"tf.keras": keras, "ours": ours}.items():
        if answer.error:
            lines.append(f"{who} raises {answer.error}: {answer.message}")
        else:
            lines.append(f"{who}, value, {_array(answer.value, answer.value_dtype)}")
            lines.append(f"{who}, gradient, {_array(answer.gradient, answer.gradient_dtype)}")
            if answer.target_gradient is not None:
                lines.append(f"{who}, gradient of the targets, {_array(answer.target_gradient)}")
    if right is None:
        lines.append(f"in float64: refused for the {refused}")
    else:
        lines.append(f"in float64, value, {_array(right.value)}")
        lines.append(f"in float64, gradient, {_array(right.gradient)}")
        if right.target_gradient is not None:
            lines.append(f"in float64, gradient of the targets, {_array(right.target_gradient)}")
    return escape("\n".join(lines)) + f"\n[bold]{escape(outcome(verdict))}[/]"


def outcome(verdict: Verdict) -> str:
    """How a case ended, in words."""
    if verdict.outcome == AGREES:
        return "Agrees: both raise." if verdict.reason else "Agrees in value and gradient."
    if verdict.outcome == MISMATCH:
        return f"Mismatch of {verdict.reason}"
    for row in DIFFERENCES:
        if row.name == verdict.reason:
            return f"Differs on purpose: {row.where}. tf.keras: {row.keras}. Here: {row.here}."
    return f"Differs on purpose: {verdict.reason}."


def _array(value: object, dtype: str | None = None) -> str:
    if value is None:
        return "none"
    array = np.asarray(value)
    text = np.array2string(array, precision=9, threshold=40, edgeitems=3, separator=", ")
    return f"{dtype or array.dtype} {array.shape}:\n{text}"


def print_comparison(
    console: Console,
    name: str,
    versions: dict[str, str],
    cases: Sequence[Case],
    target: Sequence[Answer],
    other: Sequence[Answer],
) -> None:
    """Where another Keras differs from tf.keras: in what, and under which features."""
    kinds: dict[str, list[tuple[Case, str]]] = {}
    by_feature: dict[tuple[str, str], Counter[bool]] = {}
    for case, a, b in zip(cases, target, other, strict=True):
        right, _ = reference(case)
        if right is None and not a.error and not b.error:
            continue  # both accept what we refuse: there is no bound to compare them by
        text = differs(a, b, right, case)
        if text is not None:
            if a.error or b.error:
                kind = f"only {'tf.keras' if a.error else name} raises"
            else:
                kind = text.split()[0]
            kinds.setdefault(kind, []).append((case, text))
        for feature in case.features.items():
            by_feature.setdefault(feature, Counter())[text is not None] += 1
    total = sum(len(found) for found in kinds.values())
    listed = ", ".join(f"{package} {number}" for package, number in versions.items())
    console.print(
        f"{name} ({listed}) differs from tf.keras in {total} of {len(cases)} cases.",
        style="bold", highlight=False,
    )  # fmt: skip
    table = Table("what differs", "cases", "for example (tf.keras first)", "in case")
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        case, text = found[0]
        table.add_row(kind, str(len(found)), escape(text[:90]), str(case.index))
    console.print(table)
    table = Table("feature", "", "cases", "differ", "share", title="Where it differs most")
    shares = {
        key: count[True] / count.total() for key, count in by_feature.items() if count.total() > 9
    }
    for (feature, value), share in sorted(shares.items(), key=lambda item: -item[1])[:20]:
        count = by_feature[feature, value]
        table.add_row(feature, value, str(count.total()), str(count[True]), f"{share:.0%}")
    console.print(table)


def to_json(results: Results) -> str:
    """All of it, for programs."""
    return json.dumps(
        {
            "seed": results.seed,
            "oracle": results.oracle,
            "versions": results.versions,
            "device": results.device,
            "cases": len(results.verdicts),
            "outcomes": {key: results.outcomes[key] for key in (AGREES, DELIBERATE, MISMATCH)},
            "deliberate": dict(results.deliberate),
            "ulps": {
                f"{who}, {part}": {
                    "cases": int(errors.size),
                    "median": float(np.median(errors)),
                    "mean": float(errors.mean()),
                    "largest": float(errors.max()),
                }
                for part in PARTS
                for who in WHO
                if (errors := results.errors(who, part)).size
            },
            "features": {
                feature: {
                    value: {"cases": row.cases, **row.outcomes, "worst ulps": row.worst}
                    for value, row in rows.items()
                }
                for feature, rows in results.features().items()
            },
            "mismatches": [
                {"reason": v.reason, "command": results.reproduce(v.case)}
                for v in results.mismatches
            ],
        },
        indent=1,
    )


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.verdict { font-size: 1.1rem; padding: .7rem 1rem; border-radius: 6px; }
p.good { background: #e3f3e8; } p.bad { background: #ffebe9; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #8c959f; }
td, th { padding: .18rem .6rem; vertical-align: top; } td { border-bottom: 1px solid #e5e8eb; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.first td { border-top: 2px solid #c9d0d6; }
.bar { display: flex; width: 11rem; height: .8rem; margin-top: .35rem; background: #eee; }
.agrees { background: #2f7d4f; } .deliberate { background: #d9b44a; }
.mismatch { background: #c62828; }
.key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem; }
code { background: #f2f4f6; padding: .1rem .3rem; border-radius: 3px; } img { max-width: 100%; }
small { color: #57606a; }
"""

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>torch_sce against tf.keras</title>
<style>
$style</style>
<h1>torch_sce against tf.keras</h1>
<p class="verdict $outcome">$sentence</p>
<p><code>$command</code><br>
torch_sce on $device; $oracle on the CPU; $versions</p>
$mismatches
<h2>Who is nearer to the truth</h2>
<p>The largest error of each float32 case against the same rules in float64, in ulps: units of
float32's spacing at the size of what is added up. Below the diagonal our answer is the nearer one.
$errors</p>
$plots
<h2>Where we differ on purpose</h2>
<table><tr><th>where<th>tf.keras<th>here<th class="n">cases</tr>$deliberate</table>
<h2>Cases by feature</h2>
<p><span class="key agrees"></span>agree <span class="key deliberate"></span>differ on purpose
<span class="key mismatch"></span>mismatch; <small>errors are the worst, in ulps</small></p>
<table><tr><th>feature<th><th><th class="n">cases<th class="n">agree<th class="n">on purpose
<th class="n">mismatch<th class="n">our ulps<th class="n">Keras's</tr>$features</table>
</html>
""")


def to_html(results: Results) -> str:
    """One file that needs no other."""
    return PAGE.substitute(
        sentence=html.escape(_sentence(results)),
        style=STYLE,
        outcome="bad" if results.mismatches else "good",
        command=html.escape(results.command),
        oracle="the real tf.keras" if results.oracle == TARGET else "tf.keras's recorded answers",
        device=html.escape(results.device),
        versions=html.escape(", ".join(f"{k} {v}" for k, v in results.versions.items())),
        errors="<br>".join(map(html.escape, _error_lines(results))),
        plots=_plots(results),
        mismatches="".join(
            f"<p><b>Mismatch</b> of {html.escape(v.reason)}<br>"
            f"<code>{results.reproduce(v.case)}</code></p>"
            for v in results.mismatches
        ),
        deliberate="".join(
            f"<tr><td>{_code(d.where)}<td>{_code(d.keras)}<td>{_code(d.here)}"
            f'<td class="n">{results.deliberate[d.name]}</tr>'
            for d in DIFFERENCES
        ),
        features="".join(_feature_rows(results)),
    )


def _feature_rows(results: Results) -> Iterator[str]:
    for feature, rows in results.features().items():
        for index, (value, row) in enumerate(rows.items()):
            bar = "".join(
                f'<span class="{key}" style="flex:{row.outcomes[key]}"></span>'
                for key in (AGREES, DELIBERATE, MISMATCH)
                if row.outcomes[key]
            )
            outcomes = [row.outcomes[key] or "" for key in (AGREES, DELIBERATE, MISMATCH)]
            numbers = [row.cases, *outcomes, *(_number(_worst(row, who)) for who in WHO)]
            yield (
                f"<tr{'' if index else ' class=first'}><td>{'' if index else html.escape(feature)}"
                f'<td>{html.escape(value)}<td><div class="bar">{bar}</div>'
                + "".join(f'<td class="n">{number}' for number in numbers)
                + "</tr>"
            )


def _code(text: str) -> str:
    """Text with `code` in backticks, as HTML."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _plots(results: Results) -> str:
    """The errors as pictures; empty if no loss is in float32, which is what they are of."""
    if not all(results.errors("ours", part).size for part in PARTS):
        return ""
    plt = pyplot()
    ours_color, keras_color, exact = "#1f6fb2", "#d1622b", 0.02
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for panel, part in zip(panels, PARTS, strict=True):
        ours, keras = (np.maximum(results.errors(who, part), exact) for who in WHO)
        limit = 2 * max(ours.max(initial=1), keras.max(initial=1))
        panel.fill_between([exact / 2, limit], [exact / 2, limit], exact / 2, color="#eef5fb")
        panel.plot([exact / 2, limit], [exact / 2, limit], color="#8c959f", lw=1)
        panel.scatter(keras, ours, s=9, alpha=0.35, color=ours_color, edgecolors="none")
        nearer, farther = int((ours < keras).sum()), int((ours > keras).sum())
        panel.text(0.97, 0.05, f"ours nearer: {nearer}", transform=panel.transAxes, ha="right")
        panel.text(0.03, 0.93, f"tf.keras nearer: {farther}", transform=panel.transAxes)
        panel.set(
            xscale="log", yscale="log", xlim=(exact / 2, limit), ylim=(exact / 2, limit),
            xlabel="error of tf.keras [ulp]", ylabel="error of torch_sce [ulp]",
            title=f"{part}: {len(ours)} cases ({exact} stands for exact)",
        )  # fmt: skip
    scatter = image(figure, "error of both against float64")

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for who, color, aside in zip(WHO, (ours_color, keras_color), (0.96, 1.04), strict=True):
        label = {"ours": "torch_sce", "Keras": "tf.keras"}[who]
        for part, style in zip(PARTS, ("--", "-"), strict=True):
            errors = np.sort(results.errors(who, part))
            share = np.arange(1, errors.size + 1) / max(errors.size, 1)
            panels[0].step(np.maximum(errors, exact), share, style, color=color,
                           label=f"{label}, {part}")  # fmt: skip
        key = f"{who}, gradient"
        found = [v for v in results.verdicts if key in v.ulps]
        classes = [aside * v.case.y_pred.shape[v.case.options["axis"]] for v in found]
        heights = [max(v.ulps[key], exact) for v in found]
        panels[1].scatter(classes, heights, s=9, alpha=0.4, color=color, label=label,
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
    curves = image(figure, "share of cases below an error; error by number of classes")
    plt.close("all")
    return scatter + curves


def check_file(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Ends the program with exit code 2 if no file of this name can be written."""
    if path is not None and not path.absolute().parent.is_dir():
        parser.error(f"{path}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        parser.error(f"{path}: is a folder; name a file")


def pyplot() -> Any:
    """matplotlib.pyplot, for files and not for a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def image(figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{description}" src="data:image/png;base64,{data}">\n'
