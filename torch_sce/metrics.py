"""Keras's metrics for these losses, based on torchmetrics' `Metric`.

Needs torchmetrics: `pip install torchmetrics`, or in a clone `pip install '.[metrics]'`.

Each metric has the methods of both libraries, each with its library's order of arguments:

    Keras           update_state(y_true, y_pred, sample_weight, mask)   result()    reset_state()
    torchmetrics    update(preds, target, sample_weight, mask)          compute()   reset()

Calling the metric is torchmetrics' `forward(preds, target)`: it updates, and returns the value
of this batch alone. The features of torchmetrics work: collections, checkpoints, moving to a
device, and the sum over the ranks of `torch.distributed`.

Options are attributes, as in Keras: `metric.k`. `name` and `dtype` can be set later, the others
cannot, since examples have been counted with them.

The value is total / count, and 0 if the count is 0. Every example is averaged over its
elements first, then the examples; `torch_sce.reduction.example_means` has the rule. Total and count
are float64, also after `model.to(torch.bfloat16)`: the count of a float32 metric of Keras stops at
2^24 examples. An update needs no host synchronisation. (MPS has no float64: there, keep metrics on
the CPU.)
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

try:
    from torchmetrics import Metric
except ModuleNotFoundError as missing:
    if missing.name != "torchmetrics":
        raise
    message = (
        "torch_sce.metrics needs torchmetrics: pip install torchmetrics, or in a clone of "
        "torch_sce pip install '.[metrics]'"
    )
    raise ModuleNotFoundError(message, name=missing.name) from missing

from . import accuracy, functional
from .arrays import ArrayLike, to_tensor
from .kernels import row_losses
from .options import (
    CALL,
    OURS,
    class_of_package,
    options_in,
    parse_axis,
    parse_dtype,
    parse_flag,
    parse_ignore_class,
    parse_k,
    parse_name,
    parse_smoothing,
    shown_options,
    unexpected,
)
from .ragged import packed
from .reduction import example_means
from .samples import aligned, leading, over_leading_axes, prepare

__all__ = [
    "Accuracy",
    "CategoricalAccuracy",
    "CategoricalCrossentropy",
    "SparseCategoricalAccuracy",
    "SparseCategoricalCrossentropy",
    "SparseTopKCategoricalAccuracy",
    "TopKCategoricalAccuracy",
]

Values = tuple[Tensor, Tensor | None]


class _Option:
    """An option as a read-only attribute: the state is named for it, and was counted with it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, metric: Any, owner: type | None = None) -> Any:
        return self if metric is None else metric.options[self.name]

    def __set__(self, metric: Any, value: Any) -> None:
        raise AttributeError(
            f"{self.name} of a metric cannot be changed: make another, "
            f"{type(metric).__name__}({self.name}={value!r})"
        )


class _Mean(Metric):
    """The mean over examples of what `_values` returns: Keras's `MeanMetricWrapper`."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    _rules: ClassVar[str] = ""  # a name for rules that are not those of this module
    _class_axis: ClassVar[int | None] = -1

    def __init__(self, name: str | None, dtype: Any, options: dict[str, Any], **kwargs: Any):
        if misnamed := OURS.keys() & kwargs.keys():
            raise unexpected(type(self).__name__, misnamed, options, CALL, "update_state")
        super().__init__(**kwargs)
        self.options = options
        self.name = name
        self.dtype = dtype
        # A MetricCollection merges metrics whose states have the same names and, after the first
        # batch, the same values: top-1 and top-5 must stay apart. So a checkpoint fits only these
        # options.
        about = re.sub(
            r"\W", "_", "_".join(map(str, [self._rules + type(self).__name__, *options.values()]))
        )
        self._names = (f"total_{about}", f"count_{about}")
        for state in self._names:
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def _update_count(self) -> int:
        """torchmetrics' number of updates; compiled code knows only whether there were any.

        It would be compiled again for every number.
        """
        return int(self._updated) if torch.compiler.is_compiling() else self._updates

    @_update_count.setter
    def _update_count(self, value: int) -> None:
        # PyTorch 2.11 calls this after the compiled code, so it cannot check what calls it.
        self._updated, self._updates = value > 0, value

    @property
    def name(self) -> str:
        """The name, kept in the config."""
        return vars(self)["name"]

    @name.setter
    def name(self, name: str | None) -> None:
        vars(self)["name"] = parse_name(name, _snake_case(type(self).__name__))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result; total and count are float64."""
        return self.result_dtype

    @dtype.setter
    def dtype(self, dtype: Any) -> None:
        self.result_dtype = parse_dtype(dtype)

    def set_dtype(self, dst_type: Any) -> Self:
        """Sets `dtype`: torchmetrics' call, which would round total and count."""
        self.dtype = dst_type
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        """Moves total and count, as `nn.Module.to` says, but leaves them in float64."""

        def moved(x: Tensor) -> Tensor:
            there = fn(x)
            return there if there.dtype == x.dtype else x.to(there.device)

        super()._apply(moved, *args, **kwargs)
        return self

    @property
    def total(self) -> Tensor:
        """The sum of the values of all examples, weighted; float64."""
        return getattr(self, self._names[0])

    @property
    def count(self) -> Tensor:
        """The number of examples, or the sum of their weights; float64."""
        return getattr(self, self._names[1])

    def update(
        self,
        preds: ArrayLike,
        target: ArrayLike,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> None:
        """Adds a batch: `update_state` with predictions first, as torchmetrics has it."""
        with torch.no_grad():
            axis = self.options.get("axis", self._class_axis)
            given = packed(target, preds, sample_weight, mask, axis)
            preds = to_tensor("y_pred", given.y_pred)
            total, count = self._sums(given.y_true, preds, given.sample_weight, given.mask)
            if given.fits is not None:
                total = torch.where(given.fits, total, torch.nan)
            setattr(self, self._names[0], self.total + total)
            setattr(self, self._names[1], self.count + count)

    def compute(self) -> Tensor:
        """total / count, in the metric's dtype; 0 where the count is 0."""
        is_zero = self.count == 0
        value = torch.where(is_zero, 0, self.total / torch.where(is_zero, 1, self.count))
        return value.to(self.dtype)

    def update_state(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            y_true, y_pred: as for the function of the same name.
            sample_weight: a weight for each example, (B,), or for each of its elements, (B, T); a
                scalar makes the batch count as one example of that weight.
            mask: where it is 0 nothing counts, as with a weight of 0, and predictions, labels and
                weights may have any value.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: arguments that are not real numbers.
        """
        self.update(y_pred, y_true, sample_weight, mask)

    def result(self) -> Tensor:
        """The mean over all examples since the last reset; 0 before the first."""
        if self.update_called or torch.compiler.is_compiling():
            return self.compute()
        with warnings.catch_warnings():
            # Keras does not warn about a metric without updates.
            warnings.filterwarnings("ignore", r"The ``compute`` method of metric")
            return self.compute()

    def reset_state(self) -> None:
        """Forgets all examples."""
        self.reset()

    def get_config(self) -> dict[str, Any]:
        """The options, as plain values that `from_config` takes."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**self.options, "name": self.name, "dtype": dtype}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A metric with these options: our own `get_config()`, or that of a Keras metric."""
        return cls(**options_in(config, cls, class_of_package(cls)))

    def extra_repr(self) -> str:
        # Not self.get_config(): a subclass may have given it other keys.
        default = class_of_package(type(self))()
        return shown_options(_Mean.get_config(self), _Mean.get_config(default))

    def _sums(
        self,
        y_true: ArrayLike,
        y_pred: Tensor,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
    ) -> tuple[Tensor, Tensor | int]:
        """What a batch adds to total and count."""
        values, kept = self._values(y_true, y_pred, mask)
        if sample_weight is None and mask is None:
            kept = None
        weights = aligned(sample_weight, mask, y_pred, values.shape, leading)
        return example_means(values, *weights, kept)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        """A value for each example; and which are not ignored."""
        raise NotImplementedError


class SparseCategoricalAccuracy(_Mean):
    """How often the largest prediction is that of the label, for integer labels.

    As `tf.keras.metrics.SparseCategoricalAccuracy`; `sparse_categorical_accuracy` has the rule.

    >>> metric = SparseCategoricalAccuracy()
    >>> metric.update_state([2, 1], [[0.1, 0.6, 0.3], [0.05, 0.95, 0.0]], sample_weight=[3, 1])
    >>> metric.result()
    tensor(0.2500)
    """

    def __init__(
        self,
        name: str | None = "sparse_categorical_accuracy",
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, dtype, {}, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return accuracy.sparse_categorical_accuracy(y_true, y_pred), None


class CategoricalAccuracy(_Mean):
    """How often the largest prediction is where the largest target is, for one-hot labels.

    As `tf.keras.metrics.CategoricalAccuracy`; `categorical_accuracy` has the rule.

    >>> metric = CategoricalAccuracy()
    >>> metric.update_state([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0.0]])
    >>> metric.result()
    tensor(0.5000)
    """

    def __init__(
        self, name: str | None = "categorical_accuracy", dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(name, dtype, {}, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return accuracy.categorical_accuracy(y_true, y_pred), None


class Accuracy(_Mean):
    """How often labels and predicted labels, in the same shape, are equal.

    As `tf.keras.metrics.Accuracy`. For predictions with a class axis there are
    `SparseCategoricalAccuracy` and `CategoricalAccuracy`.

    >>> metric = Accuracy()
    >>> metric.update_state([1, 2, 3, 4], [0, 2, 3, 4])
    >>> metric.result()
    tensor(0.7500)
    """

    _class_axis = None

    def __init__(self, name: str | None = "accuracy", dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(name, dtype, {}, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return accuracy.accuracy(y_true, y_pred), None


class SparseTopKCategoricalAccuracy(_Mean):
    """How often the label is among the k largest predictions, for integer labels.

    As `tf.keras.metrics.SparseTopKCategoricalAccuracy`; `sparse_top_k_categorical_accuracy` has
    the rule, and explains the options.

    >>> metric = SparseTopKCategoricalAccuracy(k=2)
    >>> metric.update_state([2, 3], [[0.1, 0.9, 0.8, 0.0], [0.05, 0.95, 0.0, 0.0]])
    >>> metric.result()
    tensor(0.5000)
    """

    k = _Option()
    from_sorted_ids = _Option()

    def __init__(
        self,
        k: int = 5,
        name: str | None = "sparse_top_k_categorical_accuracy",
        dtype: Any = None,
        from_sorted_ids: bool = False,
        **kwargs: Any,
    ) -> None:
        sorted_ids = parse_flag("from_sorted_ids", from_sorted_ids)
        super().__init__(name, dtype, {"k": parse_k(k), "from_sorted_ids": sorted_ids}, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return accuracy.sparse_top_k_categorical_accuracy(y_true, y_pred, **self.options), None


class TopKCategoricalAccuracy(_Mean):
    """How often the largest target is among the k largest predictions, for one-hot labels.

    As `tf.keras.metrics.TopKCategoricalAccuracy`; `top_k_categorical_accuracy` has the rule.

    >>> metric = TopKCategoricalAccuracy(k=1)
    >>> metric.update_state([[0, 0, 1], [0, 1, 0]], [[0.1, 0.9, 0.8], [0.05, 0.95, 0.0]])
    >>> metric.result()
    tensor(0.5000)
    """

    k = _Option()

    def __init__(
        self,
        k: int = 5,
        name: str | None = "top_k_categorical_accuracy",
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, dtype, {"k": parse_k(k)}, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return accuracy.top_k_categorical_accuracy(y_true, y_pred, **self.options), None


class SparseCategoricalCrossentropy(_Mean):
    """The mean cross-entropy, in nats, for integer labels. It has no gradient: it is not a loss.

    As `tf.keras.metrics.SparseCategoricalCrossentropy`; the function
    `sparse_categorical_crossentropy` has the rule, and explains the options. As in Keras 3 an
    ignored position adds 0 and is counted, unlike in the loss; with weights or a mask it is not.

    >>> metric = SparseCategoricalCrossentropy()
    >>> metric.update_state([1, 2], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> metric.result()
    tensor(1.1769)
    """

    higher_is_better = False

    from_logits = _Option()
    ignore_class = _Option()
    axis = _Option()

    def __init__(
        self,
        name: str | None = "sparse_categorical_crossentropy",
        dtype: Any = None,
        from_logits: bool = False,
        ignore_class: int | float | None = None,
        axis: int = -1,
        **kwargs: Any,
    ) -> None:
        options = {
            "from_logits": parse_flag("from_logits", from_logits),
            "ignore_class": parse_ignore_class(ignore_class),
            "axis": parse_axis(axis),
        }
        super().__init__(name, dtype, options, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        # PyTorch 2.6 does not compile the options as attributes.
        options: dict[str, Any] = {**self.options, "broadcast": over_leading_axes}
        samples = prepare(y_true, y_pred, mask=mask, **options)
        z, y, counted = samples.z, samples.y, samples.counted
        return row_losses(z, y, counted, samples.clip), samples.kept


class CategoricalCrossentropy(_Mean):
    """The mean cross-entropy, in nats, for one-hot labels. It has no gradient: it is not a loss.

    As `tf.keras.metrics.CategoricalCrossentropy`; the function `categorical_crossentropy` has the
    rule, and explains the options.

    >>> metric = CategoricalCrossentropy()
    >>> metric.update_state([[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> metric.result()
    tensor(1.1769)
    """

    higher_is_better = False

    from_logits = _Option()
    label_smoothing = _Option()
    axis = _Option()

    def __init__(
        self,
        name: str | None = "categorical_crossentropy",
        dtype: Any = None,
        from_logits: bool = False,
        label_smoothing: int | float = 0.0,
        axis: int = -1,
        **kwargs: Any,
    ) -> None:
        options = {
            "from_logits": parse_flag("from_logits", from_logits),
            "label_smoothing": parse_smoothing(label_smoothing),
            "axis": parse_axis(axis),
        }
        super().__init__(name, dtype, options, **kwargs)

    def _values(self, y_true: ArrayLike, y_pred: Tensor, mask: ArrayLike | None) -> Values:
        return functional.categorical_crossentropy(y_true, y_pred, **self.options), None


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
