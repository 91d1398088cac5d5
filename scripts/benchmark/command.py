"""The command line of the benchmark."""

import argparse
import dataclasses
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torch_sce.crosscheck.command import check_device
from torch_sce.kernels import native

from . import plots, report, tf_process
from .cases import (
    CASES,
    CUDA_CASES,
    HEAD,
    HEAD_SWEEP,
    HEAD_SWEEP_PEERS,
    SWEEP,
    SWEEP_PEERS,
    TF_KERAS,
    Case,
)
from .peers import NAMES, PEERS
from .results import Result, measure

# Of a case: seconds to spend, and rounds it gets in any case.
FULL, FULL_BUSY, QUICK = (8.0, 5), (4.0, 5), (1.0, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit code is 0 for any ratios, 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.worker:
        tf_process.work()
        return 0
    _check_usage(parser, options)
    torch.set_num_threads(options.threads)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "options": vars(options),
             "machine": machine(options.device), "versions": versions()}  # fmt: skip
    chosen = CASES if options.device == "cpu" else CUDA_CASES
    if options.busy:
        chosen += tuple(
            dataclasses.replace(case, busy=True) for case in chosen if case.kind != HEAD
        )
    cases = measure_all(chosen, options.peers, options)
    if TF_KERAS in options.peers:
        about["versions"] |= tf_process.measure(cases, options)
    sweep, heads = (
        measure_all(asked, [name for name in peers if name in options.peers], options)
        for asked, peers in ((SWEEP, SWEEP_PEERS), (HEAD_SWEEP, HEAD_SWEEP_PEERS))
    )
    measured = {"cases": cases, "sweep": sweep, "heads": heads}
    options.json.write_text(report.to_json(about | measured))
    where = (
        f"{about['machine'].get('gpu', about['machine']['cpu'])}, {options.threads} threads, "
        f"{'with' if native else 'without'} native kernels"
    )
    report.print_all(where, cases, sweep)
    plots.draw_speed(options.plots / "benchmark-speed.png", cases, where)
    plots.draw_classes(options.plots / "benchmark-classes.png", sweep, where)
    plots.draw_heads(options.plots / "benchmark-heads.png", heads, where)
    return 0


def measure_all(
    cases: Sequence[Case], peers: Sequence[str], options: argparse.Namespace
) -> list[Result]:
    chosen = [case for case in cases if case.quick or not options.quick]
    in_process = [name for name in PEERS if name in peers]
    results = []
    for number, case in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {case.name}", file=sys.stderr, flush=True)
        effort = QUICK if options.quick else FULL_BUSY if case.busy else FULL
        results.append(measure(case, in_process, options.device, effort))
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measures the time and memory of torch_sce and of other implementations.",
        epilog="Exit code: 0, or 2 for wrong usage.",
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--quick", action="store_true", help="fewer shapes, fewer rounds, no tf.keras")
    add("--busy", action="store_true",
        help="measure every case but heads again, beside a busy process on each core")  # fmt: skip
    add(
        "--peers", metavar="NAME[,NAME]", default=NAMES, type=_names,
        help=f"what to compare with, by default all: {', '.join(NAMES)}",
    )  # fmt: skip
    add("--threads", type=int, default=2, help="of the CPU (%(default)s)")
    add("--json", type=Path, metavar="FILE", default=Path("benchmark.json"), help="(%(default)s)")
    add("--plots", type=Path, metavar="FOLDER", default=Path("."),
        help="for benchmark-speed.png, -classes.png and -heads.png (%(default)s)")  # fmt: skip
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            listed = "\n  ".join(NAMES)
            raise argparse.ArgumentTypeError(f"{name!r} is none of these:\n  {listed}")
    return names


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What argparse cannot check by itself; ends the program with exit code 2."""
    check_device(parser, options.device)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: must be at least 1")
    if not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.json.is_dir():
        parser.error(f"--json {options.json}: is a folder")
    if not options.plots.is_dir():
        parser.error(f"--plots {options.plots}: there is no such folder")


def machine(device: str) -> dict[str, Any]:
    """The machine it runs on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found[1] if found else model
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    about = {"cpu": model, "cores": os.cpu_count(), "memory in bytes": memory}
    about["native kernels"] = native
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about | {"platform": platform.platform()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "torch-sce",
        "torch",
        "numpy",
        "keras",
        "tensorflow",
        "liger-kernel",
        "cut-cross-entropy",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
