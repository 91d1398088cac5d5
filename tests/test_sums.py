"""The sum of losses in one step is that of the losses, with every derivative."""

import pytest
import torch
from test_kernels import MODELS, rows

import torch_sce
from torch_sce import SparseCategoricalCrossentropy, kernels
from torch_sce.kernels import aten, row_losses, sum_of_losses

SHAPES = [(), (1,), (33,), (5000,), (3, 1023), (0,)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_sum_of_the_losses_with_their_gradient(shape, dtype, model):
    z, y, _ = rows(7, model, shape=shape, dtype=dtype)
    n = max(y.numel(), 1)
    leaf, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = sum_of_losses(leaf, y, MODELS[model], n)
    losses = row_losses(other, y, None, MODELS[model])
    assert value.dtype == losses.dtype == aten.row_dtype(z) and value.shape == ()
    exact = losses.double().sum().to(value.dtype) / n
    # Of float64, and without the extension, PyTorch's or the lanes' sums are rounded, too.
    rounding = 1e-15 if dtype == torch.float64 else 0 if kernels.native else 5e-7
    torch.testing.assert_close(value, exact, rtol=rounding, atol=0)
    g = torch.tensor(0.7, dtype=value.dtype)
    (dz,) = torch.autograd.grad(value, leaf, g)
    (want,) = torch.autograd.grad(losses, other, (g / n).expand(losses.shape))
    assert torch.equal(dz, want)


@pytest.mark.parametrize("model", MODELS)
def test_the_order_is_that_in_which_losses_are_added_up(model):
    z, y, _ = rows(7, model, shape=(3000,), dtype=torch.float64)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    a = sum_of_losses(z, y, MODELS[model], 3, order)
    b = sum_of_losses(z[order], y[order], MODELS[model], 3)
    assert torch.equal(a, b)


@pytest.mark.parametrize("model", MODELS)
def test_derivatives_match_finite_differences(model):
    z, y, _ = rows(5, model, shape=(4,), dtype=torch.float64)

    def value(z):
        return sum_of_losses(z, y, MODELS[model], 3)

    leaf = z.requires_grad_()
    assert torch.autograd.gradcheck(value, leaf, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(value, leaf)


@pytest.mark.parametrize("model", MODELS)
def test_functional_transforms_agree_with_autograd(model):
    z, y, _ = rows(5, model, shape=(4,), dtype=torch.float64)
    loss = SparseCategoricalCrossentropy(from_logits=model == "logits", dtype="float64")
    leaf = z.clone().requires_grad_()
    value = loss(y, leaf)
    is_one_step = type(value.grad_fn).__name__ == "_SumOfLossesBackward"
    assert is_one_step == kernels.native  # otherwise this compares nothing
    (dz,) = torch.autograd.grad(value, leaf)
    hessian = torch.autograd.functional.hessian(lambda z: loss(y, z), z)
    torch.testing.assert_close(torch.func.grad(lambda z: loss(y, z))(z), dz)
    torch.testing.assert_close(torch.func.hessian(lambda z: loss(y, z))(z), hessian)
    batch = torch.stack([z, z.flip(0)])
    want = torch.stack([loss(y, each) for each in batch])
    torch.testing.assert_close(torch.func.vmap(lambda z: loss(y, z))(batch), want)


def test_a_sum_is_as_infinite_as_one_with_weights():
    z, y = torch.tensor([[0.0, 3e38], [0.0, 3e38]]), torch.tensor([0, 0])
    loss = SparseCategoricalCrossentropy(True)
    assert loss(y, z) == loss(y, z, torch.ones(2)) == torch.inf


@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_with_sample_weight"])
def test_weights_of_1_change_only_the_rounding(reduction):
    z, y, _ = rows(100, "logits", shape=(40, 50))
    loss = SparseCategoricalCrossentropy(True, reduction=reduction)
    torch.testing.assert_close(loss(y, z), loss(y, z, torch.ones(40, 50)), rtol=5e-7, atol=0)
    exact = torch_sce.SparseCategoricalCrossentropy(True, reduction=reduction, dtype="float64")
    torch.testing.assert_close(loss(y, z).double(), exact(y, z), rtol=2e-7, atol=0)
