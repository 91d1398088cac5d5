"""What the ranks of test_distributed.py do: `torchrun --nproc-per-node N tests/ranks.py FOLDER`.

All ranks go through all checks, or those whose names follow. Each writes which of its own failed,
and why, to FOLDER/RANK.json.
"""

import copy
import functools
import itertools
import json
import math
import pickle
import random
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import BaseTorchDispatchMode

import torch_sce
from torch_sce.crosscheck.draw import draw
from torch_sce.kernels import dtensors

CASES, SEED = 300, 17
WITHIN = {"rtol": 1e-12, "atol": 1e-14, "equal_nan": True}  # of float64, in another order


def flat_cases():
    """Drawn cases of reduced losses, in float64 and with one axis of positions: see `flat`."""
    found, index = 0, -1
    while found < CASES:
        index += 1
        case = draw(SEED, index)
        if case.form == "class" and case.options["reduction"] not in ("none", None):
            given = flat(case)
            found += given is not None
            if given is not None:
                yield f"{SEED}:{index}", *given


def flat(case, reduction=None) -> tuple[Any, ...] | None:
    """The loss of a case and its arguments, so that positions can be divided among ranks."""
    y_true, y_pred = torch.as_tensor(case.y_true), torch.as_tensor(case.y_pred).double()
    try:
        loss = getattr(torch_sce, case.name)(**{**case.options, "dtype": "float64"})
        samples = loss._prepare(y_true, y_pred, case.sample_weight, case.mask, torch.float64)
    except (ValueError, TypeError):
        return None
    shape, classes = samples.z.shape[:-1], samples.z.shape[-1]
    if samples.z.numel() == 0:
        return None
    y = samples.y.reshape(-1) if case.is_sparse else samples.y.reshape(-1, classes)
    weight, mask = (
        None if x is None else x.expand(shape).reshape(-1) for x in (samples.weight, samples.mask)
    )
    # What is ignored is in the mask.
    options = {k: v for k, v in loss.get_config().items() if k not in ("axis", "ignore_class")}
    y = y if case.is_sparse else y.double()
    weight = None if weight is None else weight.double()
    options["reduction"] = reduction or options["reduction"]
    return type(loss)(**options), y, samples.z.reshape(-1, classes), weight, mask


def parts(n, ranks, seed):
    """Slices of n positions, of any lengths, also of none."""
    cuts = sorted(random.Random(seed).choices(range(n + 1), k=ranks - 1))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


def value_and_gradients(loss, y, z, weight, mask, summed=False, n=None):
    leaves = [x.detach().clone().requires_grad_() for x in (z, weight) if x is not None]
    leaves += [y.clone().requires_grad_()] if y.is_floating_point() else []
    given = leaves[2 if weight is not None else 1] if y.is_floating_point() else y
    w = None if weight is None else leaves[1]
    value = loss(given, leaves[0], w, mask, denominator=n)
    total = value.sum() if summed else value
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return value.detach(), [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def check_means():
    """The value and every gradient of positions that are spread over the ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = []  # raised at the end, as no rank may wait for another
    for number, (name, loss, *given) in enumerate(flat_cases()):
        part = parts(len(given[1]), ranks, number)[rank]
        mine: list[Any] = [None if x is None else x[part] for x in given]
        whole = None if loss.reduction == "sum" else loss.denominator(*given)
        try:
            # With the denominator as a part of the loss; of some cases then as a constant, too.
            for constant in (False, True) if whole is not None and number % 3 == 0 else (False,):
                loss.process_group = None
                want, slopes = value_and_gradients(loss, *given, n=whole if constant else None)
                loss.process_group = True
                n = None if whole is None else loss.denominator(*mine)
                value, found = value_and_gradients(loss, *mine, n=n if constant else None)
                torch.testing.assert_close(value, want, **WITHIN)
                torch.testing.assert_close(n, whole, rtol=1e-12, atol=0)
                for dx, slope in zip(found, slopes, strict=True):
                    # That of a weight in its own mean is a difference of terms as large as value/n.
                    terms = want / (1 if whole is None else whole)
                    terms = torch.cat((slope.flatten(), terms.reshape(1))).abs()
                    least = 1e-13 * terms[terms.isfinite()].sum().item()
                    within = {"rtol": 1e-12, "atol": least, "equal_nan": True}
                    torch.testing.assert_close(dx / ranks, slope[part], **within)
        except Exception as error:
            wrong.append(
                f"{name} {loss} {[None if x is None else x.shape for x in given]}: {error}"
            )
    assert not wrong, f"{len(wrong)} cases: " + "\n".join(wrong[:5])


def check_weights_that_broadcast():
    """The value of the whole, or an error on every rank: never one that depends on the cut."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(4)
    batch, length, number, refused = 3 * ranks, 4, 0, 0
    y = torch.randint(0, 5, (batch, length), generator=generator)
    z = torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)
    shapes = [None, (), (1, 1), (1, length), (batch, 1), (batch, length)]
    for reduction, w, v in itertools.product(
        ("sum", "sum_over_batch_size", "mean_with_sample_weight"), shapes, shapes
    ):
        weight = None if w is None else torch.rand(w, generator=generator, dtype=torch.float64)
        mask = None if v is None else torch.rand(v, generator=generator) < 0.7
        options: dict[str, Any] = {"reduction": reduction, "dtype": "float64"}
        loss = torch_sce.SparseCategoricalCrossentropy(True, process_group=True, **options)
        want = torch_sce.SparseCategoricalCrossentropy(True, **options)(y, z, weight, mask)
        part = parts(batch, ranks, number := number + 1)[rank]
        mine: list[Any] = [
            x if x is None or x.shape[:1] != (batch,) else x[part] for x in (y, z, weight, mask)
        ]
        try:
            value = loss(*mine)
        except (ValueError, RuntimeError) as error:
            refused += 1
            assert reduction == "mean_with_sample_weight", error
            assert re.search("must have the losses' first axis|other ranks", str(error)), error
        else:
            torch.testing.assert_close(value, want, **WITHIN)
    refusals = [None] * ranks
    dist.all_gather_object(refusals, refused)
    assert len(set(refusals)) == 1 and refused == 27, refusals


def check_class_shards():
    """The losses and gradients of rows whose classes are divided among the ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong, number, index = [], 0, -1
    while number < CASES:
        index += 1
        case = draw(SEED, index)
        if case.form != "class" or not case.is_sparse:
            continue
        given = flat(case, "none")
        if given is None or given[2].shape[1] < ranks:
            continue
        number, classes = number + 1, given[2].shape[1]
        loss, y, z, weight, mask = given
        want, (slopes, *_) = value_and_gradients(loss, y, z, weight, mask, summed=True)
        cuts = sorted(random.Random(number).sample(range(1, classes), k=ranks - 1))
        part = slice([0, *cuts][rank], [*cuts, classes][rank])
        loss.class_group = True
        value, (dz, *_) = value_and_gradients(loss, y, z[:, part], weight, mask, summed=True)
        every = [torch.empty_like(value) for _ in range(ranks)]
        dist.all_gather(every, value)
        try:
            assert all(torch.equal(x.nan_to_num(0.5), every[0].nan_to_num(0.5)) for x in every)
            torch.testing.assert_close(value, want, **WITHIN)
            torch.testing.assert_close(dz, slopes[:, part], **WITHIN)
        except Exception as error:
            wrong.append(f"{SEED}:{index} {loss} {z.shape} {part}: {error}")
    assert not wrong, f"{len(wrong)} cases: " + "\n".join(wrong[:5])


def check_nothing_counts():
    """All is ignored on one rank, on all, or there are no positions."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loss = torch_sce.SparseCategoricalCrossentropy(
        True, ignore_class=-1, dtype="float64", process_group=True
    )
    z = torch.arange(12.0, dtype=torch.float64).reshape(4, 3) * (rank + 1)
    mine = torch.full((4,), -1) if rank == 0 else torch.tensor([0, 1, -1, 2])
    every = [torch.full((4,), -1), *([torch.tensor([0, 1, -1, 2])] * (ranks - 1))]
    alone = torch_sce.SparseCategoricalCrossentropy(True, ignore_class=-1, dtype="float64")
    base = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    whole = alone(torch.cat(every), torch.cat([base * (r + 1) for r in range(ranks)]))
    torch.testing.assert_close(loss(mine, z), whole, **WITHIN)
    assert loss(torch.full((4,), -1), z) == 0
    assert loss(torch.zeros(0, dtype=torch.long), z[:0]) == 0
    mean = torch_sce.SparseCategoricalCrossentropy(True, dtype="float64", process_group=True)
    mine = slice(0, 0) if rank == 0 else slice(0, 4)
    torch.testing.assert_close(
        mean(torch.zeros(4, dtype=torch.long)[mine], base[mine]),
        alone(torch.zeros(4, dtype=torch.long), base), **WITHIN,
    )  # fmt: skip


def check_both_groups():
    """Positions divided along one axis of a mesh, classes along the other."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks < 4:
        return
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "classes"))
    row, column = divmod(rank, ranks // 2)
    generator = torch.Generator().manual_seed(4)
    y = torch.randint(-1, 3 * ranks, (9,), generator=generator)
    z = torch.randn(9, 3 * ranks, generator=generator, dtype=torch.float64)
    w = torch.rand(9, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "ignore_class": -1, "reduction": "mean_with_sample_weight", "dtype": "float64",
        "class_weight": {1: 2.0, 3: 0.5},
    }  # fmt: skip
    loss = torch_sce.SparseCategoricalCrossentropy(
        True, process_group=mesh.get_group("data"), class_group=mesh.get_group("classes"), **options
    )
    rows, classes = (slice(0, 2), slice(2, 9))[row], slice(6 * column, 6 * column + 6)
    part, given = (x.clone().requires_grad_() for x in (z[rows, classes], w[rows]))
    value = loss(y[rows], part, given)
    whole, weight = (x.clone().requires_grad_() for x in (z, w))
    want = torch_sce.SparseCategoricalCrossentropy(True, **options)(y, whole, weight)
    torch.testing.assert_close(value, want, **WITHIN)
    dz, dw = torch.autograd.grad(value, (part, given))
    slope, of_weight = torch.autograd.grad(want, (whole, weight))
    torch.testing.assert_close(dz / 2, slope[rows, classes], **WITHIN)
    torch.testing.assert_close(dw / 2, of_weight[rows], **WITHIN)


def check_errors_of_any_kind():
    """Also one that is not about arguments, one in `denominator`, and one in compiled code."""
    rank = dist.get_rank()
    y, z = torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)
    loss = torch_sce.SparseCategoricalCrossentropy(True, ignore_class=-1, process_group=True)
    kind = MemoryError if rank == 1 else RuntimeError

    def out_of_memory(*args, **kwargs):
        raise MemoryError("for this test")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(kind):
        if rank == 1:
            patch.setattr(loss, "_losses", out_of_memory)
        loss(y, z)
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match=r"labels in|other ranks"):
        loss.denominator(y + 7 * (rank == 1), z)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    if rank == 1:
        with pytest.raises(ValueError, match="labels in"):
            loss(y + 7, z)
    else:
        assert compiled(y - 1, z).isnan()  # where nothing counts, too


def check_denominators():
    """One that another rank does not have, or has other, is an error on all ranks."""
    rank = dist.get_rank()
    y, z = torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)
    loss = torch_sce.SparseCategoricalCrossentropy(True, process_group=True)
    assert loss(y, z, denominator=1 / 3).item() > 0
    for n in (3.0 + rank, 3.0 if rank == 1 else None):
        with pytest.raises(ValueError, match="denominator must be given on all ranks"):
            loss(y, z, denominator=n)
    z[0] = torch.nan
    mask = torch.tensor([1.0, -1, 0, 0])  # its sum is 0, and yet something counts
    one = torch_sce.SparseCategoricalCrossentropy(True)
    assert loss(y, z, mask=mask).isnan() and one(y, z, mask=mask).isnan()


def check_groups_of_their_own():
    """Losses with a group that is not all ranks: copies have it, and a repr shows it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group, first = dist.new_group(range(ranks)), dist.new_group([0])
    y, z = torch.arange(3) % 2, torch.rand(3, 2)
    given: tuple[dict[str, Any], ...] = ({"process_group": group}, {"class_group": group})
    for options in given:
        loss = torch_sce.SparseCategoricalCrossentropy(True, **options)
        model = torch.nn.ModuleList([loss])
        for other in (copy.deepcopy(model)[0], loss.as_criterion().loss, copy.copy(loss)):
            assert vars(other).get("process_group") is options.get("process_group")
            assert vars(other).get("class_group") is options.get("class_group")
            assert other(y, z) == loss(y, z)
        assert f"{next(iter(options))}=<" in repr(loss)
    loss, mesh = torch_sce.SparseCategoricalCrossentropy(True), next(iter(meshes()))
    for name in ("process_group", "class_group"):
        if rank == 1:
            with pytest.raises(TypeError, match="a group that this rank is not in"):
                setattr(loss, name, first)
        with pytest.raises(TypeError, match=r"pass mesh.get_group\(\), of one of its axes"):
            setattr(loss, name, mesh)
    # A loss that was unpickled in a process that has made none like it.
    loss = pickle.loads(
        pickle.dumps(torch_sce.SparseCategoricalCrossentropy(True, class_group=True))
    )
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y, z), loss(y, z))
    # Asked once for the number of classes, also through a criterion that makes copies.
    criterion = torch_sce.SparseCategoricalCrossentropy(True, class_group=True).as_criterion()
    criterion(z, y)
    with CommDebugMode() as counts:
        criterion(z, y, reduction="none")
    assert counts.get_total_counts() == 1


def check_errors():
    """An error on one rank is one on all of them, and nobody waits."""
    rank = dist.get_rank()
    for name in ("SparseCategoricalCrossentropy", "CategoricalCrossentropy"):
        loss = getattr(torch_sce, name)(True, process_group=True)
        y = torch.zeros(4, dtype=torch.long) if name[0] == "S" else torch.ones(4, 3)
        loss(y, torch.zeros(4, 3))
        try:
            loss(y[: 4 - (rank == 1)], torch.zeros(4, 3))
        except ValueError as error:
            assert rank == 1 and "y_true must have" in str(error)
        except RuntimeError as error:
            assert rank != 1 and "other ranks of the process group (1)" in str(error), error
        else:
            raise AssertionError("no error")
        loss(y, torch.zeros(4, 3))
    losses = torch_sce.SparseCategoricalCrossentropy(True, process_group=True)
    heads = torch_sce.LinearSparseCategoricalCrossentropy(process_group=True)
    y, z, hidden, weight = (
        torch.zeros(4).long(),
        torch.zeros(4, 3),
        torch.ones(4, 2),
        torch.ones(3, 2),
    )
    out, wrong = y + 7 * (rank == 1), {"weights": 3} if rank == 1 else {}
    for call in (
        lambda: losses(out, z),
        lambda: heads(out, hidden, weight),
        lambda: losses(y, z, **wrong),
        lambda: heads(y, hidden, weight, **wrong),
        lambda: losses.denominator(y, (4 - 9 * (rank == 1), 3)),
        lambda: losses(y, z, denominator=torch.nan if rank == 1 else 4),
    ):
        with pytest.raises((ValueError, TypeError) if rank == 1 else RuntimeError):
            call()


def check_communication():
    """One all-reduce forward, of four numbers, and nothing backward."""
    loss = torch_sce.SparseCategoricalCrossentropy(True, process_group=True)
    z = torch.zeros(4, 3, requires_grad=True)
    with CommDebugMode() as counts:
        value = loss(torch.zeros(4, dtype=torch.long), z)
        forward = counts.get_total_counts()
        value.backward()
    assert (forward, counts.get_total_counts()) == (1, 1), counts.get_comm_counts()


def check_communication_of_class_shards():
    """One all-gather forward, of three numbers a row, and nothing backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    y, z = torch.arange(6) % (3 * ranks), torch.randn(6, 2 + rank, requires_grad=True)
    loss = torch_sce.SparseCategoricalCrossentropy(True, class_group=True)
    loss(y * 0, z)  # finds which classes each rank has
    with CommDebugMode() as counts:
        value = loss(y * 0, z)
        forward = counts.get_total_counts()
        value.backward()
    assert (forward, counts.get_total_counts()) == (1, 1), counts.get_comm_counts()


def check_class_shards_in_half_precision():
    """As the whole in float32, but for the rounding of the gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(2)
    y = torch.randint(0, 40 * ranks, (50,), generator=generator)
    z = torch.randn(50, 40 * ranks, generator=generator).bfloat16()
    loss = torch_sce.SparseCategoricalCrossentropy(True, class_group=True)
    part = z[:, 40 * rank : 40 * (rank + 1)].clone().requires_grad_()
    value = loss(y, part)
    (dz,) = torch.autograd.grad(value, part)
    whole = z.float().requires_grad_()
    want = torch_sce.SparseCategoricalCrossentropy(True)(y, whole)
    (slope,) = torch.autograd.grad(want, whole)
    torch.testing.assert_close(value, want.detach(), rtol=1e-5, atol=0)
    assert dz.dtype == torch.bfloat16
    torch.testing.assert_close(
        dz.float(), slope[:, 40 * rank : 40 * (rank + 1)], rtol=2**-8 + 1e-5, atol=1e-30
    )


def check_class_shards_refuse():
    """Labels of no class, and predictions that are no tensor: an error on every rank."""
    loss = torch_sce.SparseCategoricalCrossentropy(True, class_group=True)
    z = torch.zeros(3, 4)
    n = 4 * dist.get_world_size()
    for y, z_, kind, text in (
        (torch.tensor([0, n, 1]), z, ValueError, rf"labels in \[0, {n}\)"),
        (torch.zeros(2), z, ValueError, "y_true must have the shape"),
        (torch.zeros(3), z.tolist(), TypeError, "y_pred must be a tensor with class_group"),
    ):
        try:
            loss(y, z_)
        except kind as error:
            assert re.search(text, str(error)), error
        else:
            raise AssertionError("no error")
    y, z = torch.zeros(3, dtype=torch.long), z.requires_grad_()
    groups: tuple[dict[str, Any], ...] = ({"class_group": True}, {"process_group": True})
    for options in groups:
        one = torch_sce.SparseCategoricalCrossentropy(True, **options)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(one(y, z), z, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no transforms of torch\.func"):
            torch.func.grad(functools.partial(one, y))(z)
    with pytest.raises(RuntimeError, match="no batches of gradients"):
        value = torch_sce.SparseCategoricalCrossentropy(True, class_group=True)(y, z)
        torch.autograd.grad(value, z, torch.ones(2), is_grads_batched=True)
    assert loss.denominator(y + n - 1, torch.Size([3, n])) == 3  # of whole predictions, too
    with pytest.raises(ValueError, match=r"always have as many classes.* 4 on this rank, got 2"):
        loss(y, z[:, :2])
    with pytest.raises(TypeError, match="explain takes whole predictions"):
        torch_sce.explain(loss, y, z)
    with pytest.raises(TypeError, match="explain takes the batch of one process"):
        torch_sce.explain(torch_sce.SparseCategoricalCrossentropy(process_group=True), y, z)
    other = copy.deepcopy(torch_sce.SparseCategoricalCrossentropy(True, class_group=True))
    pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(other(y, z), loss(y, z))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7)).double()

    def forward(self, x):
        return self.layers(x)


def problem():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(-1, 7, (24,), generator=generator)
    return x, y, parts(24, dist.get_world_size(), 5)[dist.get_rank()]


def check_ddp():
    """Under DistributedDataParallel uneven batches train as one batch."""
    x, y, mine = problem()
    torch.manual_seed(0)
    one, model = Model(), Model()
    model.load_state_dict(one.state_dict())
    model = DistributedDataParallel(model)
    loss = torch_sce.SparseCategoricalCrossentropy(
        True, ignore_class=-1, dtype="float64", process_group=True
    )
    alone = torch_sce.SparseCategoricalCrossentropy(True, ignore_class=-1, dtype="float64")
    steps = [torch.optim.SGD(m.parameters(), 0.5) for m in (model, one)]
    for _ in range(5):
        values = loss(y[mine], model(x[mine])), alone(y, one(x))
        torch.testing.assert_close(*(v.detach() for v in values), **WITHIN)
        for value, optimizer in zip(values, steps, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for a, b in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def check_accumulation():
    """Micro-batches on every rank, of which the last one has nothing that counts."""
    x, y, mine = problem()
    torch.manual_seed(0)
    one = Model()
    model = DistributedDataParallel(one)
    options = {"ignore_class": -1, "dtype": "float64"}
    alone = torch_sce.SparseCategoricalCrossentropy(True, **options)
    (want,) = torch.autograd.grad(alone(y, one(x)), list(one.parameters())[:1])
    loss = torch_sce.SparseCategoricalCrossentropy(True, process_group=True, **options)
    batches = [(y[mine][i::3], x[mine][i::3]) for i in range(3)]
    batches.append((torch.full((2,), -1), x[:2]))
    n = sum(loss.denominator(y_, torch.Size([len(y_), 7])) for y_, _ in batches)
    total = 0
    for y_, x_ in batches:
        value = loss(y_, model(x_), denominator=n)
        value.backward()
        total += value.detach()
    torch.testing.assert_close(total, alone(y, one(x)).detach(), **WITHIN)
    torch.testing.assert_close(next(one.parameters()).grad, want, rtol=1e-12, atol=1e-14)


def check_heads():
    """Hidden states that are spread over the ranks, in chunks; the head is the same on all."""
    ranks = dist.get_world_size()
    x, y, mine = problem()
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 5).double(), torch.randn(7).double()
    w = torch.rand(24).double()
    for reduction, known in itertools.product(
        ("mean", "sum", "mean_with_sample_weight"), (True, False)
    ):
        options: dict[str, Any] = {
            "ignore_class": -1, "reduction": reduction, "dtype": "float64", "label_smoothing": 0.1,
            "class_weight": torch.linspace(0.5, 2, 7),
        }  # fmt: skip
        loss = torch_sce.LinearSparseCategoricalCrossentropy(
            chunk_bytes=500, process_group=True, **options
        )
        alone = torch_sce.SparseCategoricalCrossentropy(True, **options)
        leaves = [t.clone().requires_grad_() for t in (x[mine], weight, bias)]
        wholes = [t.clone().requires_grad_() for t in (x, weight, bias)]
        given = w[mine].clone().requires_grad_(not known)  # otherwise the losses come first
        value = loss(y[mine], *leaves, sample_weight=given)
        want = alone(y, wholes[0] @ wholes[1].T + wholes[2], w)
        torch.testing.assert_close(value.detach(), want.detach(), **WITHIN)
        found, slopes = torch.autograd.grad(value, leaves), torch.autograd.grad(want, wholes)
        close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
        torch.testing.assert_close(found[0] / ranks, slopes[0][mine], **close)
        for d, slope in zip(found[1:], slopes[1:], strict=True):
            total = d.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total / ranks, slope, **close)
        if reduction != "sum":
            n = loss.denominator(y[mine], x[mine].shape, w[mine])
            torch.testing.assert_close(n, alone.denominator(y, torch.Size([24, 7]), w))
            half = loss(y[mine], *leaves, sample_weight=given, denominator=2 * n)
            torch.testing.assert_close(half.detach(), want.detach() / 2, **WITHIN)
            for d, slope in zip(torch.autograd.grad(half, leaves[:1]), found, strict=False):
                torch.testing.assert_close(2 * d, slope, **close)


def check_heads_with_divided_classes():
    """Every rank has a slice of the weight; what it gets for the rest is the whole."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(4)
    classes = 5 * ranks + 3
    close: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}
    cuts = sorted(random.Random(6).sample(range(1, classes), k=ranks - 1))
    part = slice([0, *cuts][rank], [*cuts, classes][rank])
    x, weight = (torch.randn(n, 6, generator=generator).double() for n in (24, classes))
    bias, w = torch.randn(classes).double(), torch.rand(24).double()
    dist.broadcast(bias, 0)
    dist.broadcast(w, 0)
    y = torch.randint(-1, classes, (24,), generator=generator)
    same = None
    for reduction, ignored, softcap, has_bias, known, chunk in itertools.product(
        ("mean", "none", "mean_with_sample_weight"), (True, False), (None, 3.0), (True, False),
        (True, False), (400, None),
    ):  # fmt: skip
        options: dict[str, Any] = {"reduction": reduction, "dtype": "float64"}
        options |= {"ignore_class": -1 if ignored else None}
        loss = torch_sce.LinearSparseCategoricalCrossentropy(
            chunk_bytes=chunk, class_group=True, logit_softcap=softcap, **options
        )
        loss._found = same  # else each one asks for the slices
        alone = torch_sce.LinearSparseCategoricalCrossentropy(logit_softcap=softcap, **options)
        tensors = [x, weight, *([bias] if has_bias else [])]
        mine = [x, *(t[part] for t in tensors[1:])]
        leaves, wholes = ([t.clone().requires_grad_() for t in each] for each in (mine, tensors))
        given = w.clone().requires_grad_(not known)
        labels = y if ignored else y.clamp(0)
        value = loss(labels, *leaves, sample_weight=given)
        want = alone(labels, *wholes, sample_weight=w)
        same = loss._found
        torch.testing.assert_close(value.detach(), want.detach(), **close)
        found = torch.autograd.grad(value.sum(), leaves)
        slopes = torch.autograd.grad(want.sum(), wholes)
        torch.testing.assert_close(found[0], slopes[0], **close)
        for d, slope in zip(found[1:], slopes[1:], strict=True):
            torch.testing.assert_close(d, slope[part], **close)


def check_communication_of_heads():
    """For each chunk three numbers a row and, at the same time as d weight, d hidden."""
    x, weight, y = torch.randn(256, 8), torch.randn(16, 8), torch.zeros(256, dtype=torch.long)
    weight.requires_grad_()
    for needs_hidden, chunk, chunks in ((True, None, 1), (False, None, 1), (True, 64 * 64, 4)):
        loss = torch_sce.LinearSparseCategoricalCrossentropy(class_group=True, chunk_bytes=chunk)
        loss(y, x, weight.detach())  # exchanges sizes
        sent: list[tuple[str, int]] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_gather", "all_reduce"):
                patch.setattr(dist, name, counted_calls(getattr(dist, name), name, sent))
            value = loss(y, x.clone().requires_grad_(needs_hidden), weight)
            forward = list(sent)
            value.backward()
        rows = 256 // chunks
        each = [("all_gather", 3 * rows), ("all_reduce", 8 * rows)][: 1 + needs_hidden]
        assert forward == sent == each * chunks, sent


def counted_calls(call, name, sent):
    def counting(*args, **kwargs):
        tensor = args[1] if name == "all_gather" else args[0]
        sent.append((name, tensor.numel()))
        return call(*args, **kwargs)

    return counting


def check_heads_with_divided_classes_in_other_ways():
    """In half precision, under a mode, under autocast, compiled, with both groups, frozen parts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(4)
    x, whole = (torch.randn(n, 8, generator=generator) for n in (70, 4 * ranks))
    y = torch.randint(0, 4 * ranks, (70,), generator=generator)
    part = slice(4 * rank, 4 * (rank + 1))
    loss = torch_sce.LinearSparseCategoricalCrossentropy(class_group=True)
    alone = torch_sce.LinearSparseCategoricalCrossentropy()

    def results(loss, weight, dtype=torch.float32, device="cpu", autocast=False):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, weight)]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(y, *leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    def compare(found, want, **within):
        value, dx, dw = want
        for a, b in zip(found, (value, dx, dw[part]), strict=True):
            torch.testing.assert_close(a, b, **within)

    want = results(alone, whole)
    compare(results(torch.compile(loss, fullgraph=True), whole[part]), want)
    with BaseTorchDispatchMode():
        found = results(loss, whole[part])
    compare(found, want)
    halves: tuple[dict[str, Any], ...] = (
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"autocast": True},
    )
    for options in halves:
        found = results(loss, whole[part], **options)
        # The sum over the ranks is rounded once more, and so are its parts.
        compare(found, results(alone, whole, **options), rtol=2**-6, atol=2**-11)
    frozen = loss(y, x, whole[part].clone().requires_grad_())
    torch.testing.assert_close(frozen.detach(), want[0])
    both = torch_sce.LinearSparseCategoricalCrossentropy(class_group=True, process_group=True)
    compare(
        [t / n for t, n in zip(results(both, whole[part]), (1, ranks, ranks), strict=True)],
        [want[0], want[1] / ranks, want[2] / ranks],
    )  # the same batch on all ranks
    with pytest.raises(ValueError, match=rf"labels in \[0, {4 * ranks}\)"):
        loss(y + 4 * ranks, x, whole[part])
    with pytest.raises(ValueError, match="weight must always have as many classes"):
        loss(y, x, whole[part][:2])
    loss.label_smoothing = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with class_group, got 0\.1"):
        loss(y, x, whole[part])


def meshes():
    """One of all ranks, and with four ranks one of two axes, too."""
    ranks = dist.get_world_size()
    yield init_device_mesh("cpu", (ranks,))
    if ranks == 4:
        yield init_device_mesh("cpu", (2, 2))


def dtensor(x, mesh, placements):
    """x, which is the same on all ranks, placed like this; summands are equal parts."""
    parts = math.prod(mesh.size(i) for i, p in enumerate(placements) if p.is_partial())
    shards = [Replicate() if p.is_partial() else p for p in placements]
    local = distribute_tensor(x / parts if parts > 1 else x, mesh, shards).to_local()
    return DTensor.from_local(local, mesh, placements, shape=x.shape, stride=x.stride())


def check_dtensors():
    """Predictions, labels, weights and masks in any placement, or plain where they are whole."""
    wrong, grids = [], list(meshes())
    for number, (name, loss, *given) in enumerate(itertools.islice(flat_cases(), 0, None, 3)):
        choices = random.Random(number)
        mesh = choices.choice(grids)
        if choices.random() < 0.3:
            loss.label_smoothing = 0.1
            loss.class_weight = torch.linspace(0.5, 2, given[1].shape[1])
        want, slopes = value_and_gradients(loss, *given)
        places: list[Any] = []
        for index, x in enumerate(given):
            kinds: list[Any] = [
                Replicate(),
                *(Shard(dim) for dim in range(0 if x is None else x.ndim)),
            ]
            # Summands of probabilities may round to others than they are clipped to.
            kinds += [Partial()] if index == 1 and loss.from_logits else []
            plain = x is None or (index != 1 and choices.random() < 0.3)
            places.append(None if plain else choices.choices(kinds, k=mesh.ndim))
        placed: list[Any] = [
            x if where is None else dtensor(x.contiguous(), mesh, where)
            for x, where in zip(given, places, strict=True)
        ]
        try:
            value, found = value_and_gradients(loss, *placed)
            for got, right in zip((value, *found), (want, *slopes), strict=True):
                largest = right[right.isfinite()].abs().sum().item()
                within = {"rtol": 1e-11, "atol": 1e-13 + 1e-13 * largest, "equal_nan": True}
                torch.testing.assert_close(whole(got), right, **within)
        except Exception as error:
            wrong.append(f"{name} {loss} {places}: {error}")
    assert not wrong, f"{len(wrong)} cases: " + "\n".join(wrong[:5])


def local(x: Any):
    return x.to_local()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_second_derivatives_of_dtensors():
    y, w = torch.tensor([2, 0, -1, 1, 3]), torch.rand(5, generator=torch.Generator()).double()
    z = torch.arange(20.0).reshape(5, 4).sin().double()
    sparse = torch_sce.SparseCategoricalCrossentropy(True, -1)
    soft = torch_sce.CategoricalCrossentropy(True, label_smoothing=0.1)
    for mesh in meshes():
        for places in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=mesh.ndim):
            for loss, labels in ((sparse, y), (soft, z.cos())):
                found = []
                for given in (
                    dtensor(z, mesh, places).requires_grad_(),
                    z.clone().requires_grad_(),
                ):
                    (d,) = torch.autograd.grad(loss(labels, given, w), given, create_graph=True)
                    (d2,) = torch.autograd.grad((whole(d) ** 2).sum(), given)
                    found.append((whole(d).detach(), whole(d2)))
                for got, right in zip(*found, strict=True):
                    torch.testing.assert_close(got, right)


def check_heads_of_dtensors():
    """Hidden states, weight and bias in any placement; chunks where rows are, and classes."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, w = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 7, 4), (9, 4), (9,), (3, 7))
    )
    y = torch.randint(-1, 9, (3, 7), generator=generator)
    larger = weight.repeat(4, 1), bias.repeat(4)  # rows are gathered rather than the weight
    options: list[Any] = list(
        itertools.product(("mean", "none", "sum"), (True, False), (None, 600))
    )
    for mesh in meshes():
        of_x = itertools.product([Replicate(), Shard(0), Shard(1), Shard(2)], repeat=mesh.ndim)
        of_weight = list(itertools.product([Replicate(), Shard(0), Shard(1)], repeat=mesh.ndim))
        cases = list(enumerate(itertools.product(of_x, of_weight)))[:: 2 * mesh.ndim - 1]
        for (case, (here, there)), turn in itertools.product(
            cases, range(2 if mesh.ndim == 1 else 1)
        ):
            reduction, known, chunk = options[(2 * case + turn) % len(options)]
            loss = torch_sce.LinearSparseCategoricalCrossentropy(
                -1, reduction, logit_softcap=4, dtype="float64", chunk_bytes=chunk,
                label_smoothing=0.1 * (case % 4 == 0), class_weight={2: 0.5},
            )  # fmt: skip
            tensors = (x, *larger) if case % 2 else (x, weight, bias)
            places = (here, there, [p if p == Shard(0) else Replicate() for p in there])
            spread = [dtensor(t, mesh, where) for t, where in zip(tensors, places, strict=True)]
            found: list[list[Any]] = []
            for leaves in (spread, [t.clone() for t in tensors]):
                given = w.clone().requires_grad_(not known)
                hidden, *head = (t.requires_grad_() for t in leaves)
                value = loss(y, hidden, head[0], head[1], given)
                grads = torch.autograd.grad(value.sum(), [*leaves, *([] if known else [given])])
                found.append([whole(value).detach(), *map(whole, grads)])
            for got, right in zip(*found, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-13)


def check_dtensors_and_process_group():
    """Positions of each row of the mesh its own, classes or hidden states divided along it."""
    if dist.get_world_size() < 4:
        return
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "classes")
    )
    row, ranks = mesh.get_local_rank("data"), mesh["classes"]
    generator = torch.Generator().manual_seed(4)
    z, w, y = (torch.randn(8, 6), torch.rand(8), torch.randint(-1, 6, (8,)))
    z, w = (torch.rand(*x.shape, generator=generator, dtype=torch.float64) for x in (z, w))
    y = torch.randint(-1, 6, (8,), generator=generator)
    rows = (slice(0, 3), slice(3, 8))[row]
    options: dict[str, Any] = {"ignore_class": -1, "reduction": "mean_with_sample_weight"}
    options["dtype"] = "float64"
    group = mesh.get_group("data")
    alone = torch_sce.SparseCategoricalCrossentropy(True, **options)
    everything = z.clone().requires_grad_()
    want = alone(y, everything, w)
    (slope,) = torch.autograd.grad(want, everything)
    plain = torch_sce.SparseCategoricalCrossentropy(True, process_group=group, **options)
    linear = torch_sce.LinearSparseCategoricalCrossentropy(process_group=group, **options)
    eye = dtensor(torch.eye(6, dtype=torch.float64), ranks, [Shard(0)])
    for place in (Shard(0), Shard(1), Replicate()):
        leaf = dtensor(z[rows], ranks, [place]).requires_grad_()
        for value in (plain(y[rows], leaf, w[rows]), linear(y[rows], leaf, eye, None, w[rows])):
            torch.testing.assert_close(value.detach(), want.detach(), **WITHIN)
            (dz,) = torch.autograd.grad(value, leaf)
            torch.testing.assert_close(whole(dz) / 2, slope[rows], **WITHIN)
        n = plain.denominator(y[rows], leaf, w[rows])
        torch.testing.assert_close(n, alone.denominator(y, z, w))
        half = plain(y[rows], leaf, w[rows], denominator=2 * n)
        torch.testing.assert_close(2 * half.detach(), want.detach(), **WITHIN)


def check_communication_of_dtensors():
    """One all-gather of three numbers a row for divided classes, and nothing for divided rows."""
    (mesh, *_) = meshes()
    y, z = torch.arange(8) % 5, torch.randn(8, 5)
    for place, gathers in ((Shard(1), 1), (Shard(0), 0), (Replicate(), 0)):
        leaf = dtensor(z, mesh, [place]).requires_grad_()
        g = dtensor(torch.ones(8), mesh, [Replicate() if place == Shard(1) else place])
        sent: list[tuple[str, int]] = []
        with pytest.MonkeyPatch.context() as patch, CommDebugMode() as counts:
            patch.setattr(dist, "all_gather", counted_calls(dist.all_gather, "all_gather", sent))
            losses = torch_sce.sparse_categorical_crossentropy(y, leaf, from_logits=True)
            losses.backward(g)
        assert counts.get_total_counts() == gathers, counts.get_comm_counts()
        assert sent == [("all_gather", 24)] * gathers

    # Of what an axis of the mesh divides, rows and classes, the smaller is gathered.
    weight = dtensor(torch.randn(40, 5), mesh, [Shard(0)])
    for rows, place in ((8, Replicate()), (80, Shard(0))):
        hidden = dtensor(torch.randn(rows, 5), mesh, [Shard(0)])
        assert dtensors.with_rows_for(weight, hidden).placements == (place,)


def check_dtensors_refuse():
    grids = list(meshes())
    y, z = torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)
    loss = torch_sce.SparseCategoricalCrossentropy(True)
    leaf = dtensor(z, grids[0], [Shard(0)])
    with pytest.raises(TypeError, match="must be a plain tensor with class_group, got a DTensor"):
        torch_sce.SparseCategoricalCrossentropy(True, class_group=True)(y, leaf)
    with pytest.raises(ValueError, match="y_true must have the shape of y_pred"):
        loss(y[:2], leaf)
    if len(grids) == 2:
        with pytest.raises(ValueError, match="y_true must be on y_pred's device mesh"):
            loss(dtensor(y, grids[1], [Replicate(), Shard(0)]), leaf)
    assert whole(loss(y + 5, leaf)).isnan()  # the same on all ranks


def check_ranks_without_a_part():
    """Those that a mesh does not have: an empty result, and nobody waits."""
    mesh = DeviceMesh("cpu", [0])
    y, z = torch.tensor([0, 2, 1]), torch.arange(9.0).view(3, 3)
    loss = torch_sce.SparseCategoricalCrossentropy(True, reduction="none")
    head = torch_sce.LinearSparseCategoricalCrossentropy(reduction="none")
    has_part = mesh.get_coordinate() is not None
    for place in (Shard(0), Shard(1), Replicate()):
        leaf = distribute_tensor(z, mesh, [place]).requires_grad_()
        rows = Shard(0) if place == Shard(0) else Replicate()
        found = loss(distribute_tensor(y, mesh, [rows]), leaf)
        (dz,) = torch.autograd.grad(found.sum(), leaf)
        assert (local(found).numel(), local(dz).numel()) == ((3, 9) if has_part else (0, 0))
        # PyTorch has no gradients of parts there.
        found = head(y, leaf.detach(), distribute_tensor(torch.eye(3), mesh, [Shard(0)]))
        assert local(found).numel() == (3 if has_part else 0)


def check_denominators_of_dtensors():
    """Also from the shape of predictions alone."""
    loss = torch_sce.SparseCategoricalCrossentropy(True, ignore_class=-1)
    y = torch.arange(12).view(4, 3) % 4 - 1
    for mesh in meshes():
        for place in (Shard(0), Shard(1), Replicate()):
            given = dtensor(y, mesh, [Replicate()] * (mesh.ndim - 1) + [place])
            assert whole(loss.denominator(given, torch.Size([4, 3, 3]))) == 9


def check_compiled_dtensors():
    """Each rank has a graph of its own: PyTorch would take the first rank's from its cache."""
    (mesh, *_), rank = meshes(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 6, generator=generator)
    y = torch.randint(0, 6, (8,), generator=generator)
    loss = torch_sce.SparseCategoricalCrossentropy(True, reduction="none")
    given = dtensor(y, mesh, [Replicate()]), dtensor(z, mesh, [Shard(0)])
    for function in (torch_sce.sparse_categorical_accuracy, loss):
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        for turn in (True, False):  # one after the other; nothing is sent
            if (rank == 0) == turn:
                found = compiled(*given)
                torch.testing.assert_close(local(found), local(function(*given)))
            dist.barrier()


def check_options():
    """At PyTorch's debug level DETAIL other options are an error on all ranks."""
    rank, y, z = dist.get_rank(), torch.zeros(4, dtype=torch.long), torch.ones(4, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_sce.distributed._compares_ranks", lambda: True)
        groups: tuple[dict[str, Any], ...] = ({"process_group": True}, {"class_group": True})
        for group in groups:
            loss = torch_sce.SparseCategoricalCrossentropy(rank != 1, -1, "sum", **group)
            with pytest.raises(ValueError, match=r"from_logits must be the same .*True, False"):
                loss(y, z)
            loss = torch_sce.SparseCategoricalCrossentropy(True, -1, "sum", **group)
            loss.class_weight = [1, 2, 3] if rank == 1 else None  # not in the others' configs
            for _ in range(2):  # the same error again
                with pytest.raises(ValueError, match="class_weight must be the same"):
                    loss(y, z)
            kind = "none" if rank == 1 else "sum"
            loss = torch_sce.SparseCategoricalCrossentropy(True, -1, kind, **group)
            with pytest.raises(ValueError, match=r"reduction must be the same .*'sum', 'none'"):
                loss(y, z)
            nan = {"ignore_class": torch.nan, "reduction": "sum"}
            loss = torch_sce.SparseCategoricalCrossentropy(True, **nan, **group)
            assert loss(y, z) == loss(y, z)
            assert copy.deepcopy(loss)(y, z) == loss(y, z)
            assert pickle.loads(pickle.dumps(loss))(y, z) == loss(y, z)
        loss = torch_sce.SparseCategoricalCrossentropy(True, class_group=True)
        with pytest.raises(ValueError, match=r"numel\(\) / C must be the same.*got 4, 3"):
            loss(y[: 4 - (rank == 1)], z[: 4 - (rank == 1)])
        loss = torch_sce.LinearSparseCategoricalCrossentropy(class_group=True)
        hidden = torch.ones(4, 2, requires_grad=rank == 1)
        with pytest.raises(ValueError, match=r"hidden\.requires_grad must be the same"):
            loss(y, hidden, z[:3, :2])


def check_compiled():
    x, y, mine = problem()
    torch.manual_seed(0)
    model = Model()
    loss = torch_sce.SparseCategoricalCrossentropy(
        True, ignore_class=-1, dtype="float64", process_group=True
    )

    def step(x, y):
        return loss(y, model(x))

    slices = torch_sce.SparseCategoricalCrossentropy(True, dtype="float64", class_group=True)
    compiled = torch.compile(slices, fullgraph=True, dynamic=True)  # before any other call
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % 4
    values = [f(labels, z) for f in (compiled, slices)]
    torch.testing.assert_close(*values, **WITHIN)
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in values), **WITHIN)
    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        value = call(x[mine], y[mine])
        results.append((value.detach(), *torch.autograd.grad(value, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def check_metrics():
    """Uneven batches, ranks without a batch, different numbers of updates."""
    from torch_sce import metrics

    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    for name in ("SparseCategoricalCrossentropy", "SparseCategoricalAccuracy"):
        options = {"from_logits": True} if "entropy" in name else {}
        metric, one = getattr(metrics, name)(**options), getattr(metrics, name)(**options)
        one._to_sync = one.sync_on_compute = False
        for r in range(ranks):
            for batch in range(r):
                y = torch.randint(0, 4, (3 + r + batch,), generator=generator)
                z = torch.randn(len(y), 4, generator=generator)
                one.update_state(y, z)
                if r == rank:
                    metric.update_state(y, z)
        assert metric.result() == one.result(), name


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def main(folder, *names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=200))
    failed = {}
    for name in names or CHECKS:
        try:
            CHECKS[name]()
        except (Exception, pytest.fail.Exception):
            failed[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
