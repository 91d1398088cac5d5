"""Rows whose classes are divided among the ranks of a process group.

    z (..., C_r)   this rank's slice of the predictions; C_r may differ from rank to rank
    y (...)        class numbers of the whole, the same on all ranks

The ranks exchange the summaries of their slices, three numbers a row, in one all-gather, and merge
them in the order of the ranks: losses and gradients have the same bits whichever rank computes
them. The backward pass needs no communication.
"""

import operator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import PLAIN, are_plain, aten, is_traced, kernels_for, modes, require_first_derivative
from .contract import Clip, Kernels, Saved, Summary

_FOUND: dict[tuple[int, str], tuple[int, ...]] = {}


class Slice(NamedTuple):
    """Which classes this rank has."""

    group: Any
    size: int
    start: int
    classes: int  # of all ranks
    largest: int  # the most that a rank has


def find_slice(size: int, device: torch.device, group: Any, number: int) -> Slice:
    """This rank's classes, of which it has `size`. One all-gather of a number from each rank.

    They are asked once for each `number`: while a graph is made this may run several times, and not
    as often on every rank.
    """
    size = operator.index(size)  # a number, where the compiler has a symbol
    sizes = _sizes(size, str(device), group.group_name, number)
    return Slice(group, size, sum(sizes[: dist.get_rank(group)]), sum(sizes), max(sizes))


@modes.constant_in_graphs
def _sizes(size: int, device: str, group_name: str, number: int) -> tuple[int, ...]:
    found = _FOUND.get((number, group_name))
    if found is None:
        group = modes.group_called(group_name)
        sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
        dist.all_gather(list(sizes.unsqueeze(1).unbind()), sizes.new_tensor([size]), group=group)
        found = _FOUND[number, group_name] = tuple(sizes.tolist())
    return found


def shard_losses(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, shard: Slice) -> Tensor:
    """The losses of rows of which each rank has a slice."""
    tensors = (z, y, counted)
    if modes.transforms_active():
        raise RuntimeError(
            "a loss with class_group has no transforms of torch.func: gather the predictions, and "
            "leave the group out"
        )
    if any(x is not None and type(x) not in PLAIN for x in tensors):
        raise TypeError(
            "a loss with class_group takes plain tensors, got "
            f"y_pred of type {type(z).__name__}, y_true of type {type(y).__name__}"
        )
    if z.ndim > 1:
        kernels = kernels_for(z) if are_plain(*tensors) else aten  # for modes and the compiler
        return _ShardLosses.apply(z, y, counted, clip, SliceKernels(kernels, shard))
    counted = None if counted is None else counted.unsqueeze(0)
    return shard_losses(z.unsqueeze(0), y.unsqueeze(0), counted, clip, shard).squeeze(0)


class SliceKernels(NamedTuple):
    """Kernels for rows of which this rank has a slice, as `contract.Kernels` has them.

    For the backward pass m, r and the prediction of the label are saved, of whole rows.
    """

    kernels: Kernels
    shard: Slice

    def forward(
        self, z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip
    ) -> tuple[Tensor, Saved]:
        """The losses of whole rows. Every rank of the group has to call it."""
        mine = self._summary(z, y, counted, clip)
        every = mine.new_empty(dist.get_world_size(self.shard.group), *mine.shape)
        dist.all_gather(list(every.unbind()), mine, group=self.shard.group)
        m, r, q = _merged(every)
        term = _term(q, m, clip)
        found = (r + term).log() + (m - q) if clip is None else ((r + term) / term).log()
        found = found if counted is None else torch.where(counted, found, 0)
        return found.to(mine.dtype), (m, r, q)

    def _summary(self, z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> Tensor:
        """m, r and the prediction of the label, of this rank's slice; the last is NaN elsewhere."""
        if z.shape[-1] == 0:
            lowest = -torch.inf if clip is None else 0.0
            numbers = z.new_tensor((lowest, 0, torch.nan), dtype=aten.row_dtype(z))
            return numbers.view(3, *[1] * y.ndim).expand(3, *y.shape).contiguous()
        y, owns = self._here(z, y)
        loss, saved = self.kernels.forward(z, y, counted, clip)
        m, r = self.kernels.sums_of(saved)
        q = z.gather(-1, y.unsqueeze(-1)).squeeze(-1).to(loss.dtype)
        r = torch.where(owns, r, r + _term(q, m, clip))
        return torch.stack((m, r, torch.where(owns, q, torch.nan)))

    def backward(
        self,
        g: Tensor,
        z: Tensor,
        y: Tensor,
        counted: Tensor | None,
        clip: Clip,
        saved: Saved,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient with respect to this rank's slice."""
        if z.shape[-1] == 0:
            return torch.empty_like(z)
        y, owns = self._here(z, y)
        m, r, q = saved
        first = z[..., 0].to(m.dtype, copy=True)  # z may be overwritten
        saved = self.kernels.saved_of(m.to(g.dtype), r.to(g.dtype), q.to(g.dtype), clip)
        dz = self.kernels.backward(g, z, y, counted, clip, saved, out)
        slope = g / (r + _term(q, m, clip))
        if clip is None:
            slope = slope * _term(first, m, clip)
        else:
            slope = torch.where((clip[0] <= first) & (first <= clip[1]), slope, 0)
        right = owns if counted is None else owns | ~counted
        dz[..., 0] = torch.where(right, dz[..., 0], slope.to(dz.dtype))
        return dz

    def _here(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The labels as numbers of this rank's classes, and whether it has them.

        Elsewhere class 0 stands in, and is put right.
        """
        y = y - self.shard.start
        owns = (y >= 0) & (y < z.shape[-1])
        return torch.where(owns, y, 0), owns


def copied(x: Tensor, shard: Slice) -> Tensor:
    """x, which is the same on all ranks; its gradient is the sum of theirs."""
    return _Copied.apply(x, shard.group)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        total = upstream[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _ShardLosses(torch.autograd.Function):
    """The losses of rows of which each rank has a slice."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, kernels: SliceKernels
    ) -> Tensor:
        loss, saved = kernels.forward(z, y, counted, clip)
        ctx.save_for_backward(z, y, counted, *saved)
        ctx.clip, ctx.kernels = clip, kernels
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative("a loss with class_group", "gather the predictions")
        (g,), (z, y, counted, *saved) = upstream, ctx.saved_tensors
        if not (is_traced() or modes.has_memory(g)):
            raise RuntimeError(
                "a loss with class_group has no batches of gradients (is_grads_batched=True): take "
                "them one by one"
            )
        dz = ctx.kernels.backward(g, z, y, counted, ctx.clip, tuple(saved))
        return dz, None, None, None, None


def _term(q: Tensor, m: Tensor, clip: Clip) -> Tensor:
    """What a prediction adds to the sum of its row."""
    shift = torch.where(m == -torch.inf, 0, m)
    return (q - shift).exp() if clip is None else q.clamp(*clip)


def _merged(every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, r and the prediction of the label of whole rows, in float64; NaN if no rank has it."""
    m, r, q = every.double().unbind(1)
    has_label = ~q.isnan()
    m, r, q = aten.merge(Summary(m, r, torch.where(has_label, q, -torch.inf)))
    return m, r, torch.where(has_label.any(0), q, torch.nan)
