"""The accuracies as functions. Unlike in Keras 3, -0.0 is as large as 0.0; ties go to the first."""

import torch
from torch import Tensor

from .. import accuracy
from ..arrays import ArrayLike, to_tensor


def sparse_categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Whether the largest prediction of each position is that of its label.

    Arguments, result and errors are those of `torch_sce.sparse_categorical_accuracy`.

    The rule is that of `tf_keras.metrics.sparse_categorical_accuracy`.

    >>> sparse_categorical_accuracy([0, 1], [[-0.0, 0.0], [0.05, 0.95]]).tolist()
    [1.0, 1.0]
    """
    return accuracy.sparse_categorical_accuracy(y_true, _with_one_zero("y_pred", y_pred))


def categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
    """Whether the largest prediction of each position is where its largest target is.

    Arguments, result and errors are those of `torch_sce.categorical_accuracy`.

    The rule is that of `tf_keras.metrics.categorical_accuracy`.

    >>> categorical_accuracy([[1, 0], [0, 1]], [[-0.0, 0.0], [0.05, 0.95]]).tolist()
    [1.0, 1.0]
    """
    y_pred = _with_one_zero("y_pred", y_pred)
    return accuracy.categorical_accuracy(_with_one_zero("y_true", y_true, y_pred), y_pred)


def top_k_categorical_accuracy(y_true: ArrayLike, y_pred: ArrayLike, k: int = 5) -> Tensor:
    """Whether fewer than k predictions of each position are larger than that of its largest target.

    Arguments, result and errors are those of `torch_sce.top_k_categorical_accuracy`.

    The rule is that of `tf_keras.metrics.top_k_categorical_accuracy`.

    >>> y_true, y_pred = [[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0.0]]
    >>> top_k_categorical_accuracy(y_true, y_pred, k=1).tolist()
    [0.0, 1.0]
    """
    y_pred = to_tensor("y_pred", y_pred)
    return accuracy.top_k_categorical_accuracy(_with_one_zero("y_true", y_true, y_pred), y_pred, k)


def _with_one_zero(name: str, value: ArrayLike, like: Tensor | None = None) -> Tensor:
    """The values, with 0.0 for -0.0."""
    x = to_tensor(name, value, like)
    return torch.where(x == 0, 0, x) if x.is_floating_point() else x
