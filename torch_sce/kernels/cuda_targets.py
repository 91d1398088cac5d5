"""The kernels for CUDA, in Triton, for rows with a target for every class.

The formulas are those of `targets`. One program iterates over all the classes of a row. For logits
one pass is enough, with

    u = sum_j t_j (z_j - m)             loss = T log s - u

where m, s and u are rescaled when a larger logit is found. Probabilities take two passes, since
they are clipped after their sum is known. A row is not read if it does not count. Where t holds
labels, one-hot targets are made of them in registers.
"""

# Of a kernel, a type checker sees the function that Triton compiles. Its parameters have no types,
# because Triton reads annotations.
# pyright: reportCallIssue=false, reportMissingParameterType=false, reportUnknownParameterType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aten import empty_like
from .contract import Clip, Saved
from .cuda import AXES, choose_tile, clipped, counting, launch, offsets, place, rows_of


def forward(
    z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
) -> tuple[Tensor, Saved]:
    """The loss of every row, and the m, s and a that `backward` needs.

    For logits a is T. For probabilities m is the number of entries that are not clipped.
    """
    rows = rows_of(z, t)
    if len(rows.sizes) > AXES:
        return forward(z.contiguous(), t.contiguous(), counted, clip, smoothing)
    loss, m, s, a = (z.new_empty(z.shape[:-1], dtype=torch.float32) for _ in range(4))
    if loss.numel() == 0:
        return loss, (m, s, a)
    tile = choose_tile(z, rows)
    grid, given = launch(rows, z, t, counted, tile, clip)
    given = (*given, t.stride(-1), 1 - smoothing, smoothing / z.shape[-1])
    with torch.cuda.device_of(z):
        _forward[grid](*given, loss, m, s, a, LABELS=t.ndim < z.ndim, **tile.options(clip))
    return loss, (m, s, a)


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
    places = (z if dz is None else dz, t if dt is None else dt)
    rows = rows_of(z, t, *places)
    if len(rows.sizes) > AXES and out is None:
        z, t = z.contiguous(), t.contiguous()
        return backward(g, z, t, counted, clip, smoothing, needs, saved)
    if z.numel() == 0:
        return dz, dt
    tile = choose_tile(z, rows)
    (programs,), given = launch(rows, z, t, counted, tile, clip)
    given = (*given, t.stride(-1), 1 - smoothing, smoothing / z.shape[-1])
    steps = [place.stride(-1) for place in places]
    same = not any(g.stride())  # a mean has the same g for every row
    with torch.cuda.device_of(z):
        _backward[programs, triton.cdiv(z.shape[-1], tile.classes)](
            *given, dz, dt, *steps, g if same else g.contiguous(), *saved,
            SAME=same, LABELS=t.ndim < z.ndim, **tile.options(clip),
        )  # fmt: skip
    return dz, dt


@triton.jit
def _forward(
    z, t, counted, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    t_0, t_1, t_2, t_step, keep, added, loss, m_out, s_out, a_out,
    LABELS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """The losses, m, s and a of a tile of rows with targets."""
    outer, inner, row = place(size_2, tiles, ROWS)
    inside = inner < size_2
    counts = counting(counted, row, inside)
    z += offsets(outer, inner, size_1, step_0, step_1, step_2)
    t += offsets(outer, inner, size_1, t_0, t_1, t_2)
    if LABELS:
        t = tl.load(t, mask=counts, other=0)
    if CLIP:
        value, m, s, a = _walk_probabilities(
            z, t, low, high, classes, step, t_step, keep, added, counts,
            LABELS, ROWS, CLASSES, AXIS,
        )  # fmt: skip
    else:
        value, m, s, a = _walk_logits(
            z, t, classes, step, t_step, keep, added, counts, LABELS, ROWS, CLASSES, AXIS
        )
    tl.store(loss + row, tl.where(counts, 0 - value, 0.0), mask=inside)  # never -0.0
    tl.store(m_out + row, m, mask=inside)
    tl.store(s_out + row, s, mask=inside)
    tl.store(a_out + row, a, mask=inside)


@triton.jit
def _walk_logits(
    z, t, classes, step, t_step, keep, added, counts,
    LABELS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The negative losses, m, s and T of rows of logits."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    m = tl.zeros([ROWS], tl.float32)  # that, or 0 where all is minus infinity so far
    s = tl.zeros([ROWS], tl.float32)
    u = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, classes, CLASSES):
        j, here = _classes(first, classes, counts, CLASSES, AXIS)
        block = _load(z, j, step, here, float("-inf"), AXIS)
        target = _target(t, j, t_step, here, classes, keep, added, LABELS, AXIS)
        target = tl.where(here, target, 0.0)
        before, m_before = top, m
        top = tl.maximum(top, tl.max(block, AXIS))
        m = tl.where(top == float("-inf"), 0.0, top)
        block -= tl.expand_dims(m, AXIS)
        s = s * tl.exp(before - m) + tl.sum(tl.exp(block), AXIS)
        u += total * (m_before - m) + tl.sum(tl.where(here, target * block, 0.0), AXIS)
        total += tl.sum(target, AXIS)
    return u - total * tl.log(s), m, s, total


@triton.jit
def _walk_probabilities(
    z, t, low, high, classes, step, t_step, keep, added, counts,
    LABELS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The negative losses, numbers of entries not clipped, s and a of rows of probabilities."""
    s = tl.zeros([ROWS], tl.float32)
    for first in range(0, classes, CLASSES):
        j, here = _classes(first, classes, counts, CLASSES, AXIS)
        s += tl.sum(_load(z, j, step, here, 0.0, AXIS), AXIS)
    s += 0.0  # Triton 3.2 to 3.6 cannot compile a second use of a loop's sum of what it loads
    value = tl.zeros([ROWS], tl.float32)
    free = tl.zeros([ROWS], tl.float32)
    a = tl.zeros([ROWS], tl.float32)
    for first in range(0, classes, CLASSES):
        j, here = _classes(first, classes, counts, CLASSES, AXIS)
        block = _load(z, j, step, here, 0.0, AXIS)
        target = _target(t, j, t_step, here, classes, keep, added, LABELS, AXIS)
        n, c, w = _normalise(block, target, tl.expand_dims(s, AXIS), low, high)
        value += tl.sum(tl.where(here, target * tl.log(c), 0.0), AXIS)
        free += tl.sum(tl.where(here & (n == c), 1.0, 0.0), AXIS)
        a += tl.sum(tl.where(here, w * n, 0.0), AXIS)  # NaN if any n is NaN
    return value, free, s, a


@triton.jit
def _backward(
    z, t, counted, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    t_0, t_1, t_2, dz_0, dz_1, dz_2, dt_0, dt_1, dt_2, t_step, keep, added,
    dz, dt, dz_step, dt_step, g, m, s, a,
    SAME: tl.constexpr, LABELS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    AXIS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of rows and classes with targets, except one that is None."""
    outer, inner, row = place(size_2, tiles, ROWS)
    counts = counting(counted, row, inner < size_2)
    g = tl.expand_dims(tl.load(g + (row * 0 if SAME else row), mask=counts, other=0.0), AXIS)
    m = tl.expand_dims(tl.load(m + row, mask=counts, other=0.0), AXIS)
    s = tl.expand_dims(tl.load(s + row, mask=counts, other=1.0), AXIS)
    a = tl.expand_dims(tl.load(a + row, mask=counts, other=0.0), AXIS)
    j, here = _classes(tl.program_id(1) * CLASSES, classes, counts, CLASSES, AXIS)
    z += offsets(outer, inner, size_1, step_0, step_1, step_2)
    t += offsets(outer, inner, size_1, t_0, t_1, t_2)
    if LABELS:
        t = tl.load(t, mask=counts, other=0)
    block = _load(z, j, step, here, 0.0, AXIS)
    target = _target(t, j, t_step, here, classes, keep, added, LABELS, AXIS)
    if CLIP:
        _, c, w = _normalise(block, target, s, low, high)
        logarithms = tl.log(c)
        slopes = (a - w) * tl.where(m == 0, 0.0, g) / s  # 0 if all are clipped, for any g
    else:
        logarithms = (block - m) - tl.log(s)
        slopes = g * (a / s * tl.exp(block - m) - target)
    inside = tl.expand_dims(inner < size_2, AXIS) & (j < classes)
    if dz is not None:
        dz += offsets(outer, inner, size_1, dz_0, dz_1, dz_2)
        _store(dz, j, dz_step, tl.where(here, slopes, 0.0), inside, AXIS)
    if dt is not None:
        dt += offsets(outer, inner, size_1, dt_0, dt_1, dt_2)
        _store(dt, j, dt_step, tl.where(here, g * -keep * logarithms, 0.0), inside, AXIS)


@triton.jit
def _normalise(q, target, s, low, high):
    """n, c and w of entries with their targets."""
    n = tl.div_rn(q, s)  # as PyTorch divides: which entries are clipped must not depend on it
    c = clipped(n, low, high)
    return n, c, tl.where(n == c, target / c, 0.0)


@triton.jit
def _target(
    t, j, step, here, classes, keep, added, LABELS: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """Targets of entries, smoothed; NaN for a label outside [0, C)."""
    if LABELS:
        y = tl.expand_dims(t, AXIS)
        target = tl.where(j == y, 1.0, 0.0)
        target = tl.where((y >= 0) & (y < classes), target, float("nan"))
    else:
        target = _load(t, j, step, here, 0, AXIS)
    return target * keep + added


@triton.jit
def _classes(first, classes, counts, CLASSES: tl.constexpr, AXIS: tl.constexpr):
    """The classes of a tile, and which of its entries exist and count."""
    j = tl.expand_dims(first + tl.arange(0, CLASSES), 1 - AXIS)
    return j, tl.expand_dims(counts, AXIS) & (j < classes)


@triton.jit
def _load(rows, j, step, here, other, AXIS: tl.constexpr):
    at = tl.expand_dims(rows, AXIS) + j.to(tl.int64) * step
    return tl.load(at, mask=here, other=other).to(tl.float32)


@triton.jit
def _store(rows, j, step, values, inside, AXIS: tl.constexpr):
    at = tl.expand_dims(rows, AXIS) + j.to(tl.int64) * step
    tl.store(at, values.to(rows.dtype.element_ty), mask=inside)
