"""The losses as modules: they hold the options and compute the value of a batch."""

from abc import abstractmethod
from collections.abc import Collection
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from .arrays import ArrayLike
from .distributed import (
    Unreduced,
    WithSlices,
    denominator_of,
    of_shape,
    parse_group,
    reduced,
    unchanged,
)
from .kernels import needs_definition, row_losses, sum_of_losses, target_losses
from .kernels.aten import row_dtype
from .kernels.shards import Slice, shard_losses
from .options import (
    MEANS,
    NoArguments,
    Parser,
    Reduction,
    WithOptions,
    parse_axis,
    parse_dtype,
    parse_flag,
    parse_ignore_class,
    parse_name,
    parse_reduction,
    parse_smoothing,
    typed_as,
)
from .ragged import restored
from .reduction import counts_positions, divisor_and_factor, divisor_of, reduce
from .samples import Samples, class_axis, parse_class_weight, prepare, prepare_targets


def _parsers(name: str, **own: Parser) -> dict[str, Parser]:
    """The parsers of a loss's options, its `own` and the common ones, in the order of its repr."""
    return {
        "from_logits": partial(parse_flag, "from_logits"),
        **own,
        "reduction": parse_reduction,
        "axis": parse_axis,
        "name": partial(parse_name, default=name),
        "dtype": parse_dtype,
        "class_weight": parse_class_weight,
        "process_group": partial(parse_group, "process_group"),
    }


class _Loss(WithOptions):
    """What the losses of predictions share."""

    _always_shown = "from_logits"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _Loss not in cls.__bases__ and cls.call is not cls.class_of_ours().call:
            raise TypeError(
                f"{cls.__name__} must not override call, which would have no effect: a loss does "
                "not compute its value with it. Override forward(y_true, y_pred, sample_weight, "
                "mask)."
            )

    def forward(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        denominator: ArrayLike | None = None,
        **others: Unpack[NoArguments],
    ) -> Tensor:
        """The loss: a scalar, or one value for each position if the reduction is "none".

        Arguments may also be numbers, lists or arrays; they are moved to `y_pred`'s device.
        Examples of different lengths are jagged nested tensors, `PackedSequence`s or lists of
        tensors, all arguments alike; unreduced losses come back so: see `torch_sce.ragged`.

        Args:
            y_true: labels or targets, as the class says.
            y_pred: predictions, (..., C); any real dtype.
            sample_weight: a scalar, or a shape that broadcasts to the losses' shape, `y_pred`'s
                without its class axis.
            mask: as `sample_weight`. Positions with mask 0 do not count: their labels,
                predictions and weights are not read.
            denominator: what a mean divides by, in place of its own: a number or a scalar tensor,
                of which 0 gives 0; a constant. For parts of a batch it is the sum of their
                `denominator`s.

        Returns:
            The value, in the loss's dtype. Gradients have the dtypes of `y_pred` and `y_true`.

        Raises:
            ValueError: shapes that do not fit (arguments in PyTorch's order, one-hot labels, a
                weight that would enlarge the loss), an axis out of range, a label out of range.
            TypeError: strings, complex numbers; other arguments, with ours for PyTorch's names.
        """
        if self.process_group is None and denominator is None and not others:
            samples = self._prepare(y_true, y_pred, sample_weight, mask, self.dtype)
            value = self._reduced(samples)
            value = value if value.dtype == self.dtype else value.to(self.dtype)
        else:
            compute = partial(self._unreduced, y_true, y_pred, sample_weight, mask, others)
            value = reduced(self, compute, y_pred, denominator)
        return restored(value, y_pred)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...

    def _unreduced(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
        others: Collection[str],
        divisor: Tensor | None,
    ) -> Unreduced:
        if others:
            raise self._unexpected(others)
        samples = self._prepare(y_true, y_pred, sample_weight, mask, self.dtype)
        return *self._summands(samples), unchanged

    def _summands(self, samples: Samples) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Losses, weight and mask, as `reduce` takes them."""
        losses = self._losses(samples)
        if self.reduction in ("none", None):
            return losses, samples.weight, samples.mask
        return samples.reducible(losses)

    def _reduced(self, samples: Samples) -> Tensor:
        """The value of these samples alone."""
        return reduce(*self._summands(samples), self.reduction)

    def denominator(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike | torch.Size,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> Tensor:
        """What the mean of this batch divides by, a scalar; for a sum 1.

        The mean over several batches, as in gradient accumulation, has the sum of theirs:

        >>> loss = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
        >>> batches = [([0, -1], torch.zeros(2, 4)), ([1, 2, 3], torch.ones(3, 4))]
        >>> n = sum(loss.denominator(y, z) for y, z in batches)
        >>> n.item()
        4.0
        >>> total = sum(loss(y, z, denominator=n) for y, z in batches)
        >>> round(total.item(), 4)  # log 4
        1.3863

        With a `process_group` it is summed over the group: every rank must call it as often.

        Args:
            y_true, sample_weight, mask: as for the loss.
            y_pred: predictions, or only their shape, a `torch.Size` or tuple.

        Raises:
            ValueError: the reduction is "none"; a weight for a whole batch, with which
                "mean_with_sample_weight" does not add up; as the loss.
        """

        def prepared() -> Samples:
            shaped = of_shape("y_pred", y_pred, y_true)
            return self._prepare(y_true, shaped, sample_weight, mask, None, counts_only=True)

        return denominator_of(self, prepared, y_pred, y_true)

    def call(self, y_true: ArrayLike, y_pred: ArrayLike) -> Tensor:
        """The losses per position, before weights and reduction: Keras's `Loss.call`.

        As in Keras, `dtype` and `reduction` do not matter here.

        >>> loss = SparseCategoricalCrossentropy()
        >>> [round(x, 4) for x in loss.call([1, 2], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]).tolist()]
        [0.0513, 2.3026]
        """
        return restored(self._losses(self._prepare(y_true, y_pred, None, None, None)), y_pred)

    @abstractmethod
    def _prepare(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
        dtype: torch.dtype | None,
        counts_only: bool = False,
    ) -> Samples:
        """The arguments as one checked value, predictions in this dtype or their own.

        `counts_only`: it is only asked which positions count.
        """

    @abstractmethod
    def _losses(self, samples: Samples) -> Tensor:
        """One loss for each position, 0 for one that does not count."""

    def as_criterion(self) -> "Criterion":
        """This loss as a module called with predictions first: `criterion(input, target)`.

        For code that has PyTorch's order of arguments, such as skorch, ignite, fastai or opacus.
        Its `reduction` may be read, set, and given in a call, as opacus and fastai do. Of a loss
        from logits, when this is called, it is an `nn.CrossEntropyLoss`: skorch's `predict_proba`
        then applies a softmax over the last axis, otherwise none.

        >>> criterion = SparseCategoricalCrossentropy(from_logits=True).as_criterion()
        >>> round(criterion(torch.tensor([[2.0, 0.5, 1.0, 0.1]]), torch.tensor([2])).item(), 3)
        1.554
        >>> isinstance(criterion, torch.nn.CrossEntropyLoss)
        True
        """
        return LogitsCriterion(self) if self.from_logits else Criterion(self)


class SparseCategoricalCrossentropy(WithSlices, _Loss):
    """The cross-entropy, in nats, between integer labels and predictions, weighted and averaged.

    A drop-in for `tf.keras.losses.SparseCategoricalCrossentropy`: the same options in the same
    order, the same call with labels first, the same value and gradient.

    Args:
        from_logits: whether predictions are logits; if not, they are probabilities. To match what
            Keras's `fit()` reports for a model that ends in a softmax, return the logits and pass
            True: Keras uses the logits under a softmax, and a loss in PyTorch cannot.
        ignore_class: a label, in `[0, C)` or not, whose positions do not count: loss 0, gradient 0,
            and not in the denominator of a mean.
        reduction: "sum_over_batch_size" or its other names "mean" and "auto", "sum",
            "mean_with_sample_weight", "none" or None. `torch_sce.reduction` defines them.
        axis: the class axis of the predictions.
        name: a name, kept in the config.
        dtype: the dtype of the result; None means float32, for predictions of any dtype. Given
            as a torch dtype, a name, a NumPy dtype or a Keras dtype policy. Predictions are cast
            to it first. Half precision is computed in float32 and cast at the end.
        process_group: the processes over which the value is taken, a group of `torch.distributed`
            or True for all. The value is that of their batches together, the same on every rank,
            and the average of the ranks' gradients, as DDP and FSDP take it, is its gradient. A sum
            is over all ranks, too; with "none" there is no effect. None: of this process alone.
        class_group: the processes among which the classes are divided: predictions hold this rank's
            slice of them, in the order of the ranks and of any sizes, labels, weights and masks
            are the same on all, and so are the losses. Not with `torch.func` or `label_smoothing`.
        label_smoothing: how much of each label is spread evenly over the classes, from 0 to 1. The
            loss is that of `CategoricalCrossentropy` for one-hot labels, which are not made: it
            normalises probabilities before it clips them.
        class_weight: a constant for each class, (C,), or a dict {class: weight} as Keras's `fit`
            takes it, with 1 for other classes. A position's `sample_weight` is multiplied by the
            weight of its label. "sum_over_batch_size" divides by the number of positions that
            count, as `fit` does, "mean_with_sample_weight" by the sum of their weights, as
            `F.cross_entropy(weight=...)` does.

    Options may be set later, `loss.reduction = "sum"`, under the same rules.

    The call is `loss(y_true, y_pred, sample_weight=None, mask=None)`. Labels have `y_pred`'s shape
    without its class axis, or with a size of 1 there: any integer dtype, bool, or floats, which are
    truncated toward zero. On the CPU in eager mode a label that counts and is outside `[0, C)` is a
    ValueError; on other devices and under `torch.compile` it makes its own loss and gradient NaN.

    Raises:
        ValueError: an unknown reduction or name of a dtype, a `label_smoothing` out of range, a
            `class_weight` that does not fit the classes.
        TypeError: an axis that is not an integer, a `label_smoothing` that is not a number, a
            dtype that is not floating-point.

    Differs from Keras: docs/differences.md lists where, with the reasons.

    >>> y_true, y_pred = [1, 2], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]
    >>> loss = SparseCategoricalCrossentropy()
    >>> round(loss(y_true, y_pred).item(), 3)
    1.177
    >>> round(loss(y_true, y_pred, sample_weight=[0.3, 0.7]).item(), 3)
    0.814
    >>> loss
    SparseCategoricalCrossentropy(from_logits=False)
    >>> loss = SparseCategoricalCrossentropy(label_smoothing=0.1, class_weight={1: 3.0})
    >>> round(loss(y_true, [[0.05, 0.9, 0.05], [0.1, 0.8, 0.1]]).item(), 3)
    1.564
    """

    _options: ClassVar = _parsers(
        "sparse_categorical_crossentropy",
        ignore_class=parse_ignore_class,
        label_smoothing=parse_smoothing,
    ) | {"class_group": partial(parse_group, "class_group")}

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | float | None = None,
        reduction: Reduction | None = "sum_over_batch_size",
        axis: int = -1,
        name: str | None = "sparse_categorical_crossentropy",
        dtype: Any = None,
        process_group: Any = None,
        class_group: Any = None,
        *,  # not where Keras's `name` and `dtype` are
        label_smoothing: int | float = 0.0,
        class_weight: Any = None,
        **others: Unpack[NoArguments],
    ) -> None:
        super().__init__(**others)
        self.class_group = class_group
        self.from_logits = from_logits
        self.ignore_class = ignore_class
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.axis = axis
        self.name = name
        self.dtype = dtype
        self.class_weight = class_weight
        self.process_group = process_group

    def _prepare(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
        dtype: torch.dtype | None,
        counts_only: bool = False,
    ) -> Samples:
        has_slice = counts_only and self.class_group is not None  # whatever its size
        shard = None if counts_only else self._slice(y_pred, self.axis)
        return prepare(
            y_true,
            y_pred,
            sample_weight,
            mask,
            from_logits=self.from_logits,
            axis=self.axis,
            ignore_class=self.ignore_class,
            dtype=dtype,
            classes=None if shard is None else shard.classes,
            checks_labels=not has_slice,
            class_weight=self.class_weight,
        )

    def _losses(self, samples: Samples) -> Tensor:
        z, y, counted, clip = samples.z, samples.y, samples.counted, samples.clip
        shard = self._slice(z, -1)
        if shard is not None:
            return shard_losses(z, y, counted, clip, shard)
        return row_losses(z, y, counted, clip, self.label_smoothing)

    def _reduced(self, samples: Samples) -> Tensor:
        sum_ = self._one_sum(samples)
        if sum_ is None:
            return super()._reduced(samples)
        z, y, counted = samples.z, samples.y, samples.counted
        return sum_of_losses(z, y, counted, samples.clip, *sum_, samples.order)

    def _one_sum(self, samples: Samples) -> tuple[float, Tensor | None] | None:
        """What the sum of the losses is divided by, and the factor of each, None for 1.

        None: the value is not a sum of constants that can be read, times the losses.
        """
        number, reduction = samples.number, self.reduction
        if number is None or self.label_smoothing or reduction in ("none", None):
            return None
        if self.class_group is not None:
            return None
        if samples.weight is None and counts_positions(samples.mask, reduction):
            return divisor_of(number, reduction), None
        if not _are_constants(samples.weight, samples.mask):
            return None
        given = samples.reducible(_like_losses(samples.y.shape, row_dtype(samples.z)))
        divisor, factor = divisor_and_factor(*given, reduction, number)
        if divisor == 0:  # `reduce` has the rule
            return None
        if factor is not None and samples.order is not None:
            factor = torch.empty_like(factor).index_copy_(0, samples.order, factor)
        return divisor, factor

    def _slice(self, y_pred: ArrayLike, axis: int) -> Slice | None:
        """Which classes this rank has; None: all of them."""
        if self.class_group is None:
            return None
        return self._slice_of("y_pred", y_pred, lambda z: z.shape[class_axis(axis, z)])


@lru_cache(maxsize=64)
def _like_losses(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and dtype, whose values say nothing."""
    return torch.zeros((), dtype=dtype, device="cpu").expand(shape)


def _are_constants(*tensors: Tensor | None) -> bool:
    """Whether values can be read, and no derivative with respect to them is asked for."""
    return not needs_definition(*tensors) and not any(
        x is not None and x.requires_grad for x in tensors
    )


class CategoricalCrossentropy(_Loss):
    """The cross-entropy, in nats, between targets for every class and predictions.

    A drop-in for `tf.keras.losses.CategoricalCrossentropy`, for labels that are one-hot or soft.
    For class numbers use `SparseCategoricalCrossentropy`.

    Args:
        from_logits: whether predictions are logits; if not, they are probabilities. As for
            `SparseCategoricalCrossentropy`: to match Keras's `fit()`, return the logits.
        label_smoothing: how much of each target is spread evenly over the classes, from 0 to 1:
            y becomes y * (1 - label_smoothing) + label_smoothing / C.
        axis: the class axis of targets and predictions.
        reduction, name, dtype, process_group: as for `SparseCategoricalCrossentropy`.
        class_weight: as for `SparseCategoricalCrossentropy`. The class of a position is that of its
            largest target.

    The call is `loss(y_true, y_pred, sample_weight=None, mask=None)`. Targets have `y_pred`'s shape
    and any real dtype. They need not sum to 1, and get a gradient if they require one. Shapes do
    not tell targets from predictions: check the order.

    Raises:
        ValueError: an unknown reduction or name of a dtype, a `label_smoothing` out of range.
        TypeError: an axis that is not an integer, a `label_smoothing` that is not a number, a
            dtype that is not floating-point.

    Differs from Keras: docs/differences.md lists where, with the reasons.

    >>> y_true, y_pred = [[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]
    >>> loss = CategoricalCrossentropy()
    >>> round(loss(y_true, y_pred).item(), 3)
    1.177
    >>> round(loss(y_true, y_pred, sample_weight=[0.3, 0.7]).item(), 3)
    0.814
    >>> CategoricalCrossentropy(label_smoothing=0.1)
    CategoricalCrossentropy(from_logits=False, label_smoothing=0.1)
    """

    _options: ClassVar = _parsers("categorical_crossentropy", label_smoothing=parse_smoothing)

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: int | float = 0.0,
        axis: int = -1,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_crossentropy",
        dtype: Any = None,
        process_group: Any = None,
        *,
        class_weight: Any = None,
        **others: Unpack[NoArguments],
    ) -> None:
        super().__init__(**others)
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = axis
        self.reduction = reduction
        self.name = name
        self.dtype = dtype
        self.class_weight = class_weight
        self.process_group = process_group

    def _prepare(
        self,
        y_true: ArrayLike,
        y_pred: ArrayLike,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
        dtype: torch.dtype | None,
        counts_only: bool = False,
    ) -> Samples:
        return prepare_targets(
            y_true,
            y_pred,
            sample_weight,
            mask,
            from_logits=self.from_logits,
            axis=self.axis,
            dtype=dtype,
            class_weight=self.class_weight,
        )

    def _losses(self, samples: Samples) -> Tensor:
        smoothing = self.label_smoothing
        return target_losses(samples.z, samples.y, samples.counted, samples.clip, smoothing)


class Criterion(nn.Module):
    """A loss with predictions first and attributes of `nn.CrossEntropyLoss`: `as_criterion()`.

    The loss itself, with all of its options, is `criterion.loss`.

    >>> criterion = SparseCategoricalCrossentropy(ignore_class=-1).as_criterion()
    >>> criterion.reduction, criterion.ignore_index
    ('mean', -1)
    >>> q, y = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1])
    >>> [round(x, 4) for x in criterion(q, y, reduction="none").tolist()]
    [0.6931, 0.2877]
    >>> criterion.reduction = "sum"
    >>> round(criterion(q, y).item(), 4), criterion.loss.reduction
    (0.9808, 'sum')
    """

    loss: _Loss

    def __init__(self, loss: _Loss) -> None:
        nn.Module.__init__(self)  # nn.CrossEntropyLoss's would set the options
        self.loss = loss

    @property
    def reduction(self) -> Reduction:
        """The loss's reduction by PyTorch's name, if it has one: "mean", "sum" or "none".

        Setting it, by that or by Keras's name, sets the loss's. Another is a ValueError.
        """
        reduction = self.loss.reduction
        return "mean" if reduction in MEANS else reduction or "none"

    @reduction.setter
    def reduction(self, reduction: Reduction | None) -> None:
        self.loss.reduction = MEANS[0] if reduction == "mean" else reduction

    @property
    def ignore_index(self) -> int | float | None:
        """The loss's `ignore_class`; None if no class is ignored."""
        return getattr(self.loss, "ignore_class", None)

    def forward(
        self,
        input: ArrayLike,
        target: ArrayLike,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        denominator: ArrayLike | None = None,
        reduction: Reduction | None = None,
        **others: Unpack[NoArguments],
    ) -> Tensor:
        """What the loss gives for `loss(target, input, sample_weight, mask, denominator)`.

        Args:
            input: predictions, (..., C); any real dtype.
            target: labels or targets, as the loss says.
            sample_weight, mask, denominator: as for the loss.
            reduction: that of this call, by Keras's or PyTorch's name; None: the criterion's.

        Returns:
            The value, in the loss's dtype.

        Raises:
            ValueError: an unknown reduction; as the loss.
            TypeError: as the loss.
        """
        loss = self.loss
        if reduction is not None:
            loss = loss._with(reduction=reduction)  # pyright: ignore[reportPrivateUsage]
        given = {} if denominator is None else {"denominator": denominator}
        return loss(target, input, sample_weight, mask, **given, **others)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...


class LogitsCriterion(Criterion, nn.CrossEntropyLoss):  # pyright: ignore[reportIncompatibleVariableOverride]
    """That of a loss from logits."""
