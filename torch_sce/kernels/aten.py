"""The row formulas in PyTorch operations: their definition, and the path for the CPU.

`row_losses` is the plain, differentiable statement. `forward` and `backward` walk the rows a
chunk at a time, so that what they compute with stays in cache: their only large tensor is the
gradient itself. The formulas and the letters are explained in `torch_sce.kernels`.

    z     (A, C, B)   logits, or probabilities if `clip` is given
    y     (A, B)      label, int64
    m s p (A, B)      the summary of a row
    g     (A, B)      upstream gradient of the row's loss
    clip              None for logits; (low, high) for probabilities, both bounds inclusive
"""

from collections.abc import Iterator

import torch
from torch import Tensor

Clip = tuple[float, float] | None

# The label of a row that does not count: loss 0, gradient 0. No data set has such a class.
IGNORED = -(2**62)

# Elements of scratch. About 1 MiB stays in a core's cache; elsewhere launches cost more.
CPU_SCRATCH = 2**18
DEVICE_SCRATCH = 2**26


def row_losses(z: Tensor, y: Tensor, clip: Clip) -> Tensor:
    """The loss of every row, (A, B), in operations that autograd and the compiler understand."""
    z = blank_ignored(z, y)
    return combine(*summarize(z, y, clip), y, z.shape[1], clip)


def summarize(z: Tensor, y: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """(m, s, p) of every row."""
    if clip is None:
        m = z.detach().amax(1)  # cancels out of the loss, so no gradient need flow through it
        s = (z - m.unsqueeze(1)).exp().sum(1)
        return m, s, at_label(z, y)
    c = z.clamp(*clip)
    s = c.sum(1)
    return torch.zeros_like(s), s, at_label(c, y)


def combine(m: Tensor, s: Tensor, p: Tensor, y: Tensor, classes: int, clip: Clip) -> Tensor:
    """The loss of every row: 0 where it is ignored, NaN where the label is no class."""
    loss = s.log() + (m - p) if clip is None else (s / p).log()
    return torch.where(y == IGNORED, 0, loss * one_or_nan(y, classes).to(s.dtype))


def row_gradients(g: Tensor, z: Tensor, y: Tensor, m: Tensor, s: Tensor, clip: Clip) -> Tensor:
    """g times the derivative of every row's loss with respect to its z, (A, C, B)."""
    classes = torch.arange(z.shape[1], device=z.device).view(1, -1, 1)
    is_label = classes == y.unsqueeze(1)
    g = (g * one_or_nan(y, z.shape[1]).to(g.dtype)).unsqueeze(1)
    m, s = m.unsqueeze(1), s.unsqueeze(1)
    if clip is None:
        dz = g * ((z - m).exp() / s - is_label.to(z.dtype))
    else:
        low, high = clip
        dz = g * (1 / s - is_label / z.clamp(low, high))
        dz = torch.where((low <= z) & (z <= high), dz, 0)
    return torch.where((y == IGNORED).unsqueeze(1), 0, dz)


def blank_ignored(z: Tensor, y: Tensor) -> Tensor:
    """z with zeros in the rows that do not count: autograd would give them 0 * NaN otherwise."""
    return torch.where((y == IGNORED).unsqueeze(1), 0, z)


def at_label(z: Tensor, y: Tensor) -> Tensor:
    """z_y, (A, B); any entry of the row where the label is no class."""
    return z.gather(1, y.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)


def one_or_nan(y: Tensor, classes: int) -> Tensor:
    """1, or NaN for a label that is no class: as a factor it poisons that row and no other."""
    known = (y >= 0) & (y < classes) | (y == IGNORED)
    return torch.where(known, 1.0, torch.nan)


def forward(z: Tensor, y: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every row and the (m, s) that `backward` needs, each (A, B)."""
    loss, m, s = (torch.empty_like(y, dtype=row_dtype(z)) for _ in range(3))
    for rows in chunks(z):
        chunk = z[rows].to(loss.dtype)
        m[rows], s[rows], p = summarize(chunk, y[rows], clip)
        loss[rows] = combine(m[rows], s[rows], p, y[rows], z.shape[1], clip)
    return loss, m, s


def backward(g: Tensor, z: Tensor, y: Tensor, m: Tensor, s: Tensor, clip: Clip) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    dz = torch.empty_like(z)
    for rows in chunks(z):
        chunk = z[rows].to(s.dtype)
        dz[rows] = row_gradients(g[rows], chunk, y[rows], m[rows], s[rows], clip)
    return dz


def row_dtype(z: Tensor) -> torch.dtype:
    """The dtype rows are computed in: float64 for float64, otherwise float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def chunks(z: Tensor) -> Iterator[slice]:
    """Slices of the first axis, each of a size that suits the device."""
    scratch = CPU_SCRATCH if z.device.type == "cpu" else DEVICE_SCRATCH
    step = max(1, scratch // max(1, z.shape[1] * z.shape[2]))
    for start in range(0, z.shape[0], step):
        yield slice(start, start + step)
