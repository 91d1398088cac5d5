"""Rows: losses and gradients against the oracle, derivatives, transforms, rounding."""

import numpy as np
import pytest
import torch
from oracle import sample
from torch.autograd import gradcheck, gradgradcheck
from ulps import ulps

from torch_sce.functional import CLIP
from torch_sce.kernels import IGNORED, aten, row_losses

# C = 1: nothing to choose; 2: the least; 7: no power of two; 1000: several vector widths.
CLASSES = (1, 2, 7, 1000)
MODELS = {"logits": None, "probabilities": CLIP[torch.float32]}


def rows(classes, model, shape=(3, 4), dtype=torch.float32, seed=0):
    """Predictions (A, C, B), labels (A, B) and an upstream gradient (A, B)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape[0], classes, shape[1], generator=generator, dtype=torch.float64) * 3
    if MODELS[model] is not None:
        z = z.softmax(1)
    y = torch.randint(0, classes, shape, generator=generator)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    return z.to(dtype), y, g.to(dtype if dtype == torch.float64 else torch.float32)


def expected(z, y, g, model):
    loss, dz = np.zeros(y.shape), np.zeros(z.shape)
    for a, b in np.ndindex(*y.shape):
        loss[a, b], slope = sample(z[a, :, b].double(), y[a, b].item(), model == "logits")
        dz[a, :, b] = slope * g[a, b].item()
    return loss, dz


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_equal_the_oracle(classes, model):
    z, y, g = rows(classes, model)
    z.requires_grad_()
    loss = row_losses(z, y, MODELS[model])
    loss.backward(g)
    want, dz = expected(z.detach(), y, g, model)
    # A loss is a difference of terms of size 1 and more; so is a gradient row, times g and 1 / p.
    assert ulps(loss, want, np.maximum(np.abs(want), 1)) <= 4
    size = np.abs(dz).max(1, keepdims=True)
    assert ulps(z.grad, dz, np.maximum(size, np.abs(g.numpy())[:, None, :])) <= 8


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows_at_once", [1, 2, 5, 100])
def test_chunks_change_no_bit(model, rows_at_once, monkeypatch):
    z, y, g = rows(7, model, shape=(5, 3))
    results = []
    for scratch in (2**18, rows_at_once * 7 * 3):
        monkeypatch.setattr(aten, "CPU_SCRATCH", scratch)
        leaf = z.clone().requires_grad_()
        loss = row_losses(leaf, y, MODELS[model])
        loss.backward(g)
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("model", MODELS)
def test_the_fast_path_is_the_definition(model):
    """Chunked forward and backward against autograd through the plain formulas."""
    z, y, g = rows(100, model)
    y[0, 0] = IGNORED
    fast, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = row_losses(fast, y, MODELS[model])
    loss.backward(g)
    definition = aten.row_losses(plain, y, MODELS[model])
    definition.backward(g)
    assert torch.equal(loss, definition)
    assert fast.grad is not None and plain.grad is not None
    size = plain.grad.abs().amax(1, keepdim=True).clamp(min=1e-6)
    assert ulps(fast.grad, plain.grad.numpy(), size.expand_as(z).numpy()) <= 4


@pytest.mark.parametrize("model", MODELS)
def test_an_ignored_row_has_no_loss_and_no_gradient_whatever_it_holds(model):
    z, y, g = rows(7, model)
    z[1, :, 2], z[0, 3, 1], y[1, 2], y[0, 1] = torch.nan, torch.inf, IGNORED, IGNORED
    z.requires_grad_()
    for losses in (row_losses(z, y, MODELS[model]), aten.row_losses(z, y, MODELS[model])):
        (dz,) = torch.autograd.grad(losses, z, g)
        assert losses.isfinite().all() and dz.isfinite().all()
        assert losses[1, 2] == 0 and losses[0, 1] == 0
        assert (dz[1, :, 2] == 0).all() and (dz[0, :, 1] == 0).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", [-1, 7, 255, 2**62])
def test_a_label_that_is_no_class_poisons_its_row_and_no_other(model, label):
    z, y, g = rows(7, model)
    y[1, 2] = label
    z.requires_grad_()
    for losses in (row_losses(z, y, MODELS[model]), aten.row_losses(z, y, MODELS[model])):
        (dz,) = torch.autograd.grad(losses, z, g)
        poisoned = torch.zeros(y.shape, dtype=torch.bool)
        poisoned[1, 2] = True
        assert torch.equal(losses.isnan(), poisoned)
        assert torch.equal(dz.isnan().all(1), poisoned)
        assert torch.equal(dz.isnan().any(1), poisoned)


@pytest.mark.parametrize("model", MODELS)
def test_first_and_second_derivatives_match_finite_differences(model):
    z, y, _ = rows(5, model, shape=(2, 3), dtype=torch.float64)
    y[0, 1] = IGNORED
    clip = CLIP[torch.float64] if model == "probabilities" else None
    z.requires_grad_()

    def losses(z):
        return row_losses(z, y, clip)

    assert gradcheck(losses, z, check_forward_ad=True, check_batched_grad=True,
                     check_batched_forward_grad=True)  # fmt: skip
    assert gradgradcheck(losses, z, check_fwd_over_rev=True, check_batched_grad=True)
    assert gradcheck(lambda z: aten.row_losses(z, y, clip), z)
    assert gradgradcheck(lambda z: aten.row_losses(z, y, clip), z)


@pytest.mark.parametrize("model", MODELS)
def test_functional_transforms_agree_with_autograd(model):
    z, y, g = rows(5, model, shape=(2, 3), dtype=torch.float64)
    batch = torch.stack([z, z.flip(0), z.roll(1, 1)])
    clip = MODELS[model]

    def total(z):
        return (row_losses(z, y, clip) * g).sum()

    def by_autograd(z):
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(total(leaf), leaf)[0]

    gradients = torch.stack([by_autograd(z) for z in batch])
    losses = torch.stack([row_losses(z, y, clip) for z in batch])
    vmap, grad = torch.func.vmap, torch.func.grad
    torch.testing.assert_close(vmap(grad(total))(batch), gradients)
    torch.testing.assert_close(vmap(lambda z: row_losses(z, y, clip))(batch), losses)
    last = batch.movedim(0, -1)
    mapped = vmap(lambda z: row_losses(z, y, clip), in_dims=-1, out_dims=-1)(last)
    torch.testing.assert_close(mapped, losses.movedim(0, -1))
    labels = torch.stack([y, y, y])
    each = vmap(lambda z, y: row_losses(z, y, clip))(batch, labels)
    torch.testing.assert_close(each, losses)
    tangent = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    derivative = torch.func.jvp(total, (z,), (tangent,))[1]
    torch.testing.assert_close(derivative, (gradients[0] * tangent).sum())
    hessian = torch.func.hessian(total)(z)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(total, z))


@pytest.mark.parametrize("model", MODELS)
def test_ignored_rows_have_no_second_derivative_whatever_they_hold(model):
    z, y, g = rows(5, model, dtype=torch.float64)
    z[0, :, 1], y[0, 1] = torch.nan, IGNORED
    z.requires_grad_()
    total = (row_losses(z, y, MODELS[model]) * g).sum()
    (first,) = torch.autograd.grad(total, z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    assert second.isfinite().all() and (second[0, :, 1] == 0).all() and (second != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tangents_of_half_precision_rows_are_float32(dtype):
    z, y, _ = rows(100, "logits", dtype=dtype)
    tangent = torch.ones_like(z)
    tangent[:, ::2] = 0.5
    found = torch.func.jvp(lambda z: row_losses(z, y), (z,), (tangent,))
    want = torch.func.jvp(lambda z: row_losses(z, y), (z.float(),), (tangent.float(),))
    assert all(part.dtype == torch.float32 for part in found)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_an_offset_of_all_logits_costs_no_precision(offset):
    """Saving (m, s) keeps the gradient within 2e-6; saving logsumexp would give 4e-3."""
    z, y, _ = rows(1000, "logits", shape=(16, 1))
    z = (z + offset).requires_grad_()
    row_losses(z, y).sum().backward()
    exact = z.detach().double().softmax(1)
    assert z.grad is not None
    others = torch.ones_like(exact, dtype=torch.bool).scatter(1, y.unsqueeze(1), False)
    error = ((z.grad.double() - exact) / exact)[others].abs().max()
    assert error < 2e-6


def test_tiny_probabilities_do_not_cancel():
    """log s - log p would be off by 4 ulps here: both logarithms are near -15."""
    q, y = torch.tensor([[3e-7, 1e-7]]).unsqueeze(-1), torch.tensor([[0]])
    want, _ = sample(q[0, :, 0].double(), 0, from_logits=False)
    assert ulps(row_losses(q, y, MODELS["probabilities"]), [[want]], 1.0) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_computed_in_float32(dtype):
    z, y, g = rows(1000, "logits", dtype=dtype)
    half, single = z.clone().requires_grad_(), z.float().requires_grad_()
    losses = row_losses(half, y)
    reference = row_losses(single, y)
    losses.backward(g)
    reference.backward(g)
    assert losses.dtype == torch.float32 and half.grad is not None and single.grad is not None
    assert torch.equal(losses, reference)
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(0, 1), (3, 0), (0, 0)])
def test_no_rows_give_empty_results(model, shape):
    z, y = torch.zeros(shape[0], 5, shape[1], requires_grad=True), torch.zeros(shape).long()
    losses = row_losses(z, y, MODELS[model])
    losses.sum().backward()
    assert losses.shape == shape and z.grad is not None and z.grad.shape == z.shape


def test_rows_may_lie_anywhere_in_memory():
    z, y, g = rows(7, "logits", shape=(5, 3))
    strided = torch.zeros(10, 14, 6)[::2, ::2, ::2]
    strided.copy_(z)
    expanded = z[:1].expand(5, -1, -1)
    for given in (strided, expanded):
        leaf, copy = given.detach().requires_grad_(), given.clone().requires_grad_()
        a, b = row_losses(leaf, y), row_losses(copy, y)
        assert torch.equal(a, b)
        (da,), (db,) = torch.autograd.grad(a, leaf, g), torch.autograd.grad(b, copy, g)
        assert torch.equal(da, db)
