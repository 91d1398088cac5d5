"""The kernels for CUDA, in Triton, for rows with a label.

They are memory-bound: the predictions are read once forward; backward they are read once and the
gradient is written once. There is no host synchronisation, and sums have a fixed order.

A program processes a tile of rows and classes. If the class axis is contiguous, a tile is some
rows or a part of one; if an axis of rows is contiguous, as in channels-first maps, it is many rows
and some of their classes. For few rows of very many classes, several programs share a row, and
their summaries are merged.

A row is not read if it does not count, nor in the backward pass if its g is 0.
"""

# Of a kernel, a type checker sees the function that Triton compiles. Its parameters have no types,
# because Triton reads annotations.
# pyright: reportCallIssue=false, reportMissingParameterType=false, reportUnknownParameterType=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aten
from .aten import empty_like
from .contract import Clip, Saved, Summary

# Predictions of one program's tile, powers of two.
TILE = 2048  # of some rows with their classes
LONG = 4096  # of one row, at most
WIDE = 64  # classes of a tile, at most, where an axis of rows is contiguous
MOST = 2**16 - 1  # tiles to a row, which are the second axis of the grid
AXES = 3  # of rows, that a kernel iterates over
PROGRAMS = 512  # enough to keep a device busy
SHARED = 4  # tiles to a row from which on sharing it is worth another launch


class Tile(NamedTuple):
    """What one program processes, and how many programs share a row in the forward pass."""

    rows: int  # a power of two
    classes: int  # a power of two
    axis: int  # where the classes are in a tile; its last axis is the contiguous one
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
    """How the rows of some tensors are stored: three axes or more, the last of which is split."""

    sizes: list[int]
    steps: list[list[int]]  # of each tensor


def forward(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> tuple[Tensor, Saved]:
    """The loss of every row, and its summary, whose m is empty for probabilities."""
    rows = rows_of(z)
    if len(rows.sizes) > AXES:
        z = z.contiguous()
        rows = rows_of(z)
    loss, r, p = (z.new_empty(y.shape, dtype=torch.float32) for _ in range(3))
    summary = Summary(torch.empty_like(loss) if clip is None else loss.new_empty(0), r, p)
    if loss.numel() == 0:
        return loss, summary
    tile = choose_tile(z, rows)
    with torch.cuda.device_of(z):
        if tile.splits == 1:
            grid, given = launch(rows, z, y.contiguous(), counted, tile, clip)
            _forward[grid](
                *given, loss, *summary, loss.numel(), z.shape[-1], SPLIT=False,
                **tile.options(clip),
            )  # fmt: skip
        else:
            share = tile.classes * triton.cdiv(z.shape[-1], tile.classes * tile.splits)
            parts = loss.new_empty(2, tile.splits, loss.numel())
            (programs,), given = launch(rows, z, y.contiguous(), counted, tile, clip)
            _forward[programs, tile.splits](
                *given, loss, *parts, p, loss.numel(), share, SPLIT=True, **tile.options(clip)
            )
            row = Tile(1, triton.next_power_of_2(tile.splits), 1)
            grid, given = launch(rows, z, y.contiguous(), counted, row, clip)
            _merge[grid](
                *given, loss, *summary, *parts, loss.numel(), tile.splits, **row.options(clip)
            )
    return loss, summary


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
    rows = rows_of(z, dz)
    if len(rows.sizes) > AXES and out is None:
        z = z.contiguous()
        dz = torch.empty_like(z)
        rows = rows_of(z, dz)
    if dz.numel() == 0:
        return dz
    tile = choose_tile(z, rows)
    (programs,), given = launch(rows, z, y.contiguous(), counted, tile, clip)
    same = not any(g.stride())  # a mean has the same g for every row
    with torch.cuda.device_of(z):
        _backward[programs, triton.cdiv(z.shape[-1], tile.classes)](
            *given, dz, dz.stride(-1), g if same else g.contiguous(), *saved,
            SAME=same, **tile.options(clip),
        )  # fmt: skip
    return dz


def sums_of(saved: Saved) -> tuple[Tensor, Tensor]:
    """m and r of every row, from what `forward` saved."""
    m, r, _ = saved
    return m if m.numel() else torch.zeros_like(r), r


saved_of = aten.saved_of


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


def rows_of(*tensors: Tensor) -> Rows:
    """The axes of the rows, merged where they have the strides of one."""
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


def launch(
    rows: Rows, z: Tensor, y: Tensor, counted: Tensor | None, tile: Tile, clip: Clip
) -> tuple[tuple[int], tuple[Any, ...]]:
    """The number of programs for the rows, and the arguments that every kernel begins with.

    t may take the place of y.
    """
    tiles = triton.cdiv(rows.sizes[2], tile.rows)
    steps = [step for each in rows.steps for step in each]
    counted = None if counted is None else counted.contiguous()
    given = (
        z, y, counted, *(clip or (0.0, 0.0)), *rows.sizes[1:], tiles, z.shape[-1], z.stride(-1),
        *steps,
    )  # fmt: skip
    return (rows.sizes[0] * rows.sizes[1] * tiles,), given


@triton.jit
def _forward(
    z, y, counted, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    loss, m_out, r_out, p_out, count, share,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """The losses, m and r of a tile of rows, or m and r of a share of their classes."""
    outer, inner, row = place(size_2, tiles, ROWS)
    counts = counting(counted, row, inner < size_2)
    label = tl.load(y + row, mask=counts, other=0)
    z += offsets(outer, inner, size_1, step_0, step_1, step_2)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, classes)
    for first in range(start, stop, CLASSES):
        j = tl.expand_dims(first + tl.arange(0, CLASSES), 1 - AXIS)
        here = tl.expand_dims(counts, AXIS) & (j < stop)
        at = tl.expand_dims(z, AXIS) + j.to(tl.int64) * step
        block = tl.load(at, mask=here, other=float("-inf")).to(tl.float32)
        others = here & (j != tl.expand_dims(label, AXIS))
        if CLIP:
            r += tl.sum(tl.where(others, clipped(block, low, high), 0.0), AXIS)
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
        _finish(z, step, label, counts, classes, low, high, m, r, row, inner < size_2,
                loss, m_out, r_out, p_out, CLIP)  # fmt: skip


@triton.jit
def _merge(
    z, y, counted, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    loss, m_out, r_out, p_out, m_parts, r_parts, count, splits,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """The losses, m and r of rows from what `_forward` computed for the shares of their classes."""
    outer, inner, row = place(size_2, tiles, ROWS)
    counts = counting(counted, row, inner < size_2)
    label = tl.load(y + row, mask=counts, other=0)
    z += offsets(outer, inner, size_1, step_0, step_1, step_2)
    part = tl.expand_dims(tl.arange(0, CLASSES), 1 - AXIS)
    here = tl.expand_dims(inner < size_2, AXIS) & (part < splits)
    at = tl.expand_dims(row, AXIS) + part.to(tl.int64) * count
    r = tl.load(r_parts + at, mask=here, other=0.0)
    m = tl.full([ROWS], 0.0, tl.float32)
    if not CLIP:
        each = tl.load(m_parts + at, mask=here, other=float("-inf"))
        m = tl.max(each, AXIS)
        shift = tl.where(m == float("-inf"), 0.0, m)
        r *= tl.exp(each - tl.expand_dims(shift, AXIS))
    _finish(z, step, label, counts, classes, low, high, m, tl.sum(r, AXIS), row, inner < size_2,
            loss, m_out, r_out, p_out, CLIP)  # fmt: skip


@triton.jit
def _finish(
    z, step, label, counts, classes, low, high, m, r, row, inside, loss, m_out, r_out, p_out,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Writes the losses and summaries of rows."""
    is_class = counts & (label >= 0) & (label < classes)
    p = tl.load(z + label * step, mask=is_class, other=0.0).to(tl.float32)
    if CLIP:
        p = tl.where(is_class, clipped(p, low, high), 0.0)
        value = tl.log(1 + r / p)
    else:
        p = tl.where(is_class, p, float("-inf"))
        value = tl.log(r + tl.exp(p - m)) + (m - p)
        tl.store(m_out + row, m, mask=inside)
    value = tl.where(is_class, value, tl.where(counts, float("nan"), 0.0))
    tl.store(loss + row, value, mask=inside)
    tl.store(r_out + row, r, mask=inside)
    tl.store(p_out + row, p, mask=inside)


@triton.jit
def _backward(
    z, y, counted, low, high, size_1, size_2, tiles, classes, step, step_0, step_1, step_2,
    out_0, out_1, out_2, dz, out, g, m, r, p,
    SAME: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, AXIS: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of rows and classes."""
    outer, inner, row = place(size_2, tiles, ROWS)
    counts = counting(counted, row, inner < size_2)
    label = tl.load(y + row, mask=counts, other=0)
    z += offsets(outer, inner, size_1, step_0, step_1, step_2)
    dz += offsets(outer, inner, size_1, out_0, out_1, out_2)
    is_class = (label >= 0) & (label < classes)
    g = tl.load(g + (row * 0 if SAME else row), mask=counts, other=0.0)
    g = tl.where(is_class, g, float("nan"))
    counts = counts & (g != 0)
    r = tl.load(r + row, mask=counts, other=0.0)
    p = tl.load(p + row, mask=counts, other=1.0)
    if CLIP:
        m = tl.full([ROWS], 0.0, tl.float32)
        s = r + p
        at_label = -(g / s) * (r / p)
    else:
        m = tl.load(m + row, mask=counts, other=0.0)
        s = r + tl.exp(p - m)
        at_label = -g * (r / s)
    j = tl.expand_dims(tl.program_id(1) * CLASSES + tl.arange(0, CLASSES), 1 - AXIS)
    inside = tl.expand_dims(inner < size_2, AXIS) & (j < classes)
    at = tl.expand_dims(z, AXIS) + j.to(tl.int64) * step
    block = tl.load(at, mask=inside & tl.expand_dims(counts, AXIS), other=0.0).to(tl.float32)
    slopes = tl.expand_dims(g / s, AXIS)
    if not CLIP:
        slopes *= tl.exp(block - tl.expand_dims(m, AXIS))
    slopes = tl.where(j == tl.expand_dims(label, AXIS), tl.expand_dims(at_label, AXIS), slopes)
    if CLIP:
        slopes = tl.where((low <= block) & (block <= high), slopes, 0.0)
    slopes = tl.where(tl.expand_dims(counts, AXIS), slopes, 0.0)
    at = tl.expand_dims(dz, AXIS) + j.to(tl.int64) * out
    tl.store(at, slopes.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def counting(counted, row, inside):
    """Which rows exist and count."""
    if counted is not None:
        inside = tl.load(counted + row, mask=inside, other=0) != 0
    return inside


@triton.jit
def place(size_2, tiles, ROWS: tl.constexpr):
    """The rows of this program: their place on the first two axes, on the third, and number."""
    outer = tl.program_id(0) // tiles
    inner = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return outer, inner, outer.to(tl.int64) * size_2 + inner


@triton.jit
def offsets(outer, inner, size_1, step_0, step_1, step_2):
    """Where rows begin, in elements, of which there may be more than 2^31."""
    outer_offset = (outer // size_1).to(tl.int64) * step_0 + (outer % size_1).to(tl.int64) * step_1
    return outer_offset + inner * step_2


@triton.jit
def clipped(q, low, high):
    """A NaN stays one."""
    return tl.where(q < low, low, tl.where(q > high, high, q))
