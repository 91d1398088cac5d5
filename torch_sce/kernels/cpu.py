"""The row formulas on the CPU: the functions of `aten`, with as little traffic as can be.

The rows are taken a megabyte at a time, which stays in a core's cache from one operation to the
next. Four things make this fast, and none changes a result by more than its rounding:

1. m = 0 serves as well as the maximum while s comes out within `SAFE_SUMS`. So the forward pass
   is exp and sum, and exp(z) is spared the rounding of z - m. Other rows are done again.
2. Away from its label a row's gradient is one factor, g / s, times exp(z - m) or, for
   probabilities, times 1 or 0. The entries at the labels are written afterwards.
3. Rows that do not count are neither read nor written, where rows are long.
4. exp is kept from results that underflow, where a sample of the rows shows that they would
   come: those take it a hundred times as long.

Labels and predictions are looked at to decide on these, which no other device may do.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import aten
from .aten import IGNORED, Clip, blocks, empty_like

SMALL = 2**17  # predictions, for which it is PyTorch's overhead that matters
VECTOR = 16  # classes; with fewer, PyTorch's own softmax is slow
BLOCK = 2**18  # predictions at a time, if there are many: 1 MiB of float32
SAMPLE = 2**12  # predictions that tell whether to try m = 0
ROWS = 2**16  # rows at a time, where each is one number
LONG = 256  # classes from which on it pays to pick out the rows that count

# m = 0 loses no digit of s within these bounds, nor of g / s while g is within 1e-25 and 1e25.
SAFE_SUMS = (1e-13, 1e13)
SAFE_LOGITS = (-80.0, 80.0)  # float32's exp underflows below -87 and overflows above 88
LEAST = {torch.float32: -87.0, torch.float64: -708.0}  # exp of these has all its digits

Rows = list[tuple]  # the rows of each block, as an index into y


def is_small(z: Tensor) -> bool:
    """Whether `small_losses` takes less time than `forward` and `backward`."""
    return z.numel() <= (SMALL if z.shape[-1] >= VECTOR else SMALL // VECTOR)


def small_losses(z: Tensor, y: Tensor, all_classes: bool) -> Tensor:
    """The loss of every row of logits, by PyTorch's own function.

    It takes less time to call than a function of ours, and more memory.
    """
    label, ignored, poison = _labels(y, z.shape[-1], all_classes)
    if ignored is not None:
        z = z.masked_fill(ignored.unsqueeze(-1), 0)  # whatever they hold
    if z.ndim > 2:
        z = z.movedim(-1, 1)
    wide = z if z.dtype == aten.row_dtype(z) else z.float()
    loss = F.cross_entropy(wide, label, reduction="none") + 0  # never -0.0
    if poison is not None:
        loss = loss * poison
    return loss if ignored is None else loss.masked_fill(ignored, 0)


def forward(
    z: Tensor, y: Tensor, clip: Clip, all_classes: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The loss of every row, and m, s and p for `backward`; m is None if it is 0 in all."""
    label, ignored, poison = _labels(y, z.shape[-1], all_classes)
    m, s = _summaries(z, ignored, clip)
    p = aten.at_label(z, label).to(s.dtype)
    loss = _losses(m, s, p, clip)
    if poison is not None:
        loss *= poison
    if ignored is not None:
        loss.masked_fill_(ignored, 0)
    return loss, m, s, p


def backward(
    g: Tensor,
    z: Tensor,
    y: Tensor,
    clip: Clip,
    all_classes: bool,
    m: Tensor | None,
    s: Tensor,
    p: Tensor,
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    label, ignored, poison = _labels(y, z.shape[-1], all_classes)
    if poison is not None:
        g = g * poison.to(g.dtype)
    r, at_label = g / s, _label_gradients(g, m, s, p, clip)
    if ignored is not None:
        r.masked_fill_(ignored, 0)
        at_label.masked_fill_(ignored, 0)
    rows, picked = _rows(z, ignored)
    dz = _zeros_like(z) if picked else empty_like(z)
    _write_slopes(dz, z, m, r.unsqueeze(-1), clip, rows, picked)
    _scatter(dz, label, at_label)
    if (m is not None or clip is not None) and not _within(s, (-math.inf, math.inf)):
        # A NaN in z stays one times 0; and beside it, what is clipped has gradient 0.
        for at in _indices(s.isnan(), z.shape[-1]):
            shift = s[at] if m is None else m[at]
            block = aten.row_gradients(g[at], z[at].to(s.dtype), y[at], shift, s[at], clip)
            dz[at] = block.to(dz.dtype)
    return dz


def _labels(
    y: Tensor, classes: int, all_classes: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A class for every row; which rows are ignored; `aten.one_or_nan`. None: not needed."""
    if all_classes:
        return y, None, None
    ignored = y == IGNORED
    label = y.masked_fill(ignored, 0)
    if _within(label, (-1, classes)):
        return label, ignored, None
    return label.clamp_(0, classes - 1), ignored, aten.one_or_nan(y, classes)


def _summaries(z: Tensor, ignored: Tensor | None, clip: Clip) -> tuple[Tensor | None, Tensor]:
    """(m, s) of every row; (1, 1) of one that is not read."""
    rows, picked = _rows(z, ignored)
    if clip is not None:
        return None, _sums(partial(torch.clamp, min=clip[0], max=clip[1]), z, rows, picked)
    if z.dtype == torch.float64 or not _within(_sample(z), SAFE_LOGITS):
        m, s = _ones(z), _ones(z)
        for at, (block, out) in zip(rows, _walk(z, rows, picked), strict=True):
            m[at], s[at] = _shifted_sums(block, out)
        return m, s
    s = _sums(torch.exp, z, rows, picked)
    if _within(s, SAFE_SUMS):
        return None, s
    m = torch.zeros_like(s)
    for at in _indices(~((s > SAFE_SUMS[0]) & (s < SAFE_SUMS[1])), z.shape[-1]):
        block = z[at].to(s.dtype)
        m[at], s[at] = _shifted_sums(block, out=block)
    return m, s


def _sums(weigh: Callable[..., Tensor], z: Tensor, rows: Rows, picked: bool) -> Tensor:
    """The sum of a function of every row's z.

    A product with ones would be faster where classes are few, but may be computed in bfloat16.
    """
    s, walk = _ones(z), _walk(z, rows, picked)
    if picked:
        for at, (block, out) in zip(rows, walk, strict=True):
            s[at] = weigh(block, out=out).sum(-1)
    else:
        for part, (block, out) in zip(_views(s, rows), walk, strict=True):
            torch.sum(weigh(block, out=out), -1, out=part)
    return s


def _shifted_sums(block: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(m, s) with the maximum as m."""
    m = block.amax(-1)
    return m, _exp_shifted(block, m, out).sum(-1)


def _exp_shifted(block: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """exp(z - m), with 0 for what underflows."""
    least = LEAST[block.dtype]
    torch.sub(block, m.unsqueeze(-1), out=out).clamp_min_(least).exp_()
    return torch.threshold_(out, 1.001 * math.exp(least), 0)


def _losses(m: Tensor | None, s: Tensor, p: Tensor, clip: Clip) -> Tensor:
    """`aten.combine`. Where m is 0, log s and p may cancel.

    Then these are rows of the second kind: the loss is log(s / exp(p)), which is never negative,
    as exp(p) has the rounding that it has in s.
    """
    if m is None and clip is None and _within(p, SAFE_LOGITS):
        loss = p.exp()
        return torch.div(s, loss, out=loss).log_()
    if m is None:
        m = torch.zeros_like(s)
    loss = torch.empty_like(s)
    rows = list(blocks(s.shape, 1, ROWS))
    for out, *summary in zip(*(_views(x, rows) for x in (loss, m, s, p)), strict=True):
        m_, s_, p_ = (part.double() for part in summary)
        out.copy_(aten.combine(m_, s_, p_, clip))
    return loss


def _write_slopes(
    dz: Tensor,
    z: Tensor,
    m: Tensor | None,
    r: Tensor,
    clip: Clip,
    rows: Rows,
    picked: bool,
) -> None:
    """Writes r exp(z - m), or r where a probability is not clipped: dz but at the labels."""
    shifts, factors = _views(m, rows), _views(r, rows)
    if not picked and dz.dtype == r.dtype:
        parts = zip(_views(z, rows), shifts, factors, _views(dz, rows), strict=True)
        for block, shift, factor, out in parts:
            _slopes(block, shift, factor, out, clip)
        return
    parts = zip(rows, _walk(z, rows, picked), shifts, factors, strict=True)
    for at, (block, scratch), shift, factor in parts:
        slopes = _slopes(block, shift, factor, scratch, clip)
        dz[at] = slopes.to(dz.dtype) if picked else slopes


def _slopes(block: Tensor, m: Tensor | None, r: Tensor, out: Tensor, clip: Clip) -> Tensor:
    if clip is not None:
        # This passes r on strictly within its bounds, and ours are inclusive.
        wide = np.float64 if block.dtype == torch.float64 else np.float32
        low, high = np.nextafter(wide(clip[0]), wide(-1)), np.nextafter(wide(clip[1]), wide(2))
        return torch.ops.aten.hardtanh_backward(
            r.expand_as(block), block, float(low), float(high), grad_input=out
        )
    return (torch.exp(block, out=out) if m is None else _exp_shifted(block, m, out)).mul_(r)


def _label_gradients(g: Tensor, m: Tensor | None, s: Tensor, p: Tensor, clip: Clip) -> Tensor:
    """What `aten.row_gradients` has at the labels."""
    if clip is None:
        e = p.exp() if m is None else (p - m).exp_()
        return e.div_(s).sub_(1).mul_(g)
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


def _walk(z: Tensor, rows: Rows, picked: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The blocks in the dtype rows are computed in, each with a tensor of its shape to write to.

    Rows that are picked are copied: then the two are one.
    """
    if picked:
        yield from ((block, block) for block in _copies(z, rows))
        return
    dtype, views = aten.row_dtype(z), _views(z, rows)
    scratch = empty_like(views[0], dtype)
    for view in views:
        out = scratch if view.shape == scratch.shape else scratch[tuple(map(slice, view.shape))]
        yield view if view.dtype == dtype else out.copy_(view), out


def _copies(z: Tensor, rows: Rows) -> Iterator[Tensor]:
    """The picked rows in the dtype rows are computed in, each block in the same place."""
    most = max((len(index) for *_, index in rows), default=0)
    place = z.new_empty(most, z.shape[-1], dtype=aten.row_dtype(z))
    narrow = place if place.dtype == z.dtype else z.new_empty(place.shape)
    for *position, index in rows:
        block = place[: len(index)]
        copy = block if narrow is place else narrow[: len(index)]
        yield block.copy_(torch.index_select(z[tuple(position)], 0, index, out=copy))


def _block(z: Tensor) -> int:
    """How many predictions to take at a time.

    A thirty-second, so far as that pays; all of `BLOCK` where the numbers of the rows are more.
    """
    return BLOCK if z.shape[-1] < LONG else min(BLOCK, max(BLOCK // 2, z.numel() // 32))


def _sample(z: Tensor) -> Tensor:
    """Rows from all over z, about `SAMPLE` predictions, though a few on each axis."""
    every, share, few = [], z.numel() // SAMPLE, 4 if z.ndim == 2 else 2
    for size in z.shape[:-1]:
        every.append(max(1, min(share, size // few)))
        share //= every[-1]
    return z[tuple(slice(None, None, step) for step in every)]


def _ones(z: Tensor) -> Tensor:
    """A number for every row of z."""
    return z.new_ones(z.shape[:-1], dtype=aten.row_dtype(z))


def _zeros_like(z: Tensor) -> Tensor:
    """Zeros from calloc, which NumPy calls and PyTorch does not: no page is touched before use.

    The storage is NumPy's, so it cannot be resized.
    """
    like = {torch.float64: np.float64, torch.float32: np.float32}.get(z.dtype, np.int16)
    return torch.from_numpy(np.zeros(z.shape, like)).view(z.dtype)


def _views(x: Tensor | None, rows: Rows) -> list:
    """The blocks of x, all made at once: between blocks the caches are full of predictions."""
    return [x if x is None or not at else x[at] for at in rows]


def _indices(rows: Tensor, classes: int) -> Iterator[tuple[Tensor, ...]]:
    """Where `rows` is true, a block at a time."""
    index = rows.nonzero(as_tuple=True)
    if len(index[0]):
        yield from zip(*(part.split(max(1, BLOCK // classes)) for part in index), strict=True)


def _within(values: Tensor, bounds: tuple[float, float]) -> bool:
    """Whether all the values lie between the bounds; a NaN does not."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return bounds[0] < low.item() and high.item() < bounds[1]
