"""Examples of different lengths, packed: the N positions that exist, without padding.

    a jagged nested tensor   (B, j, ...)         its values, example by example
    a PackedSequence                             its data, step by step
    a list of tensors        (T, ...) for each   joined, example by example

`packed` makes dense tensors (N, ...) of the arguments of a call, `restored` gives losses (N, ...)
the layout of the predictions. All arguments have this layout, except for weights and masks with
one value for all, or one for each example.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .arrays import ArrayLike, float64_on, to_tensor
from .kernels import are_plain
from .kernels.modes import ragged_axis

JAGGED, PACKED, LIST = "a jagged nested tensor", "a PackedSequence", "a list"

# How a list is made of each kind, and each kind of a list.
TO_LIST = {
    JAGGED: "{}.unbind()",
    PACKED: "torch.nn.utils.rnn.unpack_sequence({})",
    LIST: "{}",
}
FROM_LIST = {
    JAGGED: "torch.nested.as_nested_tensor({}, layout=torch.jagged)",
    PACKED: "torch.nn.utils.rnn.pack_sequence({}, enforce_sorted=False)",
    LIST: "{}",
}
SHOWN = 12  # lengths in an error


class Packed(NamedTuple):
    """The arguments of a call, packed."""

    y_true: ArrayLike
    y_pred: ArrayLike
    sample_weight: ArrayLike | None
    mask: ArrayLike | None
    order: Tensor | None = None  # (N,) lists the positions example by example; None: as they are
    fits: Tensor | None = None  # whether all lengths agree, where it cannot be read


class _Layout(NamedTuple):
    """Which step of which example each position is: layouts with equal parts are equal."""

    kind: str
    parts: tuple[Any, ...]  # numbers, tensors or None


class _Predictions(NamedTuple):
    """Ragged predictions."""

    name: str  # in errors
    given: Any
    layout: _Layout
    rows: Tensor  # (N, ...)


def packed(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sample_weight: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    axis: int | None = -1,
    name: str = "y_pred",
) -> Packed:
    """The arguments of a call, packed if `y_pred` is ragged, otherwise unchanged.

    Where values cannot be read, on other devices than the CPU and in graphs, an argument with
    other lengths than `y_pred`'s, but as many positions, becomes NaN.

    Args:
        y_true, y_pred, sample_weight, mask: what the caller passed.
        axis: the class axis; None if `y_pred` has none.
        name: that of `y_pred` in errors.

    Raises:
        ValueError: layouts that differ, no class axis, a class axis that is not the last.
    """
    if _is_dense(y_pred) and _is_dense(y_true) and sample_weight is None is mask:
        return Packed(y_true, y_pred, None, None)  # most calls
    layout = _layout(y_pred)
    others = {"y_true": y_true, "sample_weight": sample_weight, "mask": mask}
    if layout is None:
        for other, value in others.items():
            if _layout(value) is not None:
                raise _mismatch(other, value, name, y_pred)
        return Packed(y_true, y_pred, sample_weight, mask)
    rows = _values(name, y_pred)
    items: Any = y_pred if layout.kind == LIST else (y_pred,)
    if all(isinstance(item, (list, tuple)) for item in items):
        rows = rows.float()  # as a dense list of numbers
    z = _Predictions(name, y_pred, layout, rows)
    if axis is not None:
        _require_classes_last(z, axis)
    order = None
    if layout.kind == PACKED:
        example, step = _coordinates(y_pred, len(z.rows))
        order = (example * len(layout.parts[0]) + step).argsort()
    found = {other: _beside(z, other, value) for other, value in others.items()}
    fits = [agrees for _, agrees in found.values() if isinstance(agrees, Tensor)]
    return Packed(
        **{other: value for other, (value, _) in found.items()},
        y_pred=z.rows,
        order=order,
        fits=torch.stack(fits).all() if fits else None,
    )


def restored(losses: Tensor, y_pred: ArrayLike) -> Any:
    """Losses, one for each position, in the layout of `y_pred`; a scalar unchanged."""
    layout = None if losses.ndim == 0 else _layout(y_pred)
    if layout is None:
        return losses
    if isinstance(y_pred, PackedSequence):
        return PackedSequence(losses, *y_pred[1:])
    if layout.kind == JAGGED:
        return torch.nested.nested_tensor_from_jagged(losses, *layout.parts)
    parts = losses.split(layout.parts)
    return list(parts) if isinstance(y_pred, list) else parts


def place_of(position: tuple[int, ...], y_pred: ArrayLike) -> tuple[int, ...]:
    """The example and step of a packed position, as the position of a dense batch."""
    if _layout(y_pred) is None:
        return position
    example, step = _coordinates(y_pred, len(_values("y_pred", y_pred)))
    return (int(example[position[0]]), int(step[position[0]]), *position[1:])


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def _layout(x: Any, of_any_list: bool = False) -> _Layout | None:
    """The layout of x; None if it is dense: an array, or a list that is one.

    `of_any_list`: also that of a list of arrays or lists of equal lengths.
    """
    if isinstance(x, Tensor):
        is_jagged = x.layout == torch.jagged
        return _Layout(JAGGED, (_offsets(x),)) if is_jagged else None
    if isinstance(x, PackedSequence):
        return _Layout(PACKED, (x.batch_sizes, x.sorted_indices))
    if not isinstance(x, (list, tuple)):
        return None
    lengths = []
    for item in x:
        shape = (len(item),) if isinstance(item, (list, tuple)) else getattr(item, "shape", ())
        if len(shape) == 0:
            return None
        lengths.append(shape[0])
    is_ragged = len(set(lengths)) > 1 or any(isinstance(item, Tensor) for item in x)
    return _Layout(LIST, tuple(lengths)) if is_ragged or (of_any_list and lengths) else None


def _offsets(x: Any) -> Tensor:
    """Where the examples of a jagged nested tensor begin in its values, and where the last ends."""
    return x.offsets()


def _values(name: str, x: Any, like: Tensor | None = None) -> Tensor:
    """The values (N, ...) of something ragged. `like`: a tensor on the device of arrays in it."""
    if isinstance(x, PackedSequence):
        return x.data
    if isinstance(x, Tensor):
        values = x.values()
        _require_packed(name, x, values)
        return values
    like = _first_tensor(x) if like is None else like
    items = [to_tensor(f"{name}[{i}]", item, like) for i, item in enumerate(x)]
    shapes = [tuple(item.shape) for item in items]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(
            f"{name} must hold tensors whose shapes differ in the first axis only, got "
            f"{_shown(shapes)}"
        )
    if len({item.dtype for item in items}) > 1:  # PyTorch would round large integers
        wide = any(item.is_floating_point() for item in items)
        items = [item.to(float64_on(item.device) if wide else torch.int64) for item in items]
    return torch.cat(items)


def _first_tensor(x: Any) -> Tensor | None:
    for item in x:  # not by `next`, which PyTorch 2.6 does not compile
        if isinstance(item, Tensor):
            return item
    return None


def _require_packed(name: str, x: Any, values: Tensor) -> None:
    """Raises unless the values of a jagged nested tensor are its positions, example by example."""
    axis, offsets = ragged_axis(x), _offsets(x)
    if axis != 1:
        raise ValueError(
            f"{name} must have its ragged axis right after that of the examples, got the shape "
            f"{tuple(x.shape)}: pass {name}.transpose(1, {axis})"
        )
    is_read = offsets.device.type == "cpu" and are_plain(offsets)
    if x.lengths() is not None or (is_read and (offsets[0] != 0 or offsets[-1] != len(values))):
        raise ValueError(
            f"{name} must be a nested tensor without gaps between its examples: pass "
            f"{name}.unbind(), and the other arguments as lists"
        )


def _require_classes_last(z: _Predictions, axis: int) -> None:
    if z.rows.ndim < 2:
        stack = f" If each is one row, pass torch.stack({z.name})." * (z.layout.kind == LIST)
        raise ValueError(
            f"{z.name} must have a class axis, (T, C) for each example, got {_described(z.given)} "
            f"and no other axis: are labels and predictions swapped?{stack}"
        )
    if axis != -1:
        raise ValueError(f"axis must be -1 for examples of different lengths, got {axis}")


def _beside(z: _Predictions, name: str, value: Any) -> tuple[Any, bool | Tensor]:
    """The argument called `name`, packed as the predictions are, and whether its lengths agree."""
    if value is None:
        return None, True
    own = _layout(value, z.layout.kind == LIST)
    agrees = False if own is None else _agree(own, z.layout)
    if agrees is False and name != "y_true" and _layout(value) is None:
        return _spread(z, name, value), True
    found = None if agrees is False else _values(name, value, z.rows)
    if found is None or len(found) != len(z.rows):
        raise _mismatch(name, value, z.name, z.given)
    if not isinstance(agrees, Tensor):
        return found, True
    wide = found if found.is_floating_point() else found.to(float64_on(found.device))
    return torch.where(agrees, wide, torch.nan), agrees


def _agree(a: _Layout, b: _Layout) -> bool | Tensor:
    """Whether two layouts are equal; a tensor, True or False, where values cannot be read."""
    if a.kind != b.kind or len(a.parts) != len(b.parts):
        return False
    agree: bool | Tensor = True
    for x, y in zip(a.parts, b.parts, strict=True):
        if x is y:
            continue
        if a.kind == LIST:
            same = x == y
        elif x is None or y is None:  # the indices of examples that were sorted when packed
            indices: Any = y if x is None else x
            same = _equal(indices, torch.arange(len(indices), device=indices.device))
        else:
            same = _equal(x, y)
        if same is False:
            return False
        agree = same if agree is True else same & agree
    return agree


def _equal(x: Tensor, y: Tensor) -> bool | Tensor:
    if x.shape != y.shape:
        return False
    if x.device != y.device:  # `to_tensor` raises
        return True
    is_read = x.device.type == "cpu" and are_plain(x, y)
    return torch.equal(x, y) if is_read else (x == y).all()


def _spread(z: _Predictions, name: str, value: Any) -> Tensor:
    """A weight or mask with one value for all, or for each example, (B,) or (B, 1): (N, 1, ...).

    So a scalar weight is in "mean_with_sample_weight"'s denominator N times, as under a mask.
    """
    tensor, ones = to_tensor(name, value, z.rows), [1] * (z.rows.ndim - 2)
    if tensor.ndim == 0:
        return tensor.repeat(len(z.rows), *ones)  # not a view: the bits of its sum are others
    count = _count(z.given)
    if tensor.shape[0] != count or tensor.numel() != count:
        raise ValueError(
            f"{_mismatch(name, value, z.name, z.given)}; for one value for each example pass "
            f"({count},) or ({count}, 1)"
        )
    example, _ = _coordinates(z.given, len(z.rows))
    return tensor.reshape(count, *ones).index_select(0, example)


def _count(x: Any) -> int:
    """The number of examples."""
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0]) if x.sorted_indices is None else len(x.sorted_indices)
    return x.shape[0] if isinstance(x, Tensor) else len(x)


def _coordinates(x: Any, positions: int) -> tuple[Tensor, Tensor]:
    """The example and the step of each position, (N,) int64."""
    if isinstance(x, PackedSequence):
        step, example = _runs(x.batch_sizes.to(x.data.device), positions)
        return example if x.sorted_indices is None else x.sorted_indices[example], step
    if isinstance(x, Tensor):
        return _runs(_offsets(x).diff(), positions)
    first = _first_tensor(x)
    device = None if first is None else first.device
    return _runs(torch.tensor([len(item) for item in x], device=device), positions)


def _runs(sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For runs of these sizes: the number of its run for each element, and its place in it."""
    numbers = torch.arange(len(sizes), device=sizes.device)
    run = torch.repeat_interleave(numbers, sizes, output_size=total)
    starts = sizes.cumsum(0) - sizes
    return run, torch.arange(total, device=sizes.device) - starts[run]


def _mismatch(name: str, value: Any, of: str, y_pred: Any) -> ValueError:
    own, wanted = _layout(value), _layout(y_pred)
    hint = ""
    if own is None:
        pass
    elif wanted is None and own.kind == LIST and len(set(own.parts)) == 1:
        hint = f": pass torch.stack({name})"
    elif wanted is not None and own.kind != wanted.kind:
        as_list = TO_LIST[own.kind].format(name)
        hint = f": pass {FROM_LIST[wanted.kind].format(as_list)}"
    elif wanted is not None and not torch.compiler.is_compiling():
        pairs = enumerate(zip(_lengths(y_pred), _lengths(value), strict=False))
        different = (f" (example {i} has {a} and {b})" for i, (a, b) in pairs if a != b)
        hint = next(different, "")
    return ValueError(
        f"{name} must have the layout of {of}, {_described(y_pred)}, got {_described(value)}{hint}"
    )


def _described(x: Any) -> str:
    """The kind of x and its lengths, for an error."""
    layout = _layout(x)
    if isinstance(x, Tensor) and x.is_nested and layout is None:
        return f"a nested tensor with the layout {x.layout}"
    if layout is None:
        shape = f" of the shape {tuple(x.shape)}" if hasattr(x, "shape") else ""
        return f"a dense {type(x).__name__}{shape}"
    if torch.compiler.is_compiling():
        return layout.kind
    return f"{layout.kind} with the lengths {_shown(_lengths(x))}"


def _lengths(x: Any) -> list[int]:
    """The number of positions of each example."""
    if isinstance(x, PackedSequence):
        example, _ = _coordinates(x, len(x.data))
        return torch.bincount(example, minlength=_count(x)).tolist()
    return _offsets(x).diff().tolist() if isinstance(x, Tensor) else [len(item) for item in x]


def _shown(values: list[Any]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return f"{values[:SHOWN]}{more}"
