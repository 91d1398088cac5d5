"""The row formulas on the CPU, by the loops of cpu.c: one read of the predictions for the losses,
one read and one write for the gradients.

The extension is compiled when the package is installed. Without it (`native` is False) `aten` and
`targets` serve the CPU, too.

For the backward pass a row's summary is saved: of logits (r, p, m), of probabilities (r, q_y),
which tells more than p = c_y. Losses and gradients are bitwise the same for any number of threads.
"""

import ctypes
import functools
import math
from array import array
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from ..options import FLOATS
from .aten import empty_like, real_dtype, row_dtype
from .contract import Clip, Saved

try:
    from . import _cpu
except ImportError:  # installed without a C compiler
    _cpu = None

# As cpu.c numbers them.
KINDS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 8,
    torch.bool: 9,
}


# A scalar for the result, of predictions of each dtype: a tensor like another is made fastest.
SCALARS = {x: torch.empty((), dtype=real_dtype(x), device="cpu") for x in FLOATS}

Steps = tuple[int, ...]  # in elements
MOST_AXES = 64  # of rows: AXES of cpu.c, which trusts a plan


def forward(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> tuple[Tensor, Saved]:
    """The loss of every row; and r, z_y and for logits m of every row."""
    loss, saved = results(z, y.shape, 3 if clip is None else 2)
    run(False, z, y=y, counted=counted, loss=loss, saved=saved, clip=clip)
    return loss, (saved,)


def forward_sum(
    z: Tensor,
    y: Tensor,
    counted: Tensor | None,
    clip: Clip,
    divisor: float,
    factor: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    """The sum of all rows' losses, over `divisor`; and what `forward` saves, with the losses last.

    Losses are multiplied by the `factor` of their row, and added up in float64, in the `order` of
    rows that an int64 tensor lists.
    """
    value = torch.empty_like(SCALARS[z.dtype])
    saved = value.new_empty(4 * y.numel())
    run(
        False, z, y=y, counted=counted, saved=saved, value=value, order=order, factor=factor,
        clip=clip, divisor=divisor,
    )  # fmt: skip
    return value, (saved,)


def results(z: Tensor, rows: torch.Size, numbers: int) -> tuple[Tensor, Tensor]:
    """Empty tensors for the losses of rows, and for what is saved of them."""
    loss = z.new_empty(rows, dtype=row_dtype(z))
    return loss, loss.new_empty((numbers, *rows))


def backward(
    g: Tensor,
    z: Tensor,
    y: Tensor,
    counted: Tensor | None,
    clip: Clip,
    saved: Saved,
    out: Tensor | None = None,
    divisor: float = 1,
    factor: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype.

    A g without axes is that of the sum of all rows' losses times `factor` over `divisor`.
    """
    dz = empty_like(z) if out is None else out
    run(
        True, z, dz=dz, y=y, counted=counted, g=g, saved=saved[0], factor=factor,
        clip=clip, divisor=divisor,
    )  # fmt: skip
    return dz


def sums_of(saved: Saved) -> tuple[Tensor, Tensor]:
    """m and r of every row, from what `forward` saved."""
    r, _, *m = saved[0]
    return m[0] if m else torch.zeros_like(r), r


def saved_of(m: Tensor, r: Tensor, q: Tensor, clip: Clip) -> Saved:
    """What `backward` needs, from m, r and the prediction of the label."""
    return (torch.stack((r, q, m) if clip is None else (r, q)),)


def run(
    backward: bool,
    z: Tensor,
    t: Tensor | None = None,
    dz: Tensor | None = None,
    dt: Tensor | None = None,
    *,
    y: Tensor | None = None,
    counted: Tensor | None = None,
    g: Tensor | None = None,
    loss: Tensor | None = None,
    saved: Tensor,
    value: Tensor | None = None,
    order: Tensor | None = None,
    factor: Tensor | None = None,
    clip: Clip,
    smoothing: float = 0.0,
    divisor: float = 1.0,
) -> int:
    """Calls cpu.c: writes `loss` and `saved`, or for `backward` dz and dt.

    With `value` the sum of the losses times `factor` over `divisor` is written there, added up in
    this `order`, and the losses behind three numbers of each row in `saved`. A g without axes is
    that of `value`.

    Returns the number of units of work, each of which one thread computes.
    """
    assert _cpu is not None
    z = _in_memory(z)
    t = None if t is None else _in_memory(t)
    plan = _plan(
        z.shape,
        (z.dtype, z.stride()),
        None if t is None else (t.dtype, t.stride()),
        None if dz is None else (dz.dtype, dz.stride()),
        None if dt is None else (dt.dtype, dt.stride()),
    )
    # What has an element for each row has them in order, but one g may be that of all rows.
    y = None if y is None else _in_memory(y).contiguous()
    counted = None if counted is None else counted.contiguous()
    factor = None if factor is None else _in_memory(factor).contiguous()
    saved = saved.contiguous()
    g_step = 0
    if g is not None:
        g = _in_memory(g)
        if any(g.stride()):
            g, g_step = g.contiguous(), 1
    addresses = (
        z.data_ptr(),
        0 if t is None else t.data_ptr(),
        0 if dz is None else dz.data_ptr(),
        0 if dt is None else dt.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if counted is None else counted.data_ptr(),
        0 if g is None else g.data_ptr(),
        0 if loss is None else loss.data_ptr(),
        saved.data_ptr(),
        0 if value is None else value.data_ptr(),
        0 if order is None else order.data_ptr(),
        0 if factor is None else factor.data_ptr(),
    )
    options = (clip, smoothing, divisor)
    return _cpu.run(backward, torch.get_num_threads(), plan, addresses, g_step, *options)


def count_labels(y: Tensor, counted: Tensor | None, classes: int) -> int | None:
    """How many labels y count, int64 and on the CPU; None if one that does is not in [0, classes).

    `counted` is as `contract.Kernels` has it.
    """
    if _cpu is None:
        is_class = (y >= 0) & (y < classes)
        if counted is None:
            return y.numel() if bool(is_class.all()) else None
        return int(counted.sum()) if bool((is_class | ~counted).all()) else None
    y = _in_memory(y).contiguous()
    counted = None if counted is None else counted.contiguous()
    count = _cpu.count_labels(
        y.data_ptr(), 0 if counted is None else counted.data_ptr(), y.numel(), classes
    )
    return None if count < 0 else count


def prefer_huge_pages(x: Tensor) -> Tensor:
    """A new tensor that nothing has been written to, with fewer page faults to come if it is large.

    `run` does the same for gradients.
    """
    if _cpu is not None and x.device.type == "cpu":
        _cpu.prefer_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def _in_memory(x: Tensor) -> Tensor:
    """x without a negation that PyTorch has put off."""
    return x.resolve_neg() if x.is_neg() else x


@functools.lru_cache(maxsize=1024)
def _plan(shape: torch.Size, *tensors: tuple[torch.dtype, Steps] | None) -> bytes:
    """How to find rows in memory, as integers of 64 bits.

    The number of classes; the number of the rows' axes and their sizes, in z's order in memory;
    their steps in tensors of one element for each row; and for each tensor its kind, the step of
    its class axis and those of its rows, 0 if it is not there. Axes are joined where they can be
    in all of the tensors.
    """
    *sizes, classes = shape
    row_steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    strides = [row_steps, *(strides for _, strides in filter(None, tensors))]
    axes: list[tuple[int, ...]] = []  # the size, and a step for each of `strides`
    for axis in sorted(range(len(sizes)), key=lambda axis: strides[1][axis], reverse=True):
        size, steps = sizes[axis], [each[axis] for each in strides]
        if size == 1:
            continue
        if axes and axes[-1][1:] == tuple(size * step for step in steps):
            axes[-1] = (axes[-1][0] * size, *steps)
        else:
            axes.append((size, *steps))
    if len(axes) > MOST_AXES:
        raise ValueError(f"predictions must have at most {MOST_AXES} axes, got {len(shape)}")
    axes = axes or [(1,) * (1 + len(strides))]
    joined, row_steps, *steps = zip(*axes, strict=True)
    found = iter(steps)
    plan = [classes, len(joined), *joined, *row_steps]
    for x in tensors:
        plan += (0,) * (2 + len(joined)) if x is None else (KINDS[x[0]], x[1][-1], *next(found))
    return array("q", plan).tobytes()


def _connect() -> bool:
    """Tells cpu.c how to use PyTorch's threads; whether there is a cpu.c."""
    if _cpu is None:
        return False
    # PyTorch 2.10 and later export the first; older builds share the pool of their OpenMP.
    _cpu.set_threads(
        _address("libtorch_cpu.*", "torch_parallel_for"), _address("libgomp*", "GOMP_parallel")
    )
    return True


def _address(library: str, function: str) -> int:
    """Of a C function in a library that PyTorch brings; 0: not there."""
    for path in Path(str(files(torch))).glob(f"lib/{library}"):
        try:
            found = getattr(ctypes.CDLL(str(path)), function)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value or 0
    return 0


native = _connect()
