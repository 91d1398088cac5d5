"""Rows whose classes are divided among the ranks of a process group.

    z (..., C_r)   this rank's slice of the predictions; C_r may differ from rank to rank
    y (...)        class numbers of the whole, the same on all ranks

The ranks exchange the summaries of their slices, three numbers a row, in one all-gather, and merge
them in the order of the ranks: losses and gradients have the same bits whichever rank computes
them. The backward pass needs no communication.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import PLAIN, are_plain, aten, kernels_for, modes, require_first_derivative
from .contract import Clip, Kernels, Summary, merge


class Slice(NamedTuple):
    """Which classes this rank has."""

    group: Any
    size: int
    start: int
    classes: int  # of all ranks


def find_slice(size: int, device: torch.device, group: Any) -> Slice:
    """This rank's classes, of which it has `size`. One all-gather of a number from each rank."""
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather(list(sizes.unsqueeze(1).unbind()), sizes.new_tensor([size]), group=group)
    sizes = sizes.tolist()
    return Slice(group, size, sum(sizes[: dist.get_rank(group)]), sum(sizes))


def shard_losses(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, shard: Slice) -> Tensor:
    """The losses of rows of which each rank has a slice."""
    tensors = (z, y, counted)
    if modes.transforms_active() or any(x is not None and type(x) not in PLAIN for x in tensors):
        raise TypeError(
            "a loss with class_group takes plain tensors, and no transforms of torch.func: got "
            f"y_pred of type {type(z).__name__}, y_true of type {type(y).__name__}"
        )
    if z.ndim > 1:
        kernels = kernels_for(z) if are_plain(*tensors) else aten  # for modes and the compiler
        return _ShardLosses.apply(z, y, counted, clip, kernels, shard)
    counted = None if counted is None else counted.unsqueeze(0)
    return shard_losses(z.unsqueeze(0), y.unsqueeze(0), counted, clip, shard).squeeze(0)


class _ShardLosses(torch.autograd.Function):
    """The losses of rows of which each rank has a slice."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        y: Tensor,
        counted: Tensor | None,
        clip: Clip,
        kernels: Kernels,
        shard: Slice,
    ) -> Tensor:
        y = y - shard.start
        owns = (y >= 0) & (y < z.shape[-1])
        y = torch.where(owns, y, 0)  # elsewhere class 0 stands in, and is put right
        loss, saved = kernels.forward(z, y, counted, clip, True)
        m, r = kernels.sums_of(saved)
        q = z.gather(-1, y.unsqueeze(-1)).squeeze(-1).to(loss.dtype)
        r = torch.where(owns, r, r + _term(q, m, clip))
        mine = torch.stack((m, r, torch.where(owns, q, torch.nan)))
        every = mine.new_empty(dist.get_world_size(shard.group), *mine.shape)
        dist.all_gather(list(every.unbind()), mine, group=shard.group)
        m, r, q = _merged(every)
        ctx.save_for_backward(z, y, owns, counted, m, r, q)
        ctx.clip, ctx.kernels = clip, kernels
        term = _term(q, m, clip)
        found = (r + term).log() + (m - q) if clip is None else ((r + term) / term).log()
        return (found if counted is None else torch.where(counted, found, 0)).to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,), clip, kernels = upstream, ctx.clip, ctx.kernels
        z, y, owns, counted, m, r, q = ctx.saved_tensors
        require_first_derivative("a loss with class_group", "gather the predictions")
        saved = kernels.saved_of(*(x.to(g.dtype) for x in (m, r, q)), clip)
        dz = kernels.backward(g, z, y, counted, clip, True, saved)
        first = z[..., 0].to(m.dtype)
        slope = g / (r + _term(q, m, clip))
        if clip is None:
            slope = slope * _term(first, m, clip)
        else:
            slope = torch.where((clip[0] <= first) & (first <= clip[1]), slope, 0)
        right = owns if counted is None else owns | ~counted
        dz[..., 0] = torch.where(right, dz[..., 0], slope.to(dz.dtype))
        return dz, None, None, None, None, None


def _term(q: Tensor, m: Tensor, clip: Clip) -> Tensor:
    """What a prediction adds to the sum of its row."""
    shift = torch.where(m == -torch.inf, 0, m)
    return (q - shift).exp() if clip is None else q.clamp(*clip)


def _merged(every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, r and the prediction of the label of whole rows, in float64; NaN if no rank has it."""
    slices = [Summary(*rank.unbind()) for rank in every.double().unbind()]
    m, r, _ = functools.reduce(merge, slices)
    q = slices[0].p
    for each in slices[1:]:
        q = torch.where(each.p.isnan(), q, each.p)
    return m, r, q
