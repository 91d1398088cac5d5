"""What options may be, and how they go into configs and out of them."""

import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_flag(name: str, value: Any) -> bool:
    """Whether an option is on, as Keras takes it, but for what can only be a slip."""
    if value is None or isinstance(value, numbers.Real | np.bool_):
        return bool(value)
    kind = "a tensor" if isinstance(value, Tensor) else repr(value)
    raise TypeError(
        f"{name} must be True or False, got {kind}: options are given where the loss is made, "
        "as in SparseCategoricalCrossentropy(from_logits=True), and tensors where it is called"
    )


def check_axis(axis: Any) -> int:
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"axis must be an integer, got {axis!r}")
    return operator.index(axis)


def check_ignore_class(ignore_class: Any) -> Any:
    if isinstance(ignore_class, np.generic):
        ignore_class = ignore_class.item()
    if ignore_class is None or isinstance(ignore_class, numbers.Real):
        return ignore_class
    raise TypeError(f"ignore_class must be a number or None, got {ignore_class!r}")


def check_smoothing(label_smoothing: Any) -> float:
    if label_smoothing is None:
        return 0.0
    if not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0 <= float(label_smoothing) <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    return float(label_smoothing)


def check_k(k: Any) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an integer, got {k!r}")
    if operator.index(k) < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return operator.index(k)


def check_dtype(dtype: Any) -> torch.dtype:
    """A floating-point torch dtype from any of the things that name one."""
    if dtype is None:
        return torch.float32
    dtype = getattr(dtype, "compute_dtype", dtype)  # a Keras policy
    if isinstance(dtype, str | torch.dtype):
        name = str(dtype).removeprefix("torch.").removeprefix("mixed_")
    else:  # np.dtype and tf.DType have a name, np.float32 is a class
        name = getattr(dtype, "name", getattr(dtype, "__name__", ""))
    found = getattr(torch, name or "-", None)
    if found in FLOATS:
        return found
    error = TypeError if isinstance(found, torch.dtype) else ValueError
    names = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
    raise error(f"dtype must be None or one of {names}, got {dtype!r}")


def options_in(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The options in a config of ours or of Keras, for the class of that name."""
    if config.get("class_name", name) != name:
        raise ValueError(f"config must be that of a {name}, got one of a {config['class_name']}")
    config = config.get("config", config)
    return {key: value for key, value in config.items() if key != "fn"}  # "fn": Keras 2


def shown_options(
    config: dict[str, Any], default: dict[str, Any], names: tuple[str, ...], always: str = ""
) -> str:
    """Those of the named options that are not as they are by default, and one that is shown."""
    shown = (key for key in names if key == always or config[key] != default[key])
    return ", ".join(f"{key}={config[key]!r}" for key in shown)
