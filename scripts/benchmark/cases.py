"""What is measured: shapes, kinds of predictions, and the speed-ups we mean to reach."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .measuring import PASSES

SEED = 0
LOGITS, PROBABILITIES, HEAD = "logits", "probabilities", "linear head"

OURS = "torch_sce"
CROSS_ENTROPY = "F.cross_entropy"
COMPILED = "compiled F.cross_entropy"
OF_FLOAT = "F.cross_entropy of .float()"
OF_LOG = "F.cross_entropy of .clamp().log()"
NONE_IGNORED = "torch_sce with none ignored"
KERAS_TORCH = "Keras on torch"
TF_KERAS = "tf.keras"
LIGER = "liger-kernel"
MOVES = "1 and 3 moves"  # the time to read once, and to read twice and write, as fast as a copy
FRESH_MOVES = "1 and 3 moves, fresh"  # the same, where the write touches its pages first
LINEAR = "F.linear + F.cross_entropy"
FUSED = "F.linear_cross_entropy"  # in chunks; with the fastest of its options
LIGER_HEAD = "liger-kernel's head"
CUT = "cut-cross-entropy"
PRODUCTS = "the products alone"  # of a head: 1 and 3, chunk by chunk

Pair = tuple[float | None, float | None]  # forward, both


@dataclass(frozen=True)
class Case:
    """Predictions to measure on, and the ratios peer / ours of the time that we mean to reach."""

    shape: tuple[int, ...]  # of the predictions; a head computes them
    kind: str = LOGITS
    floors: Mapping[str, Pair] = field(default_factory=dict)
    dtype: str = "float32"
    axis: int = -1
    half_ignored: bool = False
    soft: bool = False  # a target for every class, and `CategoricalCrossentropy`
    width: int = 0  # of what goes into a head
    quick: bool = False
    busy: bool = False  # beside a busy process on each core
    busy_floors: Mapping[str, Pair] = field(default_factory=dict)  # that differ from `floors`

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == "float32" else f"{self.dtype} "
        axis = "" if self.axis == -1 else f", axis {self.axis}"
        ignored = ", half ignored" if self.half_ignored else ""
        soft = ", soft targets" if self.soft else ""
        busy = ", busy cores" if self.busy else ""
        shape = self.shape if self.kind != HEAD else (self.shape[0], self.width, self.classes)
        return f"{dtype}{self.kind} {shape}{axis}{ignored}{soft}{busy}"

    def floor(self, peer: str, which: str) -> float | None:
        floors = {**self.floors, **self.busy_floors} if self.busy else self.floors
        pair = floors.get(peer)
        return None if pair is None else pair[PASSES.index(which)]

    @property
    def for_keras(self) -> bool:
        """Whether this is measured with Keras, which takes classes last and casts to float32."""
        plain = self.dtype == "float32" and self.kind != HEAD and not self.half_ignored
        return self.axis == -1 and plain


LARGE, LARGE_BUSY = {CROSS_ENTROPY: (4.0, 2.3), COMPILED: (1.4, 1.6)}, {CROSS_ENTROPY: (3.5, 1.9)}
WITH_KERAS = LARGE | {KERAS_TORCH: (2.0, 1.9)}
FEW_CLASSES = {CROSS_ENTROPY: (1.6, 1.5), COMPILED: (1.3, 1.3)}
HALF_PRECISION = {CROSS_ENTROPY: (4.0, 2.5), OF_FLOAT: (3.0, 2.5)}
SOFT = {CROSS_ENTROPY: (3.0, 2.0), COMPILED: (1.0, 1.0)}
# Both passes: ours computes the gradients with the loss.
HEAD_HALF = {LINEAR: (None, 1.5), PRODUCTS: (None, 0.9)}
HEAD_FLOAT = HEAD_HALF | {FUSED: (None, 2.0)}
CASES = (
    Case((1024, 32000), floors=WITH_KERAS, busy_floors=LARGE_BUSY, quick=True),
    Case((256, 128256), floors=LARGE, busy_floors=LARGE_BUSY),
    Case((16, 64, 32000), floors=LARGE, busy_floors=LARGE_BUSY),
    Case((4096, 1000), floors={CROSS_ENTROPY: (1.7, 2.2), COMPILED: (1.5, 2.5)}),
    Case((131072, 21), floors=FEW_CLASSES),
    Case((8, 21, 256, 256), floors=FEW_CLASSES, axis=1),
    Case((4096, 10), floors={CROSS_ENTROPY: (0.9, 1.1), COMPILED: (1.5, 1.5)}, quick=True),
    Case((128, 1000), floors={CROSS_ENTROPY: (0.9, 1.0)}, quick=True),
    Case((32, 10), floors={CROSS_ENTROPY: (0.4, 0.6)}, quick=True),
    Case((32, 10), floors={CROSS_ENTROPY: (0.2, 0.4)}, half_ignored=True),
    Case((1024, 32000), floors=HALF_PRECISION, dtype="bfloat16", quick=True),
    Case((1024, 32000), floors={NONE_IGNORED: (1.7, 1.6)}, half_ignored=True),
    Case((1024, 32000), PROBABILITIES, {OF_LOG: (8.0, 4.0), KERAS_TORCH: (5.0, 3.0)}, quick=True),
    Case((4096, 1000), PROBABILITIES, {OF_LOG: (4.0, 4.0)}),
    Case((1024, 32000), floors=SOFT, soft=True),
    Case((4096, 1000), floors=SOFT | {CROSS_ENTROPY: (2.0, 2.0)}, soft=True, quick=True),
    Case((1024, 32000), PROBABILITIES, {OF_LOG: (1.0, 1.0)}, soft=True),
    Case((2048, 32000), HEAD, HEAD_FLOAT, width=512),
    Case((512, 32000), HEAD, HEAD_FLOAT, width=512, quick=True),
    Case((1024, 128256), HEAD, HEAD_FLOAT, width=256),
    Case((2048, 32000), HEAD, HEAD_HALF, "bfloat16", width=512),
    Case((512, 32000), HEAD, {PRODUCTS: (None, 0.9)}, "bfloat16", width=512, quick=True),
)
# On a GPU memory is the limit: nine tenths of its speed forward, as published for Hopper, and
# 0.55 ms for both passes of (8192, 32000) in bfloat16 at 3 TB/s.
VOCABULARY = {CROSS_ENTROPY: (1.0, 2.5), MOVES: (0.9, 0.95)}
MAP = {CROSS_ENTROPY: (1.0, 1.0), MOVES: (0.0, 0.67)}
CUDA_CASES = (
    Case((128, 1000), floors={CROSS_ENTROPY: (0.0, 1.0)}, quick=True),
    Case((4096, 10)),
    Case((4096, 1000), floors={CROSS_ENTROPY: (1.0, 2.5)}),
    Case((8, 512, 512, 21), floors=MAP, dtype="bfloat16"),
    Case((8, 21, 512, 512), floors=MAP, dtype="bfloat16", axis=1, quick=True),
    Case((8192, 32000), floors=VOCABULARY, dtype="bfloat16", quick=True),
    Case((4096, 128256), floors=VOCABULARY, dtype="bfloat16"),
    Case((8192, 131072), floors=VOCABULARY, dtype="bfloat16"),
    Case((16384, 151936), floors=VOCABULARY, dtype="bfloat16"),
    Case((8192, 262144), floors=VOCABULARY, dtype="bfloat16"),
    Case((8192, 32000), floors=VOCABULARY),
    Case((16, 512, 32000), floors=VOCABULARY, dtype="bfloat16"),
    Case((8, 262144), dtype="bfloat16"),
    Case((64, 128256), dtype="bfloat16"),
    Case((8192, 32000), floors={NONE_IGNORED: (1.5, 1.3)}, dtype="bfloat16", half_ignored=True),
    Case((8192, 32000), PROBABILITIES, {MOVES: (0.9, 0.95)}, dtype="bfloat16"),
    Case((4096, 1000), PROBABILITIES),
    Case((8192, 32000), floors={CROSS_ENTROPY: (1.0, 1.0)}, dtype="bfloat16", soft=True),
    Case((2048, 32000), HEAD, dtype="bfloat16", width=4096, quick=True),
    Case((2048, 128256), HEAD, dtype="bfloat16", width=4096),
    Case((8192, 128256), HEAD, dtype="bfloat16", width=4096),
)
SWEEP_ELEMENTS = 2**24
SWEEP = tuple(
    Case((SWEEP_ELEMENTS // classes, classes), quick=classes in (10, 1000, 100000))
    for classes in (10, 32, 100, 316, 1000, 3200, 10000, 32000, 100000, 262144)
)
SWEEP_PEERS = (CROSS_ENTROPY, COMPILED)
HEAD_ROWS, HEAD_CLASSES = 512, 32000  # in the sweep of heads, one of the two
HEAD_SWEEP = tuple(
    Case((rows, classes), HEAD, width=128, quick=rows * classes < 2**23)
    for rows, classes in (
        *((HEAD_ROWS, classes) for classes in (2000, 8000, 32000, 128000)),
        *((rows, HEAD_CLASSES) for rows in (128, 2048, 4096)),
    )
)
HEAD_SWEEP_PEERS = (LINEAR, FUSED)


def labels(case: Case) -> Tensor:
    """Integers, or with soft targets a target for every class."""
    generator = torch.Generator().manual_seed(SEED)
    if case.soft:
        targets = torch.randn(case.shape, generator=generator).softmax(case.axis)
        return targets.to(getattr(torch, case.dtype))
    shape = list(case.shape)
    del shape[case.axis]
    y_true = torch.randint(case.classes, shape, generator=generator)
    if case.half_ignored:
        order = torch.randperm(y_true.numel(), generator=generator)
        y_true.view(-1)[order[: y_true.numel() // 2]] = -100
    return y_true


def predictions(case: Case, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(SEED + 1)
    z = torch.randn(case.shape, generator=generator, device=device).mul_(2)
    y_pred = z if case.kind == LOGITS else z.softmax(case.axis)
    return y_pred.to(getattr(torch, case.dtype))


def head(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """What goes into a head, and its weight; logits as large as those of `predictions`."""
    generator = torch.Generator(device).manual_seed(SEED + 1)
    hidden, weight = (
        torch.randn(size, case.width, generator=generator, device=device) for size in case.shape
    )
    dtype = getattr(torch, case.dtype)
    return hidden.to(dtype), weight.mul_(2 / case.width**0.5).to(dtype)
