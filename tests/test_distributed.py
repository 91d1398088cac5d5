"""Losses over the ranks of a process group: what `ranks.py` checks, in real processes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from documents import scripts_of
from ranks import CHECKS
from torchrun import once, torchrun

import torch_sce
from torch_sce import SparseCategoricalCrossentropy

pytestmark = [
    pytest.mark.skipif("torch.get_default_device().type != 'cpu'"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]

RANKS = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module", params=[2, 4])
def failed(request, tmp_path_factory):
    """The checks that failed on some rank."""
    ranks = request.param
    folder = once(f"{ranks}-ranks", tmp_path_factory, lambda folder: torchrun(ranks, RANKS, folder))
    files = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    assert len(files) == request.param
    return {name: text for file in files for name, text in file.items()}


@pytest.mark.parametrize("name", CHECKS)
def test_ranks_have_the_value_and_the_gradients_of_one_process(name, failed):
    assert name not in failed, failed[name]


KILLED = """
import os, signal, sys, torch, torch.distributed as dist, torch_sce
rank, store, group = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
loss = torch_sce.SparseCategoricalCrossentropy(True, **{group: True})
y, z = torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)
loss(y, z)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
print("a value:", loss(y, z))
"""


@pytest.mark.parametrize("group", ["process_group", "class_group"])
def test_where_a_rank_is_killed_the_others_end_with_an_error(group, tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, rank, str(tmp_path / "store"), group],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        out, error = ranks[0].communicate(timeout=60)  # far less than PyTorch's own 30 minutes
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1 and "a value" not in out and "RuntimeError" in error


def test_true_is_one_process_where_there_are_no_others():
    y, z = torch.tensor([0, 1]), torch.eye(2)
    alone = SparseCategoricalCrossentropy(True)(y, z)
    assert torch.equal(SparseCategoricalCrossentropy(True, process_group=True)(y, z), alone)


@pytest.mark.parametrize("value", ["world", 1.5, object()])
def test_what_is_no_group_is_refused(value):
    with pytest.raises(TypeError, match="process_group must be True for all processes"):
        SparseCategoricalCrossentropy(process_group=value)


def test_configs_have_the_flag():
    loss = SparseCategoricalCrossentropy(process_group=True)
    assert loss.get_config()["process_group"] is True
    assert SparseCategoricalCrossentropy.from_config(loss.get_config()).process_group is True
    assert "process_group" not in SparseCategoricalCrossentropy().get_config()
    assert "process_group=True" in repr(loss)


Y, Z, W = torch.tensor([0, -1, 2]), torch.eye(3), torch.tensor([1.0, 5.0, 3.0])


@pytest.mark.parametrize(
    ("reduction", "sample_weight", "n"),
    [("sum_over_batch_size", None, 2), ("mean", W, 2), ("mean_with_sample_weight", W, 4),
     ("mean_with_sample_weight", None, 2), ("sum", W, 1)],
)  # fmt: skip
def test_a_denominator_is_what_the_mean_divides_by(reduction, sample_weight, n):
    loss = SparseCategoricalCrossentropy(True, ignore_class=-1, reduction=reduction)
    assert loss.denominator(Y, Z, sample_weight).item() == n
    assert loss.denominator(Y, Z.shape, sample_weight).item() == n
    if reduction == "sum":
        return
    value = loss(Y, Z, sample_weight)
    for given in (n, float(n), torch.tensor(n), torch.tensor([float(n)])):
        assert loss(Y, Z, sample_weight, denominator=given) == value
    assert loss(Y, Z, sample_weight, denominator=2 * n) == value / 2
    assert loss(Y, Z, sample_weight, denominator=0) == 0


def test_denominators_of_nothing():
    loss = SparseCategoricalCrossentropy(True, ignore_class=-1)
    assert loss.denominator(torch.full((3,), -1), Z).item() == 0
    assert loss.denominator(Y[:0], Z[:0]).item() == 0
    assert loss(Y[:0], Z[:0], denominator=5).item() == 0
    targets = torch_sce.CategoricalCrossentropy(True)
    assert targets.denominator(Z, Z).item() == 3


def test_bad_denominators_are_refused():
    with pytest.raises(ValueError, match=r"denominator is what a mean divides by.*'sum'"):
        SparseCategoricalCrossentropy(True, reduction="sum")(Y.clamp(0), Z, denominator=3)
    with pytest.raises(ValueError, match=r"denominator must be one number, got the shape \(3,\)"):
        SparseCategoricalCrossentropy(True)(Y.clamp(0), Z, denominator=W)
    with pytest.raises(ValueError, match='reduction="none" has no denominator'):
        SparseCategoricalCrossentropy(True, reduction="none").denominator(Y.clamp(0), Z)


GUIDE = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
SCRIPTS = scripts_of(GUIDE)


@pytest.mark.parametrize(
    ("name", "line"),
    [("train.py", r"9 positions on 2 ranks, loss \d\.\d{4}"),
     ("slices.py", r"(\d\.\d{4}) of slices, \1 of the whole"),
     ("fsdp.py", r"(\d\.\d{4}) of parts, \1 of the whole"),
     ("tensor.py", r"(\d\.\d{4}) of slices, \1 of the whole")],
)  # fmt: skip
def test_the_scripts_of_the_page_run(name, line, tmp_path):
    (tmp_path / name).write_text(SCRIPTS[name])
    printed = torchrun(2, tmp_path / name).stdout.strip()
    assert re.fullmatch(line, printed), printed
    assert f"prints `{printed}`" in GUIDE


BENCHMARK = Path(__file__).parent.parent / "scripts" / "benchmark_ranks.py"


def test_the_benchmark_of_ranks_has_a_row_for_each_candidate(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = torchrun(2, BENCHMARK, "--shape", 8, 40, "--rounds", 1).stdout
    for name in ("class_group", "DTensor", "loss_parallel", "gathered logits"):
        assert re.search(rf"{name} +│ +\d", out), out
