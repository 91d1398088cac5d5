"""`python -m torch_sce.crosscheck batch FILE.npz`: a single batch of the user's, compared.

The results of tf.keras, torch_sce and `F.cross_entropy`, and which rule accounts for how much of
the difference; with a number of the user's, which mistake gives it.
"""

import argparse
import json
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import shorten

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..explain import Explanation, explain
from ..losses import SparseCategoricalCrossentropy
from ..options import REDUCTIONS, parse_dtype
from . import page, report
from .answers import Answer, our_versions, ours
from .blocks import judge_in_blocks, measured, refusal
from .cases import LOSSES, Batch, Case
from .compare import MISMATCH, Verdict
from .live import TARGET, LiveOracle
from .mistakes import Match, Number, Search, search
from .rules import Step, steps

NEEDED, OPTIONAL = ("y_true", "y_pred"), ("sample_weight", "mask")
SCALARS = tuple(each for each in REDUCTIONS if each not in ("none", None))
SHOWN = 5  # mistakes that give the same number
LIKELY = 0.1  # matches by chance
LONGEST = 300  # error: TensorFlow lists all labels
# Names that `reference` has for rules.
MISFITS = ("shape of y_true", "axis", "classes", "y_pred's dtype")
WEIGHTS = ("shape of a weight", "weight along the wrong axis")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_sce.crosscheck batch",
        description="Shows the results of tf.keras, torch_sce and F.cross_entropy for your own "
        "batch, with integer labels, and which rule accounts for the difference.",
        epilog="Write the file with np.savez(FILE, y_true=..., y_pred=..., sample_weight=..., "
        "mask=...); the last two may be left out. Exit code: 0 torch_sce agrees with tf.keras or "
        "differs on purpose, 1 a mismatch, 2 wrong usage, 3 no tf.keras.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.npz")
    add("--from-logits", action="store_true", help="y_pred holds logits, not probabilities")
    add("--ignore-class", type=_number, metavar="LABEL", help="positions with it do not count")
    add("--reduction", choices=SCALARS, default="sum_over_batch_size", help="(%(default)s)")
    add("--axis", type=int, default=-1, help="the class axis of y_pred (%(default)s)")
    add("--dtype", type=_dtype, help="the loss's dtype (float32)")
    add(
        "--got", type=_got, metavar="NUMBER",
        help="the loss that your own code printed for the batch: shows which mistake gives it",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write what is shown there, for programs")
    add("--html", type=Path, metavar="FILE", help="write a report with plots there")
    return parser


def _got(text: str) -> Number:
    try:
        return Number(text)
    except ArithmeticError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not value.is_integer() or abs(value) >= 2**63:
        return value  # not an integer of TensorFlow; as a float any number works
    return int(text) if text.strip().lstrip("+-").isdecimal() else int(value)


def _dtype(text: str) -> str:
    try:
        return str(parse_dtype(text)).removeprefix("torch.")
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Found:
    """Everything that is shown."""

    file: Path
    verdict: Verdict
    keras: Answer
    ours: Answer
    steps: list[Step]
    explanation: Explanation
    versions: dict[str, str]
    got: Number | None
    searched: Search | None  # for what gives `got`

    @property
    def loss(self) -> str:
        return repr(self.explanation.loss)

    @property
    def looks_wrong(self) -> list[str]:
        return [str(finding) for finding in self.explanation.findings if finding.is_wrong]


def main(arguments: Sequence[str], console: Console) -> int:
    """Runs the comparison; the exit code says how it ended. Raises OracleError without tf.keras."""
    line = parser()
    options = line.parse_args(arguments)
    page.check_file(line, options.json)
    page.check_html(line, options.html)
    try:
        case = _case(options, read(options.file))
    except Unreadable as error:
        line.error(str(error))
    mine, refused = ours(case), refusal(case)
    if refused in MISFITS:
        line.error(f"{options.file}: {mine.message}")
    if not case.y_true.size:
        line.error(f"{options.file}: y_pred has the shape {case.y_pred.shape}: no positions")
    console.print(f"Starting {TARGET} ...", highlight=False)
    with LiveOracle(TARGET) as oracle:
        (keras,) = oracle.answers([case])
        versions = oracle.versions | our_versions()
    if mine.error and keras.error and refused in WEIGHTS:
        line.error(f"{options.file}: {mine.message}")
    batch = case.batch
    given = (batch.y_true, batch.y_pred, batch.sample_weight, batch.mask)
    ladder = _steps(case, mine, keras)
    found = Found(
        options.file, judge_in_blocks(case, keras, mine), keras, mine, ladder,
        explain(SparseCategoricalCrossentropy(**case.options), *given), versions, options.got,
        options.got and _searched(options.got, case, keras, mine, ladder),
    )  # fmt: skip
    show(console, found)
    if options.json:
        options.json.write_text(to_json(found))
        console.print(f"Results: {options.json}", highlight=False)
    if options.html:
        options.html.write_text(to_html(found))
        console.print(f"Report: {options.html}", highlight=False)
    return 1 if found.verdict.outcome == MISMATCH else 0


def _steps(case: Case, mine: Answer, keras: Answer) -> list[Step]:
    """The steps from F.cross_entropy to the loss, or only the first if the loss raises."""
    try:
        return steps(case, keras.gradient)[: 1 if mine.error else None]
    except ValueError:  # weights that do not fit
        return []


def _searched(
    number: Number, case: Case, keras: Answer, mine: Answer, ladder: list[Step]
) -> Search:
    """What gives the number: the three results, a mistake, or a part of the ladder."""
    own = [
        Match(f"does what {who} does", float(answer.value))
        for who, answer in (("tf.keras", keras), ("torch_sce", mine))
        if answer.value is not None
    ]
    usual = []
    for index, step in enumerate(ladder):
        rules = ", ".join(each.rule for each in ladder[1 : index + 1])
        words = f"is `{step.why}`" if not index else f"is `F.cross_entropy` with the rules {rules}"
        if step.value is not None:
            usual.append(Match(words, step.value))
    return search(number, case, own, usual)


class Unreadable(Exception):
    """What is wrong with a file."""


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file.

    Raises:
        Unreadable: there is no such file, it is not an archive of arrays, or it has the wrong ones.
    """
    if not path.is_file():
        wrong = "is a folder; name a file" if path.is_dir() else "there is no such file"
        raise Unreadable(f"{path}: {wrong}")
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            raise Unreadable(f"{path}: must be written by np.savez, not by np.save")
        with stored:
            arrays = dict(stored)
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if str(error).startswith("Object arrays"):
            raise Unreadable(f"{path}: must hold arrays of numbers, got Python objects") from error
        raise Unreadable(f"{path}: must be a file that np.savez wrote: {error}") from error
    listed = f"it has {', '.join(arrays) or 'none'}"
    for name in NEEDED:
        if name not in arrays:
            raise Unreadable(
                f"{path}: the array {name} is missing; {listed}. Write the file with "
                "np.savez(FILE, y_true=..., y_pred=...)"
            )
    for name, array in arrays.items():
        if name not in (*NEEDED, *OPTIONAL):
            raise Unreadable(
                f"{path}: {name} is not one of the arrays {', '.join(NEEDED + OPTIONAL)}; {listed}"
            )
        _require_numbers(path, name, array)
    return {
        name: array.astype(array.dtype.newbyteorder("="), copy=False)
        for name, array in arrays.items()
    }


def _require_numbers(path: Path, name: str, array: object) -> None:
    if not isinstance(array, np.ndarray):  # not an array, in spite of its name
        raise Unreadable(f"{path}: {name} must be an array that np.savez wrote")
    kind = array.dtype.kind
    if kind in ("f" if name == "y_pred" else "biuf") and array.itemsize <= 8:
        return
    wanted = "floating-point numbers" if name == "y_pred" else "numbers"
    hint = "; save bfloat16 as float32" if kind == "V" else ""
    if name == "y_pred" and kind in "biu":
        hint = "; are y_true and y_pred swapped?"
    raise Unreadable(
        f"{path}: {name} must hold {wanted} of at most 64 bits, got {array.dtype}{hint}"
    )


def _case(options: argparse.Namespace, arrays: dict[str, np.ndarray]) -> Case:
    y_pred = arrays["y_pred"]
    weight, mask = map(arrays.get, OPTIONAL)
    batch = Batch(arrays["y_true"], y_pred, y_pred.dtype.name, weight, mask)
    keys = ("from_logits", "ignore_class", "reduction", "axis", "dtype")
    return Case(
        seed=0, index=0, name=LOSSES[0], form="class",
        options={key: getattr(options, key) for key in keys}, batch=batch, as_lists=False,
        upstream=np.ones(1, np.float32), features={},
    )  # fmt: skip


def show(console: Console, found: Found) -> None:
    console.print(f"{found.file}: {found.loss}", style="bold", highlight=False, soft_wrap=True)
    for line in found.explanation.arguments:
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    for kind, sentence in _first(found):
        console.print(_styled(sentence), style=STYLES[kind], highlight=False, soft_wrap=True)
    titles = {
        "Three results for the batch": _sides(found),
        "From F.cross_entropy to tf.keras, one rule at a time": _ladder(found),
    }
    for title, (header, *rows) in titles.items():
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, justify="right" if column in NUMBERS else "left",
                             overflow="fold")  # fmt: skip
        for row in rows:
            table.add_row(*map(_styled, row))
        if rows:
            console.print(table)
    for sentence in _sentences(found):
        console.print(_styled(sentence), highlight=False, soft_wrap=True)


def _styled(text: str) -> str:
    """The text for the console, `code` in another colour."""
    return re.sub(r"(`[^`]*`)", r"[cyan]\1[/]", escape(text))


def _sides(found: Found) -> list[list[str]]:
    """Value and gradient from each side, and how far they are from tf.keras's."""
    sides = [("tf.keras", _side(found.keras, found.keras)),
             ("torch_sce", _side(found.ours, found.keras))]  # fmt: skip
    sides += [("F.cross_entropy", step) for step in found.steps[:1]]
    rows = [["", "value", "off by", "gradient", "gradient off by", ""]]
    for who, side in sides:
        value, *gradient = _numbers(side.value, side.length, side.distance)
        off = ""
        if side.value is not None and side.distance is not None and found.keras.value is not None:
            off = f"{side.value - float(found.keras.value):.2g}"
        rows.append([who, value, off, *gradient, side.error or side.why])
    return rows


def _side(answer: Answer, keras: Answer) -> Step:
    if answer.error or answer.value is None or answer.gradient is None:
        return Step("", "", error=shorten(f"{answer.error}: {answer.message}", LONGEST))
    gaps = measured(answer.gradient, keras.gradient)
    return Step("", "", float(answer.value), gaps.length, gaps.distance)


def _ladder(found: Found) -> list[list[str]]:
    """A row for each step, and tf.keras at the end."""
    rows = [["rule", "value", "change", "gradient off by", "why"]]
    for step, change in zip(found.steps, changes(found.steps), strict=True):
        value, _, off = _numbers(step.value, step.length, step.distance)
        rows.append([step.rule, value, "" if change is None else f"{change:+.6g}", off,
                     step.error or step.why])  # fmt: skip
    end = _side(found.keras, found.keras)
    rows.append(["tf.keras", _numbers(end.value, None, None)[0], "", "", ""])
    return rows if len(found.steps) > 1 or (found.steps and end.error) else rows[:1]


def changes(found: list[Step]) -> list[float | None]:
    """By how much each step moves the value; None where there is none before it."""
    values = [None, *(step.value for step in found)]
    return [None if a is None or b is None else b - a for a, b in pairwise(values)]


NUMBERS = ("value", "off by", "gradient", "gradient off by", "change")


def _numbers(value: float | None, length: float | None, off: float | None) -> list[str]:
    """The value, its gradient's length, and its distance from tf.keras's."""
    if value is None:
        return ["raises", "", ""]
    if length is None or off is None:
        return [f"{value:.9g}", "", ""]
    return [f"{value:.9g}", f"{length:.4g}", f"{off:.2g}"]


VERY_FEW_DIGITS = 3
STYLES = {"bad": "red", "good": "green", "got": "bold", "plain": ""}


def _first(found: Found) -> list[tuple[str, str]]:
    """What looks wrong, what gives the user's number, and the outcome: a kind and a sentence each.

    The outcome is good only if nothing looks wrong.
    """
    said = [("bad", f"Looks wrong: {finding}") for finding in found.looks_wrong]
    if found.got and found.searched:
        said.append(("got", _of_got(found.got, found.searched)))
    is_bad = found.verdict.outcome == MISMATCH
    kind = "bad" if is_bad else "plain" if found.looks_wrong else "good"
    return [*said, (kind, f"torch_sce and tf.keras: {report.outcome(found.verdict)}")]


def _of_got(number: Number, searched: Search) -> str:
    """Which mistakes give the user's number."""
    matches, nearest = searched.matches, searched.nearest
    if not matches:
        near = f" The nearest single one: code that {nearest}." if nearest else ""
        if not math.isfinite(number.value):
            near = " Look for a division by 0 or a logarithm of 0 in code that is not tried here."
        return f"{number.text}: none of {searched.tried} mistakes and combinations gives it.{near}"
    said = [f"{number.text} fits code that {matches[0]}."]
    if number.digits < VERY_FEW_DIGITS and not searched.by_chance:
        said.append("So would many other values: pass more digits to be sure.")
    said += [f"Or code that {match}." for match in matches[1:SHOWN]]
    if len(matches) > SHOWN:
        said.append(f"And {len(matches) - SHOWN} more.")
    values = [match.value for match in matches]
    if len(matches) > 1 and max(values) - min(values) <= 1e-6 * abs(values[0]):
        said.append("They give the same number for this batch.")
    elif len(matches) > 1 or searched.by_chance > LIKELY:
        said.append(
            f"Of the {searched.tried} mistakes and combinations that were tried, about "
            f"{searched.by_chance:.1g} would fit by chance: pass more digits to be sure."
        )
    return " ".join(said)


def _sentences(found: Found) -> list[str]:
    """The ladder, in words."""
    if not found.steps:
        return []
    first, last = found.steps[0], found.steps[-1]
    gives = "raises" if first.value is None else f"gives {first.value:.7g}"
    if found.keras.value is None:
        said = [f"The ladder ends at tf.keras, which raises: F.cross_entropy {gives}."]
        if found.ours.value is not None:
            said.append(f"torch_sce gives {float(found.ours.value):.7g}.")
        return said
    keras = float(found.keras.value)
    if len(found.steps) == 1:
        return ["No rule makes F.cross_entropy, as usually written, differ here."]
    if first.value is None:
        said = [f"F.cross_entropy, as usually written, raises {first.error}"]
    else:
        said = [
            f"F.cross_entropy, as usually written, gives {first.value:.7g} and tf.keras "
            f"{keras:.7g}: a difference of {keras - first.value:+.6g}."
        ]
    rest = keras - (math.nan if last.value is None else last.value)
    said += _largest(found, rest)
    rounding = abs(rest) < 1e-5 * max(abs(keras), 1)
    said.append(f"Left after all rules: {rest:.2g}{', which is rounding' if rounding else ''}.")
    if not found.explanation.loss.from_logits:
        said.append(
            "If tf.keras's number came from fit() or evaluate() of a model that ends in a "
            "softmax, it used the logits under the softmax: record those, with --from-logits."
        )
    return said


def _largest(found: Found, rest: float) -> list[str]:
    """The rule with the largest part, unless another undoes most of it."""
    moved = {s.rule: c for s, c in zip(found.steps, changes(found.steps), strict=True) if c}
    if not moved or not math.isfinite(rest):
        return []
    largest = max(moved, key=lambda rule: abs(moved[rule]))
    against = min(moved, key=lambda rule: moved[rule] * math.copysign(1, moved[largest]))
    if -moved[against] / moved[largest] > 0.5:
        return [
            f"The rules {largest} ({moved[largest]:+.6g}) and {against} ({moved[against]:+.6g}) "
            "work against each other: neither accounts for the difference alone."
        ]
    share = abs(moved[largest]) / (sum(map(abs, moved.values())) + abs(rest))
    return [
        f"The largest part comes from the rule {largest}: {moved[largest]:+.6g}, {share:.0%} "
        "of all changes."
    ]


def to_json(found: Found) -> str:
    """Everything that is shown, for programs."""
    explanation = found.explanation
    parts = {
        "file": str(found.file),
        "loss": found.loss,
        "arguments": explanation.arguments,
        "versions": found.versions,
        "outcome": found.verdict.outcome,
        "reason": found.verdict.reason,
        "findings": [vars(finding) for finding in explanation.findings],
        "got": None if found.got is None else found.got.text,
        "mistakes": found.searched and [vars(match) for match in found.searched.matches],
        "results": {
            who: vars(_side(answer, found.keras))
            for who, answer in (("tf.keras", found.keras), ("torch_sce", found.ours))
        },
        "ladder": [vars(step) for step in found.steps],
        "said": [sentence for _, sentence in _first(found)] + _sentences(found),
    }
    return json.dumps(parts, indent=1) + "\n"


def to_html(found: Found) -> str:
    """A single self-contained file."""
    return page.render(
        "batch.html",
        found=found,
        first=_first(found),
        sentences=_sentences(found),
        sides=_sides(found),
        ladder=_ladder(found),
        numbers=NUMBERS,
        way=_way(found),
        losses=_losses(found.explanation),
    )


def _way(found: Found) -> list[page.Picture]:
    """The value after each rule, as a waterfall, and the gradients' distances."""
    plt = page.pyplot()
    seen = [step for step in found.steps if step.value is not None]
    if found.keras.value is None or found.keras.gradient is None or not seen:
        return []
    values = [step.value or 0.0 for step in seen]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.5 * (len(seen) + 1)),
                                         layout="constrained", sharey=True)  # fmt: skip
    names = [step.rule for step in seen]
    left.barh(names[0], values[0], color="#8c959f")
    for name, before, after in zip(names[1:], values, values[1:], strict=False):
        color = "#1f6fb2" if after < before else "#d1622b"
        left.barh(name, after - before, left=before, color=color)
        left.annotate(f"{after - before:+.3g}", (max(before, after), name), (4, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    left.barh("tf.keras", float(found.keras.value), color="#2f7d4f")
    left.set(xlabel="value [nats]", title="What each rule changes")
    left.margins(x=0.15)
    left.invert_yaxis()
    gaps = [step.distance for step in seen]
    right.barh(names, gaps, color="#8c959f")
    right.set(xlabel="distance / length of tf.keras's gradient", title="The gradient's distance")
    picture = page.picture(figure, "the value after each rule, and the gradient's distance")
    plt.close(figure)
    return [picture]


def _losses(explanation: Explanation) -> list[page.Picture]:
    """None if the loss raises: the findings are in the text, too."""
    if not explanation.positions:
        return []
    return [page.picture(explanation.plot(), "the losses, and what each class adds")]
