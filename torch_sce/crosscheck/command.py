"""The command line of the cross-check."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from . import report
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
from .cases import Case, draw
from .compare import Verdict, judge

CASES = 2500
SEED = 0
AGREEMENT, DISAGREEMENT, USAGE, NO_ORACLE = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cross-check; the exit code says how it ended."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    cases = list(_chosen(options))
    if not cases:
        parser.error(f"--filter {' '.join(options.filter)}: no case has that feature")
    if options.record is not None and (options.oracle != TARGET or options.filter or options.case):
        parser.error("--record takes the answers of tf.keras to all cases")
    console = Console(stderr=False)
    try:
        return _run(options, cases, console)
    except OracleError as error:
        console.print(f"[bold red]No cross-check:[/] {error}", highlight=False, soft_wrap=True)
        return NO_ORACLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares torch_sce with the real tf.keras on random cases: value, gradient, "
        "shape, dtype and errors.",
        epilog="Exit code: 0 all cases agree or differ on purpose, 1 a mismatch, 2 wrong usage, "
        "3 the oracle is missing or has crashed.",
    )
    parser.add_argument(
        "--cases", type=_positive, default=CASES, help="how many to draw (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="what to draw them from (%(default)s)"
    )
    parser.add_argument(
        "--case", type=int, metavar="NUMBER", help="this one alone, with all details"
    )
    parser.add_argument(
        "--filter", action="append", default=[], metavar="'FEATURE: VALUE'",
        help="only cases with this feature, as the table names it; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--oracle", choices=(*LIVE, "recorded"), default=TARGET,
        help="recorded: tf.keras's answers on file, no TensorFlow needed; the others are asked "
        "beside tf.keras, to show where they differ from it (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where torch_sce computes: cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots there")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RECORDED, metavar="FILE",
        help="store tf.keras's answers for --oracle recorded",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _chosen(options: argparse.Namespace) -> Iterator[Case]:
    indices = range(options.cases) if options.case is None else [options.case]
    for index in indices:
        case = draw(options.seed, index)
        named = {f"{feature}: {value}" for feature, value in case.features.items()}
        if all(wanted in named for wanted in options.filter):
            yield case


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
            f"{len(cases)} cases of --seed {options.seed}, on {device}; {listed}", highlight=False
        )
        poisons = options.device != "cpu"
        verdicts: list[Verdict] = []
        answers: list[Answer] = []
        for case, answer in _progress(console, cases, target.answers(cases)):
            answers.append(answer)
            verdicts.append(judge(case, answer, ours(case, options.device), poisons))
        others = []
        if other:
            console.print(f"Asking {options.oracle} ...", highlight=False)
            others = [answer for _, answer in _progress(console, cases, other.answers(cases))]

    results = report.Results(
        verdicts, options.seed, TARGET, versions, device, options.device,
        time.perf_counter() - start,
    )  # fmt: skip
    if options.record is not None:
        record(options.record, cases, answers, target.versions)
        console.print(f"Recorded {len(cases)} answers in {options.record}", highlight=False)
    if options.case is not None:
        console.print(report.details(cases[0], answers[0], ours(cases[0], options.device)))
    else:
        report.print_tables(console, results)
    if other:
        report.print_comparison(console, options.oracle, other.versions, cases, answers, others)
    if options.json:
        options.json.write_text(report.to_json(results))
    if options.html:
        options.html.write_text(report.to_html(results))
        console.print(f"Report: {options.html}", highlight=False)
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
    step = max(1, len(cases) // 5)
    for done in range(0, len(cases), step):
        yield from islice(pairs, step)
        console.print(f"{min(done + step, len(cases))} of {len(cases)} compared", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
