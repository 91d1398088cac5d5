"""Tensors spread over two ranks, below every threshold of the package and above.

The ranks go through all cases at once, each in a process of its own, and report what failed.
"""

# pyright: reportAttributeAccessIssue=false

import json
import subprocess
import sys
import traceback
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_tensor_kinds import MODELS, SIZES, Problem
from torch.torch_version import TorchVersion
from torchrun import once

import torch_sce

pytestmark = [
    pytest.mark.skipif("torch.get_default_device().type != 'cpu'"),
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.skipif(
        TorchVersion(torch.__version__) < "2.11",
        reason="PyTorch before 2.11 cannot shard some operations, and raises an error that says so",
    ),
]

# Placements of predictions and of the other tensors: whole batches or parts of them, parts of the
# classes, or summands.
PLACEMENTS = {
    "batch": ("batch", "batch"),
    "classes": ("classes", "copy"),
    "copies": ("copy", "copy"),
    "batch, copies": ("batch", "copy"),
    "copies, batch": ("copy", "batch"),
    "summands": ("summand", "copy"),
}
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", "none")
ACCURACIES = (
    "sparse_categorical_accuracy",
    "categorical_accuracy",
    "sparse_top_k_categorical_accuracy",
    "top_k_categorical_accuracy",
)
LIMIT = 240  # seconds: a rank that waits for the other one waits forever


def cases():
    """Names of cases, each with what to call for it."""
    for placement in PLACEMENTS:
        for case in product(MODELS, SIZES):
            yield f"losses {case} {placement}", check_losses, (*case, placement)
        for case in product(("logits", "targets, logits"), REDUCTIONS):
            yield f"reductions {case} {placement}", check_reductions, (*case, placement)
        for name in ACCURACIES:
            yield f"accuracies {name} {placement}", check_accuracy, (name, placement)
    for case in product(("batch", "copy"), REDUCTIONS):
        yield f"head {case}", check_head, case
    for model in MODELS:
        yield f"mixed {model}", check_mixed, (model,)


def place(x, where):
    """x on all ranks; parts are of the batch or of the classes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    if where == "summand":
        return DTensor.from_local(x / 2, MESH, [Partial()])
    placement = {"batch": Shard(0), "classes": Shard(x.ndim - 1), "copy": Replicate()}[where]
    return distribute_tensor(x, MESH, [placement])


def placed(problem, placement):
    """Predictions, labels or targets, and a mask; with one position less on the second rank."""
    of_z, others = PLACEMENTS[placement]
    rows = problem.g.shape[0] - 1 + problem.g.shape[0] % 2
    problem.z, problem.y, problem.counted, problem.g = (
        x[:rows] for x in (problem.z, problem.y, problem.counted, problem.g)
    )
    of_y = of_z if of_z == "classes" and not problem.sparse else others
    leaf = place(problem.z, of_z).requires_grad_()
    return leaf, place(problem.y, of_y), place(problem.counted, others)


def check_losses(model, size, placement):
    problem = Problem(model, size)
    leaf, y, mask = placed(problem, placement)
    losses = problem.losses(leaf, y, mask)
    (dz,) = torch.autograd.grad(losses.full_tensor(), leaf, problem.g)
    problem.check(problem.z, losses.full_tensor(), dz.full_tensor())


def check_reductions(model, reduction, placement):
    """Against plain tensors: with weights and a mask, by labels to ignore, and with neither."""
    problem = Problem(model, "small")
    leaf, y, mask = placed(problem, placement)
    weight, plain = problem.g.abs(), problem.z.clone().requires_grad_()
    others, loss = PLACEMENTS[placement][1], problem.loss(reduction)
    for given in ({}, {"mask": mask}, {"sample_weight": place(weight, others), "mask": mask},
                  {"sample_weight": 0.5}):  # fmt: skip
        same = {name: x.full_tensor() if name == "mask" else x for name, x in given.items()}
        if "mask" in given and "sample_weight" in given:
            same["sample_weight"] = weight
        value, want = loss(y, leaf, **given), loss(problem.y, plain, **same)
        torch.testing.assert_close(value.full_tensor(), want)
        (dz,) = torch.autograd.grad(value.sum(), leaf)
        (slope,) = torch.autograd.grad(want.sum(), plain)
        torch.testing.assert_close(dz.full_tensor(), slope)


def check_accuracy(name, placement):
    problem = Problem("logits" if name.startswith("sparse") else "targets, logits", "small")
    leaf, y, _ = placed(problem, placement)
    function = getattr(torch_sce, name)
    with torch.no_grad():
        assert torch.equal(function(y, leaf).full_tensor(), function(problem.y, problem.z))


def check_head(placement, reduction):
    """Rows on both ranks with a whole weight on each; by PyTorch's operations."""
    torch.manual_seed(0)
    x, w, y = torch.randn(6, 5), torch.randn(7, 5), torch.randint(0, 7, (6,))
    loss = torch_sce.LinearSparseCategoricalCrossentropy(reduction=reduction, logit_softcap=3)
    plain = x.clone().requires_grad_(), w.clone().requires_grad_()
    want = loss(y, *plain)
    spread = place(x, placement).requires_grad_(), place(w, "copy").requires_grad_()
    value = loss(place(y, placement), *spread)
    torch.testing.assert_close(value.full_tensor(), want)
    found, slopes = (torch.autograd.grad(v.sum(), x) for v, x in ((value, spread), (want, plain)))
    for got, right in zip(found, slopes, strict=True):
        torch.testing.assert_close(got.full_tensor(), right)
    whole = plain[1].detach().clone().requires_grad_()  # the same on both ranks
    value = loss(y, spread[0], whole)
    torch.testing.assert_close(value.full_tensor(), want)
    (got,) = torch.autograd.grad(value.sum(), whole)
    torch.testing.assert_close(got, slopes[1])
    with pytest.raises(TypeError, match=r"^weight must not be a DTensor.* placements \("):
        loss(y, x, spread[1])


def check_mixed(model):
    """Plain tensors beside a DTensor are whole; beside plain predictions a DTensor is an error."""
    problem = Problem(model, "large")
    leaf, y, _ = placed(problem, "batch")
    plain, loss = problem.z.clone().requires_grad_(), problem.loss("mean")
    weight = problem.g.abs()
    want = loss(problem.y, plain, weight, problem.counted)
    (slope,) = torch.autograd.grad(want, plain)
    for labels in (problem.y, problem.y.tolist(), problem.y.numpy()):
        value = loss(labels, leaf, weight, problem.counted)
        torch.testing.assert_close(value.full_tensor(), want)
        (dz,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(dz.full_tensor(), slope)
    with pytest.raises(TypeError, match=r"^y_true must not be .*DTensor.* placements \(Shard"):
        loss(y, problem.z)
    loss(y, leaf, torch.tensor(2.0))


def main():
    """What a rank does; it prints the cases that failed and why."""
    global MESH
    rank, store = sys.argv[1:]
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    MESH = init_device_mesh("cpu", (2,))
    failed = {}
    for name, check, arguments in cases():
        try:
            check(*arguments)
        except (Exception, pytest.fail.Exception):
            failed[name] = traceback.format_exc()
    dist.destroy_process_group()
    print(json.dumps(failed))


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The cases that failed on a rank."""
    folder = once("dtensor", tmp_path_factory, run)
    found = [json.loads((folder / rank).read_text().splitlines()[-1]) for rank in "01"]
    return found[1] | found[0]


def run(folder):
    program = "import sys; sys.path.append('tests'); from test_dtensor import *; main()"
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, rank, folder / "store"], text=True,
                         cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
        for rank in "01"
    ]  # fmt: skip
    try:
        for name, rank in zip("01", ranks, strict=True):
            (folder / name).write_text(rank.communicate(timeout=LIMIT)[0])
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.parametrize("case", [name for name, _, _ in cases()])
def test_two_ranks_have_the_losses_of_one(case, failed):
    assert case not in failed, failed[case]
