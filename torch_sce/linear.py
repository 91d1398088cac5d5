"""The loss of a linear head, computed from its inputs: the logits never exist all at once.

With a vocabulary of 100,000 the logits are the largest tensor of a training step. Here they are
computed a chunk of rows at a time, with their gradients (`kernels.head`). The rules for labels,
weights, masks and averages are those of `SparseCategoricalCrossentropy(from_logits=True)`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrays import HALVES, ArrayLike, floats
from .distributed import (
    Unreduced,
    WithSlices,
    denominator_of,
    of_shape,
    on_every_rank,
    parse_group,
    reduced,
    unchanged,
)
from .kernels import computes_parts, head, is_dtensor, needs_definition, row_losses, takes_operators
from .kernels.shards import Slice, copied, shard_losses
from .options import (
    CALL,
    NoArguments,
    Reduction,
    parse_chunk_bytes,
    parse_dtype,
    parse_ignore_class,
    parse_name,
    parse_reduction,
    parse_smoothing,
    parse_softcap,
    typed_as,
    unexpected,
)
from .ragged import packed, restored
from .reduction import factors
from .samples import (
    Samples,
    dtype_of_predictions,
    parse_class_weight,
    prepare,
    values_can_be_read,
)

NAME = "linear_sparse_categorical_crossentropy"
CPU_CHUNK, DEVICE_CHUNK = 2**26, 2**29  # bytes


class _Options(NamedTuple):
    ignore_class: float | None
    softcap: float | None
    dtype: torch.dtype | None  # None: that of the logits
    chunk_bytes: int | None
    smoothing: float
    class_weight: Tensor | dict[int, float] | None = None
    shard: Slice | None = None


class _Given(NamedTuple):
    """What a head consists of, as tensors that fit together."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (C, H)
    bias: Tensor | None  # (C,)

    def compute(self) -> torch.dtype:
        """The dtype of the products."""
        given, autocast = self.hidden.dtype, _autocast_dtype(self.hidden.device)
        return given if autocast is None or given == torch.float64 else autocast


class LinearSparseCategoricalCrossentropy(WithSlices):
    """The cross-entropy, in nats, of a linear head's logits, which are computed in chunks.

    Equal to `SparseCategoricalCrossentropy(from_logits=True, ...)` of `hidden @ weight.T + bias`,
    value and gradients, in a small part of its memory: beyond its inputs and their gradients one
    workspace for a chunk of the logits.

    Args:
        ignore_class, reduction: as for `SparseCategoricalCrossentropy`.
        logit_softcap: if given, the logits are `logit_softcap * tanh(logits / logit_softcap)`, as
            in Gemma.
        name: a name, kept in the config.
        dtype: the dtype of the result, as for `SparseCategoricalCrossentropy`; logits are cast to
            it.
        chunk_bytes: the most memory for a chunk of the logits and what is as large; None means 64
            MiB on the CPU and 512 MiB on other devices. Larger chunks make no difference but in
            speed; a chunk has one row at least.
        process_group: as for `SparseCategoricalCrossentropy`.
        class_group: the processes among which the classes are divided: `weight` and `bias` hold
            this rank's, in the order of the ranks and as many in every call; all else is the same
            on all ranks, and so is the loss. `hidden` gets the whole of its gradient on each. Not
            with `label_smoothing`.
        label_smoothing, class_weight: as for `SparseCategoricalCrossentropy`.

    The call is `loss(y_true, hidden, weight, bias=None, sample_weight=None, mask=None)`.

    Products are in the dtype of `hidden` and `weight`, under autocast in its dtype, as those of
    `nn.Linear`: half-precision logits are rounded as there, and widened to float32 for the loss.
    The gradients of weight and bias are added up in float32 over the chunks, and rounded once.
    Gradients are computed with the loss if it is reduced; otherwise, for float16, or if
    `sample_weight` has a gradient, the backward pass computes the logits again.

    Raises:
        ValueError: an unknown reduction or name of a dtype, a `logit_softcap` or `chunk_bytes`
            that is not positive, a `label_smoothing` out of range, a `class_weight` that does not
            fit the classes.
        TypeError: a dtype that is not floating-point, a `logit_softcap` or `label_smoothing` that
            is not a number.

    >>> hidden = torch.tensor([[1.0, 0.0], [0.5, -1.0]])
    >>> head = torch.nn.Linear(2, 3, bias=False)
    >>> _ = torch.nn.init.eye_(head.weight)
    >>> loss = LinearSparseCategoricalCrossentropy()
    >>> round(loss(torch.tensor([0, 1]), hidden, head.weight).item(), 4)
    1.3278
    >>> from torch_sce import SparseCategoricalCrossentropy
    >>> unfused = SparseCategoricalCrossentropy(from_logits=True)
    >>> round(unfused(torch.tensor([0, 1]), head(hidden)).item(), 4)
    1.3278
    """

    _options: ClassVar = {
        "ignore_class": parse_ignore_class,
        "label_smoothing": parse_smoothing,
        "reduction": parse_reduction,
        "logit_softcap": parse_softcap,
        "name": partial(parse_name, default=NAME),
        "dtype": parse_dtype,
        "chunk_bytes": parse_chunk_bytes,
        "class_weight": parse_class_weight,
        "process_group": partial(parse_group, "process_group"),
        "class_group": partial(parse_group, "class_group"),
    }

    def __init__(
        self,
        ignore_class: int | float | None = None,
        reduction: Reduction | None = "sum_over_batch_size",
        logit_softcap: int | float | None = None,
        name: str | None = NAME,
        dtype: Any = None,
        chunk_bytes: int | None = None,
        process_group: Any = None,
        class_group: Any = None,
        *,
        label_smoothing: int | float = 0.0,
        class_weight: Any = None,
        **others: Unpack[NoArguments],
    ) -> None:
        super().__init__(**others)
        self.class_group = class_group
        self.ignore_class = ignore_class
        self.label_smoothing = label_smoothing
        self.class_weight = class_weight
        self.reduction = reduction
        self.logit_softcap = logit_softcap
        self.name = name
        self.dtype = dtype
        self.chunk_bytes = chunk_bytes
        self.process_group = process_group

    def forward(
        self,
        y_true: ArrayLike,
        hidden: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        denominator: ArrayLike | None = None,
        **others: Unpack[NoArguments],
    ) -> Tensor:
        """The loss: a scalar, or one value for each position if the reduction is "none".

        Args:
            y_true: labels, of `hidden`'s shape without its last axis, as for
                `SparseCategoricalCrossentropy`.
            hidden: what goes into the head, (..., H); float16, bfloat16, float32 or float64.
            weight: the head's weight, (C, H), as `nn.Linear` and `nn.Embedding` have it; of a
                Keras `Dense` pass `kernel.T`.
            bias: the head's bias, (C,).
            sample_weight, mask, denominator: as for `SparseCategoricalCrossentropy`.

        Returns:
            The value, in the loss's dtype. It has gradients with respect to `hidden`, `weight`,
            `bias` and `sample_weight`; they cannot be differentiated again.

        Raises:
            ValueError: shapes that do not fit, a label out of range (on the CPU, in eager mode).
            TypeError: dtypes that differ outside of autocast, labels or hidden states that are not
                numbers of the right kind; other arguments, with ours for PyTorch's names.
        """

        # Types as text: PyTorch 2.6 does not compile what computes them.
        def compute(divisor: "Tensor | None") -> "Unreduced":
            if others:
                raise self._unexpected(others)
            dense = packed(y_true, hidden, sample_weight, mask, name="hidden")
            given = _head(dense.y_pred, weight, bias)
            return self._unreduced(dense.y_true, given, dense.sample_weight, dense.mask, divisor)

        return restored(reduced(self, compute, hidden, denominator), hidden)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...

    def denominator(
        self,
        y_true: ArrayLike,
        hidden: ArrayLike | torch.Size,
        sample_weight: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> Tensor:
        """What the mean of this batch divides by, as `SparseCategoricalCrossentropy.denominator`.

        Args:
            y_true, sample_weight, mask: as for the loss.
            hidden: what goes into the head, or only its shape, a `torch.Size` or tuple.

        Raises:
            ValueError: the reduction is "none"; as the loss, but labels may be any.
        """

        def prepared() -> Samples:
            return prepare(
                y_true, of_shape("hidden", hidden, y_true), sample_weight, mask,
                from_logits=True, axis=-1, ignore_class=self.ignore_class, checks_labels=False,
                class_weight=self.class_weight,
            )  # fmt: skip

        return denominator_of(self, prepared, hidden, y_true)

    def _unreduced(
        self,
        y_true: ArrayLike,
        given: _Given,
        sample_weight: ArrayLike | None,
        mask: ArrayLike | None,
        divisor: Tensor | None,
    ) -> Unreduced:
        """The gradients are known beforehand where each loss's factor in the value is."""
        needs_gradients = {
            f"{name}.requires_grad": isinstance(x, Tensor) and x.requires_grad
            for name, x in (("hidden", given.hidden), ("sample_weight", sample_weight))
        }
        options = _options_of(self, self._slice_of("weight", given.weight, len, **needs_gradients))
        if not _in_chunks(given):
            samples, losses = _by_definition(y_true, given, sample_weight, mask, options)
            return losses, samples.weight, samples.mask, unchanged
        samples = _samples(y_true, given, sample_weight, mask, options)
        if self.reduction in ("none", None) or not _gradients_are_known(given, samples):
            losses = _losses(given, samples, options)
            return losses, samples.weight, samples.mask, unchanged
        zeros = samples.z.new_zeros(samples.y.shape, dtype=head.real_dtype(samples.z.dtype))
        g = factors(zeros, samples.weight, samples.mask, self.reduction, divisor)
        mine = _of_rank(given, samples, options)
        needs = [x is not None and x.requires_grad for x in mine.given]
        detached = [x.detach() if isinstance(x, Tensor) else x for x in mine.inputs]
        losses, *gradients = head.gradients(mine.rows(g).flatten(), needs, *detached)

        def attached(value: Tensor) -> Tensor:
            return _WithGradients.apply(value, *mine.given, *gradients)

        return mine.whole(losses), samples.weight, samples.mask, attached


def linear_sparse_categorical_crossentropy(
    y_true: ArrayLike,
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    ignore_class: int | float | None = None,
    logit_softcap: int | float | None = None,
    chunk_bytes: int | None = None,
    label_smoothing: int | float = 0.0,
    **others: Unpack[NoArguments],
) -> Tensor:
    """The cross-entropy, in nats, of a linear head's logits, one value per position.

    Equal to `sparse_categorical_crossentropy(y_true, hidden @ weight.T + bias, from_logits=True)`;
    the logits are computed in chunks, and again in the backward pass.

    Args:
        y_true, hidden, weight, bias: as for `LinearSparseCategoricalCrossentropy`.
        ignore_class, logit_softcap, chunk_bytes, label_smoothing: as its options.

    Returns:
        The losses, of `hidden`'s shape without its last axis: float64 for float64 inputs,
        otherwise float32.

    Raises:
        ValueError, TypeError: as `LinearSparseCategoricalCrossentropy`.

    >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.5, -1.0]]), torch.eye(3, 2)
    >>> losses = linear_sparse_categorical_crossentropy(torch.tensor([0, 1]), hidden, weight)
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.5514, 2.1041]
    """
    if others:
        raise unexpected(NAME, others, ["ignore_class"], CALL, "the call of a loss")
    dense = packed(y_true, hidden, name="hidden")
    given = _head(dense.y_pred, weight, bias)
    options = _Options(
        parse_ignore_class(ignore_class),
        parse_softcap(logit_softcap),
        None,
        parse_chunk_bytes(chunk_bytes),
        parse_smoothing(label_smoothing),
    )
    if not _in_chunks(given):
        losses = _by_definition(dense.y_true, given, None, None, options)[1]
    else:
        samples = _samples(dense.y_true, given, None, None, options)
        losses = _losses(given, samples, options)
    return restored(losses, hidden)


def _options_of(loss: LinearSparseCategoricalCrossentropy, shard: Slice | None = None) -> _Options:
    return _Options(
        loss.ignore_class, loss.logit_softcap, loss.dtype, loss.chunk_bytes, loss.label_smoothing,
        loss.class_weight, shard,
    )  # fmt: skip


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast; None outside of it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _head(hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> _Given:
    if isinstance(weight, nn.Module):
        raise TypeError(f"weight must be a tensor, got {weight}: pass its weight, and its bias")
    hidden = floats(hidden, "hidden")
    weight = floats(weight, "weight", hidden)
    bias = None if bias is None else floats(bias, "bias", hidden)
    if hidden.ndim == 0:
        raise ValueError("hidden must have an axis of features, got a scalar")
    shape, width = tuple(weight.shape), hidden.shape[-1]
    if weight.ndim != 2 or shape[1] != width:
        keras = " A Keras Dense kernel is (H, C): pass kernel.T." if shape[:1] == (width,) else ""
        raise ValueError(
            f"weight must be (C, H), the classes and hidden's last axis, (C, {width}), got {shape} "
            f"(hidden has the shape {tuple(hidden.shape)}).{keras}"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(
            f"bias must be (C,), one for each of weight's {shape[0]} classes, got "
            f"{tuple(bias.shape)}"
        )
    is_cast = _autocast_dtype(hidden.device) is not None
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None or x.dtype == hidden.dtype:
            continue
        if not is_cast or torch.float64 in (x.dtype, hidden.dtype):
            raise TypeError(
                f"{name} must have hidden's dtype, {hidden.dtype}, got {x.dtype}: cast one of "
                "them, or use torch.autocast, which casts all but float64"
            )
    return _Given(hidden, weight, bias)


def _in_chunks(given: _Given) -> bool:
    """Whether `kernels.head` can compute it; otherwise PyTorch's operations make all logits."""
    if torch.compiler.is_compiling():
        return takes_operators(*given)
    return computes_parts(given.hidden) or not needs_definition(*given)


def _by_definition(
    y_true: ArrayLike,
    given: _Given,
    sample_weight: ArrayLike | None,
    mask: ArrayLike | None,
    options: _Options,
) -> tuple[Samples, Tensor]:
    shard = options.shard
    if shard is not None:
        given = given._replace(hidden=copied(given.hidden, shard))
    samples = prepare(
        y_true, _logits(given, options), sample_weight, mask,
        from_logits=True, axis=-1, ignore_class=options.ignore_class, dtype=options.dtype,
        classes=None if shard is None else shard.classes, class_weight=options.class_weight,
    )  # fmt: skip
    z, y, counted = samples.z, samples.y, samples.counted
    if shard is not None:
        return samples, shard_losses(z, y, counted, None, shard)
    return samples, row_losses(z, y, counted, None, options.smoothing)


def _logits(given: _Given, options: _Options) -> Tensor:
    """All of them, with the softcap."""
    z = F.linear(*given)
    if options.softcap is None:
        return z
    return options.softcap * (z.to(_seen(z.dtype, options)) / options.softcap).tanh()


def _seen(compute: torch.dtype, options: _Options) -> torch.dtype:
    """The dtype of the logits that the loss sees. A softcap widens them first."""
    widened = torch.float32 if compute in HALVES and options.softcap is not None else compute
    return dtype_of_predictions(widened, options.dtype)


def _samples(
    y_true: ArrayLike,
    given: _Given,
    sample_weight: ArrayLike | None,
    mask: ArrayLike | None,
    options: _Options,
) -> Samples:
    """As `prepare`, with a tensor of the logits' shape that has no memory of its own."""
    hidden, weight, _ = given
    seen = _seen(given.compute(), options)
    z = hidden.detach().new_empty((), dtype=seen).expand(*hidden.shape[:-1], weight.shape[0])
    try:
        return prepare(
            y_true, z, sample_weight, mask,
            from_logits=True, axis=-1, ignore_class=options.ignore_class, dtype=options.dtype,
            classes=None if options.shard is None else options.shard.classes,
            class_weight=options.class_weight,
        )  # fmt: skip
    except ValueError as error:
        # The other hints of a shape are about a class axis, which logits here have last.
        rule = str(error).split(". If the classes are on axis")[0].rstrip(".")
        raise ValueError(f"{rule}. Here y_pred is hidden @ weight.T.") from None


def _gradients_are_known(given: _Given, samples: Samples) -> bool:
    """Whether some are needed, and what each row's loss is multiplied by is known beforehand.

    For float16 it is not: its small gradients need the factor of a gradient scaler.
    """
    if not torch.is_grad_enabled() or torch.float16 in (given.compute(), samples.z.dtype):
        return False
    if any(x is not None and x.requires_grad for x in (samples.weight, samples.mask)):
        return False
    return any(x is not None and x.requires_grad for x in given)


def _inputs(given: _Given, y: Tensor, counted: Tensor | None, options: _Options) -> head.Head:
    hidden, weight, bias = given
    compute = given.compute()
    default = CPU_CHUNK if hidden.device.type == "cpu" else DEVICE_CHUNK
    shard = options.shard
    return head.Head(
        hidden.reshape(y.numel(), hidden.shape[-1]),
        weight,
        bias,
        y.reshape(-1),
        None if counted is None else counted.reshape(-1),
        options.softcap,
        compute,
        _seen(compute, options),
        options.chunk_bytes or default,
        None if shard is None else shard.group.group_name,
        () if shard is None else list(shard[1:]),
        options.smoothing,
    )


class _OfRank(NamedTuple):
    """What this rank computes: of DTensors its part, of other tensors all."""

    given: _Given
    inputs: head.Head
    rows: Callable[[Tensor], Tensor]  # of what has one number for each row
    whole: Callable[[Tensor], Tensor]  # the losses, of this rank's


def _of_rank(given: _Given, samples: Samples, options: _Options) -> _OfRank:
    y, counted, hidden = samples.y, samples.counted, given.hidden
    rows = together = unchanged
    if is_dtensor(hidden):
        from .kernels import dtensors  # imported here: few need it, and it is slow

        if not options.smoothing:
            hidden = dtensors.with_rows_for(given.weight, hidden)
            given = given._replace(hidden=hidden)
        x, weight, bias, shard = dtensors.head_of_rank(*given, not options.smoothing)
        given, options = _Given(x, weight, bias), options._replace(shard=shard)
        rows = partial(dtensors.part_of_rows, like=hidden)
        together = partial(dtensors.losses_of, z=hidden)
        y, counted = rows(y), None if counted is None else rows(counted)

    def whole(losses: Tensor) -> Tensor:
        return together(losses.view(y.shape))

    return _OfRank(given, _inputs(given, y, counted, options), rows, whole)


def _losses(given: _Given, samples: Samples, options: _Options) -> Tensor:
    mine = _of_rank(given, samples, options)
    return mine.whole(head.losses(*mine.inputs))


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known: those of a head's three tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dx: Tensor,
        dweight: Tensor,
        dbias: Tensor,
    ) -> Tensor:
        # A view made in the backward pass would share its memory with a graph that is retained.
        dx = dx.view(hidden.shape) if ctx.needs_input_grad[1] else dx
        ctx.save_for_backward(dx, dweight, dbias)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        g, found = on_every_rank(upstream[0]), ctx.saved_tensors
        head.require_no_second_derivative()
        if not (values_can_be_read(g) and bool(g == 1)):  # 1: that of a loss alone
            found = tuple(d * g for d in found)
        needed = (
            d if need else None for d, need in zip(found, ctx.needs_input_grad[1:4], strict=True)
        )
        return None, *needed, None, None, None
