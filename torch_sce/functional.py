"""The losses as functions: one value per sample, without weights or averages.

Here are Keras's rules for labels: which dtypes and shapes they may have, which axis the classes
are on, which samples are ignored, and what is an error. Everything a user passes is checked here
or in `reduction`, once; the kernels trust what they get.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.utils.rnn import PackedSequence

from .kernels import IGNORED, are_plain, row_losses, target_losses
from .options import FLOATS, check_axis, check_flag, check_ignore_class, check_smoothing

ArrayLike = Tensor | npt.ArrayLike  # a tensor, a number, a list, an array

EPSILON = 1e-7  # keras.config.epsilon(): probabilities are clipped to [EPSILON, 1 - EPSILON]
HALVES = (torch.float16, torch.bfloat16)

# The two bounds as each dtype rounds them, as Keras clips in the dtype it computes in.
CLIP = {
    dtype: (
        torch.tensor(EPSILON, dtype=dtype, device="cpu").item(),
        torch.tensor(1 - EPSILON, dtype=dtype, device="cpu").item(),
    )
    for dtype in FLOATS
}


def sparse_categorical_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    ignore_class: float | None = None,
    axis: int = -1,
) -> Tensor:
    """The cross-entropy, in nats, between integer labels and predictions, one value per sample.

        from logits:         log(sum_j exp(z_j)) - z_y
        from probabilities:  log(sum_j c_j) - log(c_y),  c = clip(q, 1e-7, 1 - 1e-7)

    Args:
        y_true: labels, of any integer dtype, bool, or floats (truncated toward zero), of
            `y_pred`'s shape without its class axis, or with a size of 1 in its place.
        y_pred: logits or probabilities, (..., C), float16, bfloat16, float32 or float64.
        from_logits: whether `y_pred` holds logits.
        ignore_class: a label, of a class or not, whose samples get loss 0 and gradient 0.
        axis: the class axis of `y_pred`.

    Returns:
        The losses, of `y_pred`'s shape without its class axis: float64 for float64 predictions,
        otherwise float32.

    Raises:
        ValueError: shapes that do not fit, no classes, `axis` out of range, or (on the CPU, in
            eager mode) a label outside `[0, C)`. Elsewhere such a label makes its sample's loss
            and gradient NaN.
        TypeError: predictions that are not real floating-point numbers, labels that are not
            real numbers, an `ignore_class` or `axis` that is not a number.

    Differs from Keras: any class axis works, lists are accepted as arrays, half-precision
    predictions give float32 losses, labels are never rounded.

    The rule is that of `keras.losses.sparse_categorical_crossentropy` on TensorFlow.

    >>> losses = sparse_categorical_crossentropy([1, 2], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.0513, 2.3026]
    """
    from_logits = check_flag("from_logits", from_logits)
    y_pred = floats(y_pred)
    axis = class_axis(axis, y_pred)
    labels = labels_for(to_tensor("y_true", y_true, y_pred), y_pred, axis)
    counted = not_ignored(labels, ignore_class)
    return sample_losses(labels, y_pred, counted, from_logits, axis, y_pred.dtype)


def categorical_crossentropy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """The cross-entropy, in nats, between targets and predictions, one value per sample.

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
    are normalised before they are clipped, the other way round than for integer labels.

    >>> y_true = [[0, 1, 0], [0, 0, 1]]
    >>> losses = categorical_crossentropy(y_true, [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(loss, 4) for loss in losses.tolist()]
    [0.0513, 2.3026]
    """
    from_logits = check_flag("from_logits", from_logits)
    label_smoothing = check_smoothing(label_smoothing)
    y_pred = floats(y_pred)
    y_true = to_tensor("y_true", y_true, y_pred)
    axis = class_axis(axis, y_pred)
    check_targets(y_true, y_pred, axis)
    options = (from_logits, label_smoothing, axis, y_pred.dtype)
    return sample_losses_of_targets(y_true, y_pred, None, *options)


def floats(y_pred: ArrayLike) -> Tensor:
    """Predictions in a dtype that a function computes in; Python numbers as float32."""
    listed = not hasattr(y_pred, "dtype")
    y_pred = to_tensor("y_pred", y_pred)
    if listed:  # Python numbers have no precision to keep
        y_pred = y_pred.float()
    if y_pred.dtype not in CLIP:
        raise TypeError(
            f"y_pred must be float16, bfloat16, float32 or float64, got {y_pred.dtype}: "
            "are labels and predictions exchanged?"
        )
    return y_pred


def to_tensor(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """`value` as a dense, real tensor; what is not a tensor goes to `like`'s device."""
    if isinstance(value, Tensor):
        require_dense(name, value)
        if like is not None and value.device != like.device and value.ndim > 0:
            raise ValueError(
                f"{name} must be on y_pred's device, {like.device}, got {value.device}: "
                f"move it with {name}.to({str(like.device)!r})"
            )
        tensor = value if like is None else value.to(like.device)  # moves scalars alone
    else:
        device = torch.get_default_device() if like is None else like.device
        if isinstance(value, (bool, int, float)) and abs(value) < 2**63:
            dtype = float64_on(device) if isinstance(value, float) else None
            # Filling a scalar needs no transfer from the host.
            return torch.full((), value, dtype=dtype, device=device)
        tensor = torch.as_tensor(to_array(name, value), device="cpu")
        if tensor.dtype == torch.float64:
            tensor = tensor.to(float64_on(device))
        tensor = tensor.to(device)
    if like is not None and type(tensor) is not type(like):
        _check_placement(name, tensor, like)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    return tensor


def _check_placement(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises where one is a DTensor and the other is not, unless that is a scalar."""
    here, there = (getattr(x, "placements", None) for x in (tensor, like))
    if (here is None) == (there is None) or tensor.ndim == 0:
        return
    if there is None:
        raise TypeError(
            f"{name} must be no DTensor where y_pred is none, got one with placements {here}: "
            f"pass {name}.full_tensor(), or {name}.to_local() if y_pred is this rank's part"
        )
    raise TypeError(
        f"{name} must be a DTensor, as y_pred is one with placements {there}, got none: pass "
        f"torch.distributed.tensor.distribute_tensor({name}, y_pred.device_mesh, ...)"
    )


def require_dense(name: str, tensor: Tensor) -> None:
    """Raises for a tensor that is more than its numbers, and names what makes a plain one of it."""
    if isinstance(tensor, MaskedTensor):
        counted = f"{name}.get_mask()" + ".all(axis)" * _has_classes(name, tensor)
        plain = _unmasked(name, f"{name}.get_data()", counted, f"{name}.to_tensor(0)")
        raise TypeError(f"{name} must be a plain tensor, got a MaskedTensor: {plain}")
    if tensor.is_nested:
        kind, plain = "a nested one", f"torch.cat({name}.unbind())"
    elif tensor.is_quantized:
        kind, plain = tensor.dtype, f"{name}.dequantize()"
    elif tensor.layout != torch.strided:
        kind, plain = tensor.layout, f"{name}.to_dense()"
    else:
        return
    raise TypeError(f"{name} must be a dense tensor of numbers, got {kind}: pass {plain}")


def _has_classes(name: str, value: Any) -> bool:
    """Whether a mask of its shape would have a class axis, as predictions and float targets do."""
    kind = str(value.dtype)
    return name == "y_pred" or (name == "y_true" and value.ndim > 1 and "float" in kind)


def _unmasked(name: str, values: str, counted: str, filled: str) -> str:
    if name == "mask":
        return f"pass {filled}"
    return f"pass {values}, and mask={counted} to a loss or metric"


def float64_on(device: torch.device) -> torch.dtype:
    """float64, or float32 where there is no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_array(name: str, value: Any) -> np.ndarray:
    """`value` as an array of its own: numbers, in a dtype that PyTorch has."""
    require_no_loss(name, value)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or what only looks like one
        raise ValueError(f"{name} must be a tensor or convertible to an array: {error}") from error
    if array.dtype.name == "bfloat16":  # TensorFlow's and JAX's arrays; NumPy has no such dtype
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        shown = repr(value)
        if isinstance(value, np.ndarray) or len(shown) > 60:
            shown = f"{type(value).__name__} of {array.dtype}"
        raise TypeError(f"{name} must hold numbers, got {shown}")
    if array.dtype.name in ("longdouble", "float96", "float128"):
        raise TypeError(f"{name} must have a dtype that PyTorch has, got {array.dtype}")
    # A copy, as in Keras: the caller may write into an array before the backward pass. NumPy has
    # two dtypes for each integer of 64 bits; PyTorch knows the one that its string names.
    return array.astype(array.dtype.newbyteorder("=").str, order="C")


def require_no_loss(name: str, value: Any) -> None:
    """Raises for what NumPy would take without its gradients or its mask."""
    kinds, kind = _kinds_in(value), type(value).__name__
    if isinstance(value, np.ma.MaskedArray):
        hidden = f"np.ma.getmaskarray({name})" + ".any(axis)" * _has_classes(name, value)
        counted = f"~{hidden}"
        plain = _unmasked(name, f"{name}.data", counted, f"{name}.filled(0)")
        raise TypeError(f"{name} must be a plain array, got a masked one: {plain}")
    if any(issubclass(each, np.ma.MaskedArray) for each in kinds):
        raise TypeError(
            f"{name} must be a plain array, got a {kind} with masked ones: make one masked array "
            "of it by np.ma.stack, the innermost lists first, and pass that one's data and mask"
        )
    if any(issubclass(each, Tensor) for each in kinds):
        raise TypeError(f"{name} must be one tensor, got a {kind} of tensors{_joined(name, value)}")


def _kinds_in(value: Any) -> set[type]:
    """The types of what is in a list, however deep."""
    if not isinstance(value, (list, tuple)):
        return {type(value)}
    kinds = set(map(type, value))
    nested = any(issubclass(each, list | tuple) for each in kinds)
    return kinds.union(*map(_kinds_in, value)) if nested else kinds


def _joined(name: str, value: Any) -> str:
    """What stands behind "a list of tensors": how to make one tensor of it."""
    if isinstance(value, PackedSequence):
        return f": pass {name}.data"
    if not all(isinstance(item, Tensor) for item in value):
        return (
            ": make one of it by torch.stack for lists of tensors, the innermost first, and "
            "torch.tensor for numbers"
        )
    shapes = {tuple(item.shape) for item in value}
    if len(shapes) == 1:
        return f": pass torch.stack({name}), which keeps their gradients"
    if len({shape[1:] for shape in shapes}) > 1 or min(map(len, shapes)) <= (name == "y_pred"):
        return " of shapes " + " and ".join(map(str, sorted(shapes, reverse=True)))
    label = ", padding_value=-1) and ignore_class=-1" if name == "y_true" else ")"
    padded = f"torch.nn.utils.rnn.pad_sequence({name}, batch_first=True{label}"
    return f" of different lengths: pass torch.cat({name}), or {padded}"


def class_axis(axis: int, y_pred: Tensor) -> int:
    """`axis` counted from the front, with at least one class on it."""
    axis = check_axis(axis)
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

    An axis of size 1 may stand where the classes are, and another one last of all. `sibling` is
    what takes one-hot labels.
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


def _shape_message(y_true: tuple, y_pred: tuple, axis: int, wanted: tuple, sibling: str) -> str:
    rule = (
        f"y_true must have the shape of y_pred without its class axis, {wanted}, got {y_true} "
        f"(y_pred has the shape {y_pred} and its class axis is {axis})"
    )
    without_one = y_pred[:-1] if y_pred[-1:] == (1,) else y_pred
    for swapped in {min(axis, len(y_true) - 1), len(y_true) - 1} if y_true else ():
        if (*y_true[:swapped], *y_true[swapped + 1 :]) in (y_pred, without_one):
            return (
                f"{rule}. These shapes fit if labels and predictions are exchanged: labels come "
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
    """Both with as many axes where one has a last axis of size 1 more, as Keras's losses do."""
    short, long = sorted((y_true.ndim, y_pred.ndim))
    if long - short != 1:
        return y_true, y_pred

    def matched(x: Tensor, other: Tensor) -> Tensor:
        if other.ndim < x.ndim and x.shape[-1] == 1 and short != 1:
            return x.squeeze(-1)
        return x.unsqueeze(-1) if x.ndim == 1 < other.ndim and other.shape[-1] == 1 else x

    return matched(y_true, y_pred), matched(y_pred, y_true)


def check_targets(
    y_true: Tensor, y_pred: Tensor, axis: int, sibling: str = "SparseCategoricalCrossentropy"
) -> None:
    """Raises unless there is a target for every class. `sibling` is what takes class numbers."""
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
    if check_ignore_class(ignore_class) is None:
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
    """Labels as int64: floats truncated toward zero; what has no class number becomes negative."""
    if labels.is_floating_point():
        wide = labels.to(float64_on(labels.device))
        # NaN, infinities and numbers beyond int64 have no defined conversion.
        return wide.nan_to_num(nan=-1.0).clamp(-(2.0**40), 2.0**40).long()
    found = labels.long()
    if labels.dtype == torch.uint64:  # past 2^63 they come out negative, and might look like -1
        return torch.where(found < 0, 2**62, found)
    return found


def sample_losses(
    labels: Tensor,
    y_pred: Tensor,
    counted: Tensor | None,
    from_logits: bool,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    """One loss per label, and 0 where `counted` is false; clipped as `dtype` rounds the bounds."""
    y = class_numbers(labels)
    all_classes = check_range(labels, y, counted, y_pred.shape[axis], axis)
    if counted is not None:
        y = torch.where(counted, y, IGNORED)
    z = y_pred if axis == y_pred.ndim - 1 else y_pred.movedim(axis, -1)
    return row_losses(z, y, None if from_logits else CLIP[dtype], all_classes)


def sample_losses_of_targets(
    y_true: Tensor,
    y_pred: Tensor,
    counted: Tensor | None,
    from_logits: bool,
    label_smoothing: float,
    axis: int,
    dtype: torch.dtype,
) -> Tensor:
    """`sample_losses` for a target for every class."""
    z, t = (x if axis == x.ndim - 1 else x.movedim(axis, -1) for x in (y_pred, y_true))
    smoothing = (1 - label_smoothing, label_smoothing / z.shape[-1]) if label_smoothing else None
    return target_losses(z, t, None if from_logits else CLIP[dtype], smoothing, counted)


def check_range(labels: Tensor, y: Tensor, counted: Tensor | None, classes: int, axis: int) -> bool:
    """Whether every label is known to be a class.

    Raises for one that counts and is not, where reading the labels costs no wait. That is on the
    CPU in eager mode. Elsewhere the kernels turn such a sample into NaN.
    """
    if not values_can_be_read(labels, counted):
        return False
    if y.numel() == 0:
        return True
    low, high = y.aminmax()
    if low.item() >= 0 and high.item() < classes:
        return counted is None or bool(counted.all())
    outside = (y < 0) | (y >= classes)
    if counted is not None:
        outside &= counted
        if not outside.any():
            return False
    found = outside.nonzero()
    position = tuple(found[0].tolist())
    label = labels[position].item()
    others = len(found) - 1
    more = f" and at {others} other position{'s' * (others > 1)}" if others else ""
    raise ValueError(
        f"y_true must hold labels in [0, {classes}), the classes on axis {axis} of y_pred, "
        f"got {label} at position {position}{more}.{_label_hint(label, y, counted, classes)}"
    )


def values_can_be_read(*tensors: Tensor | None) -> bool:
    """Whether looking at the values costs no wait and breaks no graph."""
    here = all(x is None or x.device.type == "cpu" for x in tensors)
    return here and are_plain(*tensors)


def _label_hint(label: float, y: Tensor, counted: Tensor | None, classes: int) -> str:
    used = y if counted is None else y[counted]
    if label == classes and used.min() >= 1 and used.max() == classes:
        return " The labels seem to start at 1: subtract 1."
    if label in (-1, -100, 255):
        return f" If {label} marks samples to leave out, pass ignore_class={label}."
    return ""
