"""The row formulas in PyTorch operations: their definition, and the path for any device.

`row_losses` is the plain, differentiable statement. `forward` and `backward` process the rows in
blocks, so that temporaries stay small: the only large tensor is the gradient itself. `contract` has
the formulas and the letters.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .contract import Clip, Saved, Summary, loss_of, sums

# Predictions at a time: 1 MiB of float32 stays in a core's cache from one operation to the next,
# and on a device launches cost more than memory.
CPU_BLOCK, DEVICE_BLOCK = 2**18, 2**24


def row_losses(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> Tensor:
    """The loss of every row, in operations that autograd, the compiler and DTensors understand."""
    z = blanked(z, counted)
    p = at_label(z, y.clamp(0, z.shape[-1] - 1))
    if clip is None:
        m = z.detach().amax(-1)  # cancels out of the loss, so no gradient need flow through it
        loss = (z - m.unsqueeze(-1)).exp().sum(-1).log() + (m - p)
    else:
        loss = (clamp_inclusive(z, *clip).sum(-1) / clamp_inclusive(p, *clip)).log()
    return finished(loss, y, counted, z.shape[-1])


def forward(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> tuple[Tensor, Saved]:
    """The loss of every row, and its summary."""
    loss, *saved = (torch.empty_like(y, dtype=row_dtype(z)) for _ in range(4))
    for rows in blocks(y.shape, z.shape[-1], block_size(z)):
        # Without autograd PyTorch's own clamp is enough, in a fifth of the time.
        summary = summarize(z[rows].to(loss.dtype), y[rows], clip, torch.clamp)
        loss[rows] = loss_of(summary, clip)
        for whole, part in zip(saved, summary, strict=True):
            whole[rows] = part
    return finished(loss, y, counted, z.shape[-1]), Summary(*saved)


def backward(
    g: Tensor,
    z: Tensor,
    y: Tensor,
    counted: Tensor | None,
    clip: Clip,
    saved: Saved,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    dz = empty_like(z) if out is None else out
    for rows in blocks(y.shape, z.shape[-1], block_size(z)):
        summary = Summary(*(each[rows] for each in saved))
        block = z[rows].to(summary.r.dtype)
        some = None if counted is None else counted[rows]
        dz[rows] = row_gradients(g[rows], block, y[rows], some, clip, summary)
    return dz


def sums_of(saved: Saved) -> tuple[Tensor, Tensor]:
    """m and r of every row, from what `forward` saved."""
    return saved[0], saved[1]


def saved_of(m: Tensor, r: Tensor, q: Tensor, clip: Clip) -> Saved:
    """What `backward` needs, from m, r and the prediction of the label."""
    return Summary(m, r, q if clip is None else q.clamp(*clip))


def summarize(
    z: Tensor, y: Tensor, clip: Clip, clamp: Callable[..., Tensor] | None = None
) -> Summary:
    """The summary of every row, or of a slice of its classes: z_0 is the prediction of class 0.

    Labels may be outside the slice.
    """
    classes = z.shape[-1]
    others = torch.arange(classes, device=z.device) != y.unsqueeze(-1)
    is_here = (y >= 0) & (y < classes)
    p = at_label(z, y.clamp(0, classes - 1))
    if clip is None:
        m = z.detach().amax(-1)
        shift = torch.where(m == -torch.inf, 0, m)
        r = row_sums(torch.where(others, (z - shift.unsqueeze(-1)).exp(), 0))
        return Summary(m, r, torch.where(is_here, p, -torch.inf))
    clamp = clamp or clamp_inclusive
    r = row_sums(torch.where(others, clamp(z, *clip), 0))
    return Summary(torch.zeros_like(r), r, torch.where(is_here, clamp(p, *clip), 0))


def merge(slices: Summary) -> Summary:
    """The summary of whole rows, (...), by those of R slices of their classes, (R, ...).

    At most one of them has the label.
    """
    m = slices.m.amax(0)
    shift = torch.where(m == -torch.inf, 0, m)
    terms = slices.r * (slices.m - shift).exp()
    return Summary(m, row_sums(terms.movedim(0, -1)), slices.p.amax(0))


def row_gradients(
    g: Tensor, z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, summary: Summary
) -> Tensor:
    """g times the derivative of every row's loss with respect to its z."""
    is_label = torch.arange(z.shape[-1], device=z.device) == y.unsqueeze(-1)
    g = (g * one_or_nan(y, z.shape[-1]).to(g.dtype)).unsqueeze(-1)
    m, r, p, s = (each.unsqueeze(-1) for each in (*summary, sums(summary, clip)))
    # -r / s and -r / (s p), in the form that is accurate and has accurate derivatives.
    if clip is None:
        e = (p - m).exp()
        dz = g * torch.where(is_label, torch.where(r < e, -r / s, e / s - 1), (z - m).exp() / s)
    else:
        at_label = torch.where(r < p, -(g / s) * (r / p), g * (1 / s - 1 / p))
        dz = torch.where(is_label, at_label, g / s)
        dz = torch.where((clip[0] <= z) & (z <= clip[1]), dz, 0)
    return dz if counted is None else torch.where(counted.unsqueeze(-1), dz, 0)


def clamp_inclusive(q: Tensor, low: float, high: float) -> Tensor:
    """q within the bounds. The derivative is 1 from bound to bound, 0 outside and for a NaN.

    That of `clamp` at a bound depends on PyTorch's version, and on whether it is compiled.
    """
    c = q.detach().clamp(low, high)
    return torch.where(q == c, q, c)


def blanked(z: Tensor, counted: Tensor | None) -> Tensor:
    """z with zeros in the rows that do not count: autograd would give them 0 * NaN otherwise."""
    return z if counted is None else torch.where(counted.unsqueeze(-1), z, 0)


def at_label(z: Tensor, y: Tensor) -> Tensor:
    """z_y of every row."""
    if z.shape[-1] == 1:  # PyTorch 2.6 to 2.9 compile gather's derivative wrongly here
        return z.squeeze(-1).clone()
    return z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def finished(loss: Tensor, y: Tensor, counted: Tensor | None, classes: int) -> Tensor:
    """The losses, with NaN where the label is outside [0, C), and 0 for rows that do not count."""
    loss = loss * one_or_nan(y, classes).to(loss.dtype)
    return loss if counted is None else torch.where(counted, loss, 0)


def one_or_nan(y: Tensor, classes: int) -> Tensor:
    """1, or NaN for a label outside [0, C): as a factor it makes that row NaN and no other."""
    return torch.where((y >= 0) & (y < classes), 1.0, torch.nan)


def row_sums(z: Tensor) -> Tensor:
    """The sum of every row.

    On the CPU PyTorch splits a single row among the threads, so the result depends on their number.
    """
    if z.numel() != z.shape[-1]:
        return z.sum(-1)
    return z.expand(2, *z.shape[1:]).sum(-1)[:1]


def block_size(z: Tensor) -> int:
    """How many predictions to compute at a time."""
    return CPU_BLOCK if z.device.type == "cpu" else DEVICE_BLOCK


def row_dtype(z: Tensor) -> torch.dtype:
    """The dtype rows are computed in: float64 for float64, otherwise float32."""
    return real_dtype(z.dtype)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of rows of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_like(z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of z's shape, dense, with its axes in the order that z's have in memory."""
    if z.is_contiguous():
        return torch.empty_like(z, dtype=dtype)
    return torch.empty_permuted(z.shape, memory_order(z), dtype=dtype or z.dtype, device=z.device)


def memory_order(z: Tensor) -> list[int]:
    """The axes of z from the largest stride to the smallest."""
    return sorted(range(z.ndim), key=z.stride, reverse=True)


def blocks(shape: torch.Size, classes: int, limit: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cover rows of this shape, each of at most `limit` predictions or of one row.

    They are in memory order: one axis is split, those before it are iterated over, those after it
    stay whole.
    """
    if math.prod(shape) * classes <= limit:
        yield ()
        return
    behind = [math.prod(shape[axis + 1 :]) * classes for axis in range(len(shape))]
    cut = next((axis for axis, size in enumerate(behind) if size <= limit), len(shape) - 1)
    count = -(-shape[cut] // max(1, limit // behind[cut]))
    step = -(-shape[cut] // count)
    for position in itertools.product(*(range(size) for size in shape[:cut])):
        before = tuple(slice(i, i + 1) for i in position)
        for start in range(0, shape[cut], step):
            yield (*before, slice(start, start + step))
