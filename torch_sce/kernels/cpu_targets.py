"""Rows with a target for every class on the CPU, by the loops of cpu.c: see `targets` and `cpu`.

For the backward pass s, T and m are saved; for probabilities s, a and whether any n_j is within
the bounds.
"""

import torch
from torch import Tensor

from .aten import empty_like
from .contract import Clip, Saved
from .cpu import KINDS, results, run


def forward(
    z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
) -> tuple[Tensor, Saved]:
    """The loss of every row, and three numbers of every row."""
    loss, saved = results(z, z.shape[:-1], 3)
    y, targets = _given(z, t)
    run(False, z, targets, y=y, counted=counted, loss=loss, saved=saved, clip=clip,
        smoothing=smoothing)  # fmt: skip
    return loss, (saved,)


def backward(
    g: Tensor,
    z: Tensor,
    t: Tensor,
    counted: Tensor | None,
    clip: Clip,
    smoothing: float,
    needs: tuple[bool, bool],
    saved: Saved,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dz and dt in the shapes and dtypes of z and t, None for one that is not needed."""
    dz, dt = (empty_like(x) if need else None for x, need in zip((z, t), needs, strict=True))
    dz = dz if out is None else out
    y, targets = _given(z, t)
    run(True, z, targets, dz, dt, y=y, counted=counted, g=g, saved=saved[0], clip=clip,
        smoothing=smoothing)  # fmt: skip
    return dz, dt


def _given(z: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Labels, or targets in a dtype that cpu.c reads: 8-bit floats and some others are rare."""
    if t.ndim < z.ndim:
        return t, None
    return None, t if t.dtype in KINDS else t.to(torch.float32)
