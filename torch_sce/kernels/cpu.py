"""The row formulas on the CPU, by the loops of cpu.c: one read of the predictions for the losses,
one read and one write for the gradients.

The extension is compiled when the package is installed. Without it (`native` is False) `aten` and
`targets` serve the CPU, too.

For the backward pass r is saved, and for logits m; z still has p. Rows that do not count are not
read. Losses and gradients are bitwise the same for any number of threads.
"""

import ctypes
import functools
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
    torch.bool: 8,
}


def forward(
    z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip, in_range: bool
) -> tuple[Tensor, Saved]:
    """The loss of every row, and r and m of every row; only r for probabilities."""
    loss = z.new_empty(y.shape, dtype=row_dtype(z))
    saved = loss.new_empty((2 if clip is None else 1, *y.shape))
    run(False, z, y=y, counted=counted, loss=loss, saved=saved, clip=clip)
    return loss, (saved,)


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
    dz = empty_like(z)
    run(True, z, dz=dz, y=y, counted=counted, g=g, saved=saved[0], clip=clip)
    return dz


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
) -> None:
    """Calls cpu.c: writes `loss` and `saved`, or for `backward` dz and dt."""
    assert _cpu is not None
    given = [None if x is None else x.resolve_neg() for x in (z, t, dz, dt)]
    strides = tuple([None if x is None else x.stride() for x in given])
    sizes, row_steps, steps = _layout(z.shape, strides)
    tensors = [
        None if x is None else (x.data_ptr(), KINDS[x.dtype], step)
        for x, step in zip(given, steps, strict=True)
    ]
    # What has an element for each row has them in order, but one g may be that of all rows.
    y, counted, saved = (
        None if x is None else x.resolve_neg().contiguous() for x in (y, counted, saved)
    )
    g_step = 0 if g is None else int(any(g.stride()))
    if g is not None:
        g = g.resolve_neg()
        g = g.contiguous() if g_step else g
    _cpu.run(
        backward,
        torch.get_num_threads(),
        z.shape[-1],
        sizes,
        row_steps,
        *tensors,
        *(0 if x is None else x.data_ptr() for x in (y, counted, g)),
        g_step,
        0 if loss is None else loss.data_ptr(),
        saved.data_ptr(),
        clip,
        smoothing,
    )


@functools.lru_cache(maxsize=1024)
def _layout(shape: torch.Size, strides: tuple) -> tuple[tuple, tuple, tuple]:
    """Sizes of the rows' axes in z's order in memory, and the steps along them.

    Those in tensors of one element for each row, and those in each of the tensors, with that of
    the class axis last. Axes are joined where they can be in all of them.
    """
    rows = shape[:-1]
    row_steps = torch.empty(rows, device="meta").stride()
    order = sorted(range(len(rows)), key=lambda axis: strides[0][axis], reverse=True)
    every = [row_steps, *(each for each in strides if each is not None)]
    axes: list[list[int]] = []  # size, and a step for each of `every`
    for axis in order:
        size, steps = rows[axis], [each[axis] for each in every]
        if size == 1 and len(rows) > 1:
            continue
        if axes and all(a == b * size for a, b in zip(axes[-1][1:], steps, strict=True)):
            axes[-1] = [axes[-1][0] * size, *steps]
        else:
            axes.append([size, *steps])
    axes = axes or [[1] * (1 + len(every))]
    found = iter(zip(*axes, strict=True))
    sizes, row_steps = next(found), next(found)
    return (
        sizes,
        row_steps,
        tuple(None if each is None else (*next(found), each[-1]) for each in strides),
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
    for path in (Path(torch.__file__).parent / "lib").glob(library):
        found = getattr(ctypes.CDLL(str(path)), function, None)
        return ctypes.cast(found, ctypes.c_void_p).value or 0 if found else 0
    return 0


native = _connect()
