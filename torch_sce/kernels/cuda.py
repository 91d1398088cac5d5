"""The row formulas in Triton: the functions of `aten` and `targets` for CUDA.

Memory bounds them: the predictions are read once forward; backward they are read once and the
gradient is written once. Nothing here looks at a value, waits for the device, or adds up in an
order that could vary.

A program takes a tile of rows and classes. Where the classes of a row lie together, a tile is
some rows or a part of one; where rows lie together, as in maps with the channels first, it is
many rows and some of their classes. Where there are few rows of very many classes, several
programs share a row, and what they found is merged.

Of a row's summary (m, s, p) two numbers are kept: m, and the sum without the label's own term,
r = s - exp(p - m), or s - c_y for probabilities, which is added up without it. So the gradient at
the label is no difference of two numbers that may be nearly equal:

    logits:         g * (exp(p - m) / s - 1)  =  -g * r / s
    probabilities:  g * (1 / s - 1 / c_y)     =  -g * r / (s * c_y)

A row is not read if it is ignored, nor in the backward pass if its g is 0.

Rows with a target for every class have kernels of their own, for the formulas of `targets`. One
program walks all the classes of a row. The sums of logits are those of one walk, with

    u = sum_j t_j (z_j - m)             loss = T log s - u

where m, s and u are corrected as larger logits are met. Probabilities are walked twice, since they
are to be clipped after their sum is known. A row is not read if it does not count.
"""

# Of a kernel, a type checker sees the function that Triton compiles.
# pyright: reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aten import IGNORED, Clip, empty_like
from .targets import Smoothing

MARK = tl.constexpr(IGNORED)

# Predictions of one program's tile, powers of two.
TILE = 2048  # of some rows with their classes
LONG = 4096  # of one row, at most
WIDE = 64  # classes of a tile, at most, where rows lie together
MOST = 2**16 - 1  # tiles to a row, which are the second axis of the grid
AXES = 3  # of rows, that a kernel walks
PROGRAMS = 512  # enough to keep a device busy
SHARED = 4  # tiles to a row from which on sharing it is worth another launch


class Tile(NamedTuple):
    """What one program takes, and how many programs share a row in the forward pass."""

    rows: int  # a power of two
    classes: int  # a power of two
    axis: int  # where the classes are in a tile; its last axis is the one that lies together
    splits: int = 1

    def options(self, clip: Clip) -> dict[str, Any]:
        return {
            "ROWS": self.rows,
            "CLASSES": self.classes,
            "AXIS": self.axis,
            "CLIP": clip is not None,
            "enable_fp_fusion": True,  # a default, which Triton is about to change
            "num_warps": max(1, min(8, self.rows * self.classes // 256)),
        }


class Rows(NamedTuple):
    """How the rows of some tensors lie in memory: three axes or more, the last of which is cut."""

    sizes: list[int]
    steps: list[list[int]]  # of each tensor


def forward(z: Tensor, y: Tensor, clip: Clip, all_classes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of every row, and the m and r that `backward` needs; no m for probabilities."""
    rows, y = _rows(z), y.contiguous()
    if len(rows.sizes) > AXES:
        z = z.contiguous()
        rows = _rows(z)
    loss, r = (z.new_empty(y.shape, dtype=torch.float32) for _ in range(2))
    m = torch.empty_like(loss) if clip is None else loss.new_empty(0)
    if loss.numel() == 0:
        return loss, m, r
    tile = choose_tile(z, rows)
    with torch.cuda.device_of(z):
        if tile.splits == 1:
            grid, given = _launch(rows, z, y, tile, clip)
            _forward[grid](
                *given, loss, m, r, loss.numel(), z.shape[-1], SPLIT=False, **tile.options(clip)
            )
        else:
            share = tile.classes * triton.cdiv(z.shape[-1], tile.classes * tile.splits)
            parts = loss.new_empty(2, tile.splits, loss.numel())
            (programs,), given = _launch(rows, z, y, tile, clip)
            _forward[programs, tile.splits](
                *given, loss, *parts, loss.numel(), share, SPLIT=True, **tile.options(clip)
            )
            row = Tile(1, triton.next_power_of_2(tile.splits), 1)
            grid, given = _launch(rows, z, y, row, clip)
            _merge[grid](*given, loss, m, r, *parts, loss.numel(), tile.splits, **row.options(clip))
    return loss, m, r


def backward(
    g: Tensor, z: Tensor, y: Tensor, clip: Clip, all_classes: bool, m: Tensor, r: Tensor
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    dz = empty_like(z)
    rows = _rows(z, dz)
    if len(rows.sizes) > AXES:
        z = z.contiguous()
        dz = torch.empty_like(z)
        rows = _rows(z, dz)
    if r.numel() == 0:
        return dz
    tile = choose_tile(z, rows)
    (programs,), given = _launch(rows, z, y.contiguous(), tile, clip)
    same = not any(g.stride())  # the mean hands the same g to every row
    with torch.cuda.device_of(z):
        _backward[programs, triton.cdiv(z.shape[-1], tile.classes)](
            *given, dz, dz.stride(-1), g if same else g.contiguous(), m, r,
            SAME=same, **tile.options(clip),
        )  # fmt: skip
    return dz


def forward_targets(
    z: Tensor, t: Tensor, clip: Clip, smoothing: Smoothing, counted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of every row, and the m, s and a that `backward_targets` needs.

    For logits a is T. For probabilities m is the number of entries that are not clipped.
    """
    rows = _rows(z, t)
    if len(rows.sizes) > AXES:
        return forward_targets(z.contiguous(), t.contiguous(), clip, smoothing, counted)
    loss, m, s, a = (z.new_empty(z.shape[:-1], dtype=torch.float32) for _ in range(4))
    if loss.numel() == 0:
        return loss, m, s, a
    tile = choose_tile(z, rows)
    grid, given = _launch_targets(rows, z, t, tile, clip, smoothing, counted)
    with torch.cuda.device_of(z):
        _forward_targets[grid](*given, loss, m, s, a, **tile.options(clip))
    return loss, m, s, a


def backward_targets(
    g: Tensor,
    z: Tensor,
    t: Tensor,
    clip: Clip,
    smoothing: Smoothing,
    counted: Tensor | None,
    needs: tuple[bool, bool],
    m: Tensor,
    s: Tensor,
    a: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """dz and dt in the shapes and dtypes of z and t, None for one that is not needed."""
    dz, dt = (empty_like(x) if need else None for x, need in zip((z, t), needs, strict=True))
    places = (z if dz is None else dz, t if dt is None else dt)
    rows = _rows(z, t, *places)
    if len(rows.sizes) > AXES:
        z, t = z.contiguous(), t.contiguous()
        return backward_targets(g, z, t, clip, smoothing, counted, needs, m, s, a)
    if s.numel() == 0:
        return dz, dt
    tile = choose_tile(z, rows)
    (programs,), given = _launch_targets(rows, z, t, tile, clip, smoothing, counted)
    steps = [place.stride(-1) for place in places]
    same = not any(g.stride())  # the mean hands the same g to every row
    with torch.cuda.device_of(z):
        _backward_targets[programs, triton.cdiv(z.shape[-1], tile.classes)](
            *given, dz, dt, *steps, g if same else g.contiguous(), m, s, a,
            SAME=same, **tile.options(clip),
        )  # fmt: skip
    return dz, dt


def choose_tile(z: Tensor, rows: Rows) -> Tile:
    """The launch settings. They depend on shape and strides alone, so results do not vary."""
    sizes, (steps, *_) = rows
    classes_lie_together = sizes[-1] == 1 or z.stride(-1) <= steps[-1]
    width = min(triton.next_power_of_2(z.shape[-1]), LONG if classes_lie_together else WIDE)
    width = max(width, triton.next_power_of_2(triton.cdiv(z.shape[-1], MOST)))
    height = min(max(1, TILE // width), triton.next_power_of_2(sizes[-1]))
    programs = sizes[0] * sizes[1] * triton.cdiv(sizes[-1], height)
    blocks = triton.cdiv(z.shape[-1], width)
    splits = max(1, min(blocks, PROGRAMS // programs)) if blocks >= SHARED else 1
    return Tile(height, width, int(classes_lie_together), splits)


def _rows(*tensors: Tensor) -> Rows:
    """The axes of the rows, joined where they lie like one."""
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []  # of each axis, in every tensor
    for axis, size in enumerate(tensors[0].shape[:-1]):
        step = tuple(tensor.stride(axis) for tensor in tensors)
        if size != 1 and sizes and steps[-1] == tuple(size * each for each in step):
            sizes[-1], steps[-1] = sizes[-1] * size, step
        elif size != 1:
            sizes.append(size)
            steps.append(step)
    missing = max(0, AXES - len(sizes))
    steps = [(0,) * len(tensors)] * missing + steps
    return Rows([1] * missing + sizes, [list(each) for each in zip(*steps, strict=True)])


def _launch(
    rows: Rows, z: Tensor, y: Tensor, tile: Tile, clip: Clip
) -> tuple[tuple[int], tuple[Any, ...]]:
    """The number of programs for the rows, and the arguments that every kernel begins with.

    In the place of y there may be t.
    """
    tiles = triton.cdiv(rows.sizes[2], tile.rows)
    steps = [step for each in rows.steps for step in each]
    given = (
        z, y, *(clip or (0.0, 0.0)), *rows.sizes[1:], tiles, z.shape[-1], z.stride(-1), *steps,
    )  # fmt: skip
    return (rows.sizes[0] * rows.sizes[1] * tiles,), given


def _launch_targets(
    rows: Rows,
    z: Tensor,
    t: Tensor,
    tile: Tile,
    clip: Clip,
    smoothing: Smoothing,
    counted: Tensor | None,
) -> tuple[tuple[int], tuple[Any, ...]]:
    """As `_launch`, for the kernels of targets."""
    grid, given = _launch(rows, z, t, tile, clip)
    counted = None if counted is None else counted.contiguous()
    return grid, (*given, t.stride(-1), *(smoothing or (1.0, 0.0)), counted)


@triton.jit
def _forward(
    z, y, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    loss, m_out, r_out, count, share,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """The losses, m and r of a tile of rows, or m and r of a share of their classes."""
    outer, inner, row = _place(size_2, tiles, ROWS)
    label = tl.load(y + row, mask=inner < size_2, other=MARK)
    z += _offsets(outer, inner, size_1, step_0, step_1, step_2)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, classes)
    for first in range(start, stop, CLASSES):
        j = tl.expand_dims(first + tl.arange(0, CLASSES), 1 - AXIS)
        here = tl.expand_dims(label != MARK, AXIS) & (j < stop)
        at = tl.expand_dims(z, AXIS) + j.to(tl.int64) * step
        block = tl.load(at, mask=here, other=float("-inf")).to(tl.float32)
        others = here & (j != tl.expand_dims(label, AXIS))
        if CLIP:
            r += tl.sum(tl.where(others, _clip(block, low, high), 0.0), AXIS)
        else:
            top = tl.maximum(m, tl.max(block, AXIS))
            shift = tl.where(top == float("-inf"), 0.0, top)  # where all is minus infinity so far
            e = tl.exp(block - tl.expand_dims(shift, AXIS))
            r = r * tl.exp(m - shift) + tl.sum(tl.where(others, e, 0.0), AXIS)
            m = top
    if SPLIT:
        row += tl.program_id(1).to(tl.int64) * count
        tl.store(r_out + row, r, mask=inner < size_2)
        if not CLIP:
            tl.store(m_out + row, m, mask=inner < size_2)
    else:
        _finish(z, step, label, classes, low, high, m, r, row, inner < size_2, loss, m_out, r_out,
                CLIP)  # fmt: skip


@triton.jit
def _merge(
    z, y, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    loss, m_out, r_out, m_parts, r_parts, count, splits,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """The losses, m and r of rows from what `_forward` found in the shares of their classes."""
    outer, inner, row = _place(size_2, tiles, ROWS)
    label = tl.load(y + row, mask=inner < size_2, other=MARK)
    z += _offsets(outer, inner, size_1, step_0, step_1, step_2)
    part = tl.expand_dims(tl.arange(0, CLASSES), 1 - AXIS)
    here = tl.expand_dims(inner < size_2, AXIS) & (part < splits)
    at = tl.expand_dims(row, AXIS) + part.to(tl.int64) * count
    r = tl.load(r_parts + at, mask=here, other=0.0)
    m = tl.full([ROWS], 0.0, tl.float32)
    if not CLIP:
        each = tl.load(m_parts + at, mask=here, other=float("-inf"))
        m = tl.max(each, AXIS)
        r *= tl.exp(each - tl.expand_dims(m, AXIS))
    _finish(z, step, label, classes, low, high, m, tl.sum(r, AXIS), row, inner < size_2, loss,
            m_out, r_out, CLIP)  # fmt: skip


@triton.jit
def _finish(
    z, step, label, classes, low, high, m, r, row, inside, loss, m_out, r_out, CLIP: tl.constexpr
):
    """Writes the losses, m and r of rows."""
    is_class = (label >= 0) & (label < classes)
    p = tl.load(z + label * step, mask=is_class, other=0.0).to(tl.float32)
    if CLIP:
        value = tl.log(1 + r / _clip(p, low, high))
    else:
        value = tl.log(r + tl.exp(p - m)) + (m - p)
        tl.store(m_out + row, m, mask=inside)
    value = tl.where(is_class, value, tl.where(label == MARK, 0.0, float("nan")))
    tl.store(loss + row, value, mask=inside)
    tl.store(r_out + row, r, mask=inside)


@triton.jit
def _backward(
    z, y, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    out_0, out_1, out_2, dz, out, g, m, r,
    SAME: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of rows and classes."""
    outer, inner, row = _place(size_2, tiles, ROWS)
    label = tl.load(y + row, mask=inner < size_2, other=MARK)
    z += _offsets(outer, inner, size_1, step_0, step_1, step_2)
    dz += _offsets(outer, inner, size_1, out_0, out_1, out_2)
    counts = label != MARK
    is_class = (label >= 0) & (label < classes)
    g = tl.load(g + (row * 0 if SAME else row), mask=counts, other=0.0)
    g = tl.where(is_class, g, float("nan"))
    counts = counts & (g != 0)
    is_class = is_class & counts
    p = tl.load(z + label * step, mask=is_class, other=0.0).to(tl.float32)
    r = tl.load(r + row, mask=counts, other=0.0)
    if CLIP:
        m = tl.full([ROWS], 0.0, tl.float32)
        c = _clip(p, low, high)
        s = r + c
        at_label = tl.where((low <= p) & (p <= high), -(g / s) * (r / c), 0.0)
    else:
        m = tl.load(m + row, mask=counts, other=0.0)
        s = r + tl.exp(p - m)
        at_label = -g * (r / s)
    j = tl.expand_dims(tl.program_id(1) * CLASSES + tl.arange(0, CLASSES), 1 - AXIS)
    inside = tl.expand_dims(inner < size_2, AXIS) & (j < classes)
    at = tl.expand_dims(z, AXIS) + j.to(tl.int64) * step
    block = tl.load(at, mask=inside & tl.expand_dims(counts, AXIS), other=0.0).to(tl.float32)
    slope = tl.expand_dims(g / s, AXIS)
    if CLIP:
        slopes = tl.where((low <= block) & (block <= high), slope, 0.0)
    else:
        slopes = slope * tl.exp(block - tl.expand_dims(m, AXIS))
    slopes = tl.where(j == tl.expand_dims(label, AXIS), tl.expand_dims(at_label, AXIS), slopes)
    slopes = tl.where(tl.expand_dims(counts, AXIS), slopes, 0.0)
    at = tl.expand_dims(dz, AXIS) + j.to(tl.int64) * out
    tl.store(at, slopes.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _forward_targets(
    z, t, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    t_0, t_1, t_2, t_step, keep, added, counted, loss, m_out, s_out, a_out,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """The losses, m, s and a of a tile of rows with targets."""
    outer, inner, row = _place(size_2, tiles, ROWS)
    inside = inner < size_2
    counts = _counts(counted, row, inside)
    z += _offsets(outer, inner, size_1, step_0, step_1, step_2)
    t += _offsets(outer, inner, size_1, t_0, t_1, t_2)
    if CLIP:
        value, m, s, a = _walk_probabilities(
            z, t, low, high, classes, step, t_step, keep, added, counts, ROWS, CLASSES, AXIS
        )
    else:
        value, m, s, a = _walk_logits(
            z, t, classes, step, t_step, keep, added, counts, ROWS, CLASSES, AXIS
        )
    tl.store(loss + row, tl.where(counts, 0 - value, 0.0), mask=inside)  # never -0.0
    tl.store(m_out + row, m, mask=inside)
    tl.store(s_out + row, s, mask=inside)
    tl.store(a_out + row, a, mask=inside)


@triton.jit
def _walk_logits(
    z, t, classes, step, t_step, keep, added, counts,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
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
        target = tl.where(here, _load(t, j, t_step, here, 0, AXIS) * keep + added, 0.0)
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
    ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
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
        target = _load(t, j, t_step, here, 0, AXIS) * keep + added
        n, c, w = _normalise(block, target, tl.expand_dims(s, AXIS), low, high)
        value += tl.sum(tl.where(here, target * tl.log(c), 0.0), AXIS)
        free += tl.sum(tl.where(here & (n == c), 1.0, 0.0), AXIS)
        a += tl.sum(tl.where(here, w * n, 0.0), AXIS)  # a NaN if any n is no number
    return value, free, s, a


@triton.jit
def _backward_targets(
    z, t, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    t_0, t_1, t_2, dz_0, dz_1, dz_2, dt_0, dt_1, dt_2, t_step, keep, added, counted,
    dz, dt, dz_step, dt_step, g, m, s, a,
    SAME: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of rows and classes with targets, but for one that is None."""
    outer, inner, row = _place(size_2, tiles, ROWS)
    counts = _counts(counted, row, inner < size_2)
    g = tl.expand_dims(tl.load(g + (row * 0 if SAME else row), mask=counts, other=0.0), AXIS)
    m = tl.expand_dims(tl.load(m + row, mask=counts, other=0.0), AXIS)
    s = tl.expand_dims(tl.load(s + row, mask=counts, other=1.0), AXIS)
    a = tl.expand_dims(tl.load(a + row, mask=counts, other=0.0), AXIS)
    j, here = _classes(tl.program_id(1) * CLASSES, classes, counts, CLASSES, AXIS)
    z += _offsets(outer, inner, size_1, step_0, step_1, step_2)
    t += _offsets(outer, inner, size_1, t_0, t_1, t_2)
    block = _load(z, j, step, here, 0.0, AXIS)
    target = _load(t, j, t_step, here, 0, AXIS) * keep + added
    if CLIP:
        _, c, w = _normalise(block, target, s, low, high)
        logarithms = tl.log(c)
        slopes = (a - w) * tl.where(m == 0, 0.0, g) / s  # 0 if all are clipped, whatever g is
    else:
        logarithms = (block - m) - tl.log(s)
        slopes = g * (a / s * tl.exp(block - m) - target)
    inside = tl.expand_dims(inner < size_2, AXIS) & (j < classes)
    if dz is not None:
        dz += _offsets(outer, inner, size_1, dz_0, dz_1, dz_2)
        _store(dz, j, dz_step, tl.where(here, slopes, 0.0), inside, AXIS)
    if dt is not None:
        dt += _offsets(outer, inner, size_1, dt_0, dt_1, dt_2)
        _store(dt, j, dt_step, tl.where(here, g * -keep * logarithms, 0.0), inside, AXIS)


@triton.jit
def _normalise(q, target, s, low, high):
    """n, c and w of entries with their targets."""
    n = tl.div_rn(q, s)  # as PyTorch divides: which entries are clipped must not depend on it
    c = _clip(n, low, high)
    return n, c, tl.where(n == c, target / c, 0.0)


@triton.jit
def _counts(counted, row, inside):
    """Which rows are there and count."""
    if counted is not None:
        inside = tl.load(counted + row, mask=inside, other=0) != 0
    return inside


@triton.jit
def _classes(first, classes, counts, CLASSES: tl.constexpr, AXIS: tl.constexpr):
    """The classes of a tile, and which of its entries are there and count."""
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


@triton.jit
def _place(size_2, tiles, ROWS: tl.constexpr):
    """The rows of this program: their place on the first two axes, on the third, and number."""
    outer = tl.program_id(0) // tiles
    inner = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return outer, inner, outer.to(tl.int64) * size_2 + inner


@triton.jit
def _offsets(outer, inner, size_1, step_0, step_1, step_2):
    """Where rows begin, in elements, of which there may be more than 2^31."""
    outer_offset = (outer // size_1).to(tl.int64) * step_0 + (outer % size_1).to(tl.int64) * step_1
    return outer_offset + inner * step_2


@triton.jit
def _clip(q, low, high):
    """A NaN stays one."""
    return tl.where(q < low, low, tl.where(q > high, high, q))
