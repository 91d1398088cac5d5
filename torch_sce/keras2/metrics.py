"""The metrics of Keras 2, based on torchmetrics' `Metric`.

They have the methods and options of those in `torch_sce.metrics`, and need torchmetrics, too. The
value is total / count, and 0 if the count is 0, where every element of the values counts:

    Keras 2    labels (B, T) add B T to the count, or the sum of their weights
    Keras 3    B, after averaging over T: sequences of different lengths weigh the same

A weight for each example, (B,), is one for each of its elements, and a scalar one for every
element. Positions with the label `ignore_class` are not counted. `mask` is a factor of the weights,
as `fit` applies the mask of predictions; a metric of `tf_keras` that is called directly does not.
`torch_sce.keras2.rules.element_sums` has the rule.
"""

from typing import ClassVar

from torch import Tensor

from .. import metrics
from ..arrays import ArrayLike, to_tensor
from ..kernels import row_losses, target_losses
from ..metrics import Values
from ..samples import aligned, prepare, prepare_targets
from .accuracy import (
    categorical_accuracy,
    sparse_categorical_accuracy,
    top_k_categorical_accuracy,
)
from .rules import element_sums, labels_of, lead, lead_over, parse_ignored, squeezed

__all__ = [
    "Accuracy",
    "CategoricalAccuracy",
    "CategoricalCrossentropy",
    "SparseCategoricalAccuracy",
    "SparseCategoricalCrossentropy",
    "SparseTopKCategoricalAccuracy",
    "TopKCategoricalAccuracy",
]


class _ElementMean(metrics._Mean):  # pyright: ignore[reportPrivateUsage]
    """The mean over elements of what `_values` returns."""

    _rules: ClassVar[str] = "keras2_"

    def _sums(
        self,
        y_true: ArrayLike,
        y_pred: Tensor,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
    ) -> tuple[Tensor, Tensor | int]:
        values, kept = self._values(y_true, y_pred, mask)
        weights = aligned(sample_weight, mask, y_pred, values.shape, lead)
        return element_sums(values, *weights, kept)


class SparseCategoricalAccuracy(_ElementMean, metrics.SparseCategoricalAccuracy):
    """How often the largest prediction is that of the label, for integer labels.

    As `tf_keras.metrics.SparseCategoricalAccuracy`.

    >>> metric = SparseCategoricalAccuracy()
    >>> metric.update_state([[1, 1, 1]], [[[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]])
    >>> metric.update_state([[1]], [[[0.9, 0.1]]])
    >>> metric.result()  # three of four; in Keras 3 one of two
    tensor(0.7500)
    """

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        y_true = to_tensor("y_true", y_true, y_pred)
        # Weights are matched to the labels' shape.
        return sparse_categorical_accuracy(y_true, y_pred).reshape(y_true.shape), None


class CategoricalAccuracy(_ElementMean, metrics.CategoricalAccuracy):
    """How often the largest prediction is where the largest target is, for one-hot labels.

    As `tf_keras.metrics.CategoricalAccuracy`.

    >>> metric = CategoricalAccuracy()
    >>> metric.update_state([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0.0]])
    >>> metric.result()
    tensor(0.5000)
    """

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return categorical_accuracy(y_true, y_pred), None


class Accuracy(_ElementMean, metrics.Accuracy):
    """How often labels and predicted labels, in the same shape, are equal.

    As `tf_keras.metrics.Accuracy`.

    >>> metric = Accuracy()
    >>> metric.update_state([[1, 2], [3, 4]], [[0, 2], [3, 4]], sample_weight=[1, 3])
    >>> metric.result()
    tensor(0.8750)
    """


class SparseTopKCategoricalAccuracy(_ElementMean, metrics.SparseTopKCategoricalAccuracy):
    """How often the label is among the k largest predictions, for integer labels.

    As `tf_keras.metrics.SparseTopKCategoricalAccuracy`.

    >>> metric = SparseTopKCategoricalAccuracy(k=2)
    >>> metric.update_state([2, 3], [[0.1, 0.9, 0.8, 0.0], [0.05, 0.95, 0.0, 0.0]])
    >>> metric.result()
    tensor(0.5000)
    """


class TopKCategoricalAccuracy(_ElementMean, metrics.TopKCategoricalAccuracy):
    """How often the largest target is among the k largest predictions, for one-hot labels.

    As `tf_keras.metrics.TopKCategoricalAccuracy`.

    >>> metric = TopKCategoricalAccuracy(k=1)
    >>> metric.update_state([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0.0]])
    >>> metric.result()
    tensor(0.5000)
    """

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return top_k_categorical_accuracy(y_true, y_pred, self.k), None


class SparseCategoricalCrossentropy(_ElementMean, metrics.SparseCategoricalCrossentropy):
    """The mean cross-entropy, in nats, for integer labels. It has no gradient: it is not a loss.

    As `tf_keras.metrics.SparseCategoricalCrossentropy`: computed in the metric's dtype, and ignored
    positions are not counted.

    >>> metric = SparseCategoricalCrossentropy(ignore_class=-1)
    >>> metric.update_state([1, 2, -1], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    >>> metric.result()
    tensor(1.1769)
    """

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        samples = prepare(
            labels_of(to_tensor("y_true", y_true, y_pred), y_pred, self.axis),
            y_pred,
            mask=mask,
            from_logits=self.from_logits,
            axis=self.axis,
            ignore_class=parse_ignored(self.ignore_class),
            dtype=self.dtype,
            broadcast=lead_over,
        )
        z, y, counted = samples.z, samples.y, samples.counted
        return row_losses(z, y, counted, samples.clip), samples.kept


class CategoricalCrossentropy(_ElementMean, metrics.CategoricalCrossentropy):
    """The mean cross-entropy, in nats, for one-hot labels. It has no gradient: it is not a loss.

    As `tf_keras.metrics.CategoricalCrossentropy`: computed in the metric's dtype.

    >>> metric = CategoricalCrossentropy()
    >>> metric.update_state([[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> metric.result()
    tensor(1.1769)
    """

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        samples = prepare_targets(
            *squeezed(to_tensor("y_true", y_true, y_pred), y_pred),
            from_logits=self.from_logits,
            axis=self.axis,
            dtype=self.dtype,
            matches_ranks=False,
        )
        z, y, clip = samples.z, samples.y, samples.clip
        return target_losses(z, y, samples.counted, clip, self.label_smoothing), None
