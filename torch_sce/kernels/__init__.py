"""Losses of rows of predictions on any device: the choice of kernels, and autograd.

`contract` has the formulas, and what a module of kernels consists of:

    aten            the definition, in PyTorch's operations; for any device
    cpu, cuda       for one device: in C, and in Triton
    targets, cpu_targets, cuda_targets
                    the same for rows whose label is a target for every class

Rows are z (..., C) and y (...). The last axis is the class axis, with any stride. Predictions are
not copied into another layout (except by `cuda`, if the rows need more than three axes, as in a
crop of a volume). Nothing here handles weights, masks or averages: a weight is the upstream
gradient g of its row.

Tensors that are not plain (`are_plain`) use the definitions, `aten.row_losses` and
`targets.losses`, which are PyTorch's operations.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from . import aten, cpu, cpu_targets, modes, operators, targets
from .contract import Clip, Kernels, TargetKernels
from .cpu import native

__all__ = [
    "Clip",
    "are_plain",
    "computes_parts",
    "is_dtensor",
    "kernels_for",
    "native",
    "needs_definition",
    "require_first_derivative",
    "row_losses",
    "sum_of_losses",
    "takes_operators",
    "target_kernels",
    "target_losses",
    "whole_rows",
]

PLAIN = (Tensor, torch.nn.Parameter)


def row_losses(
    z: Tensor,
    y: Tensor,
    counted: Tensor | None = None,
    clip: Clip = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of every row, of y's shape: float64 for float64 z, otherwise float32.

    `counted` and `clip` are as `contract.Kernels` has them. With `smoothing` the loss is that of
    smoothed one-hot targets, see `targets`.
    """
    if smoothing:
        return target_losses(z, y, counted, clip, smoothing)
    if _is_compiled_for_cpu(z, y, counted):
        return operators.label_losses(z, y, counted, clip)
    if needs_definition(z, y, counted):
        if computes_parts(z) and z.ndim > 1:
            from . import dtensors  # imported here: few need it, and it is slow

            z, y, counted = dtensors.placed(z, y, counted, divides_classes=True)
            kernels = dtensors.Labels(dtensors.classes_of(z))
            return _RowLosses.apply(z, y, counted, clip, kernels)
        z = whole_rows(z)
        return aten.row_losses(z.to(aten.row_dtype(z)), y, counted, clip)
    shape, kernels = y.shape, kernels_for(z)
    if kernels is cpu:
        return _RowLosses.apply(z, y, counted, clip, kernels)
    if y.ndim == 0:
        z, y, counted = z.unsqueeze(0), y.unsqueeze(0), _over(Tensor.unsqueeze, counted, 0)
    elif y.ndim > 1 and z.is_contiguous():
        z, y, counted = z.flatten(0, -2), y.flatten(), _over(Tensor.flatten, counted)
    return _RowLosses.apply(z, y, counted, clip, kernels).view(shape)


def sum_of_losses(
    z: Tensor,
    y: Tensor,
    counted: Tensor | None = None,
    clip: Clip = None,
    divisor: float = 1.0,
    factor: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The weighted sum of all rows' losses over a number: `(row_losses * factor).sum() / divisor`.

    All labels that count are in [0, C). They have been read: no mode or transform is active.

    Args:
        z, y, counted, clip: as for `row_losses`.
        divisor: the number.
        factor: that of each loss, of y's shape and the dtype of the losses; a constant.
        order: that in which the losses are added up, of y's first axis; it decides the last bits.
    """
    if native and z.is_cpu and _is_plain(z) and not _is_dual(z):
        if order is not None and y.ndim > 1:
            rows = torch.arange(y.numel(), device=y.device)
            order = rows.view(len(y), math.prod(y.shape[1:]))[order].flatten()
        return _apply_sum(z, y, counted, clip, divisor, factor, order)
    losses = row_losses(z, y, counted, clip)
    losses = losses if factor is None else losses * factor
    return (losses if order is None else losses[order]).sum() / divisor


def target_losses(
    z: Tensor,
    t: Tensor,
    counted: Tensor | None = None,
    clip: Clip = None,
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of every row of z for the targets t of its shape: (...) for (..., C).

    t may also be labels (...), for smoothed one-hot targets.
    """
    if _is_compiled_for_cpu(z, t, counted) and target_kernels(z, t) is cpu_targets:
        return operators.target_losses(z, t, counted, clip, smoothing)
    if needs_definition(z, t, counted):
        if computes_parts(z) and z.ndim > 1:
            from . import dtensors

            z, t, counted = dtensors.placed(z, t, counted)
            return _TargetLosses.apply(z, t, counted, clip, smoothing, dtensors.Targets)
        return targets.losses(whole_rows(z), whole_rows(t), counted, clip, smoothing)
    if z.ndim > 1:
        return _TargetLosses.apply(z, t, counted, clip, smoothing, target_kernels(z, t))
    counted = _over(Tensor.unsqueeze, counted, 0)
    return target_losses(z.unsqueeze(0), t.unsqueeze(0), counted, clip, smoothing).squeeze(0)


def _over(operation: Callable[..., Tensor], x: Tensor | None, *arguments: int) -> Tensor | None:
    return None if x is None else operation(x, *arguments)


def _is_compiled_for_cpu(z: Tensor, *others: Tensor | None) -> bool:
    """Whether this becomes part of a compiled graph, with tensors that `cpu` can read."""
    return torch.compiler.is_compiling() and kernels_for(z) is cpu and takes_operators(z, *others)


def takes_operators(*tensors: Tensor | None) -> bool:
    """Whether a compiled graph may call an operator of this package on these tensors.

    An exported program has the definitions, and so do transforms and forward derivatives.
    """
    return (
        hasattr(torch.compiler, "is_exporting")  # from PyTorch 2.7 on
        and not torch.compiler.is_exporting()
        and not modes.transforms_active()
        and not modes.forward_derivatives_active()
        and all(x is None or type(x) in PLAIN for x in tensors)
    )


def needs_definition(*tensors: Tensor | None) -> bool:
    """Whether the definitions are used: in compiled graphs, and for forward derivatives."""
    return not are_plain(*tensors) or any(x is not None and _is_dual(x) for x in tensors)


def whole_rows(z: Tensor) -> Tensor:
    """z; a DTensor with its classes gathered, so that each rank has whole rows."""
    if not is_dtensor(z):
        return z
    from . import dtensors

    z = dtensors.whole_rows(z)
    # A graph has to say whose it is: PyTorch's cache of compiled graphs takes that of one rank for
    # another's, whose parts are others (pytorch/pytorch#188390). This leaves nothing out.
    return z[..., : 2**62 + dist.get_rank()] if torch.compiler.is_compiling() else z


def is_dtensor(x: Any) -> bool:
    return hasattr(x, "placements")


def computes_parts(z: Tensor) -> bool:
    """Whether each rank computes its part of a DTensor's rows.

    Compiled graphs, transforms and forward derivatives have the definitions.
    """
    return is_dtensor(z) and not (
        torch.compiler.is_compiling()
        or modes.transforms_active()
        or modes.forward_derivatives_active()
    )


class _RowLosses(torch.autograd.Function):
    """The losses of rows, by the kernels of z's device."""

    @staticmethod
    def forward(
        ctx: Any,  # as in PyTorch: any attribute can be set on it
        z: Tensor,
        y: Tensor,
        counted: Tensor | None,
        clip: Clip,
        kernels: Kernels,
    ) -> Tensor:
        ctx.kernels, ctx.clip = kernels, clip
        loss, saved = kernels.forward(z, y, counted, clip)
        ctx.save_for_backward(z, y, counted, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (z, y, counted, *saved) = upstream, ctx.saved_tensors
        if _needs_expression(g, z, y, counted):
            dz = _differentiable_gradients(g, z, y, counted, ctx.clip)
        else:
            dz = ctx.kernels.backward(g, z, y, counted, ctx.clip, tuple(saved))
        return dz, None, None, None, None


class _SumOfLosses(torch.autograd.Function):
    """The sum of the losses of rows times their factors, over a number, by the CPU's kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        y: Tensor,
        counted: Tensor | None,
        clip: Clip,
        divisor: float,
        factor: Tensor | None,
        order: Tensor | None,
    ) -> Tensor:
        ctx.options = clip, divisor
        value, (saved,) = cpu.forward_sum(z, y, counted, clip, divisor, factor, order)
        ctx.save_for_backward(z, y, counted, factor, saved)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (z, y, counted, factor, saved) = upstream, ctx.saved_tensors
        clip, divisor = ctx.options
        if _needs_expression(g, z, y, counted, factor):
            g = g / divisor
            g = (g if factor is None else g * factor).expand(y.shape)
            dz = _differentiable_gradients(g, z, y, counted, clip)
        else:
            dz = cpu.backward(g, z, y, counted, clip, (saved,), None, divisor, factor)
        return dz, None, None, None, None, None, None


_apply_sum = modes.apply_of(_SumOfLosses)


class _TargetLosses(torch.autograd.Function):
    """The losses of rows with a target for every class."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        t: Tensor,
        counted: Tensor | None,
        clip: Clip,
        smoothing: float,
        kernels: TargetKernels,
    ) -> Tensor:
        ctx.kernels, ctx.options = kernels, (clip, smoothing)
        loss, saved = kernels.forward(z, t, counted, clip, smoothing)
        ctx.save_for_backward(z, t, counted, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (z, t, counted, *saved) = upstream, ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if _needs_expression(g, z, t, counted):
            both = targets.gradients(g, z, t, counted, *ctx.options)
            found = [d if need else None for d, need in zip(both, needs, strict=True)]
        else:
            found = ctx.kernels.backward(g, z, t, counted, *ctx.options, needs, tuple(saved))
        return *found, None, None, None, None


def kernels_for(z: Tensor) -> Kernels:
    """The module for z's device."""
    if z.is_cuda and z.dtype != torch.float64:
        return _cuda_kernels(z.device)
    return cpu if native and z.device.type == "cpu" else aten


def target_kernels(z: Tensor, t: Tensor) -> TargetKernels:
    """`targets`, but where the kernels for z's device have their own."""
    # Which floats of 8 bits Triton can read depends on the device.
    eight_bits = t.is_floating_point() and t.element_size() == 1
    kernels = kernels_for(z)
    if eight_bits or kernels is aten:
        return targets
    if kernels is cpu:
        return cpu_targets
    from . import cuda_targets  # imported here, with Triton

    return cuda_targets


@functools.cache
def _cuda_kernels(device: torch.device) -> Kernels:
    """`cuda`, or `aten` where there is no Triton, or none for this device."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return aten
    try:
        from . import cuda  # imported here: Triton is optional
    except ImportError:
        return aten
    return cuda


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether kernels may read these tensors' memory: dense ones, with no mode or transform active.

    All other tensors use PyTorch's operations: a subclass defines what each of them does, and a
    mode or a transform sees only them.
    """
    if is_traced():
        return False
    for x in tensors:  # noqa: SIM110  all() of a generator takes twice as long, in every call
        if x is not None and not _is_plain(x):
            return False
    return True


def is_traced() -> bool:
    """Whether the compiler, a transform or a mode is active, for which values cannot be read."""
    return (
        torch.compiler.is_compiling()
        or modes.transforms_active()
        or modes.dispatch_modes_active()
        or modes.is_jit_tracing()
    )


def _is_dual(x: Tensor) -> bool:
    return modes.forward_derivatives_active() and forward_ad.unpack_dual(x).tangent is not None


def _is_plain(x: Tensor) -> bool:
    """Whether x is a tensor in memory. A batch from `is_grads_batched=True` has no storage."""
    return type(x) in PLAIN and x.layout == torch.strided and not x.is_meta and modes.has_memory(x)


def _needs_expression(g: Tensor, z: Tensor, *others: Tensor | None) -> bool:
    """Whether the gradient is differentiated again or transformed, or a tensor is not plain.

    Writing into a buffer supports none of these.
    """
    return torch.is_grad_enabled() or not (are_plain(g, z, *others) or computes_parts(z))


def require_first_derivative(what: str, instead: str) -> None:
    """Raises in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} cannot be differentiated twice (create_graph=True): {instead}")


def _differentiable_gradients(
    g: Tensor, z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip
) -> Tensor:
    """The gradients as an expression in z."""
    if is_dtensor(z):  # not every operation below takes DTensors beside other tensors
        losses = aten.row_losses(whole_rows(z).to(aten.row_dtype(z)), y, counted, clip)
        return torch.autograd.grad(losses, z, g, create_graph=True)[0]
    if counted is not None:
        g = torch.where(counted, g, 0)
    wide = aten.blanked(z.to(aten.row_dtype(z)), counted)
    summary = aten.summarize(wide, y, clip)
    return aten.row_gradients(g, wide, y, counted, clip, summary).to(z.dtype)
