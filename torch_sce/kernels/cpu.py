"""The row formulas on the CPU: the functions of `aten`, with as little memory traffic as can be.

The rows are taken a megabyte at a time, which stays in a core's cache from one operation to the
next. PyTorch's own `log_softmax` and `softmax` take a block of logits: they subtract the maximum of
each row, so no row depends on another, and logits may be far from 0 and far apart. Nothing is saved
for the backward pass, which computes the softmax again. Rows of probabilities are summarised by
their sum s and the label's probability p.

Those functions add up each row in a few partial sums, one term after the other: for 32,000 classes
of which one stands out that is off by 130 units in the last place. So the sum of a long row's
softmax, which `sum` adds up pairwise, corrects it.

Rows that do not count are not read, and only their zeros are written, where rows are long. Labels
are read to decide on that, which no other device may do.

Losses and gradients are bitwise the same for any number of threads.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import aten
from .aten import blocks, empty_like, memory_order, row_sums
from .contract import Clip, Saved

SMALL = 2**17  # predictions, for which it is PyTorch's overhead that matters
BLOCK = 2**18  # predictions at a time, if there are many: 1 MiB of float32
VECTOR = 16  # classes; with fewer, PyTorch's softmax along them is slow
LONG = 256  # classes from which on it pays to copy rows, to leave some out or to sum along memory
MANY = 2**10  # classes, beyond which PyTorch's own loss loses digits

Rows = list[tuple]  # the rows of each block, as an index into y


def is_small(z: Tensor) -> bool:
    """Whether `small_losses` takes less time than `forward` and `backward`."""
    classes = z.shape[-1]
    return classes <= MANY and z.numel() <= (SMALL if classes >= VECTOR else SMALL // VECTOR)


def small_losses(z: Tensor, y: Tensor, counted: Tensor | None, in_range: bool) -> Tensor:
    """The loss of every row of logits, by PyTorch's own function.

    It takes less time to call than a function of ours, and more memory.
    """
    label, ignored, poison = _labels(y, counted, z.shape[-1], in_range)
    if ignored is not None:
        z = z.masked_fill(ignored.unsqueeze(-1), 0)  # whatever they hold
    z = z if z.dtype == aten.row_dtype(z) else z.float()
    if z.stride(-1) == 1 or z.shape[-1] >= LONG:
        z, label = z.contiguous().flatten(0, -2), label.flatten()
    else:
        z = z.movedim(-1, 1)
    loss = F.cross_entropy(z, label, reduction="none").view(y.shape) + 0  # never -0.0
    if poison is not None:
        loss = loss * poison
    return loss if ignored is None else loss.masked_fill(ignored, 0)


def forward(
    z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, in_range: bool
) -> tuple[Tensor, Saved]:
    """The loss of every row; for probabilities s and q_y, too, for `backward`."""
    label, ignored, poison = _labels(y, counted, z.shape[-1], in_range)
    rows, picked = _rows(z, ignored)
    if clip is None:
        loss, saved = _losses_of_logits(z, label, rows, picked), ()
    else:
        saved = (_sums(z, clip, rows, picked), aten.at_label(z, label).to(aten.row_dtype(z)))
        loss = _losses_of_probabilities(*saved, clip)
    if poison is not None:
        loss *= poison
    if ignored is not None:
        loss.masked_fill_(ignored, 0)
    return loss, saved


def backward(
    g: Tensor,
    z: Tensor,
    y: Tensor,
    counted: Tensor | None,
    clip: Clip,
    in_range: bool,
    saved: Saved,
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    label, ignored, poison = _labels(y, counted, z.shape[-1], in_range)
    if poison is not None:
        g = g * poison.to(g.dtype)
    if ignored is not None:
        g = g.masked_fill(ignored, 0)
    rows, picked = _rows(z, ignored)
    dz = empty_like(z)
    if ignored is not None and picked:
        _write_zeros(dz, ignored)
    if clip is None:
        _write_gradients(dz, g, z, label, rows, picked, ignored)
        return dz
    s, p = saved
    at_label = _label_gradients(g, s, p, clip)
    _write_slopes(dz, g / s, z, clip, rows, picked)
    _scatter(dz, label, at_label if ignored is None else at_label.masked_fill_(ignored, 0))
    if s.isnan().any():
        # A NaN in z stays one times 0; and beside it, what is clipped has gradient 0.
        for at in _indices(s.isnan(), z.shape[-1]):
            wide = z[at].to(s.dtype)
            summary = aten.summarize(wide, label[at], clip)
            some = None if counted is None else counted[at]
            dz[at] = aten.row_gradients(g[at], wide, label[at], some, clip, summary).to(dz.dtype)
    return dz


def _labels(
    y: Tensor, counted: Tensor | None, classes: int, in_range: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A class for every row; which rows do not count; `aten.one_or_nan`. None: not needed."""
    ignored = None if counted is None else ~counted
    if in_range or y.numel() == 0:
        return y, ignored, None
    label = y if ignored is None else y.masked_fill(ignored, 0)
    return label.clamp(0, classes - 1), ignored, aten.one_or_nan(label, classes)


def _losses_of_logits(z: Tensor, label: Tensor, rows: Rows, picked: bool) -> Tensor:
    """The loss of every row; 0 of one that is not read."""
    loss = z.new_zeros(z.shape[:-1], dtype=aten.row_dtype(z))
    for at, block, out in _walk(z, rows, picked):
        if block.shape[-1] < LONG:
            loss[at] = 0 - aten.at_label(_log_softmax(block, out), label[at])  # never -0.0
            continue
        torch.softmax(block, -1, out=out)
        # Its largest entry is 1 / s; what its entries add up to corrects that s.
        s = row_sums(out) / out.amax(-1)
        loss[at] = s.log_() + (block.amax(-1) - aten.at_label(block, label[at]))
    return loss


def _losses_of_probabilities(s: Tensor, p: Tensor, clip: tuple[float, float]) -> Tensor:
    """`contract.loss_of`, in float64: rounding s / p would show where it is near 1."""
    loss = torch.empty_like(s)
    for at in blocks(s.shape, 1, BLOCK // 4):
        loss[at] = (s[at].double() / p[at].double().clamp(*clip)).log_()
    return loss


def _sums(z: Tensor, clip: tuple[float, float], rows: Rows, picked: bool) -> Tensor:
    """s of every row of probabilities; 1 of one that is not read.

    A product with ones would be faster where classes are few, but may be computed in bfloat16.
    """
    s = z.new_ones(z.shape[:-1], dtype=aten.row_dtype(z))
    for at, block, out in _walk(z, rows, picked):
        s[at] = row_sums(torch.clamp(block, *clip, out=out))
    return s


def _write_gradients(
    dz: Tensor,
    g: Tensor,
    z: Tensor,
    label: Tensor,
    rows: Rows,
    picked: bool,
    ignored: Tensor | None,
) -> None:
    """Writes g (softmax - [j == y]) for every row of logits that is read."""
    for at, block, out in _walk(z, rows, picked):
        total = _softmax(block, out)
        out.scatter_add_(-1, label[at].unsqueeze(-1), -total)
        if ignored is not None and not picked:
            unread = ignored[at].unsqueeze(-1)
            out.masked_fill_(unread, 0)
            total.masked_fill_(unread, 1)
        factor = g[at].unsqueeze(-1) / total
        if picked:
            dz[at] = out.mul_(factor).to(dz.dtype)
        else:
            torch.mul(out, factor, out=dz[at])


def _write_slopes(
    dz: Tensor, r: Tensor, z: Tensor, clip: tuple[float, float], rows: Rows, picked: bool
) -> None:
    """Writes r where a probability is not clipped: dz but at the labels."""
    # hardtanh passes r on strictly within its bounds, and ours are inclusive.
    wide = np.float64 if r.dtype == torch.float64 else np.float32
    low, high = np.nextafter(wide(clip[0]), wide(-1)), np.nextafter(wide(clip[1]), wide(2))
    for at, block, out in _walk(z, rows, picked):
        if not picked and dz.dtype == out.dtype:
            out = dz[at]
        slopes = torch.ops.aten.hardtanh_backward(
            r[at].unsqueeze(-1).expand_as(block), block, float(low), float(high), grad_input=out
        )
        if picked or dz.dtype != slopes.dtype:
            dz[at] = slopes.to(dz.dtype)


def _label_gradients(g: Tensor, s: Tensor, p: Tensor, clip: tuple[float, float]) -> Tensor:
    """What `aten.row_gradients` has at the labels of probabilities."""
    low, high = clip
    return torch.where((low <= p) & (p <= high), g * (1 / s - 1 / p), 0)


def _scatter(dz: Tensor, label: Tensor, values: Tensor) -> None:
    """Writes a value at the label of every row."""
    values = values.to(dz.dtype)
    if dz.dtype in (torch.float16, torch.bfloat16):  # scatter_ would convert all of dz, and back
        dz, values = dz.view(torch.int16), values.view(torch.int16)
    dz.scatter_(-1, label.unsqueeze(-1), values.unsqueeze(-1))


def _rows(z: Tensor, ignored: Tensor | None) -> tuple[Rows, bool]:
    """All rows as slices; or, and True, those that count where it pays to pick them out.

    They are picked along y's last axis, at one position of the axes before it.
    """
    *before, last, classes = z.shape
    few = before and last * classes < BLOCK // 8
    if ignored is None or classes < LONG or z.stride(-1) != 1 or few:
        return list(blocks(z.shape[:-1], classes, _block(z))), False
    return [
        (*position, index)
        for position in itertools.product(*map(range, before))
        for index in (~ignored[position]).nonzero().squeeze(1).split(max(1, _block(z) // classes))
        if len(index)
    ], True


def _write_zeros(dz: Tensor, ignored: Tensor) -> None:
    """Writes the gradients of rows that are not picked."""
    for position in itertools.product(*map(range, ignored.shape[:-1])):
        dz[position].index_fill_(0, ignored[position].nonzero().squeeze(1), 0)


def _walk(z: Tensor, rows: Rows, picked: bool) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """For each block its rows, their z in the dtype rows are computed in, a tensor to write to.

    The two lie in memory alike, without gaps, and in the same memory for each block where they are
    copies.
    """
    if picked:
        yield from _walk_picked(z, rows)
        return
    out = place = z.new_empty(())
    for at in rows:
        block = z[at]
        if block.shape != out.shape:
            out = _scratch(block)
            place = torch.empty_like(out)
        alike = block.dtype == out.dtype and block.stride() == out.stride()
        yield at, block if alike else place.copy_(block), out


def _scratch(block: Tensor) -> Tensor:
    """A tensor for results, as dense as can be, where PyTorch's softmax is at its best.

    Along the last axis in memory it is slow with few classes; along any other it adds them up one
    by one, which loses digits with many.
    """
    dtype = aten.row_dtype(block)
    classes = block.shape[-1]
    if classes >= LONG:
        return block.new_empty(block.shape, dtype=dtype)
    if classes < VECTOR and block.stride(-1) == 1:
        return block.new_empty((classes, *block.shape[:-1]), dtype=dtype).movedim(0, -1)
    return empty_like(block, dtype)


def _walk_picked(z: Tensor, rows: Rows) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """`_walk` for rows that are picked out of all."""
    most, dtype = max((len(at[-1]) for at in rows), default=0), aten.row_dtype(z)
    place, out = (z.new_empty(most, z.shape[-1], dtype=dtype) for _ in range(2))
    narrow = place if z.dtype == dtype else z.new_empty(place.shape)
    for at in rows:
        *position, index = at
        block, copy = place[: len(index)], narrow[: len(index)]
        torch.index_select(z[tuple(position)], 0, index, out=copy)
        yield at, block if narrow is place else block.copy_(copy), out[: len(index)]


def _log_softmax(block: Tensor, out: Tensor) -> Tensor:
    """log_softmax of every row, in the order that both have in memory."""
    order = memory_order(out)
    axis = order.index(out.ndim - 1)
    torch.log_softmax(block.permute(order), axis, out=out.permute(order))
    return out


def _softmax(block: Tensor, out: Tensor) -> Tensor:
    """Writes the softmax of every row, and returns what it adds up to, (..., 1): about 1.

    Along another axis than memory's last, the bits of PyTorch's depend on the number of threads.
    """
    if out.is_contiguous():
        torch.softmax(block, -1, out=out)
    else:
        _log_softmax(block, out)
        out.exp_()
    return row_sums(out).unsqueeze(-1)


def _block(z: Tensor) -> int:
    """How many predictions to take at a time.

    A thirty-second, so far as that pays; all of `BLOCK` where the numbers of the rows are more. But
    a row for each thread: PyTorch's softmax gives no row to two.
    """
    classes = z.shape[-1]
    limit = BLOCK if classes < LONG else min(BLOCK, max(BLOCK // 2, z.numel() // 32))
    return max(limit, classes * torch.get_num_threads())


def _indices(rows: Tensor, classes: int) -> Iterator[tuple[Tensor, ...]]:
    """Where `rows` is true, a block at a time."""
    index = rows.nonzero(as_tuple=True)
    if len(index[0]):
        yield from zip(*(part.split(max(1, BLOCK // classes)) for part in index), strict=True)
