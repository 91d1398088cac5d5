"""The CPU's kernels as operators, which a graph of `torch.compile` calls.

They take less time than the code that Inductor makes of the definitions: see docs/speed.md.
Exported programs have the definitions, so that they run without this package.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, library

from . import cpu, cpu_targets
from .aten import empty_like
from .contract import Clip


def label_losses(z: Tensor, y: Tensor, counted: Tensor | None, clip: Clip) -> Tensor:
    """The loss of every row: `cpu.forward` in a compiled graph."""
    return _label_losses(z, y, counted, clip)[0]


def target_losses(
    z: Tensor, t: Tensor, counted: Tensor | None, clip: Clip, smoothing: float
) -> Tensor:
    """The loss of every row: `cpu_targets.forward` in a compiled graph."""
    return _target_losses(z, t, counted, clip, smoothing)[0]


def _bounds(clip: Sequence[float] | None) -> Clip:
    return None if clip is None else (clip[0], clip[1])


@library.custom_op(
    "torch_sce::label_losses", mutates_args=(), device_types="cpu",
    schema="(Tensor z, Tensor y, Tensor? counted, float[]? clip) -> (Tensor, Tensor)",
)  # fmt: skip
def _label_losses(
    z: Tensor, y: Tensor, counted: Tensor | None, clip: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    loss, saved = cpu.forward(z, y, counted, _bounds(clip))
    return loss, saved[0]


@_label_losses.register_fake
def _(
    z: Tensor, y: Tensor, counted: Tensor | None, clip: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    return cpu.results(z, y.shape, 3 if clip is None else 2)


@library.custom_op(
    "torch_sce::label_gradients", mutates_args=(), device_types="cpu",
    schema="(Tensor g, Tensor z, Tensor y, Tensor? counted, float[]? clip, Tensor saved) -> Tensor",
)  # fmt: skip
def _label_gradients(
    g: Tensor,
    z: Tensor,
    y: Tensor,
    counted: Tensor | None,
    clip: Sequence[float] | None,
    saved: Tensor,
) -> Tensor:
    return cpu.backward(g, z, y, counted, _bounds(clip), (saved,))


@_label_gradients.register_fake
def _(g: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return empty_like(z)


def _keep_labels(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.clip = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward_of_labels(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    z, y, counted, saved = ctx.saved_tensors
    dz = None if g is None else _label_gradients(g, z, y, counted, ctx.clip, saved)
    return dz, None, None, None


_label_losses.register_autograd(_backward_of_labels, setup_context=_keep_labels)


@library.custom_op(
    "torch_sce::target_losses", mutates_args=(), device_types="cpu",
    schema="(Tensor z, Tensor t, Tensor? counted, float[]? clip, float smoothing)"
           " -> (Tensor, Tensor)",
)  # fmt: skip
def _target_losses(
    z: Tensor, t: Tensor, counted: Tensor | None, clip: Sequence[float] | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    loss, saved = cpu_targets.forward(z, t, counted, _bounds(clip), smoothing)
    return loss, saved[0]


@_target_losses.register_fake
def _(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return cpu.results(z, z.shape[:-1], 3)


# Of z, of t, or of both: which are needed is known when the graph is made.
@library.custom_op(
    "torch_sce::target_gradients", mutates_args=(), device_types="cpu",
    schema="(Tensor g, Tensor z, Tensor t, Tensor? counted, float[]? clip, float smoothing,"
           " bool[] needs, Tensor saved) -> Tensor[]",
)  # fmt: skip
def _target_gradients(
    g: Tensor,
    z: Tensor,
    t: Tensor,
    counted: Tensor | None,
    clip: Sequence[float] | None,
    smoothing: float,
    needs: Sequence[bool],
    saved: Tensor,
) -> list[Tensor]:
    both = (needs[0], needs[1])
    found = cpu_targets.backward(g, z, t, counted, _bounds(clip), smoothing, both, (saved,))
    return [d for d in found if d is not None]


@_target_gradients.register_fake
def _(
    g: Tensor,
    z: Tensor,
    t: Tensor,
    counted: Tensor | None,
    clip: Sequence[float] | None,
    smoothing: float,
    needs: Sequence[bool],
    saved: Tensor,
) -> list[Tensor]:
    return [empty_like(x) for x, need in zip((z, t), needs, strict=True) if need]


def _keep_targets(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.clip, ctx.smoothing = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward_of_targets(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    z, t, counted, saved = ctx.saved_tensors
    needs = [g is not None and need for need in ctx.needs_input_grad[:2]]
    found = iter(
        _target_gradients(g, z, t, counted, ctx.clip, ctx.smoothing, needs, saved)
        if any(needs) and g is not None
        else ()
    )
    return *(next(found) if need else None for need in needs), None, None, None


_target_losses.register_autograd(_backward_of_targets, setup_context=_keep_targets)
