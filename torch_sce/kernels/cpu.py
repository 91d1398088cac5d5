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
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from .aten import empty_like, row_dtype
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


Steps = tuple[int, ...]  # in elements
Plan = tuple[int, Steps, Steps, tuple[tuple[int, Steps] | None, ...]]  # see `_plan`


def forward(
    z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, in_range: bool
) -> tuple[Tensor, Saved]:
    """The loss of every row; and r, z_y and for logits m of every row."""
    loss, saved = results(z, y.shape, 3 if clip is None else 2)
    run(False, z, y=y, counted=counted, loss=loss, saved=saved, clip=clip)
    return loss, (saved,)


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
    in_range: bool,
    saved: Saved,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to z, in z's shape and dtype."""
    dz = empty_like(z) if out is None else out
    run(True, z, dz=dz, y=y, counted=counted, g=g, saved=saved[0], clip=clip)
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
    clip: Clip,
    smoothing: float = 0.0,
) -> int:
    """Calls cpu.c: writes `loss` and `saved`, or for `backward` dz and dt.

    Returns the number of units of work, each of which one thread computes.
    """
    assert _cpu is not None
    z, t, g = _in_memory(z), t if t is None else _in_memory(t), g if g is None else _in_memory(g)
    plan = _plan(z.shape, _description(z), _description(t), _description(dz), _description(dt))
    # What has an element for each row has them in order, but one g may be that of all rows.
    g_step = 0 if g is None or not any(g.stride()) else 1
    g = g.contiguous() if g_step and g is not None else g
    y, counted, saved = _in_order(y), _in_order(counted), _in_memory(saved).contiguous()
    given = (z, t, dz, dt, y, counted, g, loss, saved)
    addresses = tuple([0 if x is None else x.data_ptr() for x in given])
    return _cpu.run(backward, torch.get_num_threads(), plan, addresses, g_step, clip, smoothing)


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


def _in_order(x: Tensor | None) -> Tensor | None:
    return None if x is None else _in_memory(x).contiguous()


def _description(x: Tensor | None) -> tuple[torch.dtype, Steps] | None:
    return None if x is None else (x.dtype, x.stride())


@functools.lru_cache(maxsize=1024)
def _plan(shape: torch.Size, *tensors: tuple[torch.dtype, Steps] | None) -> Plan:
    """How to find rows in memory.

    The number of classes; the sizes of the rows' axes, in z's order in memory; their steps in
    tensors of one element for each row; and for each tensor its kind and its steps, that of the
    class axis last. Axes are joined where they can be in all of the tensors.
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
    axes = axes or [(1,) * (1 + len(strides))]
    joined, row_steps, *steps = zip(*axes, strict=True)
    found = iter(steps)
    return (
        classes,
        joined,
        row_steps,
        tuple(None if x is None else (KINDS[x[0]], (*next(found), x[1][-1])) for x in tensors),
    )


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
