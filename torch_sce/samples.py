"""What a caller passes to a loss, a function or a metric, as one checked value.

All of Keras's rules for shapes and labels are here, once: which axis holds the classes, which
shapes labels, weights and masks may have, which positions are ignored, what is an error, and its
hint. The kernels and `reduction` trust what `prepare` returns.

    P   the shape of the losses: y_pred's without its class axis, one loss for each position
    C   the number of classes
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .arrays import HALVES, ArrayLike, float64_on, floats, to_tensor
from .kernels import Clip, are_plain, whole_rows
from .kernels.cpu import count_labels
from .options import FLOATS
from .ragged import packed, place_of

Shape = tuple[int, ...]
Broadcast = Callable[[str, Tensor, torch.Size], Tensor]  # the rule for a weight or a mask

EPSILON = 1e-7  # keras.config.epsilon(): probabilities are clipped to [EPSILON, 1 - EPSILON]

# The two bounds as each dtype rounds them, as Keras clips in the dtype it computes in.
CLIP = {
    dtype: (
        torch.tensor(EPSILON, dtype=dtype, device="cpu").item(),
        torch.tensor(1 - EPSILON, dtype=dtype, device="cpu").item(),
    )
    for dtype in FLOATS
}


class Samples(NamedTuple):
    """A batch whose parts fit together."""

    z: Tensor  # (*P, C) predictions, in the dtype that the loss sees or a narrower one
    y: Tensor  # (*P,) int64 class numbers, or (*P, C) targets
    counted: Tensor | None  # (*P,) bool: which positions count; None: all
    kept: Tensor | None  # (*P,) bool: which are not ignored for their label; None: all
    weight: Tensor | None  # broadcasts to P
    mask: Tensor | None  # the mask as given, 0 where a label is ignored; broadcasts to P
    clip: Clip  # None for logits, otherwise the bounds of probabilities
    number: int | None = None  # how many positions count, if it is known that their y is in [0, C)
    order: Tensor | None = None  # lists the positions example by example; None: as they are

    def reducible(self, losses: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The losses (*P,), weight and mask, example by example: a sum's bits need its order."""
        weight, mask, order = self.weight, self.mask, self.order
        if order is None:
            return losses, weight, mask
        weight, mask = (None if x is None else x[order] for x in (weight, mask))
        return losses[order], weight, mask


def prepare(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sample_weight: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    from_logits: bool,
    axis: int,
    ignore_class: float | None = None,
    dtype: torch.dtype | None = None,
    broadcast: Broadcast | None = None,
    classes: int | None = None,
    checks_labels: bool = True,
    class_weight: Tensor | dict[int, float] | None = None,
) -> Samples:
    """Labels and predictions, checked, with the positions that count.

    Args:
        y_true, y_pred, sample_weight, mask: what the caller passed.
        from_logits, axis, ignore_class: options, parsed.
        dtype: the loss's dtype, which predictions are cast to; None for `y_pred`'s own.
        broadcast: the rule for weights and masks; by default that of losses.
        classes: how many there are, if `y_pred` has a part of them; labels are numbers of these.
        checks_labels: whether labels must be in their range, where values can be read, and class
            weights fit the classes.
        class_weight: from `parse_class_weight`.

    Raises:
        ValueError, TypeError: as the loss says.
    """
    original, order = y_pred, None
    ready = _as_given(y_true, y_pred, sample_weight, mask, axis, dtype)
    if ready is not None:
        labels, y_pred, weight, mask = ready
        axis = y_pred.ndim - 1
    else:
        y_true, y_pred, sample_weight, mask, order, _ = packed(
            y_true, y_pred, sample_weight, mask, axis
        )
        y_pred = predictions(y_pred, dtype)
        given = to_tensor("y_true", y_true, y_pred)
        axis = class_axis(axis, y_pred)
        labels = labels_for(given, y_pred, axis)
        weight, mask = aligned(sample_weight, mask, y_pred, labels.shape, broadcast)
    kept = not_ignored(labels, ignore_class)
    mask = combine_masks(mask, kept)
    counted = None if mask is None else mask.bool().expand(labels.shape)
    y = labels if ready is not None else class_numbers(labels)
    number = None
    if checks_labels and (ready is not None or values_can_be_read(labels, counted)):
        C = classes or y_pred.shape[axis]
        number = number_that_count(labels, y, counted, C, axis, original)
        counted = None if number == y.numel() else counted
    if class_weight is not None:
        fits = (classes or y_pred.shape[axis]) if checks_labels else None
        weight = times(weight, weights_of(y, class_weight, fits))
    clip = None if from_logits else CLIP[dtype or y_pred.dtype]
    z = _classes_last(y_pred, axis)
    return Samples(z, y, counted, kept, weight, mask, clip, number, order)


def _as_given(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sample_weight: ArrayLike | None,
    mask: ArrayLike | None,
    axis: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """The arguments, if they are tensors that need no conversion and whose values can be read.

    In most calls they are.
    """
    if not (isinstance(y_true, Tensor) and isinstance(y_pred, Tensor)):
        return None
    if y_true.is_nested or y_pred.is_nested or not values_can_be_read(y_true, y_pred):
        return None
    shape, kind = y_pred.shape, y_pred.dtype
    are_ready = (
        y_true.dtype == torch.int64
        and kind in FLOATS
        and (kind == dtype or kind == dtype_of_predictions(kind, dtype))
        and (axis == -1 or axis == len(shape) - 1)
        and y_true.shape == shape[:-1] != shape
        and 0 not in shape
    )
    if not are_ready:
        return None
    if sample_weight is not None and not _needs_no_conversion(sample_weight, y_true):
        return None
    if mask is not None and not _needs_no_conversion(mask, y_true):
        return None
    return y_true, y_pred, sample_weight, mask


def _needs_no_conversion(value: ArrayLike, labels: Tensor) -> TypeGuard[Tensor]:
    """Whether a weight or mask has the labels' shape, and needs no conversion."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and (value.dtype == torch.bool or value.dtype in FLOATS)
        and value.shape == labels.shape
        and values_can_be_read(value)
    )


def prepare_targets(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sample_weight: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    from_logits: bool,
    axis: int,
    dtype: torch.dtype | None = None,
    matches_ranks: bool = True,
    broadcast: Broadcast | None = None,
    class_weight: Tensor | dict[int, float] | None = None,
) -> Samples:
    """As `prepare`, with a target for every class. `matches_ranks`: as Keras's losses do.

    The class weight of a position is that of its largest target, as in Keras's `fit`.
    """
    y_true, y_pred, sample_weight, mask, order, _ = packed(
        y_true, y_pred, sample_weight, mask, axis
    )
    y_pred = predictions(y_pred, dtype)
    t = to_tensor("y_true", y_true, y_pred)
    if matches_ranks:
        t, y_pred = match_ranks(t, y_pred)
    axis = class_axis(axis, y_pred)
    require_targets(t, y_pred, axis)
    shape = y_pred.shape[:axis] + y_pred.shape[axis + 1 :]
    weight, mask = aligned(sample_weight, mask, y_pred, shape, broadcast)
    counted = None if mask is None else mask.bool().expand(shape)
    if class_weight is not None:
        largest = whole_rows(_classes_last(t, axis)).to(float64_on(t.device)).argmax(-1)
        weight = times(weight, weights_of(largest, class_weight, t.shape[axis]))
    clip = None if from_logits else CLIP[dtype or y_pred.dtype]
    z, t = _classes_last(y_pred, axis), _classes_last(t, axis)
    return Samples(z, t, counted, None, weight, mask, clip, order=order)


def predictions(y_pred: ArrayLike, dtype: torch.dtype | None) -> Tensor:
    """`y_pred` in the loss's dtype, or in a narrower one that the kernels widen by rows."""
    if dtype is None:
        return floats(y_pred)
    y_pred = to_tensor("y_pred", y_pred)
    return y_pred.to(dtype_of_predictions(y_pred.dtype, dtype))


def dtype_of_predictions(given: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that predictions of a given one are handed to the kernels in."""
    widens = dtype == torch.float32 and given in HALVES
    return given if widens or dtype is None else dtype


def _classes_last(x: Tensor, axis: int) -> Tensor:
    return x if axis == x.ndim - 1 else x.movedim(axis, -1)


def class_axis(axis: int, y_pred: Tensor) -> int:
    """`axis` counted from the front, with at least one class on it."""
    if y_pred.ndim == 0:
        raise ValueError("y_pred must have a class axis, got a scalar")
    if not -y_pred.ndim <= axis < y_pred.ndim:
        raise ValueError(
            f"axis must be in [{-y_pred.ndim}, {y_pred.ndim}) for y_pred of shape "
            f"{tuple(y_pred.shape)}, got {axis}"
        )
    axis %= y_pred.ndim
    if y_pred.shape[axis] == 0:
        raise ValueError(
            f"y_pred must have at least one class on axis {axis}, got shape {tuple(y_pred.shape)}"
        )
    return axis


def labels_for(
    y_true: Tensor, y_pred: Tensor, axis: int, sibling: str = "CategoricalCrossentropy"
) -> Tensor:
    """`y_true` in the shape of the losses: `y_pred`'s without its class axis.

    The class axis may be kept with size 1, and one more axis of size 1 may follow. `sibling` is
    the class for one-hot labels.
    """
    shape = (*y_pred.shape[:axis], *y_pred.shape[axis + 1 :])
    labels = y_true
    if labels.ndim == y_pred.ndim + 1 > 2 and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if labels.ndim == y_pred.ndim:
        if labels.shape[axis] == 1:
            labels = labels.squeeze(axis)
        elif labels.shape[-1] == 1:
            labels = labels.squeeze(-1)
    if labels.shape == shape:
        return labels
    given = (tuple(y_true.shape), tuple(y_pred.shape))
    raise ValueError(_shape_message(*given, axis, shape, sibling))


def _shape_message(y_true: Shape, y_pred: Shape, axis: int, wanted: Shape, sibling: str) -> str:
    rule = (
        f"y_true must have the shape of y_pred without its class axis, {wanted}, got {y_true} "
        f"(y_pred has the shape {y_pred} and its class axis is {axis})"
    )
    without_one = y_pred[:-1] if y_pred[-1:] == (1,) else y_pred
    for swapped in {min(axis, len(y_true) - 1), len(y_true) - 1} if y_true else ():
        if (*y_true[:swapped], *y_true[swapped + 1 :]) in (y_pred, without_one):
            return (
                f"{rule}. These shapes fit if labels and predictions are swapped: labels come "
                "first in loss(y_true, y_pred) and metric.update_state(y_true, y_pred), as in "
                "Keras; predictions come first in loss.as_criterion()(input, target), "
                "metric.update(preds, target) and metric(preds, target)."
            )
    if y_true == y_pred and len(y_pred) == 1:
        return f"{rule}. For labels (B,) y_pred must be (B, C): its class axis seems to be missing."
    if y_true == y_pred:
        return (
            f"{rule}. If y_true is one-hot, use {sibling}, or pass the class numbers: "
            f"y_true.argmax({axis})."
        )
    for other in range(len(y_pred)):
        if y_true in (
            y_pred[:other] + y_pred[other + 1 :],
            (*y_pred[:other], 1, *y_pred[other + 1 :]),
        ):
            return (
                f"{rule}. If the classes are on axis {other}, pass axis={other}, or to an accuracy "
                f"y_pred.movedim({other}, -1)."
            )
    return f"{rule}."


def match_ranks(y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same rank, if one has an extra last axis of size 1, as in Keras's losses."""
    short, long = sorted((y_true.ndim, y_pred.ndim))
    if long - short != 1:
        return y_true, y_pred

    def matched(x: Tensor, other: Tensor) -> Tensor:
        if other.ndim < x.ndim and x.shape[-1] == 1 and short != 1:
            return x.squeeze(-1)
        return x.unsqueeze(-1) if x.ndim == 1 < other.ndim and other.shape[-1] == 1 else x

    return matched(y_true, y_pred), matched(y_pred, y_true)


def require_targets(
    y_true: Tensor, y_pred: Tensor, axis: int, sibling: str = "SparseCategoricalCrossentropy"
) -> None:
    """Raises unless there is a target for every class. `sibling` is the class for class numbers."""
    if y_true.shape == y_pred.shape:
        return
    given, wanted = tuple(y_true.shape), tuple(y_pred.shape)
    rule = f"y_true must have y_pred's shape, {wanted}, a target for every class, got {given}"
    if given in ((*wanted[:axis], *wanted[axis + 1 :]), (*wanted[:axis], 1, *wanted[axis + 1 :])):
        numbers_ = "y_true" if len(given) < len(wanted) else f"y_true.squeeze({axis})"
        moved = "" if axis == len(wanted) - 1 else f".movedim(-1, {axis})"
        rule += (
            f". If y_true holds class numbers, use {sibling}, or pass "
            f"torch.nn.functional.one_hot({numbers_}, {wanted[axis]}){moved}"
        )
    raise ValueError(rule)


def not_ignored(labels: Tensor, ignore_class: Any) -> Tensor | None:
    """Which labels differ from `ignore_class`, as a bool tensor; None if none is to be ignored.

    Compared before labels are truncated, as Keras does, and exactly: nothing is rounded.
    """
    if ignore_class is None:
        return None
    if labels.is_floating_point():
        return labels.to(float64_on(labels.device)) != float(ignore_class)
    low, high = (0, 2**64) if labels.dtype == torch.uint64 else (-(2**63), 2**63)
    # The range comes first: NaN and infinities are outside of it, and have no integer.
    if not (low <= ignore_class < high and ignore_class == int(ignore_class)):
        return torch.ones_like(labels, dtype=torch.bool)
    ignore_class = int(ignore_class)
    if ignore_class >= 2**63:
        ignore_class -= 2**64  # as int64 has the bits of such a label
    return labels.long() != ignore_class


def class_numbers(labels: Tensor) -> Tensor:
    """Labels as int64: floats truncated toward zero; NaN and huge ones end up outside `[0, C)`."""
    if labels.is_floating_point():
        wide = labels.to(float64_on(labels.device))
        # NaN, infinities and numbers beyond int64 have no defined conversion.
        return wide.nan_to_num(nan=-1.0).clamp(-(2.0**40), 2.0**40).long()
    found = labels.long()
    if labels.dtype == torch.uint64:  # past 2^63 they come out negative, and might look like -1
        return torch.where(found < 0, 2**62, found)
    return found


def number_that_count(
    labels: Tensor, y: Tensor, counted: Tensor | None, C: int, axis: int, y_pred: ArrayLike
) -> int:
    """How many labels count. Raises for one of them that is outside `[0, C)`.

    `y_pred` as it was given says where a label is.
    """
    number = count_labels(y, counted, C)
    if number is not None:
        return number
    outside = (y < 0) | (y >= C)
    found = (outside if counted is None else outside & counted).nonzero()
    index = tuple(found[0].tolist())
    label = labels[index].item()
    position = place_of(index, y_pred)
    axis += len(position) - len(index)  # without the axis of the examples where they are packed
    others = len(found) - 1
    more = f" and at {others} other position{'s' * (others > 1)}" if others else ""
    used = y if counted is None else y[counted]
    raise ValueError(
        f"y_true must hold labels in [0, {C}), the classes on axis {axis} of y_pred, "
        f"got {label} at position {position}{more}.{_label_hint(label, used, C)}"
    )


def parse_class_weight(class_weight: Any) -> Tensor | dict[int, float] | None:
    """A weight for each class, (C,), or for some classes in a dict."""
    if not isinstance(class_weight, Mapping):
        if class_weight is None:
            return None
        weights = to_tensor("class_weight", class_weight).detach()
        if weights.ndim == 1:
            return weights
        raise ValueError(
            "class_weight must have one weight for each class, (C,), or be a dict {class: weight}, "
            f"got the shape {tuple(weights.shape)}"
        )
    found: dict[int, float] = {}
    for label, weight in class_weight.items():
        with suppress(TypeError, ValueError):  # a JSON file has class numbers as strings
            if int(label) == float(label) >= 0:
                found[int(label)] = float(weight)
                continue
        raise ValueError(
            "class_weight must have numbers of classes, from 0 on, as keys, and numbers as "
            f"weights, got {{{label!r}: {weight!r}}}"
        )
    return found


def weights_of(y: Tensor, class_weight: Tensor | dict[int, float], classes: int | None) -> Tensor:
    """The weight of each position's class y; of one that a dict leaves out 1, as in Keras's `fit`.

    `classes`: how many there are; None: unknown.
    """
    if isinstance(class_weight, dict):
        last = max(class_weight, default=-1)
        if classes is not None and last >= classes:
            raise ValueError(
                f"class_weight must have classes in [0, {classes}) as keys, got {last}"
            )
        table = [class_weight.get(label, 1.0) for label in range(last + 2)]
        weights = torch.tensor(table, dtype=float64_on(y.device), device="cpu")
    else:
        weights = class_weight
        if classes is not None and len(weights) != classes:
            raise ValueError(
                f"class_weight must have one weight for each of the {classes} classes, got "
                f"{len(weights)}"
            )
    weights = weights.to(y.device, non_blocking=weights.device.type == "cpu")
    weights = to_tensor("class_weight", weights, y, "y_true")
    return weights[y.clamp(0, len(weights) - 1)]


def times(weight: Tensor | None, other: Tensor) -> Tensor:
    return other if weight is None else weight * other


def values_can_be_read(*tensors: Tensor | None) -> bool:
    """Whether reading values needs no host synchronisation and breaks no graph."""
    for x in tensors:
        if x is not None and not x.is_cpu:
            return False
    return are_plain(*tensors)


def _label_hint(label: float, used: Tensor, C: int) -> str:
    if label == C and used.min() >= 1 and used.max() == C:
        return " The labels seem to start at 1: subtract 1."
    if label in (-1, -100, 255):
        return f" If {label} marks positions to leave out, pass ignore_class={label}."
    return ""


def aligned(
    sample_weight: ArrayLike | None,
    mask: ArrayLike | None,
    y_pred: Tensor,
    shape: torch.Size,
    broadcast: Broadcast | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and mask on `y_pred`'s device, so that they broadcast to the losses' shape."""
    broadcast = broadcast or align
    weight, mask = (
        None if value is None else broadcast(name, to_tensor(name, value, y_pred), shape)
        for name, value in (("sample_weight", sample_weight), ("mask", mask))
    )
    return weight, mask


def align(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value`, a weight or a mask, reshaped so that it broadcasts to exactly the losses' shape.

    Keras adds or drops a last axis of size 1 where the ranks differ by one, then broadcasts.

    Differs from Keras: a ValueError if the result would be larger than the losses, or if a weight
    for each example would broadcast along the wrong axis.
    """
    rank = len(shape)
    given = tuple(value.shape)
    if value.ndim == rank + 1 and given[-1] == 1:
        value = value.squeeze(-1)
    elif value.ndim == rank - 1 and value.ndim > 0 and shape[-1] == 1:
        value = value.unsqueeze(-1)
    while value.ndim > max(rank, 1) and value.shape[0] == 1:
        value = value.squeeze(0)
    require_broadcasting(name, value, shape, given)
    return value


def require_broadcasting(name: str, value: Tensor, shape: torch.Size, given: Shape) -> None:
    """Raises unless `value`, of the shape `given` at first, broadcasts to exactly this shape."""
    rank = len(shape)
    fits = value.ndim <= rank and all(
        have in (1, want)
        for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    # (B,) on (B, T) is meant per example, but would broadcast along T if B == T.
    leads = 0 < value.ndim < rank and tuple(value.shape) == tuple(shape[: value.ndim])
    if leads and value.numel() > 1:
        index = ", ".join([":", *["None"] * (rank - value.ndim)])
        raise ValueError(
            f"{name} must broadcast to the losses' shape {tuple(shape)} from the last axis, "
            f"got {given}: for one value per example pass {name}[{index}]"
        )
    if not fits:
        raise ValueError(f"{name} must broadcast to the losses' shape {tuple(shape)}, got {given}")


def combine_masks(mask: Tensor | None, counted: Tensor | None) -> Tensor | None:
    """One mask from the caller's (aligned) and from the labels that are not ignored."""
    if mask is None or counted is None:
        return counted if mask is None else mask
    return mask & counted if mask.dtype == torch.bool else torch.where(counted, mask.float(), 0)


def leading(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value`, a weight or a mask of a metric, reshaped to the leading axes of `shape`.

    Raises:
        ValueError: a shape that does not fit.
    """
    given = tuple(value.shape)
    while value.ndim > len(shape) and value.shape[-1] == 1:
        value = value.squeeze(-1)
    pairs = zip(value.shape, shape, strict=False)
    if value.ndim > len(shape) or not all(have in (1, want) for have, want in pairs):
        raise ValueError(
            f"{name} must broadcast to the values' shape {tuple(shape)} from the first axis, as "
            f"{tuple(shape[:1])} does, got {given}"
        )
    return value


def over_leading_axes(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """As `leading`, so that it broadcasts to this shape."""
    value = leading(name, value, shape)
    return value.reshape(value.shape + (1,) * (len(shape) - value.ndim))
