"""The accuracies as functions: for every position 1.0 if its prediction is right, otherwise 0.0.

Integer labels use the `sparse_` functions, one-hot labels the others. Predictions may be logits or
probabilities: only their order matters. Ties go to the lowest class number, but -0.0 is smaller
than 0.0, except for top-k. A NaN is never the largest, and a label outside `[0, C)` is never right.
Labels are compared without rounding: 257 is not 256, although it would be in bfloat16.
"""

import torch
from torch import Tensor

from .arrays import HALVES, ArrayLike, float64_on, to_tensor
from .kernels import whole_rows
from .options import parse_flag, parse_k
from .samples import (
    class_axis,
    class_numbers,
    labels_for,
    match_ranks,
    require_targets,
    values_can_be_read,
)


def sparse_categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Whether the largest prediction of each position is that of its label.

    Args:
        y_true: labels, of any real dtype, of `y_pred`'s shape without its last axis, or with a size
            of 1 in its place. A label that is not a whole number in `[0, C)` is never right.
        y_pred: logits or probabilities, (..., C), of any real dtype.

    Returns:
        float32, 1 or 0, in `y_true`'s shape, but without a last axis of size 1.

    Raises:
        ValueError: shapes that do not fit, no classes.
        TypeError: arguments that are not real numbers.

    Differs from Keras: labels are not rounded to `y_pred`'s dtype, shapes that only broadcast
    to each other raise an error.

    The rule is that of `keras.metrics.sparse_categorical_accuracy` on TensorFlow.

    >>> sparse_categorical_accuracy([2, 1], [[0.1, 0.6, 0.3], [0.05, 0.95, 0.0]]).tolist()
    [0.0, 1.0]
    """
    y_pred = to_tensor("y_pred", y_pred)
    y_true = to_tensor("y_true", y_true, y_pred)
    labels = labels_for(y_true, y_pred, class_axis(-1, y_pred), "CategoricalAccuracy")
    matches = _equal(labels, _largest(y_pred)).float().reshape(y_true.shape)
    return matches.squeeze(-1) if matches.ndim > 1 else matches


def categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Whether the largest prediction of each position is where its largest target is.

    Args:
        y_true: targets, one-hot or soft, of any real dtype, in `y_pred`'s shape.
        y_pred: logits or probabilities, (..., C), of any real dtype.

    Returns:
        float32, 1 or 0, of `y_pred`'s shape without its last axis.

    Raises:
        ValueError: shapes that differ, no classes.
        TypeError: arguments that are not real numbers.

    Differs from Keras: other shapes raise an error, even if they broadcast.

    The rule is that of `keras.metrics.categorical_accuracy` on TensorFlow.

    >>> categorical_accuracy([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0]]).tolist()
    [0.0, 1.0]
    """
    y_true, y_pred = _with_targets(y_true, y_pred, "SparseCategoricalAccuracy")
    return (_largest(y_true) == _largest(y_pred)).float()


def sparse_top_k_categorical_accuracy(
    y_true: ArrayLike, y_pred: ArrayLike, k: int = 5, from_sorted_ids: bool = False
) -> Tensor:
    """Whether fewer than k predictions of each position are larger than that of its label.

    So predictions that tie with the k-th largest all count. A position with a prediction that is
    not finite is never right.

    Args:
        y_true: labels, of any real dtype (floats are truncated toward zero), of `y_pred`'s shape
            without its last axis, or with a size of 1 in its place.
        y_pred: logits or probabilities, (..., C), with a batch axis. With `from_sorted_ids` the
            class numbers of each position, best first, of which the first k are used.
        k: how many, at least 1.
        from_sorted_ids: whether `y_pred` holds class numbers.

    Returns:
        float32, 1 or 0, in `y_true`'s shape.

    Raises:
        ValueError: shapes that do not fit, no classes, a k below 1.
        TypeError: arguments that are not real numbers, a k that is not an integer.

    Differs from Keras: predictions may have any real dtype, other shapes raise an error.

    The rule is that of `keras.metrics.sparse_top_k_categorical_accuracy` on TensorFlow.

    >>> y_pred = [[0.1, 0.9, 0.8, 0.0], [0.05, 0.95, 0.0, 0.0]]
    >>> sparse_top_k_categorical_accuracy([2, 3], y_pred, k=2).tolist()
    [1.0, 0.0]
    """
    k, from_sorted_ids = parse_k(k), parse_flag("from_sorted_ids", from_sorted_ids)
    y_pred = _batch(to_tensor("y_pred", y_pred))
    y_true = to_tensor("y_true", y_true, y_pred)
    labels = labels_for(y_true, y_pred, class_axis(-1, y_pred), "TopKCategoricalAccuracy")
    if from_sorted_ids:
        whole = labels if y_pred.is_floating_point() else class_numbers(labels)
        matches = _equal(whole.unsqueeze(-1), y_pred[..., :k]).any(-1) & labels.isfinite()
    else:
        matches = _in_top_k(class_numbers(labels), y_pred, k)
    return matches.float().reshape(y_true.shape)


def top_k_categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike, k: int = 5) -> Tensor:
    """Whether fewer than k predictions of each position are larger than that of its largest target.

    Args:
        y_true: targets, one-hot or soft, of any real dtype, in `y_pred`'s shape.
        y_pred: logits or probabilities, (..., C), with a batch axis.
        k: how many, at least 1.

    Returns:
        float32, 1 or 0, of `y_pred`'s shape without its last axis.

    Raises:
        ValueError: shapes that differ, no classes, a k below 1.
        TypeError: arguments that are not real numbers, a k that is not an integer.

    Differs from Keras: as `sparse_top_k_categorical_accuracy`.

    The rule is that of `keras.metrics.top_k_categorical_accuracy` on TensorFlow.

    >>> y_true, y_pred = [[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0.0]]
    >>> top_k_categorical_accuracy(y_true, y_pred, k=1).tolist()
    [0.0, 1.0]
    """
    k = parse_k(k)
    y_true, y_pred = _with_targets(y_true, y_pred, "SparseTopKCategoricalAccuracy")
    return _in_top_k(_largest(y_true), _batch(y_pred), k).float()


def accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Whether labels and predicted labels, in the same shape or (..., 1) and (...), are equal.

    >>> accuracy([1, 2, 3], [0, 2, 3]).tolist()
    [0.0, 1.0, 1.0]
    """
    y_pred = to_tensor("y_pred", y_pred)
    y_true, y_pred = match_ranks(to_tensor("y_true", y_true, y_pred), y_pred)
    if y_true.shape != y_pred.shape:
        raise ValueError(
            f"y_true must have y_pred's shape, {tuple(y_pred.shape)}, got {tuple(y_true.shape)}: "
            "Accuracy compares labels with labels; for predictions with a class axis use "
            "SparseCategoricalAccuracy or CategoricalAccuracy"
        )
    return _equal(y_true, y_pred).float()


def _with_targets(y_true: ArrayLike, y_pred: ArrayLike, sibling: str) -> tuple[Tensor, Tensor]:
    y_pred = to_tensor("y_pred", y_pred)
    y_true = to_tensor("y_true", y_true, y_pred)
    require_targets(y_true, y_pred, class_axis(-1, y_pred), sibling)
    return y_true, y_pred


def _batch(y_pred: Tensor) -> Tensor:
    if y_pred.ndim > 1:
        return y_pred
    raise ValueError(
        f"y_pred must have a batch axis and a class axis, got shape {tuple(y_pred.shape)}: "
        "for one example pass y_pred[None]"
    )


def _largest(values: Tensor) -> Tensor:
    """The index of the largest value on the last axis: the first of several, never a NaN.

    As in Keras 3 on TensorFlow, -0.0 is smaller than 0.0.
    """
    values = whole_rows(values)
    if not values.is_floating_point():
        return class_numbers(values).argmax(-1)
    index = values.argmax(-1)
    largest = values.gather(-1, index.unsqueeze(-1))
    if values_can_be_read(values) and not (largest.isnan() | (largest == 0)).any():
        return index  # argmax treats a NaN as the largest, and zeros as equal
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    values = torch.where(values.isnan(), -torch.inf, values)
    is_minus_zero = values.reciprocal() == -torch.inf  # Inductor fails on signbit before argmax
    return torch.where(is_minus_zero, -torch.finfo(values.dtype).tiny, values).argmax(-1)


def _in_top_k(y: Tensor, y_pred: Tensor, k: int) -> Tensor:
    """As `tf.math.in_top_k`."""
    y_pred = whole_rows(y_pred)
    if not y_pred.is_floating_point():
        y_pred = class_numbers(y_pred)  # unsigned dtypes support few operations
    classes = y_pred.shape[-1]
    score = y_pred.gather(-1, y.clamp(0, classes - 1).unsqueeze(-1))
    larger = (y_pred > score).sum(-1)
    low, high = y_pred.aminmax(dim=-1)
    k = min(k, classes)  # a k beyond int64 cannot be compared
    return (y >= 0) & (y < classes) & (larger < k) & low.isfinite() & high.isfinite()


def _equal(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Whether two labels are equal; integers are compared without rounding."""
    if y_true.is_floating_point() and y_pred.is_floating_point():
        # As in Keras, 0.1 in float64 equals 0.1 in float32.
        dtype = torch.float32 if y_pred.dtype in HALVES else y_pred.dtype
        return y_true.to(dtype) == y_pred.to(dtype)
    if y_true.is_floating_point() or y_pred.is_floating_point():
        dtype = float64_on(y_pred.device)
        return y_true.to(dtype) == y_pred.to(dtype)
    return class_numbers(y_true) == class_numbers(y_pred)
