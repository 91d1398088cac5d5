"""What the cross-check found, for the terminal and as one HTML file."""

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import page, plots
from .answers import FLOAT64, Answer
from .compare import AGREES, MISMATCH, Verdict, reference
from .profiles import PROFILES
from .reference import Right
from .results import OUTCOMES, Results, differences, error_lines, everyday, lines, sentence
from .tally import Tally

ORACLES = {
    FLOAT64: "compared with the rules in float64 alone",
    "recorded": "tf.keras's recorded answers on the CPU",
}


def print_tables(console: Console, results: Results) -> None:
    columns = ("ours",) if results.alone else ("ours", "Keras's")
    both = f"two columns are the worst errors, ours and {results.profile.keras}'s"
    last = "column is our worst error" if results.alone else both
    table = Table(
        title=f"Cases by feature. The last {last}, "
        "in ulps: units of float32's spacing at the size of what is added up, against float64.",
        title_justify="left",
    )
    for index, column in enumerate(("feature", "", "cases", *OUTCOMES.values(), *columns)):
        # A name that is cut short could not be given to --filter.
        table.add_column(column, justify="right" if index > 1 else "left", overflow="fold")
    for line in lines(results):
        if line.feature:
            table.add_section()
        cases, agree, on_purpose, mismatches, *worst = line.numbers
        mismatches = f"[red]{mismatches}[/]" if mismatches else ""
        table.add_row(line.feature, line.value, cases, agree, on_purpose, mismatches, *worst)
    console.print(table)
    if not results.alone:
        _print_differences(console, results)


def _print_differences(console: Console, results: Results) -> None:
    table = Table(title="Differences on purpose", title_justify="left")
    for column in ("where", results.profile.keras, "here", "cases"):
        table.add_column(column, justify="right" if column == "cases" else "left", overflow="fold")
    for *texts, count in differences(results):
        if count:
            table.add_row(*map(escape, texts), str(count))
    console.print(table)


def print_conclusion(console: Console, results: Results) -> None:
    shown = results.tally.mismatches[:20]
    for mismatch in shown:
        reason = escape(mismatch.reason)
        console.print(f"[red]Mismatch[/] of {reason}", highlight=False, soft_wrap=True)
        console.print(f"  {results.reproduce(mismatch)}", highlight=False, soft_wrap=True)
    if results.mismatches > len(shown):
        console.print(f"... and {results.mismatches - len(shown)} more", highlight=False)
    for line in (*error_lines(results), *everyday(results)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(sentence(results), style="bold", highlight=False, soft_wrap=True)


def details(verdict: Verdict, keras: Answer | None, ours: Answer) -> str:
    """All details of one case, to find out why it differs."""
    case = verdict.case
    right, refused = reference(case)
    options = ", ".join(f"{key}={value!r}" for key, value in case.options.items())
    given = "lists" if case.as_lists else "arrays"
    lines = [f"{case.form} {case.name}({options}), given as {given}"]
    if case.head is not None:
        lines[0] += ", of a linear head, y_pred @ weight.T + bias"
        weights = {"weight": case.head.weight, "bias": case.head.bias}
        lines += [f"{key}, {_array(x, case.y_pred_dtype)}" for key, x in weights.items()]
        options = {k: v for k, v in vars(case.head).items() if k not in weights}
        lines.append(", ".join(f"{key} {value}" for key, value in options.items()))
    for batch in case.steps:
        lines += ["reset"] if batch is None else [
            f"y_true, {_array(batch.y_true)}",
            f"y_pred, {_array(batch.y_pred, batch.y_pred_dtype)}",
            f"sample_weight, {_array(batch.sample_weight)}",
            f"mask, {_array(batch.mask)}",
        ]  # fmt: skip
    for who, answer in {PROFILES[case.profile].keras: keras, "ours": ours}.items():
        if answer is None:
            continue
        if answer.error:
            lines.append(f"{who} raises {answer.error}: {answer.message}")
        else:
            lines.append(f"{who}, value, {_array(answer.value, answer.value_dtype)}")
            some = "" if answer.gradient_places is None else ", the recorded entries"
            text = _array(answer.gradient, answer.gradient_dtype)
            lines.append(f"{who}, gradient{some}, {text}")
            lines += _further_gradients(who, answer)
    if right is None:
        lines.append(f"in float64: refused for the {refused}")
    else:
        lines.append(f"in float64, value, {_array(right.value)}")
        lines.append(f"in float64, gradient, {_array(right.gradient)}")
        lines += _further_gradients("in float64", right)
    return escape("\n".join(lines)) + f"\n[bold]{escape(outcome(verdict))}[/]"


def _further_gradients(who: str, answer: Answer | Right) -> Iterator[str]:
    for what in ("target", "weight", "bias"):
        gradient = getattr(answer, f"{what}_gradient")
        if gradient is not None:
            name = "targets" if what == "target" else what
            yield f"{who}, gradient of the {name}, {_array(gradient)}"


def outcome(verdict: Verdict) -> str:
    """How a case ended, in words."""
    if verdict.outcome == AGREES:
        return "Agrees: both raise." if verdict.reason else "Agrees in value and gradient."
    if verdict.outcome == MISMATCH:
        return f"Mismatch of {verdict.reason}"
    profile = PROFILES[verdict.case.profile]
    for row in profile.differences:
        if row.name == verdict.reason:
            theirs = f"{profile.keras}: {row.keras}"
            return f"Differs on purpose: {row.where}. {theirs}. Here: {row.here}."
    return f"Differs on purpose: {verdict.reason}."


def _array(value: object, dtype: str | None = None) -> str:
    if value is None:
        return "none"
    array = np.asarray(value)
    text = np.array2string(array, precision=9, threshold=40, edgeitems=3, separator=", ")
    return f"{dtype or array.dtype} {array.shape}:\n{text}"


def print_comparison(console: Console, name: str, versions: dict[str, str], tally: Tally) -> None:
    """Where another Keras differs from tf.keras: how, and for which features."""
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


def to_html(results: Results) -> str:
    """A single self-contained file."""
    return page.render(
        "report.html",
        results=results,
        sentence=sentence(results),
        everyday=everyday(results),
        oracle=ORACLES.get(results.setting.oracle, f"the real {results.profile.keras} on the CPU"),
        errors=error_lines(results),
        pictures=plots.pictures(results),
        differences=() if results.alone else differences(results),
        lines=lines(results),
        outcomes=OUTCOMES,
    )
