"""The losses as modules: they hold the options and compute the value of a batch."""

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from torch import Tensor

from ..arrays import ArrayLike, floats, to_tensor
from ..kernels import row_losses, target_losses
from ..options import (
    NoArguments,
    WithOptions,
    parse_axis,
    parse_flag,
    parse_name,
    parse_smoothing,
    typed_as,
)
from ..ragged import packed, restored
from ..samples import Samples, prepare, prepare_targets
from .rules import align, labels_of, parse_ignored, parse_reduction, reduce, squeezed

Reduction = Literal["auto", "sum_over_batch_size", "sum", "none"]


class _Loss(WithOptions):
    """What both losses share."""

    _always_shown = "from_logits"
    from_logits: bool

    def forward(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        **others: Unpack[NoArguments],
    ) -> Tensor:
        """The loss: a scalar, or one value for each position if the reduction is "none".

        Arguments may also be numbers, lists or arrays; they are moved to `y_pred`'s device.
        Examples of different lengths are as for `torch_sce.SparseCategoricalCrossentropy`.

        Args:
            y_true: labels or targets, as the class says.
            y_pred: predictions, (..., C), float16, bfloat16, float32 or float64.
            sample_weight: a scalar, or a shape that broadcasts to the losses' shape, `y_pred`'s
                without its class axis; with one axis less, one value for the positions that share
                the first axes.
            mask: as `sample_weight`; Keras's `_keras_mask`. Positions with mask 0 do not count:
                their labels, predictions and weights are not read.

        Returns:
            The value, in `y_pred`'s dtype. Gradients have the dtypes of `y_pred` and `y_true`.

        Raises:
            ValueError: shapes that do not fit, an axis out of range, a label out of range.
            TypeError: predictions that are no floating-point numbers; other arguments.
        """
        if others:
            raise self._unexpected(others)
        axis = getattr(self, "axis", -1)
        dense = packed(y_true, y_pred, sample_weight, mask, axis)
        z = floats(dense.y_pred)
        samples = self._prepare(dense.y_true, z, dense.sample_weight, dense.mask)
        parts = (self._losses(samples), samples.weight, samples.mask)
        if dense.order is not None and self.reduction != "none":
            parts = samples._replace(order=dense.order).reducible(parts[0])
        value = reduce(*parts, self.reduction)
        return restored(value.to(z.dtype), y_pred)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...

    @abstractmethod
    def _prepare(
        self,
        y_true: ArrayLike,
        y_pred: Tensor,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
    ) -> Samples:
        """The arguments as one checked value."""

    @abstractmethod
    def _losses(self, samples: Samples) -> Tensor:
        """One loss for each position, 0 for one that does not count."""


class SparseCategoricalCrossentropy(_Loss):
    """The cross-entropy, in nats, between integer labels and predictions, weighted and averaged.

    A drop-in for `tf_keras.losses.SparseCategoricalCrossentropy`: the same options in the same
    order, the same call with labels first, the same value and gradient.

    Args:
        from_logits: whether predictions are logits; if not, they are probabilities. To match what
            Keras's `fit()` reports for a model that ends in a softmax, return the logits and pass
            True: Keras uses the logits under a softmax, and a loss in PyTorch cannot.
        ignore_class: a label, in `[0, C)` or not, whose positions do not count. It is truncated
            toward zero, as labels are.
        reduction: "auto" or its other name "sum_over_batch_size", "sum", or "none".
            `torch_sce.keras2.rules` defines them.
        name: a name, kept in the config.

    The call is `loss(y_true, y_pred, sample_weight=None, mask=None)`. Labels and classes, which are
    on the last axis of `y_pred`, are as for the function `sparse_categorical_crossentropy`. If no
    position counts, the mean is NaN, with gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: an `ignore_class` that is not a number.

    Differs from Keras: docs/keras2.md lists where, with the reasons.

    >>> y_true, y_pred = [1, 2], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]
    >>> loss = SparseCategoricalCrossentropy()
    >>> round(loss(y_true, y_pred).item(), 3)
    1.177
    >>> round(loss(y_true, y_pred, sample_weight=[0.3, 0.7]).item(), 3)
    0.814
    >>> SparseCategoricalCrossentropy(ignore_class=2)([2, 2], y_pred).item()
    nan
    >>> loss
    SparseCategoricalCrossentropy(from_logits=False)
    """

    _options: ClassVar = {
        "from_logits": partial(parse_flag, "from_logits"),
        "ignore_class": parse_ignored,
        "reduction": parse_reduction,
        "name": partial(parse_name, default="sparse_categorical_crossentropy"),
    }

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | float | None = None,
        reduction: Reduction = "auto",
        name: str | None = "sparse_categorical_crossentropy",
        **others: Unpack[NoArguments],
    ) -> None:
        super().__init__(**others)
        self.from_logits = from_logits
        self.ignore_class = ignore_class
        self.reduction = reduction
        self.name = name

    def _prepare(
        self,
        y_true: ArrayLike,
        y_pred: Tensor,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
    ) -> Samples:
        return prepare(
            labels_of(to_tensor("y_true", y_true, y_pred), y_pred, -1),
            y_pred,
            sample_weight,
            mask,
            from_logits=self.from_logits,
            axis=-1,
            ignore_class=self.ignore_class,
            broadcast=align,
        )

    def _losses(self, samples: Samples) -> Tensor:
        z, y, counted, clip = samples.z, samples.y, samples.counted, samples.clip
        return row_losses(z, y, counted, clip)


class CategoricalCrossentropy(_Loss):
    """The cross-entropy, in nats, between targets for every class and predictions.

    A drop-in for `tf_keras.losses.CategoricalCrossentropy`, for labels that are one-hot or soft.
    For class numbers use `SparseCategoricalCrossentropy`.

    Args:
        from_logits: whether predictions are logits; if not, they are probabilities.
        label_smoothing: how much of each target is spread evenly over the classes, from 0 to 1:
            y becomes y * (1 - label_smoothing) + label_smoothing / C.
        axis: the class axis of targets and predictions.
        reduction, name: as for `SparseCategoricalCrossentropy`.

    The call is `loss(y_true, y_pred, sample_weight=None, mask=None)`. Targets have `y_pred`'s shape
    and any real dtype; a last axis of size 1 that only one of them has is dropped. They need not
    sum to 1, and get a gradient if they require one. Shapes do not tell targets from predictions:
    check the order.

    Raises:
        ValueError: an unknown reduction, a `label_smoothing` out of range.
        TypeError: an axis that is not an integer, a `label_smoothing` that is not a number.

    Differs from Keras: docs/keras2.md lists where, with the reasons.

    >>> y_true, y_pred = [[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]
    >>> loss = CategoricalCrossentropy()
    >>> round(loss(y_true, y_pred).item(), 3)
    1.177
    >>> CategoricalCrossentropy(label_smoothing=0.1)
    CategoricalCrossentropy(from_logits=False, label_smoothing=0.1)
    """

    _options: ClassVar = {
        "from_logits": partial(parse_flag, "from_logits"),
        "label_smoothing": parse_smoothing,
        "axis": parse_axis,
        "reduction": parse_reduction,
        "name": partial(parse_name, default="categorical_crossentropy"),
    }

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: int | float = 0.0,
        axis: int = -1,
        reduction: Reduction = "auto",
        name: str | None = "categorical_crossentropy",
        **others: Unpack[NoArguments],
    ) -> None:
        super().__init__(**others)
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = axis
        self.reduction = reduction
        self.name = name

    def _prepare(
        self,
        y_true: ArrayLike,
        y_pred: Tensor,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
    ) -> Samples:
        return prepare_targets(
            *squeezed(to_tensor("y_true", y_true, y_pred), y_pred),
            sample_weight,
            mask,
            from_logits=self.from_logits,
            axis=self.axis,
            matches_ranks=False,
            broadcast=align,
        )

    def _losses(self, samples: Samples) -> Tensor:
        smoothing = self.label_smoothing
        return target_losses(samples.z, samples.y, samples.counted, samples.clip, smoothing)
