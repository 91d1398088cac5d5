"""The sum of losses in one step is that of the losses, with every derivative."""

import itertools

import pytest
import torch
from test_kernels import MODELS, rows

import torch_sce
from torch_sce import SparseCategoricalCrossentropy, kernels
from torch_sce.kernels import aten, row_losses, sum_of_losses
from torch_sce.options import REDUCTIONS
from torch_sce.reduction import reduce

SHAPES = [(), (1,), (33,), (5000,), (3, 1023), (0,)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [7, 200])
def test_it_is_the_weighted_sum_of_the_losses_with_their_gradient(classes, shape, dtype, model):
    z, y, g = rows(classes, model, shape=shape, dtype=dtype)
    n = max(y.numel(), 1)
    some, factors = y % 3 != 0, g.to(aten.row_dtype(z))
    for counted, factor in itertools.product((None, some), (None, factors)):
        leaf, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        value = sum_of_losses(leaf, y, counted, MODELS[model], n, factor)
        losses = row_losses(other, y, counted, MODELS[model])
        assert value.dtype == losses.dtype == aten.row_dtype(z) and value.shape == ()
        terms = losses.double() * (1 if factor is None else factor.double())
        exact = terms.sum().to(value.dtype) / n
        # Of float64, and without the extension, PyTorch's or the lanes' sums are rounded, too.
        rounding = 2e-15 if dtype == torch.float64 else 0 if kernels.native else 5e-7
        most = rounding * terms.detach().abs().sum().item() / n
        torch.testing.assert_close(value, exact, rtol=0, atol=most)
        g = torch.tensor(0.7, dtype=value.dtype)
        (dz,) = torch.autograd.grad(value, leaf, g)
        of_rows = g / n if factor is None else g / n * factor
        (want,) = torch.autograd.grad(losses, other, of_rows.expand(losses.shape))
        assert torch.equal(dz, want)


# Of losses (4, 5): what a user may pass as a weight or as a mask.
WEIGHTS = {
    "none": lambda x: None,
    "each": lambda x: x,
    "negative": lambda x: x - 0.5,
    "halves": lambda x: (x * 2).round() / 2,
    "bools": lambda x: x > 0.5,
    "integers": lambda x: (x * 3).long(),
    "one": lambda x: x[0, 0],
    "a number": lambda x: 0.25,
    "for each step": lambda x: x[:1],
    "for each example": lambda x: x[:, :1],
    "zeros": lambda x: x * 0,
    "nan": lambda x: torch.where(x > 0.9, torch.nan, x),
    "a leaf": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("mask", [name for name in WEIGHTS if name != "nan"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_loss_is_what_its_reduction_makes_of_the_losses(weight, mask):
    """In one step, where values can be read and are constants, or in several."""
    drawn = torch.Generator().manual_seed(0)
    steps = set()
    for reduction, ignored, model in itertools.product(REDUCTIONS, (None, -1), MODELS):
        loss = SparseCategoricalCrossentropy(model == "logits", ignored, reduction)
        z, y, _ = rows(6, model, shape=(4, 5))
        y = torch.where(torch.rand(4, 5, generator=drawn) < 0.3, -1, y) if ignored else y
        given = [WEIGHTS[x](torch.rand(4, 5, generator=drawn)) for x in (weight, mask)]
        leaves = [z.requires_grad_()]
        leaves += [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
        samples = loss._prepare(y, z, given[0], given[1], torch.float32)
        value = loss(y, z, *given)
        want = reduce(loss._losses(samples), samples.weight, samples.mask, reduction)
        steps.add(type(value.grad_fn).__name__)
        torch.testing.assert_close(value, want, rtol=5e-6, atol=1e-6, equal_nan=True)
        options = {"grad_outputs": torch.full_like(want, 0.7), "allow_unused": True}
        found = torch.autograd.grad(value, leaves, **options)
        right = torch.autograd.grad(want, leaves, **options)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
    in_one = kernels.native and "a leaf" not in (weight, mask)
    assert ("_SumOfLossesBackward" in steps) == in_one


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(3000,), (3000, 2), (3000, 1, 3)])
def test_the_order_is_that_in_which_losses_are_added_up(shape, model):
    z, y, factor = rows(7, model, shape=shape, dtype=torch.float64)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    a = sum_of_losses(z, y, None, MODELS[model], 3, factor, order)
    b = sum_of_losses(z[order], y[order], None, MODELS[model], 3, factor[order])
    assert torch.equal(a, b)


@pytest.mark.parametrize("model", MODELS)
def test_derivatives_match_finite_differences(model):
    z, y, _ = rows(5, model, shape=(4,), dtype=torch.float64)

    counted, factor = torch.tensor([True, True, False, True]), torch.tensor([2, -1, torch.nan, 0.5])
    leaf = z.requires_grad_()
    for some, each in ((None, None), (counted, None), (counted, factor.double().nan_to_num(0))):

        def value(z, some=some, each=each):
            return sum_of_losses(z, y, some, MODELS[model], 3, each)

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


@pytest.mark.parametrize("kind", ["labels", "weights", "mask"])
def test_values_are_read_as_pytorch_has_them(kind):
    """Negated without a copy, or with bytes other than 0 and 1 in a tensor of bools."""
    z, y, weight = rows(6, "logits", shape=(4, 5))
    mask = torch.arange(20).view(4, 5) % 3 != 0
    negated = torch._neg_view  # pyright: ignore[reportPrivateImportUsage]
    other = {
        "labels": (negated(-y), weight, mask),
        "weights": (y, negated(-weight), mask),
        "mask": (y, weight, (mask * torch.tensor(2, dtype=torch.uint8)).view(torch.bool)),
    }[kind]
    for reduction, with_mask in itertools.product(REDUCTIONS, (False, True)):
        loss = SparseCategoricalCrossentropy(True, reduction=reduction)
        found, want = (
            loss(y, z, weight, mask if with_mask else None)
            for y, weight, mask in (other, (y, weight, mask))
        )
        assert torch.equal(found, want)


@pytest.mark.parametrize("lengths", [[3, 1, 2], []])
def test_a_packed_sequence_has_any_default_device_and_length(lengths):
    sizes = torch.tensor([sum(n > step for n in lengths) for step in range(3) if lengths])
    z, y, weight = rows(6, "logits", shape=(sum(lengths), 2))
    y, z, weight = (
        torch.nn.utils.rnn.PackedSequence(x, sizes.long(), *[torch.arange(len(lengths))] * 2)
        for x in (y, z, weight)
    )
    for reduction in (name for name in REDUCTIONS if name not in ("none", None)):
        loss = SparseCategoricalCrossentropy(True, reduction=reduction)
        want = loss(y, z, weight)
        with torch.device("meta"):
            assert torch.equal(loss(y, z, weight), want) and want.isfinite()
