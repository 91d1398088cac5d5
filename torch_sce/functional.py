"""The losses as functions: one value for each position, without weights or averages."""

from typing import Unpack

from torch import Tensor

from .arrays import ArrayLike
from .kernels import row_losses, target_losses
from .options import (
    CALL,
    NoArguments,
    parse_axis,
    parse_flag,
    parse_ignore_class,
    parse_smoothing,
    unexpected,
)
from .ragged import restored
from .samples import prepare, prepare_targets


def sparse_categorical_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    ignore_class: int | float | None = None,
    axis: int = -1,
    label_smoothing: int | float = 0.0,
    **others: Unpack[NoArguments],
) -> Tensor:
    """The cross-entropy, in nats, between integer labels and predictions, one value per position.

        from logits:         log(sum_j exp(z_j)) - z_y
        from probabilities:  log(sum_j c_j) - log(c_y),  c = clip(q, 1e-7, 1 - 1e-7)

    Args:
        y_true: labels, of any integer dtype, bool, or floats (truncated toward zero), of
            `y_pred`'s shape without its class axis, or with a size of 1 in its place.
        y_pred: logits or probabilities, (..., C), float16, bfloat16, float32 or float64.
        from_logits: whether `y_pred` holds logits.
        ignore_class: a label, in `[0, C)` or not, whose positions get loss 0 and gradient 0.
        axis: the class axis of `y_pred`.
        label_smoothing: how much of each label is spread evenly over the classes, from 0 to 1. The
            losses are those of `categorical_crossentropy` for one-hot labels, which are not made:
            it normalises probabilities before it clips them.

    Returns:
        The losses, of `y_pred`'s shape without its class axis: float64 for float64 predictions,
        otherwise float32.

    Raises:
        ValueError: shapes that do not fit, no classes, `axis` or `label_smoothing` out of range, or
            (on the CPU, in eager mode) a label outside `[0, C)`. Elsewhere such a label makes its
            position's loss and gradient NaN.
        TypeError: predictions that are not real floating-point numbers, labels that are not
            real numbers, an `ignore_class`, `axis` or `label_smoothing` that is not a number.

    Differs from Keras: any class axis works, lists are accepted as arrays, half-precision
    predictions give float32 losses, labels are never rounded.

    The rule is that of `keras.losses.sparse_categorical_crossentropy` on TensorFlow, which has no
    `label_smoothing` in Keras 3.15.

    >>> losses = sparse_categorical_crossentropy([1, 2], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.0513, 2.3026]
    """
    if others:
        name, taken = "sparse_categorical_crossentropy", ["axis", "ignore_class"]
        raise unexpected(name, others, taken, CALL, "the call of a loss")
    label_smoothing = parse_smoothing(label_smoothing)
    samples = prepare(
        y_true,
        y_pred,
        from_logits=parse_flag("from_logits", from_logits),
        axis=parse_axis(axis),
        ignore_class=parse_ignore_class(ignore_class),
    )
    z, y, counted, clip = samples.z, samples.y, samples.counted, samples.clip
    losses = row_losses(z, y, counted, clip, label_smoothing)
    return restored(losses, y_pred)


def categorical_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    label_smoothing: int | float = 0.0,
    axis: int = -1,
    **others: Unpack[NoArguments],
) -> Tensor:
    """The cross-entropy, in nats, between targets and predictions, one value per position.

        from logits:         -sum_j y_j log(softmax(z)_j)
        from probabilities:  -sum_j y_j log(c_j),  c = clip(q / sum(q), 1e-7, 1 - 1e-7)

    Args:
        y_true: targets, one-hot or soft, of any real dtype, in `y_pred`'s shape.
        y_pred: logits or probabilities, (..., C), float16, bfloat16, float32 or float64.
        from_logits: whether `y_pred` holds logits.
        label_smoothing: how much of each target is spread evenly over the classes, from 0 to 1:
            y becomes y * (1 - label_smoothing) + label_smoothing / C.
        axis: the class axis of both.

    Returns:
        The losses, of `y_pred`'s shape without its class axis: float64 for float64 predictions,
        otherwise float32. They have gradients with respect to targets that require one, too.

    Raises:
        ValueError: shapes that differ, no classes, `axis` or `label_smoothing` out of range.
        TypeError: predictions that are not real floating-point numbers, targets that are not real
            numbers, an `axis` or `label_smoothing` that is not a number.

    Differs from Keras: for logits and targets that do not sum to 1 the gradient is the derivative
    of the loss, smoothing follows `axis`, half-precision predictions give float32 losses.

    The rule is that of `keras.losses.categorical_crossentropy` on TensorFlow. Its probabilities
    are normalised before they are clipped; for integer labels they are clipped first.

    >>> y_true = [[0, 1, 0], [0, 0, 1]]
    >>> losses = categorical_crossentropy(y_true, [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.0513, 2.3026]
    """
    if others:
        raise unexpected("categorical_crossentropy", others, ["axis"], CALL, "the call of a loss")
    label_smoothing = parse_smoothing(label_smoothing)
    samples = prepare_targets(
        y_true,
        y_pred,
        from_logits=parse_flag("from_logits", from_logits),
        axis=parse_axis(axis),
        matches_ranks=False,
    )
    z, t, counted, clip = samples.z, samples.y, samples.counted, samples.clip
    return restored(target_losses(z, t, counted, clip, label_smoothing), y_pred)
