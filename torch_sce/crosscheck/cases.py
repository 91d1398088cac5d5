"""What a case is: one call of a loss or of a function, or some updates of a metric.

`draw` makes them at random. A case of a loss may have a linear head, which makes its predictions.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .bits import Bits

SCRIPT = ("python", "scripts/cross_check.py")
LOSSES = ("SparseCategoricalCrossentropy", "CategoricalCrossentropy")
OF_A_HEAD = "LinearSparseCategoricalCrossentropy"


@dataclass(frozen=True)
class Batch:
    """What one call is given."""

    y_true: np.ndarray
    y_pred: np.ndarray  # bfloat16 values are carried in float32
    y_pred_dtype: str
    sample_weight: Any = None
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Head:
    """A linear head that makes the logits of a loss from `y_pred`, which holds its inputs."""

    weight: np.ndarray  # (C, H), of the inputs' dtype
    bias: np.ndarray | None  # (C,)
    softcap: float | None
    chunk_bytes: int | None
    transposed: bool  # inputs and weight are views whose first axis is contiguous


@dataclass(frozen=True)
class Case:
    """A loss, function or metric of Keras by name, its arguments, and the features it is counted
    under.
    """

    seed: int
    index: int
    name: str  # of the class; functions have the same in snake case
    form: str  # "class" of a loss, "function" (unreduced), or "metric"
    options: dict[str, Any]
    batch: Batch
    as_lists: bool
    upstream: np.ndarray  # what the value is multiplied by before differentiation, one per loss
    features: dict[str, str]
    profile: ClassVar[str] = "keras3"  # whose rules it is judged by, a name in `profiles.PROFILES`
    package: ClassVar[str] = "torch_sce"  # ours, with these rules
    arguments: ClassVar[tuple[str, ...]] = ()  # of the command that shows it
    more: tuple[Batch | None, ...] = ()  # further updates of a metric; None: a reset
    head: Head | None = None

    @property
    def y_true(self) -> np.ndarray:
        return self.batch.y_true

    @property
    def y_pred(self) -> np.ndarray:
        return self.batch.y_pred

    @property
    def y_pred_dtype(self) -> str:
        return self.batch.y_pred_dtype

    @property
    def sample_weight(self) -> Any:
        return self.batch.sample_weight

    @property
    def mask(self) -> np.ndarray | None:
        return self.batch.mask

    @property
    def steps(self) -> tuple[Batch | None, ...]:
        """The updates of a metric, in order."""
        return (self.batch, *self.more)

    @property
    def is_sparse(self) -> bool:
        """Whether labels are class numbers, not targets for every class."""
        return self.name.startswith("Sparse")

    @property
    def is_loss(self) -> bool:
        """Whether it has gradients."""
        return self.name in LOSSES and self.form != "metric"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the predictions, those that a head makes if there is one."""
        head, shape = self.head, self.y_pred.shape
        return shape if head is None else (*shape[:-1], len(head.weight))

    @property
    def function(self) -> str:
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower()

    @property
    def loss_dtype(self) -> str:
        """The dtype Keras computes in: the function's is the predictions' own.

        A metric computes its values in one and adds them up in the other: this is the coarser.
        """
        if self.form == "function":
            return self.y_pred_dtype if self.is_loss else "float32"
        dtype = self.options.get("dtype") or "float32"
        if self.form == "metric" and self.name in LOSSES:
            order = ("bfloat16", "float16", "float32", "float64")
            known = [each for each in (dtype, self.y_pred_dtype) if each in order]
            return min(known, key=order.index)
        return dtype

    @property
    def fingerprint(self) -> str:
        """A hash of all that goes into the call: equal inputs, equal fingerprint."""
        digest = hashlib.sha256()
        parts: list[Any] = [self.upstream]
        for batch in self.steps:
            parts += [None] if batch is None else vars(batch).values()
        if self.head is not None:
            parts += vars(self.head).values()
        for part in parts:
            array = np.asarray(np.nan if part is None else part)
            digest.update(f"{part is None}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        rest = (self.name, self.form, sorted(self.options.items()), self.as_lists)
        digest.update(repr(rest).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Keras2Case(Case):
    """A case of Keras 2, which computes losses in the predictions' dtype, and metrics in theirs."""

    profile: ClassVar[str] = "keras2"
    package: ClassVar[str] = "torch_sce.keras2"
    arguments: ClassVar[tuple[str, ...]] = ("--profile", "keras2")

    @property
    def loss_dtype(self) -> str:
        if self.is_loss:
            return self.y_pred_dtype
        return self.options.get("dtype") or "float32"


def command(seed: int, index: int, arguments: Sequence[str] = ()) -> str:
    """The command that shows this case."""
    return shlex.join([*SCRIPT, "--seed", str(seed), "--case", str(index), *arguments])


def pick_weights(
    bits: Bits, shape: tuple[int, ...], odds: Mapping[str, float], larger: bool = True
) -> tuple[str, np.ndarray]:
    """A kind of weights with these odds, and such weights.

    `larger`: huge ones may be up to 2**99, not 2**79, the limit for gradients of probabilities.
    """
    kind = bits.pick(odds)
    weight = bits.integers(1, 13, shape) / 4
    if kind == "arbitrary":
        weight = bits.integers(2**21, 3 * 2**24, shape) * 2.0**-24
    elif kind == "with zeros":
        weight = weight * bits.flags(0.6, shape)
    elif kind == "signed":
        weight = weight * bits.choices([-1, 1], shape)
    elif kind == "all zero":
        weight = weight * 0
    elif kind == "nan":
        weight = np.where(bits.flags(0.3, shape), np.nan, weight)
    elif kind == "tiny or huge":
        powers = [2.0**-116, 2.0**-100, 2.0**-60, 2.0**60, 2.0**79, 2.0 ** (99 if larger else 79)]
        each = bits.chance(0.5)
        weight = weight * (bits.choices(powers, shape) if each else bits.choice(powers))
    return kind, np.asarray(weight)


def one_hot(label: np.ndarray, classes: int) -> np.ndarray:
    """1 at the label, 0 elsewhere: (..., C) for labels (...)."""
    return (np.arange(classes) == label[..., None]).astype(np.float64)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).reshape(values.shape)
