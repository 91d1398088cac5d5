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
without its logarithms and its softmax. Summaries of disjoint slices of the classes merge: take
the larger m, rescale and add s, add p (0 where the label lies in another slice).

Three traps of rounding shape this. `(m, s)` is kept for the backward pass and not m + log s: for
logits with an offset of 1e5 that keeps the gradient's relative error at 7.5e-7, not 3.9e-3. The
loss of logits is log s + (m - p), not (m + log s) - p, which is off by 5e-4 at an offset of 1e4.
And the loss of probabilities takes one logarithm: log s and log p are both near -15 where all
the probabilities are tiny, and their difference keeps only the digits that -15 has left.

Rows come as z (A, C, B) and y (A, B): the axes before the class axis, the class axis, the axes
behind it. So a class axis anywhere is a view, and B is 1 where it is the last. A row whose label
is `IGNORED` has loss 0 and gradient 0, whatever it holds. A row whose label is neither that nor a
class has loss NaN and gradient NaN. Nothing here knows of weights, masks or averages: a weight is
the upstream gradient g of its row.
"""

import torch
from torch import Tensor

from . import aten
from .aten import IGNORED, Clip

__all__ = ["IGNORED", "row_losses"]


def row_losses(z: Tensor, y: Tensor, clip: Clip = None) -> Tensor:
    """The loss of every row, (A, B): float64 for float64 z, otherwise float32.

    `clip` says what z holds: None for logits, (low, high) for probabilities to be clipped to
    these inclusive bounds.
    """
    if torch.compiler.is_compiling():  # the compiler fuses plain operations better than we could
        return aten.row_losses(z.to(aten.row_dtype(z)), y, clip)
    return _RowLosses.apply(z, y, clip)[0]  # pyright: ignore[reportIndexIssue] apply is untyped


class _RowLosses(torch.autograd.Function):
    """(z, y, clip) -> (loss, m, s). Only the loss is differentiable, and only in z."""

    @staticmethod
    def forward(z, y, clip):
        return aten.forward(z, y, clip)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, y, ctx.clip = inputs
        _, m, s = output
        ctx.mark_non_differentiable(m, s)
        ctx.save_for_backward(z, y, m, s)
        ctx.save_for_forward(z, y)

    @staticmethod
    def backward(ctx, *upstream):
        g, (z, y, m, s) = upstream[0], ctx.saved_tensors
        if _needs_expression(g):
            return _differentiable_gradients(g, z, y, ctx.clip).to(z.dtype), None, None
        return aten.backward(g, z, y, m, s, ctx.clip), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        z, y = ctx.saved_tensors
        one = torch.ones_like(y, dtype=aten.row_dtype(z))
        slope = _differentiable_gradients(one, z, y, ctx.clip)
        return (slope * tangents[0].to(slope.dtype)).sum(1), None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """More rows: the mapped axis joins the first one."""
        (z, y, clip), (z_dim, y_dim, _), size = inputs, in_dims, info.batch_size
        z = z.expand(size, *z.shape) if z_dim is None else z.movedim(z_dim, 0)
        y = y.expand(size, *y.shape) if y_dim is None else y.movedim(y_dim, 0)
        outputs = _RowLosses.apply(z.flatten(0, 1), y.flatten(0, 1), clip)
        return tuple(out.unflatten(0, y.shape[:2]) for out in outputs), (0, 0, 0)


def _needs_expression(g: Tensor) -> bool:
    """Whether more than the numbers of a gradient is wanted: a derivative of it, or a transform.

    Writing into a buffer would do for neither. The last test is for `is_grads_batched=True`.
    """
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(g)  # pyright: ignore[reportAttributeAccessIssue] no stub
    )


def _differentiable_gradients(g: Tensor, z: Tensor, y: Tensor, clip: Clip) -> Tensor:
    """The gradients as an expression in z, in the dtype rows are computed in."""
    wide = aten.blank_ignored(z.to(aten.row_dtype(z)), y)
    m, s, _ = aten.summarize(wide, y, clip)
    return aten.row_gradients(g, wide, y, m, s, clip)
