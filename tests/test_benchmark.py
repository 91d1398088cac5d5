"""The benchmark measures what it reports, and reports what it could not measure."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark import command, measuring, report, tf_process
from benchmark.cases import (
    CASES,
    COMPILED,
    CROSS_ENTROPY,
    CUDA_CASES,
    FRESH_MOVES,
    HEAD,
    KERAS_TORCH,
    LINEAR,
    MOVES,
    NONE_IGNORED,
    OF_LOG,
    OURS,
    PRODUCTS,
    Case,
    head,
    labels,
    predictions,
)
from benchmark.peers import CANDIDATES, NAMES, PEERS, ours_none_ignored, products
from benchmark.results import COPY, Result, add_moves, measure
from rich.console import Console

from torch_sce.kernels import native

SCRIPTS = Path(__file__).parent.parent / "scripts"
SHORT = (0.0, 2)  # seconds and rounds for a case

# One of each kind, as the real list has them.
SMALL = (
    Case((6, 40), floors={CROSS_ENTROPY: (1e-6, 1e6)}, quick=True),
    Case((2, 3, 40)),
    Case((2, 5, 4, 3), axis=1),
    Case((6, 40), dtype="bfloat16"),
    Case((6, 40), half_ignored=True),
    Case((6, 40), "probabilities", {OF_LOG: (1.0, 1.0)}, quick=True),
    Case((6, 40), soft=True),
    Case((2, 3, 40), "probabilities", soft=True),
    Case((6, 40), HEAD, {LINEAR: (None, 1e6), PRODUCTS: (None, 1e-6)}, width=5),
    Case((6, 40), HEAD, dtype="bfloat16", width=5),
)
HEAD_SWEEP = (Case((6, 40), HEAD, width=5, quick=True), Case((1024, 30), HEAD, width=5))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's global settings are restored."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("KERAS_TORCH_DEVICE", "cpu")


def test_half_of_the_labels_are_ignored_and_the_others_are_the_same():
    ignored, whole = (labels(Case((64, 10), half_ignored=half)) for half in (True, False))
    assert (ignored == -100).sum() == 32
    assert torch.equal(ignored[ignored != -100], whole[ignored != -100])


def test_ours_with_none_ignored_counts_every_label():
    case = Case((64, 10), half_ignored=True)
    peer = ours_none_ignored(case, "cpu")
    z = predictions(case)
    want = torch.nn.functional.cross_entropy(z, labels(Case((64, 10))))
    assert peer is not None
    assert peer(labels(case), z).item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.usefixtures("tensorflow")
def test_every_floor_has_a_peer_that_takes_the_case():
    for case in (*CASES, *CUDA_CASES):
        tiny = dataclasses.replace(case, shape=tuple(min(size, 9) for size in case.shape))
        for peer in {*case.floors, *case.busy_floors} - {MOVES, PRODUCTS}:
            assert CANDIDATES[peer](tiny, "cpu") is not None


def test_the_measuring_can_be_imported_alone():
    code = """
import sys
import benchmark.measuring
heavy = {"torch_sce", "benchmark.peers", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, check=True)


def test_busy_processes_end_with_their_block():
    with measuring.busy_cores(False) as processes:
        assert processes == []
    with pytest.raises(KeyboardInterrupt), measuring.busy_cores(True) as processes:
        assert len(processes) == os.cpu_count()
        assert all(process.poll() is None for process in processes)
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in processes)


def test_busy_processes_end_with_a_benchmark_that_is_killed():
    code = """
import os, signal, sys
sys.modules["torch"] = sys  # slow to import, and not used here
from benchmark.measuring import busy_cores
with busy_cores(True) as processes:
    print(len(processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    # They hold the pipe, which is read to its end.
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, stdout=subprocess.PIPE,
                           text=True, timeout=60, check=False)  # fmt: skip
    assert ended.stdout == f"{os.cpu_count()}\n" and ended.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured on Linux")
def test_the_peak_of_a_known_allocation_is_seen():
    size = 64 * 2**20
    peak = measuring.peak_memory(lambda: torch.ones(size // 4), "cpu")
    assert peak is not None and 60 * 2**20 <= peak <= 72 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured on Linux")
def test_the_peak_counts_what_is_freed_within_the_call():
    def call():
        torch.ones(16 * 2**20).sum()
        torch.ones(8 * 2**20).sum()

    peak = measuring.peak_memory(call, "cpu")
    assert peak is not None and 60 * 2**20 <= peak <= 72 * 2**20


def test_what_cannot_be_measured_is_no_peak(monkeypatch):
    def refused(_call, _device):
        raise PermissionError

    monkeypatch.setattr(measuring, "linux_peak", refused)
    assert measuring.peak_memory(lambda: None, "cpu") is None


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_candidate_computes_the_same_loss(case):
    peers = [name for name in PEERS if name not in (COMPILED, NONE_IGNORED)]
    result = measure(case, peers, "cpu", SHORT)
    assert not result.missing
    assert result.peers
    # Keras sums probabilities' logarithms without a softmax; rows of bfloat16 sum to 1 +- 2^-8.
    tolerance = 1e-2 if case.dtype == "bfloat16" else 1e-5
    for name, loss in result.losses.items():
        assert loss == pytest.approx(result.losses[OURS], rel=tolerance), name


def test_a_peer_that_cannot_be_imported_is_missing_with_the_reason(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "keras", None)
    result = measure(SMALL[0], [KERAS_TORCH], "cpu", SHORT)
    assert KERAS_TORCH not in result.seconds
    assert result.missing[KERAS_TORCH].startswith("ModuleNotFoundError: import of keras")
    report.print_times(Console(width=130), [result])
    assert "Missing: Keras on torch (ModuleNotFoundError" in capsys.readouterr().out


def test_a_peer_that_fails_when_called_is_missing_with_the_reason(monkeypatch):
    def build(_case, _device):
        def loss(_y_true, _y_pred):
            raise RuntimeError("\n  no C++ compiler\nand much more")

        return loss

    monkeypatch.setitem(CANDIDATES, COMPILED, build)
    result = measure(SMALL[0], [COMPILED], "cpu", SHORT)
    assert result.missing == {COMPILED: "RuntimeError: no C++ compiler"}


def made_up(peer_forward, peer_both):
    """Ours takes 1 and 2 seconds; medians differ from means."""
    case = Case((4, 8), floors={CROSS_ENTROPY: (1.5, 2.0)})
    seconds = {
        OURS: {"forward": [1.0, 1.0, 9.0], "both": [0.1, 2.0, 2.0]},
        CROSS_ENTROPY: {"forward": [0.0, peer_forward, 99.0], "both": [peer_both] * 3},
        COPY: {"at hand": [0.5], "fresh": [1.0]},
    }
    return Result(case, seconds)


def test_ratios_are_of_medians_and_a_floor_is_reached_by_equality():
    result = made_up(1.5, 3.9)
    assert result.ratio(CROSS_ENTROPY, "forward") == 1.5
    assert result.ratio(CROSS_ENTROPY, "both") == pytest.approx(1.95)
    assert result.reaches(CROSS_ENTROPY, "forward") is True
    assert result.reaches(CROSS_ENTROPY, "both") is False
    assert report.conclusion([result, made_up(3, 4)]) == "3 of 4 ratios reach their floor"
    assert result.nanoseconds(OURS, "both") == 2e9 / 32
    assert np.isnan(result.median(COMPILED, "both"))


def test_a_busy_case_has_the_floors_of_the_quiet_one_but_for_its_own():
    floors = {CROSS_ENTROPY: (4.0, 2.0), COMPILED: (1.0, 1.0)}
    quiet = Case((4, 8), floors=floors, busy_floors={CROSS_ENTROPY: (3.0, 1.5)})
    busy = dataclasses.replace(quiet, busy=True)
    found = [case.floor(peer, "both") for case in (quiet, busy) for peer in floors]
    assert found == [2.0, 1.0, 1.5, 1.0]
    assert busy.name == quiet.name + ", busy cores"


@pytest.mark.parametrize(("device", "both"), [
    ("cpu", {MOVES: [3.0, 6.0], FRESH_MOVES: [8.0, 11.0]}),
    ("cuda", {MOVES: [3.0, 6.0]}),
])  # fmt: skip
def test_a_copy_is_two_moves(device, both):
    seconds = {COPY: {"at hand": [2.0, 4.0], "fresh": [7.0, 9.0]}}
    add_moves(seconds, device)
    assert {name: seconds[name]["both"] for name in seconds if name != COPY} == both
    assert all(seconds[name]["forward"] == [1.0, 2.0] for name in both)


def test_a_missed_floor_is_marked_in_the_table(capsys):
    report.print_times(Console(width=130), [made_up(1.5, 3.9)])
    line = next(line for line in capsys.readouterr().out.splitlines() if CROSS_ENTROPY in line)
    assert "below 1.95 (2.0)" in line and "below 1.50" not in line


def test_memory_above_its_limit_is_marked_where_there_are_many_classes():
    memory = {OURS: {"forward": 0.01, "both": 1.2}}
    many, few = (Result(Case((4, classes)), memory=memory) for classes in (1000, 999))
    assert report.memory_cell(many, OURS, "both") == "[red]above 1.20[/]"
    assert report.memory_cell(many, OURS, "forward") == "0.01"
    assert report.memory_cell(few, OURS, "both") == "1.20"
    assert report.memory_cell(few, CROSS_ENTROPY, "both") == "-"


def test_the_memory_of_a_head_is_that_beyond_its_inputs_and_gradients(capsys):
    case = Case((256, 20000), HEAD, width=64)
    result = measure(case, [LINEAR], "cpu", SHORT)
    assert result.memory.keys() == ({OURS, LINEAR} if sys.platform == "linux" else set())
    if result.memory:
        # F.cross_entropy keeps two of the logits, and makes two gradients; ours has one workspace.
        # A tenth is 2 MB, as PyTorch's libraries may take beside it.
        assert 2.5 < result.peak(LINEAR, "both") <= 4.3
        assert 0.9 < result.peak(OURS, "both") < 1.3
    report.print_memory(Console(width=130), [result])
    assert "above" not in capsys.readouterr().out


def test_the_products_alone_are_the_three_of_a_head(monkeypatch):
    """In several chunks, of which the last may be smaller."""
    made = []
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: made.append(mm(*a, **k).clone()) or made[-1])
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: made.append(addmm(*a, **k)) or made[-1])
    monkeypatch.setattr("benchmark.peers.CPU_CHUNK", 3 * 4 * (40 + 2 * 5))
    hidden, weight = head(Case((7, 40), HEAD, width=5))
    products(hidden, weight, "both")
    z = mm(hidden, weight.t())
    torch.testing.assert_close(torch.cat(made[::3]), z)
    torch.testing.assert_close(torch.cat(made[1::3]), mm(z, weight))
    torch.testing.assert_close(made[-1], mm(z.t(), hidden))
    assert [len(chunk) for chunk in made[::3]] == [3, 3, 1]
    made.clear()
    products(hidden, weight, "forward")
    torch.testing.assert_close(torch.cat(made), z)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = (Case((40, 10), quick=True), Case((4, 100), quick=True))
    sweeps = {"SWEEP": sweep, "HEAD_SWEEP": HEAD_SWEEP}
    for name, value in {"CASES": SMALL, **sweeps, "QUICK": SHORT, "FULL": SHORT}.items():
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(measuring, "MEASUREMENT", 1e-5)


def run(folder: Path, *arguments: str) -> dict:
    """What a run writes as JSON."""
    file = folder / "out.json"
    threads = str(torch.get_num_threads())
    places = ("--json", str(file), "--plots", str(folder), "--threads", threads)
    assert command.main([*places, *arguments]) == 0
    return json.loads(file.read_text())


def test_a_quick_run_prints_tables_and_writes_json_and_pictures(small, tmp_path, capsys):
    found = run(tmp_path, "--quick", "--busy", "--peers", f"{CROSS_ENTROPY},{OF_LOG},tf.keras")
    printed = capsys.readouterr()
    assert "logits (6, 40)" in printed.out and CROSS_ENTROPY in printed.out
    assert "Missing: tf.keras (left out by --quick)" in printed.out
    assert printed.out.splitlines()[-1].endswith("of 8 ratios reach their floor")
    assert f" {torch.get_num_threads()} threads, with" in printed.out.splitlines()[0]
    assert "1 of 4: logits (6, 40)\n" in printed.err
    assert "3 of 4: logits (6, 40), busy cores\n" in printed.err
    for name in ("benchmark-speed.png", "benchmark-classes.png", "benchmark-heads.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert [result["case"]["busy"] for result in found["cases"]] == [False, False, True, True]
    assert len(found["sweep"]) == 2 and len(found["heads"]) == 1
    assert {"date", "options", "machine", "versions"} <= found.keys()
    assert found["machine"]["native kernels"] is native
    measured = found["cases"][0]["seconds"][CROSS_ENTROPY]["both"]
    assert len(measured) == 2 and min(measured) > 0


@pytest.mark.usefixtures("tensorflow")
def test_the_real_tf_keras_is_measured_on_the_same_numbers(small, tmp_path, capsys):
    found = run(tmp_path, "--peers", "tf.keras")
    assert found["versions"]["tf.keras"]
    for case in found["cases"]:
        if case["case"]["axis"] == 1 or case["case"]["half_ignored"] or case["case"]["width"]:
            assert "tf.keras" not in case["seconds"]
        elif case["case"]["dtype"] == "float32":
            assert case["losses"]["tf.keras"] == pytest.approx(case["losses"][OURS], rel=1e-5)
            assert len(case["seconds"]["tf.keras"]["both"]) >= 2
    assert "Missing" not in capsys.readouterr().out


def test_a_worker_that_ends_in_an_error_leaves_tf_keras_missing(small, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('no tensorflow here')")
    monkeypatch.setattr(tf_process, "PROGRAM", broken)
    found = run(tmp_path, "--peers", "tf.keras")
    assert found["cases"][0]["missing"] == {"tf.keras": "ImportError: no tensorflow here"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], r"'nobody' is none of these"),
        (["--plots", "nowhere/at/all"], "there is no such folder"),
        (["--json", "nowhere/out.json"], "there is no folder nowhere"),
        (["--json", "."], "is a folder"),
        (["--device", "abacus"], "must be cpu, cuda, or cuda:NUMBER"),
        (["--device", "cuda:99"], "finds no such CUDA device"),
        (["--threads", "0"], "must be at least 1"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--peers" not in arguments or all(f"  {name}" in said for name in NAMES)


WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["script", "--help"]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("script", "missing", "message"), [
    ("benchmark", "rich", "The benchmark needs rich and matplotlib: pip install rich matplotlib"),
    ("benchmark", "matplotlib", "The benchmark needs rich and matplotlib: pip install rich"),
    ("cross_check.py", "rich", "The cross-check needs rich: pip install rich"),
])  # fmt: skip
def test_a_script_says_what_it_needs(script, missing, message):
    code = WITHOUT.format(missing=missing, path=str(SCRIPTS / script))
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS.parent, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr
