"""The command line of the cross-check."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from . import batch, report
from .answers import (
    LIVE,
    RECORDED,
    TARGET,
    Answer,
    LiveOracle,
    OracleError,
    RecordedOracle,
    our_versions,
    ours,
    record,
)
from .cases import Case
from .compare import Verdict, judge
from .draw import draw

CASES = 4000
SEED = 0
AGREEMENT, DISAGREEMENT, USAGE, NO_ORACLE = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cross-check; the exit code says how it ended."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    if not console.is_terminal:
        console.width = 120  # what reads it does not break lines
    try:
        if arguments[:1] == ["batch"]:
            return batch.main(arguments[1:], console)
        parser = _parser()
        options = parser.parse_args(arguments)
        _check_usage(parser, options)
        return _run(options, _chosen(parser, options), console)
    except OracleError as error:
        console.print(f"[bold red]No cross-check:[/] {error}", highlight=False, soft_wrap=True)
        return NO_ORACLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares torch_sce with the real tf.keras on random cases: value, gradient, "
        "shape, dtype and errors.",
        epilog="`batch FILE.npz` instead of options looks at a batch of your own: `batch --help`. "
        "Exit code: 0 all cases agree or differ on purpose, 1 a mismatch, 2 wrong usage, "
        "3 the oracle is missing or has crashed.",
    )
    add = parser.add_argument
    add("--cases", type=_from(1), default=CASES, help="how many to draw (%(default)s)")
    add("--seed", type=_from(0), default=SEED, help="what to draw them from (%(default)s)")
    add("--case", type=_from(0), metavar="NUMBER", help="this one alone, with all details")
    add(
        "--filter", action="append", default=[], metavar="'FEATURE: VALUE'",
        help="only cases with this feature, as the table names it, for example "
        "'reduction: sum'; given more than once, all of them",
    )  # fmt: skip
    add(
        "--oracle", choices=(*LIVE, "recorded"), default=TARGET,
        help=f"recorded: tf.keras's answers on file to --seed {SEED}, cases below {CASES}, no "
        "TensorFlow needed; the others are asked beside tf.keras, to show where they differ "
        "from it (%(default)s)",
    )  # fmt: skip
    add("--device", default="cpu", help="where torch_sce computes: cpu, cuda, cuda:1, ...")
    add("--json", type=Path, metavar="FILE", help="write all results there")
    add("--html", type=Path, metavar="FILE", help="write a report with plots there")
    add(
        "--record", type=Path, nargs="?", const=RECORDED, metavar="FILE",
        help="store tf.keras's answers for --oracle recorded",
    )  # fmt: skip
    return parser


def _from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program with exit code 2 if there is no such device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        parser.error(f"--device {device}: must be cpu, cuda, or cuda:NUMBER")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        parser.error(f"--device {device}: PyTorch finds no such CUDA device here")


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What argparse cannot check by itself; ends the program with exit code 2."""
    check_device(parser, options.device)
    for path in (options.json, options.html, options.record):
        report.check_file(parser, path)
    if options.case is not None and options.filter:
        parser.error("--case is one case, --filter chooses among many: pass one of them")
    everything = options.oracle == TARGET and not options.filter and options.case is None
    if options.record is not None and not everything:
        parser.error("--record takes the answers of tf.keras to all cases")


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """The cases asked for, at least one."""
    if options.case is not None:
        return [draw(options.seed, options.case)]
    drawn = [draw(options.seed, index) for index in range(options.cases)]
    named = [{f"{feature}: {value}" for feature, value in c.features.items()} for c in drawn]
    known = set().union(*named)
    for wanted in options.filter:
        if wanted not in known:
            listed = "\n  ".join(sorted(known))
            parser.error(f"--filter {wanted!r}: no case has that. These there are:\n  {listed}")
    wanted = set(options.filter)
    chosen = [case for case, names in zip(drawn, named, strict=True) if wanted <= names]
    if not chosen:
        parser.error(f"--filter: none of {options.cases} cases has all of {options.filter}")
    return chosen


def _run(options: argparse.Namespace, cases: list[Case], console: Console) -> int:
    start = time.perf_counter()
    with ExitStack() as stack:
        console.print(f"Starting {options.oracle} ...", highlight=False)
        other = None
        if options.oracle == "recorded":
            target = stack.enter_context(RecordedOracle())
        else:
            target = stack.enter_context(LiveOracle(TARGET))
            if options.oracle != TARGET:
                other = stack.enter_context(LiveOracle(options.oracle))
        versions = target.versions | our_versions()
        device = _device_name(options.device)
        listed = ", ".join(f"{name} {number}" for name, number in versions.items())
        console.print(
            f"{len(cases)} of the cases of --seed {options.seed}, on {device}; {listed}",
            highlight=False,
        )
        poisons = options.device != "cpu"
        verdicts: list[Verdict] = []
        answers: list[Answer] = []
        our_answers: list[Answer] = []
        for case, answer in _progress(console, cases, target.answers(cases)):
            answers.append(answer)
            our_answers.append(ours(case, options.device))
            verdicts.append(judge(case, answer, our_answers[-1], poisons))
        others = []
        if other:
            console.print(f"Asking {options.oracle} ...", highlight=False)
            others = [answer for _, answer in _progress(console, cases, other.answers(cases))]

    arguments = [] if options.device == "cpu" else ["--device", options.device]
    if options.oracle == "recorded":
        arguments += ["--oracle", "recorded"]
    if options.case is None:
        filters = [part for wanted in options.filter for part in ("--filter", wanted)]
        choice = ["--cases", str(options.cases), *filters]
    else:
        choice = ["--case", str(options.case)]
    results = report.Results(
        verdicts, options.seed, target.name, versions, device, arguments, choice,
        time.perf_counter() - start,
    )  # fmt: skip
    if options.record is not None:
        record(options.record, cases, answers, target.versions)
        console.print(f"Recorded {len(cases)} answers in {options.record}", highlight=False)
    if options.case is None:
        report.print_tables(console, results)
    else:
        text = report.details(verdicts[0], answers[0], our_answers[0])
        console.print(text, highlight=False)
    if other:
        report.print_comparison(console, options.oracle, other.versions, cases, answers, others)
    if options.json:
        options.json.write_text(report.to_json(results))
    if options.html:
        options.html.write_text(report.to_html(results))
        console.print(f"Report: {options.html}", highlight=False)
    if options.case is None:
        report.print_conclusion(console, results)
    return DISAGREEMENT if results.mismatches else AGREEMENT


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"


def _progress(
    console: Console, cases: list[Case], answers: Iterable[Answer]
) -> Iterator[tuple[Case, Answer]]:
    """Pairs of case and answer, shown as a bar in a terminal and as lines in a log."""
    pairs = zip(cases, answers, strict=True)
    if console.is_terminal:
        yield from track(pairs, "Comparing", total=len(cases), console=console)
        return
    step = max(100, len(cases) // 5)
    for done in range(0, len(cases), step):
        yield from islice(pairs, step)
        console.print(f"{min(done + step, len(cases))} of {len(cases)} compared", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
