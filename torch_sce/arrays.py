"""Converts what a caller passes to a dense, real tensor, with errors that name the conversion."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import TypeAliasType

from .options import FLOATS


@runtime_checkable
class _Array(Protocol):
    def __array__(self) -> np.ndarray: ...


@runtime_checkable
class _Sequence(Protocol):
    """Lists and tuples of numbers, arrays or such sequences."""

    # No string has this method, so that none is a sequence. Pyright wants it first.
    def __contains__(self, value: object, /) -> bool: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> "float | _Array | _Sequence": ...


# A tensor, a number, a list, an array; `help()` shows it by its name.
ArrayLike = TypeAliasType("ArrayLike", Tensor | int | float | _Array | _Sequence | PackedSequence)

HALVES = (torch.float16, torch.bfloat16)


def to_tensor(
    name: str, value: Any, like: Tensor | None = None, like_name: str = "y_pred"
) -> Tensor:
    """`value` as a dense, real tensor; what is not a tensor goes to `like`'s device."""
    if isinstance(value, Tensor):
        require_dense(name, value)
        if like is not None and value.device != like.device and value.ndim > 0:
            raise ValueError(
                f"{name} must be on {like_name}'s device, {like.device}, got {value.device}: "
                f"move it with {name}.to({str(like.device)!r})"
            )
        tensor = value if like is None else value.to(like.device)  # moves only scalars
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
    if like is not None and not type(tensor) is type(like) is Tensor:
        tensor = _placed(name, tensor, like, like_name)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    return tensor


def floats(value: ArrayLike, name: str = "y_pred", like: Tensor | None = None) -> Tensor:
    """Predictions in a dtype that a function computes in; Python numbers as float32."""
    listed = not hasattr(value, "dtype")
    tensor = to_tensor(name, value, like, "hidden")
    if listed:  # Python numbers have no precision to keep
        tensor = tensor.float() if like is None else tensor.to(like.dtype)
    if tensor.dtype not in FLOATS:
        kind = {"y_pred": "predictions", "hidden": "hidden states"}.get(name)
        hint = f": are labels and {kind} swapped?" if kind else ""
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}{hint}"
        )
    return tensor


def float64_on(device: torch.device) -> torch.dtype:
    """float64, or float32 where there is no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def require_dense(name: str, tensor: Tensor) -> None:
    """Raises for a tensor that is not plain and dense, and names the conversion."""
    if isinstance(tensor, MaskedTensor):
        counted = f"{name}.get_mask()" + ".all(axis)" * _has_classes(name, tensor)
        plain = _unmasked(name, f"{name}.get_data()", counted, f"{name}.to_tensor(0)")
        raise TypeError(f"{name} must be a plain tensor, got a MaskedTensor: {plain}")
    if tensor.is_nested:
        kind = "a nested one"
        plain = f"{name}.values()" if tensor.layout == torch.jagged else f"{name}.unbind()"
    elif tensor.is_quantized:
        kind, plain = tensor.dtype, f"{name}.dequantize()"
    elif tensor.layout != torch.strided:
        kind, plain = tensor.layout, f"{name}.to_dense()"
    else:
        return
    raise TypeError(f"{name} must be a dense tensor of numbers, got {kind}: pass {plain}")


def _placed(name: str, tensor: Tensor, like: Tensor, like_name: str) -> Tensor:
    """A plain tensor beside a DTensor is the same on all ranks; the reverse is an error."""
    here, there = (getattr(x, "placements", None) for x in (tensor, like))
    meshes = [getattr(x, "device_mesh", None) for x in (tensor, like)]
    if here is not None and there is not None and meshes[0] != meshes[1]:
        raise ValueError(
            f"{name} must be on {like_name}'s device mesh, {meshes[1]}, got {meshes[0]}: pass "
            f"{name}.full_tensor()"
        )
    if (here is None) == (there is None) or tensor.ndim == 0:
        return tensor
    if there is None and like_name == "hidden":
        raise TypeError(
            f"{name} must not be a DTensor if hidden is not, got one with placements {here}: under "
            "FSDP leave the head in the group of the whole model, or call head.unshard() first "
            f"({name}.full_tensor() alone would not add up its gradient over the ranks); with "
            f"class_group pass {name}.to_local()"
        )
    if there is None:
        raise TypeError(
            f"{name} must not be a DTensor if {like_name} is not, got one with placements {here}: "
            f"pass {name}.full_tensor(), or {name}.to_local() if {like_name} is this rank's part"
        )
    from torch.distributed.tensor import DTensor, Replicate  # few need it, and it is slow

    mesh: Any = meshes[1]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)


def to_array(name: str, value: Any) -> np.ndarray:
    """`value` as a new array of numbers, in a dtype that PyTorch has."""
    require_no_loss(name, value)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or the conversion fails
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
    """Raises for values whose gradients or mask NumPy would drop."""
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
    """The types of the elements of a nested list."""
    if not isinstance(value, (list, tuple)):
        return {type(value)}
    kinds = set(map(type, value))
    nested = any(issubclass(each, list | tuple) for each in kinds)
    return kinds.union(*map(_kinds_in, value)) if nested else kinds


def _joined(name: str, value: Any) -> str:
    """The end of an error about a list of tensors: how to make one tensor of it."""
    if isinstance(value, PackedSequence):
        return f": pass {name}.data"
    if not all(isinstance(item, Tensor) for item in value):
        return " and others: make one tensor of the innermost lists first"
    shapes = {tuple(item.shape) for item in value}
    if len(shapes) == 1:
        return f": pass torch.stack({name}), which keeps their gradients"
    if len({shape[1:] for shape in shapes}) > 1:
        return " of shapes " + " and ".join(map(str, sorted(shapes, reverse=True)))
    return f" of different lengths: pass torch.cat({name})"


def _has_classes(name: str, value: Any) -> bool:
    """Whether a mask of its shape would have a class axis, as predictions and float targets do."""
    kind = str(value.dtype)
    return name == "y_pred" or (name == "y_true" and value.ndim > 1 and "float" in kind)


def _unmasked(name: str, values: str, counted: str, filled: str) -> str:
    if name == "mask":
        return f"pass {filled}"
    return f"pass {values}, and mask={counted} to a loss or metric"
