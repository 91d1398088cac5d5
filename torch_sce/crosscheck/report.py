"""What the cross-check found, for the terminal, as JSON, and as one HTML file with plots."""

import argparse
import base64
import html
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .answers import FLOAT64, Answer
from .compare import AGREES, DELIBERATE, MISMATCH, Verdict, reference
from .differences import DIFFERENCES
from .tally import PARTS, WHO, Mismatch, Row, Tally

SCRIPT = ("python", "scripts/cross_check.py")
OUTCOMES = {AGREES: "agree", DELIBERATE: "on purpose", MISMATCH: "mismatch"}


@dataclass(frozen=True)
class Setting:
    """What a run is made with. One that goes on has the same."""

    oracle: str
    filters: list[str]
    device: str
    versions: dict[str, str]
    source: str  # a hash of ours


KEYS = [each.name for each in fields(Setting)]


@dataclass
class Results:
    """What came of a run and what it was run with."""

    tally: Tally
    seeds: range
    setting: Setting
    arguments: list[str]  # of the command line: which oracle and device
    choice: list[str]  # and which cases of the seeds
    seconds: float = 0.0

    @property
    def who(self) -> tuple[str, ...]:
        """Whose errors are known."""
        return WHO[:1] if self.setting.oracle == FLOAT64 else WHO

    @property
    def mismatches(self) -> int:
        return self.tally.outcomes[MISMATCH]

    def features(self) -> dict[str, dict[str, Row]]:
        """Rows by feature and value, values in order of how often they were drawn."""
        return {
            feature: dict(sorted(rows.items(), key=lambda item: (-item[1].cases, item[0])))
            for feature, rows in self.tally.features.items()
        }

    def reproduce(self, case: Mismatch) -> str:
        """The command that shows this case."""
        chosen = ("--seed", str(case.seed), "--case", str(case.case))
        return shlex.join([*SCRIPT, *chosen, *self.arguments])

    @property
    def command(self) -> str:
        """The command that draws all these cases."""
        return shlex.join([*SCRIPT, "--seed", str(self.seeds[0]), *self.choice, *self.arguments])


def print_tables(console: Console, results: Results) -> None:
    alone = results.setting.oracle == FLOAT64
    columns = ("ours",) if alone else ("ours", "Keras's")
    both = "two columns are the worst errors, ours and tf.keras's"
    last = "column is our worst error" if alone else both
    table = Table(
        title=f"Cases by feature. The last {last}, "
        "in ulps: units of float32's spacing at the size of what is added up, against float64.",
        title_justify="left",
    )
    for index, column in enumerate(("feature", "", "cases", *OUTCOMES.values(), *columns)):
        # A name that is cut short could not be given to --filter.
        table.add_column(column, justify="right" if index > 1 else "left", overflow="fold")
    for feature, rows in results.features().items():
        table.add_section()
        for index, (value, row) in enumerate(rows.items()):
            mismatches = row.outcomes[MISMATCH]
            table.add_row(
                "" if index else feature, value, str(row.cases), str(row.outcomes[AGREES]),
                str(row.outcomes[DELIBERATE] or ""), f"[red]{mismatches}[/]" if mismatches else "",
                *(_number(_worst(row, who)) for who in results.who),
            )  # fmt: skip
    console.print(table)
    if not alone:
        _print_differences(console, results.tally.reasons)


def _print_differences(console: Console, reasons: Counter[str]) -> None:
    table = Table(title="Differences on purpose", title_justify="left")
    for column in ("where", "tf.keras", "here", "cases"):
        table.add_column(column, justify="right" if column == "cases" else "left", overflow="fold")
    for difference in DIFFERENCES:
        count = reasons[difference.name]
        if count == 0:
            continue
        texts = (difference.where, difference.keras, difference.here)
        table.add_row(*map(escape, texts), str(count))
    if "bad labels on a device" in reasons:
        count = str(reasons["bad labels on a device"])
        table.add_row("label outside [0, C), on a device", "raises", "NaN in that row", count)
    console.print(table)


def print_conclusion(console: Console, results: Results) -> None:
    shown = results.tally.mismatches[:20]
    for mismatch in shown:
        reason = escape(mismatch.reason)
        console.print(f"[red]Mismatch[/] of {reason}", highlight=False, soft_wrap=True)
        console.print(f"  {results.reproduce(mismatch)}", highlight=False, soft_wrap=True)
    if results.mismatches > len(shown):
        console.print(f"... and {results.mismatches - len(shown)} more", highlight=False)
    for line in _error_lines(results):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_sentence(results), style="bold", highlight=False, soft_wrap=True)


def _sentence(results: Results) -> str:
    tally = results.tally
    count, agree, raised = tally.cases, tally.outcomes[AGREES], tally.reasons["raises"]
    alone = results.setting.oracle == FLOAT64
    on_purpose = "" if alone else f"{tally.outcomes[DELIBERATE]} differ on purpose, "
    return (
        f"{agree} of {count} cases agree with {'the float64 rules' if alone else 'tf.keras'} "
        f"({agree - raised} in value and gradient, {raised} in raising an error), {on_purpose}"
        f"{results.mismatches} mismatch{'es' * (results.mismatches != 1)} "
        f"({results.seconds:.0f} s)."
    )


def _error_lines(results: Results) -> Iterator[str]:
    for part in PARTS:
        errors = {who: results.tally.errors(who, part) for who in results.who}
        if errors["ours"].size:
            said = "; ".join(
                f"{'ours' if who == 'ours' else 'tf.keras'} median {np.median(each):.2f}, "
                f"mean {each.mean():.2f}, largest {each.max():.2f}"
                for who, each in errors.items()
            )
            count = errors["ours"].size
            yield f"Error of the {part} in ulps against float64, {count} float32 cases: {said}."


def _worst(row: Row, who: str) -> float | None:
    found = [row.worst[f"{who}, {part}"] for part in PARTS if f"{who}, {part}" in row.worst]
    return max(found, default=None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def details(verdict: Verdict, keras: Answer | None, ours: Answer) -> str:
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
        if answer is None:
            continue
        if answer.error:
            lines.append(f"{who} raises {answer.error}: {answer.message}")
        else:
            lines.append(f"{who}, value, {_array(answer.value, answer.value_dtype)}")
            some = "" if answer.gradient_places is None else ", the recorded entries"
            text = _array(answer.gradient, answer.gradient_dtype)
            lines.append(f"{who}, gradient{some}, {text}")
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


def print_comparison(console: Console, name: str, versions: dict[str, str], tally: Tally) -> None:
    """Where another Keras differs from tf.keras: in what, and under which features."""
    total = sum(kind.cases for kind in tally.kinds.values())
    listed = ", ".join(f"{package} {number}" for package, number in versions.items())
    console.print(
        f"{name} ({listed}) differs from tf.keras in {total} of {tally.cases} cases.",
        style="bold", highlight=False,
    )  # fmt: skip
    table = Table("what differs", "cases", "for example (tf.keras first)", "in case")
    for what, kind in sorted(tally.kinds.items(), key=lambda item: -item[1].cases):
        seed, index, text = kind.first
        where = str(index) if len(tally.finished) == 1 else f"{index} of --seed {seed}"
        table.add_row(what, str(kind.cases), escape(text[:90]), where)
    console.print(table)
    table = Table("feature", "", "cases", "differ", "share", title="Where it differs most")
    shares = {
        key: count[True] / count.total() for key, count in tally.differ.items() if count.total() > 9
    }
    for (feature, value), share in sorted(shares.items(), key=lambda item: -item[1])[:20]:
        count = tally.differ[feature, value]
        table.add_row(feature, value, str(count.total()), str(count[True]), f"{share:.0%}")
    console.print(table)


def to_json(results: Results) -> str:
    """All of it, for programs, and for a run that goes on: one line for each part."""
    tally = results.tally
    mismatches = [vars(m) | {"command": results.reproduce(m)} for m in tally.mismatches]
    deliberate = {key: n for key, n in tally.reasons.items() if key != "raises"}
    parts = vars(results.setting) | {
        "seed": results.seeds[0],
        "seconds": round(results.seconds, 1),
        **tally.to_json(),
        "deliberate": deliberate,
        "ulps": {
            f"{who}, {part}": {
                "cases": int(errors.size),
                "median": float(np.median(errors)),
                "mean": float(errors.mean()),
                "largest": float(errors.max()),
            }
            for part in PARTS
            for who in results.who
            if (errors := tally.errors(who, part)).size
        },
        "mismatches": mismatches,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def save(results: Results, path: Path) -> None:
    """Writes the file in one step: whoever reads it, or kills us, finds the old or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(to_json(results))
    os.replace(part, path)


def resume(results: Results, path: Path, cases: int) -> None:
    """Adds what a run of the same setting has left in a file.

    Raises:
        ValueError: the file is none of ours, of another setting, or has cases beyond the first
            `cases` of the seeds.
    """
    try:
        stored = json.loads(path.read_text())
        tally = Tally.from_json(stored)
        setting, seconds = Setting(**{key: stored[key] for key in KEYS}), stored["seconds"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of the cross-check ({error!r})") from error
    for key in KEYS:
        there, here = getattr(setting, key), getattr(results.setting, key)
        if there != here:
            raise ValueError(f"{path} was made with {key} {there}, not {here}")
    for seed, ranges in tally.finished.items():
        if seed not in results.seeds or ranges[-1][1] > cases:
            raise ValueError(
                f"{path} has cases of seed {seed} up to {ranges[-1][1] - 1}, not asked for here"
            )
    results.tally.merge(tally)
    results.seconds = seconds


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
<html lang="en"><meta charset="utf-8"><title>torch_sce against $other</title>
<style>
$style</style>
<h1>torch_sce against $other</h1>
<p class="verdict $outcome">$sentence</p>
<p><code>$command</code><br>
torch_sce on $device; $oracle; $versions</p>
$mismatches
<h2>$nearer</h2>
<p>The largest error of each float32 case against the same rules in float64, in ulps: units of
float32's spacing at the size of what is added up.$diagonal
$errors</p>
$plots
$deliberate<h2>Cases by feature</h2>
<p><span class="key agrees"></span>agree <span class="key deliberate"></span>differ on purpose
<span class="key mismatch"></span>mismatch; <small>errors are the worst, in ulps</small></p>
<table><tr><th>feature<th><th><th class="n">cases<th class="n">agree<th class="n">on purpose
<th class="n">mismatch<th class="n">our ulps$keras</tr>$features</table>
</html>
""")


ORACLES = {
    FLOAT64: "compared with the rules in float64 alone",
    "recorded": "tf.keras's recorded answers on the CPU",
}


def to_html(results: Results) -> str:
    """One file that needs no other."""
    alone = results.setting.oracle == FLOAT64
    return PAGE.substitute(
        sentence=html.escape(_sentence(results)),
        style=STYLE,
        outcome="bad" if results.mismatches else "good",
        command=html.escape(results.command),
        other="the float64 rules" if alone else "tf.keras",
        nearer="Errors" if alone else "Who is nearer to the truth",
        diagonal="" if alone else " Below the diagonal our answer is the nearer one.",
        keras="" if alone else '<th class="n">Keras\'s',
        oracle=ORACLES.get(results.setting.oracle, "the real tf.keras on the CPU"),
        device=html.escape(results.setting.device),
        versions=html.escape(", ".join(f"{k} {v}" for k, v in results.setting.versions.items())),
        errors="<br>".join(map(html.escape, _error_lines(results))),
        plots=_plots(results),
        mismatches="".join(
            f"<p><b>Mismatch</b> of {html.escape(m.reason)}<br>"
            f"<code>{results.reproduce(m)}</code></p>"
            for m in results.tally.mismatches
        ),
        deliberate="" if alone else _deliberate(results.tally),
        features="".join(_feature_rows(results)),
    )


def _deliberate(tally: Tally) -> str:
    rows = "".join(
        f"<tr><td>{_code(d.where)}<td>{_code(d.keras)}<td>{_code(d.here)}"
        f'<td class="n">{tally.reasons[d.name]}</tr>'
        for d in DIFFERENCES
    )
    return (
        "<h2>Where we differ on purpose</h2>\n<table><tr><th>where<th>tf.keras<th>here"
        f'<th class="n">cases</tr>{rows}</table>\n'
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
            numbers = [row.cases, *outcomes, *(_number(_worst(row, who)) for who in results.who)]
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
    if not all(results.tally.errors("ours", part).size for part in PARTS):
        return ""
    alone = results.setting.oracle == FLOAT64
    pictures = _curves(results) if alone else _scatter(results.tally) + _curves(results)
    pyplot().close("all")
    return pictures


EXACT = 0.02  # ulps that stand for 0 on a logarithmic axis
COLORS = {"ours": "#1f6fb2", "Keras": "#d1622b"}


def _scatter(tally: Tally) -> str:
    """Our error over tf.keras's."""
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
        panel.text(0.03, 0.93, f"tf.keras nearer: {farther}", transform=panel.transAxes)
        total = tally.errors("ours", part).size
        plotted = "" if len(found) == total else f", {len(found)} plotted"
        panel.set(
            xscale="log", yscale="log", xlim=(EXACT / 2, limit), ylim=(EXACT / 2, limit),
            xlabel="error of tf.keras [ulp]", ylabel="error of torch_sce [ulp]",
            title=f"{part}: {total} cases{plotted} ({EXACT} stands for exact)",
        )  # fmt: skip
    return image(figure, "error of both against float64")


def _curves(results: Results) -> str:
    """How many cases are below an error; the gradient's by number of classes."""
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for who, aside in zip(results.who, (0.96, 1.04), strict=False):
        label = {"ours": "torch_sce", "Keras": "tf.keras"}[who]
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
    return image(figure, "share of cases below an error; error by number of classes")


def check_file(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Ends the program with exit code 2 if no file of this name can be written."""
    if path is not None and not path.absolute().parent.is_dir():
        parser.error(f"{path}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        parser.error(f"{path}: is a folder; name a file")


def check_html(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """As `check_file`, for a report with plots."""
    check_file(parser, path)
    if path is not None and find_spec("matplotlib") is None:
        parser.error("--html draws with matplotlib, which is missing: pip install matplotlib")


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
