"""The CPU's kernels: threads, order, layouts and thresholds of their own."""

import pytest
import torch
from test_kernels import MODELS, loss_and_gradient, rows
from ulps import ulps

from torch_sce.kernels import target_losses

SHAPES = {
    "many rows": (300, 1000), "one long row": (1, 1_000_003), "three": (3, 90_000),
    "few classes": (40_000, 5), "a map": (2, 60, 70, 21), "long maps": (1, 2, 60_000),
}  # fmt: skip


def results_of_threads(compute):
    """What it returns with one, two and five threads."""
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(1)
    return results


def laid_out(z):
    """Maps channels first."""
    return z.movedim(-1, 1).contiguous().movedim(1, -1) if z.ndim > 2 else z


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bits_are_the_same_for_any_number_of_threads(shape, model):
    z, y, g = rows(shape[-1], model, shape=shape[:-1])
    z = laid_out(z)
    first, *others = results_of_threads(lambda: loss_and_gradient(z, y, g, model))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bits_of_targets_are_the_same_for_any_number_of_threads(shape, model):
    z, _, g = rows(shape[-1], model, shape=shape[:-1])
    t = rows(shape[-1], "probabilities", shape=shape[:-1], seed=1)[0]
    both = [laid_out(x).requires_grad_() for x in (z, t)]

    def compute():
        losses = target_losses(both[0], both[1], None, MODELS[model])
        return losses.detach(), *torch.autograd.grad(losses, both, g)

    first, *others = results_of_threads(compute)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("classes", [1024, 4000, 100_000])
def test_where_one_class_stands_out_many_others_are_added_up_as_exactly(classes, axis):
    """One after the other they would be lost against it: 130 ulps for 32,000 classes."""
    z, y, g = rows(classes, "logits", shape=(4, 3))
    z[..., 1] = z.amax(-1) + 1.5
    z = z.movedim(-1, axis).contiguous().movedim(axis, -1)
    loss, dz = loss_and_gradient(z, y, g, "logits")
    want, exact = loss_and_gradient(z.double(), y, g.double(), "logits")
    assert ulps(loss, want) <= 3
    assert ulps(dz, exact, g.abs().unsqueeze(-1)) <= 3
    # Each entry by itself: what an exponential loses is as many ulps as its argument, up to 30.
    others = torch.ones_like(z, dtype=torch.bool).scatter(-1, y.unsqueeze(-1), False)
    assert ulps(dz[others], exact[others]) <= 40
