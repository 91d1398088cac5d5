"""The CPU's kernels at their own thresholds: threads, and small tensors against large ones."""

import pytest
import torch
from test_kernels import MODELS, loss_and_gradient, rows
from ulps import ulps

from torch_sce.kernels import cpu

SHAPES = {
    "many rows": (300, 1000), "one long row": (1, 1_000_003), "three": (3, 90_000),
    "few classes": (40_000, 5), "a map": (2, 60, 70, 21), "long maps": (1, 2, 60_000),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bits_are_the_same_for_any_number_of_threads(shape, model):
    z, y, g = rows(shape[-1], model, shape=shape[:-1])
    if len(shape) > 2:
        z = z.movedim(-1, 1).contiguous().movedim(1, -1)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(z, y, g, model))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(7, 1000), (40, 10), (3, 5, 300), (2, 8, 21)])
def test_small_tensors_and_large_ones_agree(shape, monkeypatch):
    z, y, g = rows(shape[-1], "logits", shape=shape[:-1])
    small, dz_small = loss_and_gradient(z, y, g, "logits")
    monkeypatch.setattr(cpu, "SMALL", 0)
    large, dz_large = loss_and_gradient(z, y, g, "logits")
    assert ulps(large, small, small.clamp(min=1)) <= 1
    assert ulps(dz_large, dz_small, g.abs().unsqueeze(-1)) <= 1
