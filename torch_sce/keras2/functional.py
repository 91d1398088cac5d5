"""The losses as functions: one value for each position, without weights or averages."""

from typing import Unpack

from torch import Tensor

from ..arrays import ArrayLike, floats, to_tensor
from ..kernels import row_losses, target_losses
from ..options import CALL, NoArguments, parse_axis, parse_flag, parse_smoothing, unexpected
from ..ragged import packed, restored
from ..samples import prepare, prepare_targets
from .rules import labels_of, parse_ignored


def sparse_categorical_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    axis: int = -1,
    ignore_class: int | float | None = None,
    **others: Unpack[NoArguments],
) -> Tensor:
    """The cross-entropy, in nats, between integer labels and predictions, one value per position.

    As `torch_sce.sparse_categorical_crossentropy`, with `axis` before `ignore_class` and these
    rules.

    Args:
        y_true: labels, of any integer dtype, bool, or floats (truncated toward zero), of
            `y_pred`'s shape without its class axis. They may be flat, and may have axes of size 1
            more or less.
        y_pred: logits or probabilities, (..., C), float16, bfloat16, float32 or float64.
        from_logits: whether `y_pred` holds logits.
        axis: the class axis of `y_pred`.
        ignore_class: a label, in `[0, C)` or not, whose positions get loss 0 and gradient 0. It is
            truncated, too, and compared with truncated labels.

    Returns:
        The losses, of `y_pred`'s shape without its class axis and of its dtype.

    Raises:
        ValueError: shapes that do not fit, no classes, an `axis` out of range, or (on the CPU, in
            eager mode) a label outside `[0, C)`. Elsewhere such a label makes its position's loss
            and gradient NaN.
        TypeError: predictions that are not real floating-point numbers, labels that are not
            real numbers, an `ignore_class` or `axis` that is not a number.

    Differs from Keras: half-precision losses are computed in float32 and rounded at the end.

    The rule is that of `tf_keras.losses.sparse_categorical_crossentropy`.

    >>> y_pred = [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]]
    >>> losses = sparse_categorical_crossentropy([1, 2], y_pred, False, -1, 2)
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.0513, 0.0]
    """
    if others:
        name, taken = "sparse_categorical_crossentropy", ["axis", "ignore_class"]
        raise unexpected(name, others, taken, CALL, "the call of a loss")
    axis = parse_axis(axis)
    dense = packed(y_true, y_pred, axis=axis)
    predictions = floats(dense.y_pred)
    samples = prepare(
        labels_of(to_tensor("y_true", dense.y_true, predictions), predictions, axis),
        predictions,
        from_logits=parse_flag("from_logits", from_logits),
        axis=axis,
        ignore_class=parse_ignored(ignore_class),
    )
    z, y, counted = samples.z, samples.y, samples.counted
    losses = row_losses(z, y, counted, samples.clip)
    return restored(losses.to(predictions.dtype), y_pred)


def categorical_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    label_smoothing: int | float = 0.0,
    axis: int = -1,
    **others: Unpack[NoArguments],
) -> Tensor:
    """The cross-entropy, in nats, between targets and predictions, one value per position.

    As `torch_sce.categorical_crossentropy`, in the predictions' dtype.

    Args:
        y_true: targets, one-hot or soft, of any real dtype, in `y_pred`'s shape.
        y_pred: logits or probabilities, (..., C), float16, bfloat16, float32 or float64.
        from_logits: whether `y_pred` holds logits.
        label_smoothing: how much of each target is spread evenly over the classes, from 0 to 1.
        axis: the class axis of both.

    Returns:
        The losses, of `y_pred`'s shape without its class axis and of its dtype.

    Raises:
        ValueError: shapes that differ, no classes, `axis` or `label_smoothing` out of range.
        TypeError: predictions that are not real floating-point numbers, targets that are not real
            numbers, an `axis` or `label_smoothing` that is not a number.

    Differs from Keras: as `torch_sce.categorical_crossentropy`; half-precision losses are computed
    in float32 and rounded at the end.

    The rule is that of `tf_keras.losses.categorical_crossentropy`.

    >>> y_true = [[0, 1, 0], [0, 0, 1]]
    >>> losses = categorical_crossentropy(y_true, [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.0513, 2.3026]
    """
    if others:
        raise unexpected("categorical_crossentropy", others, ["axis"], CALL, "the call of a loss")
    label_smoothing = parse_smoothing(label_smoothing)
    axis = parse_axis(axis)
    dense = packed(y_true, y_pred, axis=axis)
    predictions = floats(dense.y_pred)
    samples = prepare_targets(
        dense.y_true,
        predictions,
        from_logits=parse_flag("from_logits", from_logits),
        axis=axis,
        matches_ranks=False,
    )
    losses = target_losses(samples.z, samples.y, samples.counted, samples.clip, label_smoothing)
    return restored(losses.to(predictions.dtype), y_pred)
