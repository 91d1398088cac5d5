"""Parses options, and converts them to and from configs."""

import copy
import inspect
import numbers
import operator
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

Parser = Callable[[Any], Any]
Function = TypeVar("Function", bound=Callable[..., Any])

Mean = Literal["sum_over_batch_size", "mean", "auto"]
Reduction = Literal[Mean, "sum", "mean_with_sample_weight", "none"]
MEANS = get_args(Mean)
GROUPS = ("process_group", "class_group")
OF_GROUPS = ("_found", "_number", "_compared")  # attributes that are found for a group
REDUCTIONS = (*get_args(Reduction), None)
CALL = ("sample_weight", "mask", "denominator")  # what the call of a loss may be given
OURS = {  # Keras's names of PyTorch's arguments
    "dim": ["axis"],
    "ignore_index": ["ignore_class"],
    "weight": ["class_weight", "sample_weight"],
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def parse_flag(name: str, value: Any) -> bool:
    """`value` as a bool, as in Keras; values that can only be a mistake raise."""
    if value is None or isinstance(value, (numbers.Real, np.bool_)):
        return bool(value)
    kind = "a tensor" if isinstance(value, Tensor) else repr(value)
    raise TypeError(
        f"{name} must be True or False, got {kind}: options are given where a loss or metric is "
        f"made, {name}=True, and tensors where it is called"
    )


def parse_axis(axis: Any) -> int:
    return _integer("axis", axis)


def parse_ignore_class(ignore_class: Any) -> Any:
    if isinstance(ignore_class, np.generic):
        ignore_class = ignore_class.item()
    if ignore_class is None or isinstance(ignore_class, numbers.Real):
        return ignore_class
    raise TypeError(f"ignore_class must be a number or None, got {ignore_class!r}")


def parse_smoothing(label_smoothing: Any) -> float:
    if label_smoothing is None:
        return 0
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    if not 0 <= float(label_smoothing) <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    return float(label_smoothing) or 0  # not 0.0: with dynamic=True a float is compiled twice


def parse_softcap(logit_softcap: Any) -> float | None:
    if logit_softcap is None:
        return None
    if isinstance(logit_softcap, bool) or not isinstance(logit_softcap, numbers.Real):
        raise TypeError(f"logit_softcap must be a positive number or None, got {logit_softcap!r}")
    if not 0 < float(logit_softcap) < float("inf"):
        raise ValueError(f"logit_softcap must be a positive number, got {logit_softcap!r}")
    return float(logit_softcap)


def parse_chunk_bytes(chunk_bytes: Any) -> int | None:
    found = None if chunk_bytes is None else _integer("chunk_bytes", chunk_bytes)
    if found is not None and found < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes!r}")
    return found


def parse_k(k: Any) -> int:
    if isinstance(k, Tensor):
        raise TypeError(f"k must be an integer, got {k!r}")
    k = _integer("k", k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def _integer(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):  # the compiler's, too
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


def parse_reduction(reduction: Any) -> Any:
    if not isinstance(reduction, (str, type(None))) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    return reduction


def parse_name(name: Any, default: str) -> str:
    if name is not None and not isinstance(name, str):
        kind = "a tensor" if isinstance(name, Tensor) else repr(name)
        raise TypeError(
            f"name must be a string or None, got {kind}: options are given where a loss or metric "
            "is made, tensors where it is called or updated"
        )
    return name or default


def parse_dtype(dtype: Any) -> torch.dtype:
    """A floating-point torch dtype from anything that names one."""
    if dtype is None:
        return torch.float32
    dtype = getattr(dtype, "compute_dtype", dtype)  # a Keras policy
    if isinstance(dtype, (str, torch.dtype)):
        name = str(dtype).removeprefix("torch.").removeprefix("mixed_")
    else:  # np.dtype and tf.DType have a name, np.float32 is a class
        name = getattr(dtype, "name", getattr(dtype, "__name__", ""))
    found = getattr(torch, name or "-", None)
    if found in FLOATS:
        return found
    error = TypeError if isinstance(found, torch.dtype) else ValueError
    names = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
    raise error(f"dtype must be None or one of {names}, got {dtype!r}")


class NoArguments(TypedDict, closed=True):
    """No arguments, to a type checker: those that are taken only for an error that names ours."""


def unexpected(
    what: str, others: Iterable[str], here: Collection[str], there: Collection[str], place: str
) -> TypeError:
    """The error about arguments that `what` does not have. It has those in `here`, `place` `there`.

    >>> unexpected("a loss", ["dim"], ["axis"], CALL, "the call")
    TypeError("a loss has no argument 'dim': use axis")
    """
    name = next(iter(others))
    ours = OURS.get(name, [name])
    hints = [x for x in ours if x in here] + [f"{x} in {place}" for x in ours if x in there]
    hint = f": use {', or '.join(hints)}" if hints else ""
    return TypeError(f"{what} has no argument {name!r}{hint}")


def typed_as(function: Function) -> Callable[[Any], Function]:
    """A decorator that gives a function to type checkers: PyTorch leaves `__call__` untyped."""
    return lambda _: function


class WithOptions(nn.Module):
    """A module whose options are parsed whenever they are set; to and from configs."""

    _options: ClassVar[dict[str, Parser]]  # in the order of the repr
    _always_shown: ClassVar[str] = ""
    reduction: Reduction | None
    dtype: torch.dtype
    process_group: Any = None
    class_weight: Any = None

    def __init__(self, **others: Unpack[NoArguments]) -> None:
        if others:
            taken = _constructor_options(type(self), self.class_of_ours())
            raise unexpected(type(self).__name__, others, taken, CALL, "the call")
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        parse = self._options.get(name)
        super().__setattr__(name, value if parse is None else parse(value))

    def get_config(self) -> dict[str, Any]:
        """The options, as plain values that `from_config` takes, without groups of processes.

        Differs from Keras: `dtype` is kept, and for integer labels `axis`.

        >>> from torch_sce import SparseCategoricalCrossentropy
        >>> SparseCategoricalCrossentropy(axis=1, dtype="float64").get_config()["axis"]
        1
        """
        options = {name: getattr(self, name) for name in self._options}
        config = {k: x.tolist() if isinstance(x, Tensor) else x for k, x in options.items()}
        if config.get("class_weight") is None:  # Keras's losses have none
            config.pop("class_weight", None)
        for name in GROUPS:
            if config.get(name) is not True:  # a group ends with its processes
                config.pop(name, None)
        if "dtype" in config:
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A loss with these options: our own `get_config()`, or that of a Keras loss.

        What `keras.losses.serialize` returns, a config with the name of its class, is accepted too.

        >>> from torch_sce import SparseCategoricalCrossentropy
        >>> keras_config = {"name": "sce", "reduction": "sum", "from_logits": True,
        ...                 "ignore_class": None}
        >>> SparseCategoricalCrossentropy.from_config(keras_config)
        SparseCategoricalCrossentropy(from_logits=True, reduction='sum', name='sce')
        """
        return cls(**options_in(config, cls, cls.class_of_ours()))

    @classmethod
    def class_of_ours(cls) -> Any:
        """The class of this package that this one is or extends."""
        return next(each for each in cls.__mro__ if "_options" in vars(each))

    def extra_repr(self) -> str:
        # Not self.get_config(): a subclass may have given it other keys.
        default = WithOptions.get_config(self.class_of_ours()())
        config = WithOptions.get_config(self)
        groups = {name: getattr(self, name) for name in GROUPS if name in self._options}
        config |= {name: group for name, group in groups.items() if group is not None}
        return shown_options(config, default, self._always_shown)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in OF_GROUPS}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with the same groups, which cannot be copied."""
        memo |= {id(group): group for group in (getattr(self, name, None) for name in GROUPS)}
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def _unexpected(self, others: Iterable[str]) -> TypeError:
        """The error about arguments that a call does not have."""
        what = f"the call of {type(self).__name__}"
        return unexpected(what, others, CALL, self._options, "the constructor")

    def _with(self, **options: Any) -> Self:
        """A copy that differs in these options, of a subclass with any constructor."""
        other = type(self).__new__(type(self))
        other.__dict__.update(vars(self))  # with what was found for its groups
        for name, value in options.items():
            setattr(other, name, value)
        return other


def class_of_package(cls: type) -> Any:
    """The class of this package that `cls` is or extends."""
    package = __name__.partition(".")[0]
    return next(each for each in cls.__mro__ if each.__module__.partition(".")[0] == package)


def options_in(config: Any, cls: type, ours: type) -> dict[str, Any]:
    """The options in a config of ours or of Keras, for `cls`, which is or extends `ours`."""
    options = config
    if isinstance(config, Mapping) and {"class_name", "config"} & set(config):
        name = config.get("class_name", cls.__name__)  # as keras.losses.serialize returns it
        if name not in [cls.__name__, ours.__name__]:
            raise ValueError(f"config must be that of a {cls.__name__}, got one of a {name}")
        options = config.get("config")
    if not isinstance(options, Mapping):
        raise TypeError(
            "config must be a dict, as get_config() returns it, or have one under 'config', "
            f"got {config!r}"
        )
    options = {key: value for key, value in options.items() if key != "fn"}  # "fn": Keras 2
    taken = _constructor_options(cls, ours)
    unknown = [key for key in options if key not in taken]
    if unknown:
        raise ValueError(
            f"config must be that of a {cls.__name__}, which has no options {unknown}, only {taken}"
        )
    return options


def _constructor_options(cls: type, ours: type) -> list[str]:
    """The names of the constructor's arguments, and with `**kwargs` those of its bases'."""
    taken = []
    for each in cls.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(each.__init__).parameters.values())[1:]
        taken += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if each is ours or all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(taken))


def shown_options(config: dict[str, Any], default: dict[str, Any], always: str = "") -> str:
    """The options that differ from their defaults, and one that is always shown."""
    shown = (key for key in config if key == always or config[key] != default.get(key))
    return ", ".join(f"{key}={_shown(config[key])}" for key in shown)


def _shown(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, (list, dict)) else repr(value)
