"""The losses of rows whose logits come from a linear head, and never exist all at once.

    x (N, H)       the rows that go into the head
    weight (C, H)  and bias (C,), as `nn.Linear` has them
    z (N, C)       the logits: x @ weight.T + bias; with a softcap c: c tanh(z / c)

Rows are computed a chunk at a time: their logits in one workspace, losses and dz by the kernels of
the device, dz in the place of the logits, then the products dz @ weight and dz.T @ x. Sums over
chunks are float32 where the inputs are in half precision, and are rounded once.

With a group of ranks that have a slice of the classes each, weight and bias hold this rank's. The
ranks merge the summaries of a chunk's rows (`shards`) and add up its dx, meanwhile each computes
its part of d weight.

Both functions are operators, which a compiled graph calls as they are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, library

from ..arrays import HALVES
from . import kernels_for, modes, require_first_derivative, target_kernels
from .aten import real_dtype
from .contract import Kernels, SmoothedLabels
from .cpu import prefer_huge_pages
from .shards import Slice, SliceKernels

ADDS_FLOAT32 = hasattr(torch.ops.aten.addmm, "dtype_out")  # from PyTorch 2.8 on, for CUDA

Rows = slice | Tensor  # the rows of a chunk: a slice of x, or their numbers
Needs = Sequence[bool]  # whether x, weight and bias need a gradient

INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor y, Tensor? counted, "
    "float? softcap, ScalarType compute, ScalarType seen, int chunk_bytes, "
    "str? group=None, int[] part=[], float smoothing=0.0"
)


class Head(NamedTuple):
    """What is the same for all chunks."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    y: Tensor
    counted: Tensor | None  # as `contract.Kernels` has it
    softcap: float | None
    compute: torch.dtype  # of the products
    seen: torch.dtype  # of the logits that the loss sees
    chunk_bytes: int  # the size of the workspace
    group: str | None = None  # the name of the ranks' group
    part: Sequence[int] = ()  # the other fields of a `Slice`
    smoothing: float = 0.0  # of labels, if the classes are not divided

    def shard(self) -> Slice | None:
        return None if self.group is None else Slice(modes.group_called(self.group), *self.part)


class Workspace(NamedTuple):
    """Memory for the logits of a chunk, the same for all chunks; of each dtype there is one z."""

    z: Tensor  # as the product has it, and dz for the products that follow
    wide: Tensor  # for the softcap
    seen: Tensor  # as the loss has it
    slope: Tensor  # of the softcap, if there is one


@library.custom_op(
    "torch_sce::head_losses", mutates_args=(), schema=f"({INPUTS}) -> Tensor"
)  # fmt: skip
def losses(*inputs: Any) -> Tensor:
    """The loss of every row, (N,)."""
    head = _prepared(Head(*inputs))
    loss = head.x.new_zeros(len(head.x), dtype=real_dtype(head.seen))
    for rows, _, work in _chunks(head):
        z = _seen(work, head)
        y, counted = head.y[rows], _of(head.counted, rows)
        _put(loss, rows, _kernels(z, head).forward(z, y, counted, None)[0])
    return loss


@library.custom_op(
    "torch_sce::head_gradients", mutates_args=(),
    schema=f"(Tensor g, bool[] needs, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def gradients(g: Tensor, needs: Needs, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses, and the sum of g times their gradients: dx, d weight and d bias.

    One that is not needed is empty.
    """
    head = _prepared(Head(*inputs))
    loss, dx, dweight, dbias = _results(needs, Head(*inputs))
    loss.zero_()
    dx.zero_()
    products = _SumOfProducts(prefer_huge_pages(dweight), head.compute)
    sums = torch.zeros_like(dbias, dtype=real_dtype(head.compute))
    for rows, x, work in _chunks(head):
        found, dz = _loss_and_dz(g[rows], rows, work, head)
        _put(loss, rows, found)
        finish = _add_dx(dx, dz, rows, head) if needs[0] else None
        if needs[1]:
            products.add(dz, x)
        if needs[2]:
            sums += dz.sum(0, dtype=sums.dtype)
        if finish is not None:
            finish()
    return loss, dx, products.value(), dbias.copy_(sums)


@losses.register_fake
def _(*inputs: Any) -> Tensor:
    head = Head(*inputs)
    return head.x.new_empty(head.x.shape[0], dtype=real_dtype(head.seen))


@gradients.register_fake
def _(g: Tensor, needs: Needs, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(needs, Head(*inputs))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    head = Head(*inputs)
    ctx.save_for_backward(*head[:5])
    ctx.options = head[5:]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    require_no_second_derivative()
    needs = list(ctx.needs_input_grad[:3])
    _, *found = gradients(g, needs, *ctx.saved_tensors, *ctx.options)
    found = (d if need else None for d, need in zip(found, needs, strict=True))
    return *found, *(None for _ in Head._fields[3:])


losses.register_autograd(_backward, setup_context=_keep)


def require_no_second_derivative() -> None:
    require_first_derivative(
        "the loss of a linear head",
        "use SparseCategoricalCrossentropy(from_logits=True) of hidden @ weight.T + bias",
    )


def _results(needs: Needs, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for the losses and the gradients."""
    x, weight, bias = head.x, head.weight, head.bias
    loss = x.new_empty(x.shape[0], dtype=real_dtype(head.seen))  # len would be one for all N
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    dweight = torch.empty_like(weight) if needs[1] else x.new_empty(0)
    dbias = torch.empty_like(bias) if needs[2] and bias is not None else x.new_empty(0)
    return loss, dx, dweight, dbias


def _prepared(head: Head) -> Head:
    """With the weight and the bias in the dtype of the products."""
    bias = None if head.bias is None else head.bias.to(head.compute)
    return head._replace(weight=head.weight.to(head.compute), bias=bias)


def _kernels(z: Tensor, head: Head) -> Kernels | SliceKernels | SmoothedLabels:
    shard = head.shard()
    if head.smoothing:
        assert shard is None
        return SmoothedLabels(target_kernels(z, head.y), head.smoothing)
    return kernels_for(z) if shard is None else SliceKernels(kernels_for(z), shard)


def _add_dx(dx: Tensor, dz: Tensor, rows: Rows, head: Head) -> Callable[[], None]:
    """Puts dx of a chunk in its place, by the time that the function that is returned has run."""
    stays = isinstance(rows, slice) and dx.dtype == dz.dtype
    part = torch.mm(dz, head.weight, out=dx[rows]) if stays else dz @ head.weight
    shard = head.shard()
    work = None if shard is None else dist.all_reduce(part, group=shard.group, async_op=True)

    def finish() -> None:
        if work is not None:
            work.wait()
        if not stays:
            _put(dx, rows, part)

    return finish


def _of(x: Tensor | None, rows: Rows) -> Tensor | None:
    return None if x is None else x[rows]


def _put(whole: Tensor, rows: Rows, part: Tensor) -> None:
    whole[rows] = part.to(whole.dtype)


def _chunk_rows(head: Head) -> int:
    """How many rows to compute at a time, so that what is made for them fits in `chunk_bytes`."""
    classes, width = head.weight.shape
    shard = head.shard()
    classes = classes if shard is None else shard.largest  # ranks have the same chunks
    dtypes = [*_dtypes(head), *([] if head.softcap is None else [head.seen])]
    size = classes * sum(dtype.itemsize for dtype in dtypes)
    if head.counted is not None or head.x.dtype != head.compute:  # copies of x and dx
        size += 2 * width * head.compute.itemsize
    return max(1, head.chunk_bytes // max(1, size))


def _step(n: int, most: int) -> int:
    """How many of n rows to compute at a time, so that chunks are about equal.

    A multiple of 64 where it may be larger: for others some products take a third more time.
    """
    unit = 64 if most >= 64 else 1
    chunks = max(1, math.ceil(n / (most - most % unit)))
    return math.ceil(max(1, n) / chunks / unit) * unit


def _dtypes(head: Head) -> set[torch.dtype]:
    """Those of a chunk's logits."""
    return {head.compute, head.seen} | (set() if head.softcap is None else {real_dtype(head.seen)})


def _workspace(head: Head, rows: int) -> Workspace:
    def memory(rows: int, dtype: torch.dtype) -> Tensor:
        return prefer_huge_pages(head.x.new_empty((rows, head.weight.shape[0]), dtype=dtype))

    z = {dtype: memory(rows, dtype) for dtype in _dtypes(head)}
    slope = memory(0 if head.softcap is None else rows, head.seen)
    return Workspace(z[head.compute], z.get(real_dtype(head.seen), slope), z[head.seen], slope)


def _leaves_rows_out(x: Tensor) -> bool:
    """Whether it is known, without waiting for a device, how many rows count."""
    return x.device.type == "cpu"


def _chunks(head: Head) -> Iterator[tuple[Rows, Tensor, Workspace]]:
    """The rows of each chunk, x of them, and their logits before the softcap, in a workspace.

    Rows that do not count are left out, or their x is taken as 0.
    """
    x, counted = head.x, head.counted
    leaves_out = _leaves_rows_out(x)
    chosen = counted.nonzero().squeeze(1) if counted is not None and leaves_out else None
    n = len(x) if chosen is None else len(chosen)
    step = _step(n, _chunk_rows(head))
    whole = _workspace(head, min(step, n))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        rows = rows if chosen is None else chosen[rows]
        part = x[rows].to(head.compute)
        if counted is not None and not leaves_out:
            part = torch.where(counted[rows].unsqueeze(1), part, 0)
        work = Workspace(*(each[: len(part)] for each in whole))
        if head.bias is None:
            torch.mm(part, head.weight.t(), out=work.z)
        else:
            torch.addmm(head.bias, part, head.weight.t(), out=work.z)
        yield rows, part, work


def _seen(work: Workspace, head: Head) -> Tensor:
    """The logits as the loss sees them."""
    if head.softcap is None:
        return _in(work.seen, work.z)
    wide = _in(work.wide, work.z)
    return _in(work.seen, wide.div_(head.softcap).tanh_().mul_(head.softcap))


def _in(memory: Tensor, z: Tensor) -> Tensor:
    """z in that memory, where it already is if it has its dtype."""
    return z if z.dtype == memory.dtype else memory.copy_(z)


def _loss_and_dz(g: Tensor, rows: Rows, work: Workspace, head: Head) -> tuple[Tensor, Tensor]:
    """The losses of a chunk, and dz in the place of its logits in the workspace."""
    z, y, counted = _seen(work, head), head.y[rows], _of(head.counted, rows)
    kernels = _kernels(z, head)
    loss, saved = kernels.forward(z, y, counted, None)
    slope = _slope(z, work, head)
    dz = kernels.backward(g, z, y, counted, None, saved, z)
    dz = dz if slope is None else dz.mul_(slope)
    return loss, _in(work.z, dz)


def _slope(z: Tensor, work: Workspace, head: Head) -> Tensor | None:
    """The derivative of the softcap c tanh(z / c), 1 - tanh^2, by its value; None without one."""
    if head.softcap is None:
        return None
    return torch.div(z, head.softcap, out=work.slope).square_().neg_().add_(1)


class _SumOfProducts:
    """The sum over chunks of dz.T @ x in `result`, rounded once."""

    def __init__(self, result: Tensor, compute: torch.dtype) -> None:
        self.result, self.compute, self.chunks = result, compute, 0
        self.part: Tensor | None = None  # of one chunk
        self.total: Tensor | None = None  # of all, where that is not the same tensor

    def add(self, dz: Tensor, x: Tensor) -> None:
        self.chunks += 1
        beta = min(self.chunks - 1, 1)
        if dz.is_cuda and ADDS_FLOAT32 and self.compute in HALVES:
            total = self.total = _as(self.result, torch.float32) if beta == 0 else self.total
            assert total is not None
            torch.ops.aten.addmm.dtype_out(total, dz.t(), x, torch.float32, beta=beta, out=total)
            return
        part = self.part = _as(self.result, self.compute) if self.part is None else self.part
        if self.compute not in HALVES:
            torch.addmm(part, dz.t(), x, beta=beta, out=part)
            return
        if self.chunks == 2:
            self.total = _as(self.result, torch.float32).copy_(part)
        torch.mm(dz.t(), x, out=part)
        if self.total is not None:
            _add(self.total, part)

    def value(self) -> Tensor:
        found = self.part if self.total is None else self.total
        if found is None:
            return self.result.zero_()
        return found if found is self.result else self.result.copy_(found)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, or an empty tensor like it in another dtype."""
    return x if x.dtype == dtype else prefer_huge_pages(torch.empty_like(x, dtype=dtype))


def _add(total: Tensor, part: Tensor) -> None:
    """total += part. On the CPU a sum of two dtypes takes PyTorch five times as long."""
    if total.device.type != "cpu":
        total += part
        return
    step = max(1, 2**18 // max(1, part.shape[1]))  # 1 MiB of float32 at a time
    for total_rows, part_rows in zip(total.split(step), part.split(step), strict=True):
        total_rows += part_rows.float()
