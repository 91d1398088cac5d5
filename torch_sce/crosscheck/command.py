"""The command line of the cross-check."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from . import batch, page, report
from .answers import FLOAT64, OracleError
from .campaign import (
    Block,
    Compared,
    Here,
    Plan,
    Workers,
    blocks,
    drawn,
    interruptible,
    is_kept,
    names,
    source,
)
from .compare import MISMATCH
from .live import LIVE, TARGET
from .profiles import KERAS2, KERAS3, PROFILES
from .recorded import RECORDED, RecordedOracle, record
from .results import Results, Setting, resume, save
from .tally import Ranges, Tally

CASES = 4000
SEED = 0
PROGRAM = "python -m torch_sce.crosscheck"
SAVE_EVERY = 30.0  # seconds
AGREEMENT, DISAGREEMENT, USAGE, NO_ORACLE, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cross-check; the exit code says how it ended."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no line width
    try:
        if arguments[:1] == ["batch"]:
            return batch.main(arguments[1:], console)
        parser = _parser()
        options = parser.parse_args(arguments)
        options.oracle = options.oracle or PROFILES[options.profile].keras
        _check_usage(parser, options)
        _check_filters(parser, options)
        return _run(parser, options, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OracleError as error:
        console.print(f"[bold red]No cross-check:[/] {error}", highlight=False, soft_wrap=True)
        return NO_ORACLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compares torch_sce with the real tf.keras on random cases: value, gradient, "
        "shape, dtype and errors.",
        epilog="`batch FILE.npz` instead of options compares your own batch: `batch --help`. "
        "Exit code: 0 all cases agree or differ on purpose, 1 a mismatch, 2 wrong usage, "
        "3 the oracle is missing or has crashed, 130 interrupted by Ctrl-C or SIGTERM.",
    )
    add = parser.add_argument
    add("--cases", type=_from(1), default=CASES, help="number of cases per seed (%(default)s)")
    add("--seed", type=_from(0), default=SEED, help="the seed of the random cases (%(default)s)")
    add("--seeds", type=_from(1), default=1, help="number of seeds, from --seed on (%(default)s)")
    add("--case", type=_from(0), metavar="NUMBER", help="only this case, with all details")
    add(
        "--filter", action="append", default=[], metavar="'FEATURE: VALUE'",
        help="only cases with this feature, as the table names it, for example "
        "'reduction: sum'; if given more than once, cases with all of them",
    )  # fmt: skip
    add(
        "--profile", choices=PROFILES, default=KERAS3,
        help="keras2: torch_sce.keras2 is compared with tf_keras, under its own table of "
        "differences (%(default)s)",
    )  # fmt: skip
    add(
        "--oracle", choices=(*LIVE, "recorded", FLOAT64),
        help=f"recorded: tf.keras's recorded answers to --seed {SEED}, cases below {CASES}, no "
        "TensorFlow needed; float64: without a Keras, our answers are compared only with the "
        "rules in float64; the others are compared with tf.keras, to show where they differ "
        "(the profile's Keras)",
    )  # fmt: skip
    add("--device", default="cpu", help="where torch_sce computes: cpu, cuda, cuda:1, ...")
    add(
        "--workers", type=_from(1), default=1, metavar="N",
        help="number of processes, each with its own oracle (%(default)s)",
    )  # fmt: skip
    add(
        "--json", type=Path, metavar="FILE",
        help=f"write all results to this file, also every {SAVE_EVERY:.0f} s during the run",
    )  # fmt: skip
    add(
        "--resume", action="store_true",
        help="continue the run in the --json file, if there is one",
    )  # fmt: skip
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
    for path in (options.json, options.record):
        page.check_file(parser, path)
    page.check_html(parser, options.html)
    if options.profile == KERAS2 and options.oracle not in (PROFILES[KERAS2].keras, FLOAT64):
        parser.error(f"--profile {KERAS2} has no --oracle but tf_keras, its own, and {FLOAT64}")
    if options.case is not None and options.filter:
        parser.error("--case is one case, --filter chooses among many: pass one of them")
    if options.case is not None and (options.resume or options.seeds > 1 or options.workers > 1):
        parser.error("--case is one case; --resume, --seeds and --workers are for many")
    if options.resume and options.json is None:
        parser.error("--resume continues the run in a file: pass it as --json")
    everything = options.oracle == TARGET and not options.filter and options.case is None
    if options.record is not None and not everything:
        parser.error("--record stores tf.keras's answers to all cases")
    if options.record is not None and (options.workers, options.seeds) != (1, 1):
        parser.error("--record stores the cases of one seed in order: leave out --workers, --seeds")
    if options.record is not None and options.resume:
        parser.error("--record stores all answers of one run: leave out --resume")


def _require_recorded(options: argparse.Namespace) -> None:
    """Raises OracleError at the start if the last case would."""
    last = options.cases - 1 if options.case is None else options.case
    RecordedOracle().require_recorded(_seeds(options)[-1], last)


def _check_filters(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with exit code 2 if no case passes all filters."""
    if not options.filter:
        return
    known: set[str] = set()
    for seed in _seeds(options):
        for case in drawn(seed, range(options.cases), options.profile):
            if is_kept(case, options.filter):
                return
            known |= names(case)
    for wanted in options.filter:
        if wanted not in known:
            listed = "\n  ".join(sorted(known))
            parser.error(f"--filter {wanted!r}: no case has it. The features are:\n  {listed}")
    total = options.seeds * options.cases
    parser.error(f"--filter: none of {total} cases has all of {options.filter}")


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.seeds)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    plan = Plan(options.oracle, options.device, tuple(options.filter), options.profile)
    seen: list[Compared] = []
    kept = seen if options.case is not None or options.record is not None else None
    if options.oracle != FLOAT64:
        console.print(f"Starting {options.oracle} ...", highlight=False)
    with interruptible() as stopped:
        alone = options.workers == 1
        comparing = Here(plan, stopped, kept) if alone else Workers(plan, options.workers, stopped)
        with comparing:
            results = _start(parser, options, comparing.versions)
            if options.oracle == "recorded":
                _require_recorded(options)
            _print_start(console, options, results.setting)
            _compare(options, console, comparing, results, began)
    if _count(results.tally.finished) < _asked(options):
        return _interrupted(options, console, results)
    if options.record is not None:
        recorded = [each for each in seen if each.keras and each.verdict.case.head is None]
        cases, answers = (
            [each.verdict.case for each in recorded],
            [each.keras for each in recorded if each.keras],
        )
        record(options.record, cases, answers, comparing.versions["target"])
        console.print(f"Recorded {len(cases)} answers in {options.record}", highlight=False)
    if options.case is None:
        report.print_tables(console, results)
    else:
        for each in seen:  # the case, and the one with a head
            text = report.details(each.verdict, each.keras, each.ours)
            console.print(text, highlight=False)
    if comparing.versions["other"]:
        other = comparing.versions["other"]
        report.print_comparison(console, options.oracle, other, results.tally)
    if options.html:
        options.html.write_text(report.to_html(results))
        console.print(f"Report: {options.html}", highlight=False)
    if options.case is None:
        report.print_conclusion(console, results)
    return DISAGREEMENT if results.mismatches else AGREEMENT


def _start(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    versions: dict[str, dict[str, str]],
) -> Results:
    """Empty results, or those of the run to resume."""
    setting = Setting(
        options.oracle, options.filter, _device_name(options.device),
        versions["target"] | versions["ours"], source(), options.profile,
    )  # fmt: skip
    arguments = [] if options.device == "cpu" else ["--device", options.device]
    if options.profile != KERAS3:
        arguments += ["--profile", options.profile]
    if options.oracle in ("recorded", FLOAT64):
        arguments += ["--oracle", options.oracle]
    if options.case is None:
        seeds = [] if options.seeds == 1 else ["--seeds", str(options.seeds)]
        filters = [part for wanted in options.filter for part in ("--filter", wanted)]
        choice = [*seeds, "--cases", str(options.cases), *filters]
    else:
        choice = ["--case", str(options.case)]
    results = Results(Tally(), _seeds(options), setting, arguments, choice)
    if options.resume and options.json.exists():
        try:
            resume(results, options.json, options.cases)
        except ValueError as error:
            parser.error(f"--resume: {error}; delete the file, or name another")
    return results


def _print_start(console: Console, options: argparse.Namespace, setting: Setting) -> None:
    listed = ", ".join(f"{name} {number}" for name, number in setting.versions.items())
    seeds = _seeds(options)
    last = "" if len(seeds) == 1 else f" to {seeds[-1]}"
    those = "".join(f", those with {wanted!r}" for wanted in options.filter)
    console.print(
        f"{_asked(options)} of the cases of --seed {seeds[0]}{last}{those}, on {setting.device}; "
        f"{listed}",
        highlight=False,
    )


def _compare(
    options: argparse.Namespace,
    console: Console,
    comparing: Here | Workers,
    results: Results,
    began: float,
) -> None:
    """Adds the tallies of the cases to the results, and writes them regularly and at the end."""
    tally, earlier, saved = results.tally, results.seconds, began
    if options.case is not None:
        todo = iter([Block(options.seed, options.case, options.case + 1)])
    else:
        todo = blocks(_seeds(options), options.cases, dict(tally.finished))
    try:
        for found in _progress(console, comparing.run(todo), tally, _asked(options)):
            tally.merge(found)
            now = time.perf_counter()
            results.seconds = earlier + now - began
            if options.json and now - saved > SAVE_EVERY:
                save(results, options.json)
                saved = now
    finally:
        if options.json and tally.finished:
            save(results, options.json)


def _interrupted(options: argparse.Namespace, console: Console, results: Results) -> int:
    done = _count(results.tally.finished)
    if done:
        report.print_conclusion(console, results)
    kept = f"are in {options.json}, for --resume" if options.json else "are lost without --json"
    console.print(
        f"Interrupted: {done} of {_asked(options)} compared; their results {kept}.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return INTERRUPTED


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"


def _asked(options: argparse.Namespace) -> int:
    return 1 if options.case is not None else options.seeds * options.cases


def _count(finished: dict[int, Ranges]) -> int:
    return sum(stop - start for ranges in finished.values() for start, stop in ranges)


def _progress(
    console: Console, found: Iterator[Tally], tally: Tally, total: int
) -> Iterator[Tally]:
    """The tallies to be merged, shown as a bar in a terminal and as lines in a log."""
    done = said = _count(tally.finished)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("Comparing", total=total, completed=done)
        for each in found:
            yield each
            done += _count(each.finished)
            bar.update(task, completed=done)
            if not console.is_terminal and (done == total or done - said >= max(100, total // 20)):
                mismatches = tally.outcomes[MISMATCH]
                some = f", {mismatches} mismatch{'es' * (mismatches > 1)}" if mismatches else ""
                console.print(f"{done} of {total} compared{some}", highlight=False)
                said = done
