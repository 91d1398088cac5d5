"""The row formulas in PyTorch operations: their definition, and the path for any device.

`row_losses` is the plain, differentiable statement. `forward` and `backward` walk the rows a
block at a time, so that what they compute with stays small: their only large tensor is the
gradient itself. The formulas and the letters are explained in `torch_sce.kernels`.

    z       (..., C)   logits, or probabilities if `clip` is given
    y       (...)      label, int64
    m s p   (...)      the summary of a row; p is q_y as it stands, `combine` clips it
    g       (...)      upstream gradient of the row's loss
    clip               None for logits; (low, high) for probabilities, both bounds inclusive
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Clip = tuple[float, float] | None

# The label of a row that does not count: loss 0, gradient 0. No data set has such a class.
IGNORED = -(2**62)

BLOCK = 2**26  # predictions at a time: on a device, launches cost more than memory


def row_losses(z: Tensor, y: Tensor, clip: Clip) -> Tensor:
    """The loss of every row, in operations that autograd and the compiler understand."""
    z, label = blank_ignored(z, y), y.clamp(0, z.shape[-1] - 1)
    return only_counted(combine(*summarize(z, label, clip), clip), y, z.shape[-1])


def clamp_inclusive(q: Tensor, low: float, high: float) -> Tensor:
    """q within the bounds. The derivative is 1 from bound to bound, 0 outside and for a NaN.

    That of `clamp` at a bound depends on PyTorch's version, and on whether it is compiled.
    """
    c = q.detach().clamp(low, high)
    return torch.where(q == c, q, c)


def summarize(
    z: Tensor, y: Tensor, clip: Clip, clamp: Callable[..., Tensor] = clamp_inclusive
) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s, p) of every row, whose label has to be a class.

    Where no derivative is taken `clamp` may be PyTorch's own, which takes a fifth of the time.
    """
    p = at_label(z, y)
    if clip is None:
        m = z.detach().amax(-1)  # cancels out of the loss, so no gradient need flow through it
        return m, (z - m.unsqueeze(-1)).exp().sum(-1), p
    s = clamp(z, *clip).sum(-1)
    return torch.zeros_like(s), s, p


def combine(m: Tensor, s: Tensor, p: Tensor, clip: Clip) -> Tensor:
    """The loss of every row whose label is a class."""
    return s.log() + (m - p) if clip is None else (s / clamp_inclusive(p, *clip)).log()


def row_gradients(g: Tensor, z: Tensor, y: Tensor, m: Tensor, s: Tensor, clip: Clip) -> Tensor:
    """g times the derivative of every row's loss with respect to its z."""
    is_label = torch.arange(z.shape[-1], device=z.device) == y.unsqueeze(-1)
    g = (g * one_or_nan(y, z.shape[-1]).to(g.dtype)).unsqueeze(-1)
    m, s = m.unsqueeze(-1), s.unsqueeze(-1)
    if clip is None:
        dz = g * ((z - m).exp() / s - is_label.to(z.dtype))
    else:
        inside = (clip[0] <= z) & (z <= clip[1])
        dz = g * (1 / s - is_label / torch.where(inside, z, 1))
        dz = torch.where(inside, dz, 0)
    return torch.where((y == IGNORED).unsqueeze(-1), 0, dz)


def blank_ignored(z: Tensor, y: Tensor) -> Tensor:
    """z with zeros in the rows that do not count: autograd would give them 0 * NaN otherwise."""
    return torch.where((y == IGNORED).unsqueeze(-1), 0, z)


def at_label(z: Tensor, y: Tensor) -> Tensor:
    """z_y of every row."""
    if z.shape[-1] == 1:  # PyTorch 2.6 to 2.9 compile gather's derivative wrongly here
        return z.squeeze(-1).clone()
    return z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def only_counted(loss: Tensor, y: Tensor, classes: int) -> Tensor:
    """The losses, with 0 for rows that are ignored and NaN where the label is no class."""
    return torch.where(y == IGNORED, 0, loss * one_or_nan(y, classes).to(loss.dtype))


def one_or_nan(y: Tensor, classes: int) -> Tensor:
    """1, or NaN for a label that is no class: as a factor it poisons that row and no other."""
    known = (y >= 0) & (y < classes) | (y == IGNORED)
    return torch.where(known, 1.0, torch.nan)


def forward(z: Tensor, y: Tensor, clip: Clip, all_classes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every row, and the m and s that `backward` needs."""
    loss, m, s = (torch.empty_like(y, dtype=row_dtype(z)) for _ in range(3))
    for rows in blocks(y.shape, z.shape[-1], BLOCK):
        label = y[rows].clamp(0, z.shape[-1] - 1)
        m[rows], s[rows], p = summarize(z[rows].to(loss.dtype), label, clip, torch.clamp)
        loss[rows] = combine(m[rows], s[rows], p, clip)
    return loss if all_classes else only_counted(loss, y, z.shape[-1]), m, s


def backward(
    g: Tensor, z: Tensor, y: Tensor, clip: Clip, all_classes: bool, m: Tensor, s: Tensor
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    dz = empty_like(z)
    for rows in blocks(y.shape, z.shape[-1], BLOCK):
        block = z[rows].to(s.dtype)
        dz[rows] = row_gradients(g[rows], block, y[rows], m[rows], s[rows], clip)
    return dz


def row_sums(z: Tensor) -> Tensor:
    """The sum of every row.

    On the CPU PyTorch divides a single row among the threads, and the bits depend on how many.
    """
    if z.numel() != z.shape[-1]:
        return z.sum(-1)
    return z.expand(2, *z.shape[1:]).sum(-1)[:1]


def row_dtype(z: Tensor) -> torch.dtype:
    """The dtype rows are computed in: float64 for float64, otherwise float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def empty_like(z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of z's shape, dense, with its axes in the order that z's have in memory."""
    if z.is_contiguous():
        return torch.empty_like(z, dtype=dtype)
    return torch.empty_permuted(z.shape, memory_order(z), dtype=dtype or z.dtype, device=z.device)


def memory_order(z: Tensor) -> list[int]:
    """The axes of z from the largest step in memory to the smallest."""
    return sorted(range(z.ndim), key=z.stride, reverse=True)


def blocks(shape: torch.Size, classes: int, limit: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cover rows of this shape, each of at most `limit` predictions or of one row.

    They come in the order of memory: one axis is cut, those before it are walked step by step,
    those behind it stay whole.
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
