"""How much memory a loss takes beyond its predictions.

Of a loss as the operating system sees it. Of a linear head by its tensors and in comparison with
its matrix products, whose library takes memory of its own, depending on the CPU.
"""

import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from benchmark.measuring import FORWARD, peak_memory
from torch.profiler import ProfilerActivity, profile

from torch_sce import (
    CategoricalCrossentropy,
    LinearSparseCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
)
from torch_sce.kernels import native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# The operations of `aten` and `targets` take more memory for a block than the extension does.
TIMES = 1 if native else 2
SIZE = TIMES * 2**13 * 1000  # predictions: 31 MiB of float32, or 62

CASES = {
    "plain": {},
    "ignored classes": {"ignored": True},
    "mask": {"mask": True},
    "weights": {"weight": True},
    "all of them": {"ignored": True, "mask": True, "weight": True},
    "far from 0": {"offset": 200.0},
    "all but the last": {"layout": lambda z: z.view(8, -1, 32000)[:, :-1]},
    "all but the last, ignored": {
        "layout": lambda z: z.view(8, -1, 32000)[:, :-1], "ignored": True,
    },
    "channels first": {"layout": lambda z: z.view(4, 1000, 64, -1), "axis": 1},
    "channels first, ignored": {
        "layout": lambda z: z.view(4, 1000, 64, -1), "axis": 1, "ignored": True,
    },
    "channels last": {"layout": lambda z: z.view(4, 64, -1, 1000).movedim(-1, 1), "axis": 1},
}  # fmt: skip


@pytest.mark.parametrize("from_logits, dtype", [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("case", CASES)
def test_no_mode_takes_a_second_tensor_of_the_size_of_the_predictions(case, from_logits, dtype):
    """The gradient is one such tensor; for the rest there are blocks of 1 MiB, and rows.

    A second one would take at least the 16 or 32 MiB of bfloat16.
    """
    options = {"axis": -1, "layout": lambda z: z.view(-1, 32000), "offset": 0.0, **CASES[case]}
    z = torch.arange(SIZE, dtype=torch.int16).to(dtype).mul_(2**-13).add_(options["offset"])
    z = options["layout"](z if from_logits else z.sigmoid_())
    axis = options["axis"] % z.ndim
    shape = (*z.shape[:axis], *z.shape[axis + 1 :])
    y = torch.randint(0, z.shape[axis], shape)
    if "ignored" in options:
        y[torch.rand(shape) < 0.5] = -1
    given = {
        "sample_weight": torch.rand(shape) if "weight" in options else None,
        "mask": torch.rand(shape) < 0.5 if "mask" in options else None,
    }
    loss = SparseCategoricalCrossentropy(from_logits=from_logits, ignore_class=-1, axis=axis)
    leaf = z.detach().requires_grad_()
    size = z.numel() * z.element_size()
    # A block in the predictions' dtype and two in float32, and once more if malloc does not reuse
    # them: half of what a second tensor would take.
    block = TIMES * 8 * 2**20
    forward = peak_memory(lambda: loss(y, z, **given), "cpu", FORWARD)
    both = peak_memory(lambda: torch.autograd.grad(loss(y, leaf, **given), leaf), "cpu")
    assert forward is not None and forward < 0.02 * size + block
    # Rows that do not count, up to three quarters, may leave their pages of the gradient untouched.
    assert both is not None and 0.2 * size < both < 1.03 * size + block


TARGETS = {
    "plain": {},
    "smoothed, of integers": {"dtype": torch.int8, "smoothing": 0.1},
    "masked": {"mask": True},
    "channels first": {"layout": lambda z: z.view(4, 1000, 64, -1), "axis": 1},
}


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("case", TARGETS)
def test_targets_take_no_second_tensor_either(case, from_logits):
    options = {"axis": -1, "layout": lambda z: z.view(-1, 32000), "smoothing": 0, **TARGETS[case]}
    z = torch.arange(SIZE, dtype=torch.int16).float().mul_(2**-13)
    z = options["layout"](z if from_logits else z.sigmoid_())
    t = torch.zeros(z.shape, dtype=options.get("dtype", torch.float32))
    axis = options["axis"] % z.ndim
    t.select(axis, 3).fill_(1)
    mask = torch.rand(t.select(axis, 0).shape) < 0.5 if "mask" in options else None
    loss = CategoricalCrossentropy(from_logits, options["smoothing"], axis=axis)
    leaf = z.detach().requires_grad_()
    size, blocks = z.numel() * z.element_size(), TIMES * 8 * 2**20
    forward = peak_memory(lambda: loss(t, z, mask=mask), "cpu", FORWARD)
    both = peak_memory(lambda: torch.autograd.grad(loss(t, leaf, mask=mask), leaf), "cpu")
    assert forward is not None and forward < 0.02 * size + blocks
    assert both is not None and 0.9 * size < both < 1.03 * size + blocks


@pytest.mark.parametrize("from_logits", [True, False])
def test_smoothed_labels_take_no_second_tensor_either(from_logits):
    z = torch.arange(SIZE, dtype=torch.int16).float().mul_(2**-13)
    z = (z if from_logits else z.sigmoid_()).view(-1, 32000)
    y, leaf = torch.arange(len(z)) % 32000, z.detach().requires_grad_()
    loss = SparseCategoricalCrossentropy(from_logits, label_smoothing=0.1)
    size, blocks = z.numel() * z.element_size(), TIMES * 8 * 2**20
    forward = peak_memory(lambda: loss(y, z), "cpu", FORWARD)
    both = peak_memory(lambda: torch.autograd.grad(loss(y, leaf), leaf), "cpu")
    assert forward is not None and forward < 0.02 * size + blocks
    assert both is not None and 0.9 * size < both < 1.03 * size + blocks


HEADS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "bfloat16": {"dtype": torch.bfloat16},
    "ignored": {"ignored": True},
    "unreduced": {"reduction": "none"},
    "softcap": {"logit_softcap": 30.0},
    "bfloat16, softcap": {"dtype": torch.bfloat16, "logit_softcap": 30.0},
    "autocast": {"autocast": True},
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_takes_a_chunk_and_float32_sums_for_any_number_of_rows(case):
    """Beyond the gradients themselves. All the logits would take 3 and 6 chunks, or half of that.

    For the rest there are blocks of 1 MiB, rows of a few numbers each, and what the library of the
    matrix products takes.
    """
    options = {"dtype": torch.float32, **HEADS[case]}
    dtype, autocast = options.pop("dtype"), options.pop("autocast", False)
    classes, features, ignored = 16000, 128, options.pop("ignored", False)
    chunk = 6 * 2**20
    loss = LinearSparseCategoricalCrossentropy(chunk_bytes=chunk, ignore_class=-1, **options)
    weight = torch.randn(classes, features).to(dtype).requires_grad_()
    peaks = []
    for rows in (256, 512):
        hidden = torch.randn(rows, features).to(dtype).requires_grad_()
        y = torch.randint(0, classes, (rows,))
        if ignored:
            y[::3] = -1

        def step(hidden=hidden, y=y):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(y, hidden, weight).sum()
            torch.autograd.grad(value, (hidden, weight))

        own = sum(x.numel() * x.element_size() for x in (hidden, weight))
        peaks.append(peak_of_tensors(step) - own)
    sums = 4 * weight.numel() if autocast or dtype != torch.float32 else 0
    # Less than another chunk, or another gradient; the operations of `aten` have more blocks.
    other = (2 if native else 4) * 2**20 + memory_of_products(weight, chunk, autocast)
    assert max(peaks) < chunk + sums + other, [peak / 2**20 for peak in peaks]
    assert peaks[1] - peaks[0] < other


def memory_of_products(weight: torch.Tensor, chunk: int, autocast: bool) -> int:
    """What the three matrix products of a chunk take beyond their arguments and results."""
    weight = weight.detach().to(torch.bfloat16 if autocast else weight.dtype)
    dz = torch.rand(chunk // weight[:, 0].nbytes, len(weight)).to(weight.dtype)
    x, dweight = dz @ weight, torch.empty_like(weight)

    def products():
        torch.mm(x, weight.t(), out=dz)
        torch.mm(dz, weight, out=x)
        torch.mm(dz.t(), x, out=dweight)

    return peak_of_tensors(products)


def peak_of_tensors(call: Callable[[], object]) -> int:
    """Bytes of the tensors made by a call, at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events: list[Any] = profiled.profiler.kineto_results.events()  # pyright: ignore
    changes = [each for each in events if each.name() == "[memory]"]
    changes.sort(key=lambda each: each.start_ns())
    return max(accumulate((each.nbytes() for each in changes), initial=0))


def test_tensors_are_counted_when_they_are_made_and_when_they_are_freed():
    x = torch.ones(2**18)
    for _ in range(3):
        assert 2 * 2**20 <= peak_of_tensors(lambda: ((x + x) + x) + x) < 2.01 * 2**20
