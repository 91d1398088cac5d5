"""Rows of predictions: their losses and gradients, whatever the device.

A row of C predictions with a label y is summarised by three numbers, which give its loss (in
nats) and its gradient:

    from logits z:         m = max_j z_j    s = sum_j exp(z_j - m)    p = z_y
    from probabilities q:  m = 0            s = sum_j c_j             p = c_y

                           c = clip(q, low, high)

    logits:         loss = log s + (m - p)
                    dz_j = g * (exp(z_j - m) / s - [j == y])

    probabilities:  loss = log(s / p)
                    dq_j = g * [low <= q_j <= high] * (1 / s - [j == y] / p)

The second row model is what tf.keras does to probabilities (clip, log, softmax cross-entropy)
without its logarithms and its softmax. Summaries of disjoint slices of the classes merge: take the
larger m, rescale and add s, add p (0 where the label lies in another slice).

Three traps of rounding shape this. `(m, s)` is kept for the backward pass and not m + log s: for
logits with an offset of 1e5 that keeps the gradient's relative error at 7.5e-7, not 3.9e-3. The
loss of logits is log s + (m - p), not (m + log s) - p, which is off by 5e-4 at an offset of 1e4.
And the loss of probabilities takes one logarithm: log s and log p are both near -15 where all
the probabilities are tiny, and their difference keeps only the digits that -15 has left.

Rows come as z (..., C) and y (...). The last axis is the class axis, wherever it lies in memory,
and predictions are not copied to have it elsewhere (but by `cuda`, where rows are left on more
than three axes, as in a crop of a volume). A row whose label is `IGNORED` has loss 0 and gradient
0, whatever it holds. A row whose label is neither that nor a class has loss NaN and gradient NaN.
Nothing here knows of weights, masks or averages: a weight is the upstream gradient g of its row.

`aten` has the definition, and serves any device. A module for one device, `cpu` or `cuda`, has its
`forward` and `backward`; what the first returns behind the losses the second is given at the end.
`targets` is about rows whose label is a target for every class, with formulas of their own: it
serves any device with `forward_targets` and `backward_targets`, and `cuda` has these two as well.

The modules for a device read memory and write into it. Tensors that are not plain (`are_plain`)
take the definitions, `aten.row_losses` and `targets.losses`, which are PyTorch's operations.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten, cpu, modes, targets
from .aten import IGNORED, Clip
from .targets import Smoothing

__all__ = ["IGNORED", "are_plain", "row_losses", "target_losses", "whole_rows"]

PLAIN = (Tensor, torch.nn.Parameter)


def row_losses(z: Tensor, y: Tensor, clip: Clip = None, all_classes: bool = False) -> Tensor:
    """The loss of every row, of y's shape: float64 for float64 z, otherwise float32.

    `clip` says what z holds: None for logits, (low, high) for probabilities to be clipped to
    these inclusive bounds. `all_classes` says that every label is known to be a class.
    """
    if _needs_plain_operations(z, y):
        z = whole_rows(z)
        return aten.row_losses(z.to(aten.row_dtype(z)), y, clip)
    shape, kernels = y.shape, _kernels(z)
    if y.ndim == 0:
        z, y = z.unsqueeze(0), y.unsqueeze(0)
    elif y.ndim > 1 and z.is_contiguous():
        z, y = z.flatten(0, -2), y.flatten()
    if kernels is cpu and clip is None and cpu.is_small(z):
        losses = cpu.small_losses(z, y, all_classes)
    else:
        losses = _RowLosses.apply(z, y, clip, all_classes, kernels)
    return losses if losses.shape == shape else losses.view(shape)


def target_losses(
    z: Tensor,
    t: Tensor,
    clip: Clip = None,
    smoothing: Smoothing = None,
    counted: Tensor | None = None,
) -> Tensor:
    """The loss of every row of z for the targets t of its shape: (...) for (..., C).

    `clip` is as for `row_losses`. `smoothing`, (keep, share), makes t_j keep * t_j + share.
    `counted`, (...), is false for rows that have loss 0 and gradient 0, whatever they hold.
    """
    if _needs_plain_operations(z, t, counted):
        z, t = whole_rows(z), whole_rows(t)
        return targets.losses(z, t, clip, smoothing, counted)
    if z.device.type == "cpu" and targets.is_small(z, clip):
        return targets.losses(z, t, clip, smoothing, counted)
    if z.ndim == 1:
        rows = None if counted is None else counted.unsqueeze(0)
        return target_losses(z.unsqueeze(0), t.unsqueeze(0), clip, smoothing, rows).squeeze(0)
    return _TargetLosses.apply(z, t, clip, smoothing, counted, _target_kernels(z, t))


def _needs_plain_operations(*tensors: Tensor | None) -> bool:
    """The compiler fuses them better than we could, and forward derivatives need them."""
    return not are_plain(*tensors) or any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def whole_rows(z: Tensor) -> Tensor:
    """z; a DTensor with its classes gathered, so that each rank has whole rows."""
    placements = getattr(z, "placements", None)
    if placements is None:
        return z
    from torch.distributed.tensor import Replicate  # not before: few need it, and it takes long

    whole = [Replicate() if p.is_partial() or p.is_shard(z.ndim - 1) else p for p in placements]
    return z.redistribute(placements=whole)  # pyright: ignore[reportAttributeAccessIssue]


class _RowLosses(torch.autograd.Function):
    """The losses of rows, by the kernels of z's device."""

    @staticmethod
    def forward(ctx, z, y, clip, all_classes, kernels):
        ctx.kernels, ctx.options = kernels, (clip, all_classes)
        loss, *summary = kernels.forward(z, y, clip, all_classes)
        ctx.save_for_backward(z, y, *summary)
        return loss

    @staticmethod
    def backward(ctx, *upstream):
        (g,), (z, y, *summary) = upstream, ctx.saved_tensors
        no_more = (None, None, None, None)
        if _needs_expression(g, z, y):
            return _differentiable_gradients(g, z, y, ctx.options[0]), *no_more
        return ctx.kernels.backward(g, z, y, *ctx.options, *summary), *no_more


class _TargetLosses(torch.autograd.Function):
    """The losses of rows with a target for every class."""

    @staticmethod
    def forward(ctx, z, t, clip, smoothing, counted, kernels):
        ctx.kernels, ctx.options = kernels, (clip, smoothing)
        loss, *summary = kernels.forward_targets(z, t, clip, smoothing, counted)
        ctx.save_for_backward(z, t, counted, *summary)
        return loss

    @staticmethod
    def backward(ctx, *upstream):
        (g,), (z, t, counted, *summary) = upstream, ctx.saved_tensors
        (clip, smoothing), needs = ctx.options, ctx.needs_input_grad[:2]
        if _needs_expression(g, z, t, counted):
            both = targets.gradients(g, z, t, clip, smoothing, counted)
            found = [d if need else None for d, need in zip(both, needs, strict=True)]
        else:
            options = (clip, smoothing, counted, needs)
            found = ctx.kernels.backward_targets(g, z, t, *options, *summary)
        return *found, None, None, None, None


def _kernels(z: Tensor) -> Any:
    """The module for z's device."""
    if z.is_cuda and z.dtype != torch.float64:
        return _cuda_kernels(z.device)
    return cpu if z.device.type == "cpu" else aten


def _target_kernels(z: Tensor, t: Tensor) -> Any:
    """`targets`, but where the kernels for z have such functions of their own."""
    kernels = _kernels(z)
    # Which floats of 8 bits Triton can read depends on the device.
    eight_bits = t.is_floating_point() and t.element_size() == 1
    return targets if eight_bits or kernels in (aten, cpu) else kernels


@functools.cache
def _cuda_kernels(device: torch.device) -> Any:
    """`cuda`, or `aten` where there is no Triton, or none for this device."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return aten
    try:
        from . import cuda  # not before: it imports Triton, which is optional
    except ImportError:
        return aten
    return cuda


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether kernels may read these tensors' memory: dense ones, with no mode or transform active.

    Everything else takes PyTorch's operations: a subclass defines what each of them does, and a
    mode or a transform sees nothing but them.
    """
    return not is_traced() and all(x is None or _is_plain(x) for x in tensors)


def is_traced() -> bool:
    """Whether the compiler, a transform or a mode is active, for which values cannot be read."""
    return (
        torch.compiler.is_compiling()
        or modes.transforms_active()
        or modes.dispatch_modes_active()
        or modes.is_jit_tracing()
    )


def _is_plain(x: Tensor) -> bool:
    """Whether x is a tensor in memory. A batch from `is_grads_batched=True` has no storage."""
    return type(x) in PLAIN and x.layout == torch.strided and not x.is_meta and modes.has_memory(x)


def _needs_expression(*tensors: Tensor | None) -> bool:
    """Whether more than the numbers of a gradient is wanted: a derivative of it, or a transform.

    Writing into a buffer would do for neither, nor for tensors that are not plain.
    """
    return torch.is_grad_enabled() or not are_plain(*tensors)


def _differentiable_gradients(g: Tensor, z: Tensor, y: Tensor, clip: Clip) -> Tensor:
    """The gradients as an expression in z."""
    wide = aten.blank_ignored(z.to(aten.row_dtype(z)), y)
    m, s, _ = aten.summarize(wide, y.clamp(0, z.shape[-1] - 1), clip)
    return aten.row_gradients(g, wide, y, m, s, clip).to(z.dtype)
