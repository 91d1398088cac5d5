"""Rows with a target for every class, one-hot or soft: their definition, on any device.

The letters are those of `torch_sce.kernels`, but for the label: t_j is the target of class j, and
T = sum_j t_j, which is 1 for a distribution and need not be.

    logits:         p = softmax(z)
                    loss = -sum_j t_j log p_j
                    dz_j = g * (T p_j - t_j)
                    dt_j = -g * log p_j

    probabilities:  n_j = q_j / s             s = sum_j q_j           c = clip(n, low, high)
                    loss = -sum_j t_j log c_j
                    dq_j = g * (a - w_j) / s      w_j = [low <= n_j <= high] * t_j / c_j
                    dt_j = -g * log c_j           a = sum_j w_j n_j

That is what tf.keras does for `CategoricalCrossentropy`: probabilities are normalised first and
clipped then, the other way round than for integer labels. Its gradient for logits has 1 in the
place of T; here it is the derivative of the loss, whatever the targets add up to.

Targets may be smoothed on the way: t_j becomes (1 - smoothing) t_j + smoothing / C. Where labels
are to be smoothed, t is (...): integers y, one axis less, for t_j = [j = y]. Such targets are made
a block at a time, as NaN for a label outside [0, C).

    z, t     (..., C)   predictions and targets, each in a dtype of its own
    counted  (...)      bool: rows that are not have loss 0 and gradient 0; None: all are
    g        (...)      upstream gradient of the row's loss
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .aten import (
    at_label,
    block_size,
    blocks,
    clamp_inclusive,
    empty_like,
    finished,
    one_or_nan,
    row_dtype,
    row_sums,
)
from .contract import Clip, Saved


def losses(z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float) -> Tensor:
    """The loss of every row, in operations that autograd and the compiler understand."""
    if t.ndim < z.ndim:
        return _label_losses(z, t, counted, clip, smoothing)
    z, t = _as_counted(z, t, counted, smoothing)
    return 0 - (t * _logarithms(z, clip)).sum(-1)  # never -0.0


def _label_losses(
    z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
) -> Tensor:
    """The same for labels, without targets."""
    z = z.to(row_dtype(z))
    logarithms = _logarithms(z if counted is None else _where(counted, z, 1), clip)
    loss = 0 - smoothing * logarithms.mean(-1)
    if smoothing < 1:  # 0 * log 0 would be NaN
        loss = loss - (1 - smoothing) * at_label(logarithms, y.clamp(0, z.shape[-1] - 1))
    return finished(loss, y, counted, z.shape[-1])


def gradients(
    g: Tensor, z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
) -> tuple[Tensor, Tensor]:
    """dz and dt, as expressions that can be differentiated once more."""
    wide, smooth = _as_counted(z, t, counted, smoothing)
    if counted is not None:
        g = torch.where(counted, g, 0)
    g = g.unsqueeze(-1)
    logarithms = _logarithms(wide, clip)
    if clip is None:
        dz = g * (smooth.sum(-1, keepdim=True) * logarithms.exp() - smooth)
    else:
        s = wide.sum(-1, keepdim=True)
        n = wide / s
        c = clamp_inclusive(n, *clip)
        w = torch.where(n == c, smooth / c, 0)
        dz = g * ((w * n).sum(-1, keepdim=True) - w) / s
    dt = g * (smoothing - 1) * logarithms
    return dz.to(z.dtype), dt.to(t.dtype) if t.is_floating_point() else dt


def forward(
    z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
) -> tuple[Tensor, Saved]:
    """The loss of every row, and nothing else: `backward` finds sums again as it needs."""
    loss = z.new_empty(z.shape[:-1], dtype=row_dtype(z))
    for rows, z_, t_, a, _ in _walk(z, t, clip, smoothing):
        if clip is None:
            _log_softmax(z_, a)
        else:
            torch.div(z_, row_sums(z_).unsqueeze(-1), out=a).clamp_(*clip).log_()
        loss[rows] = row_sums(a.mul_(t_))
    loss = torch.sub(0, loss, out=loss)  # never -0.0
    return loss if counted is None else loss.masked_fill_(~counted, 0), ()


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
    g = g.unsqueeze(-1)
    for rows, z_, t_, a, b in _walk(z, t, clip, smoothing, copies=out is not None):
        g_ = g[rows]
        if clip is None:
            if dt is not None:
                logarithms = _log_softmax(z_, _place(dt, rows, a))
                _write(dt, rows, logarithms.mul_((smoothing - 1) * g_), counted)
            if dz is not None:
                p = torch.softmax(z_, -1, out=_place(dz, rows, a))
                # They add up to 1 only as exactly as PyTorch has added up the row.
                total = (row_sums(t_) / row_sums(p)).unsqueeze(-1)
                p.mul_(g_ * total).addcmul_(t_, g_, value=-1)
                _write(dz, rows, p, counted)
            continue
        s = row_sums(z_).unsqueeze(-1)
        n = torch.div(z_, s, out=a)
        c = torch.clamp(n, *clip, out=b)
        if dz is not None:
            clipped = n != c
            w = torch.div(t_, c, out=_place(dz, rows, torch.empty_like(c))).masked_fill_(clipped, 0)
            total = row_sums(n.mul_(w)).unsqueeze(-1)
            factor = g_.masked_fill(clipped.all(-1, keepdim=True), 0)  # even a NaN
            # g / s may overflow where its product with the rest does not.
            _write(dz, rows, torch.sub(total, w, out=w).mul_(factor).div_(s), counted)
        if dt is not None:
            logarithms = torch.log(c, out=_place(dt, rows, b))
            _write(dt, rows, logarithms.mul_((smoothing - 1) * g_), counted)
    return dz, dt


def _as_counted(
    z: Tensor, t: Tensor, counted: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """z and t as they are computed with, without what rows that do not count may hold."""
    z, t = z.to(row_dtype(z)), _hot(t, z).to(row_dtype(z))
    if smoothing:
        t = t * (1 - smoothing) + smoothing / z.shape[-1]
    if counted is not None:
        z, t = _where(counted, z, 1), _where(counted, t, 0)
    return z, t


def _where(counted: Tensor, x: Tensor, fill: int) -> Tensor:
    return torch.where(counted.unsqueeze(-1), x, fill)


def _hot(t: Tensor, z: Tensor) -> Tensor:
    """Targets; labels as one-hot ones, NaN for one outside [0, C)."""
    if t.ndim == z.ndim:
        return t
    is_label = torch.arange(z.shape[-1], device=t.device) == t.unsqueeze(-1)
    return is_label * one_or_nan(t, z.shape[-1]).unsqueeze(-1)


def _logarithms(z: Tensor, clip: Clip) -> Tensor:
    """log p of logits, log c of probabilities."""
    if clip is None:
        return F.log_softmax(z, -1)
    return clamp_inclusive(z / z.sum(-1, keepdim=True), *clip).log()


def _log_softmax(z: Tensor, out: Tensor) -> Tensor:
    """Writes log p of rows of logits.

    On the CPU PyTorch's own adds up a row in a few partial sums, which loses digits with many
    classes.
    """
    if z.device.type != "cpu":
        return torch.log_softmax(z, -1, out=out)
    m = z.amax(-1, keepdim=True)
    s = row_sums(torch.sub(z, m, out=out).exp_()).unsqueeze(-1)
    return torch.sub(z, m, out=out).sub_(s.log_())


def _walk(
    z: Tensor, t: Tensor, clip: Clip, smoothing: float, copies: bool = False
) -> Iterator[tuple[Any, ...]]:
    """The rows of each block, their z and t as they are computed with, and a tensor for use.

    For probabilities there is a second one. `copies`: z may be written over.
    """
    dtype = row_dtype(z)
    every = list(blocks(z.shape[:-1], z.shape[-1], block_size(z)))
    copies = copies or z.dtype != dtype
    needed = (True, clip is not None, copies, t.dtype != dtype or smoothing > 0)
    scratch = [empty_like(z[every[0]], dtype) if each and every else None for each in needed]
    for rows in every:
        z_, t_ = z[rows], t[rows]
        part = tuple(map(slice, z_.shape))
        a, b, c, d = (None if x is None else x[part] for x in scratch)
        if c is not None:
            z_ = c.copy_(z_)
        if d is not None:
            t_ = d.copy_(_hot(t_, z_))
        if smoothing:
            t_.mul_(1 - smoothing).add_(smoothing / z.shape[-1])
        yield rows, z_, t_, a, b


def _place(out: Tensor, rows: tuple[slice, ...], scratch: Tensor) -> Tensor:
    """Where to compute these rows of `out`: there, if it has the dtype for it."""
    return out[rows] if out.dtype == scratch.dtype else scratch


def _write(out: Tensor, rows: tuple[slice, ...], values: Tensor, counted: Tensor | None) -> None:
    """Puts values from `_place` where they belong, if that is not there."""
    if counted is not None:
        values.masked_fill_(~counted[rows].unsqueeze(-1), 0)
    if values.dtype != out.dtype:
        out[rows] = values
