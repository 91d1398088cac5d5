"""Weights, masks and averages, against the oracle and by their properties."""

import numpy as np
import pytest
import torch
from conftest import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ulps import ulps

from torch_sce import SparseCategoricalCrossentropy
from torch_sce.crosscheck.reference import right
from torch_sce.reduction import factors, reduce

REDUCTIONS = ("none", None, "sum", "mean", "sum_over_batch_size", "mean_with_sample_weight")
SCALARS = ("sum", "mean", "sum_over_batch_size", "mean_with_sample_weight")

# Quarters add up without rounding, so only the losses' own rounding is compared.
quarters = st.integers(-12, 12).map(lambda n: n / 4)


@st.composite
def batches(draw):
    """Logits (B, T, C), labels (B, T), some of them ignored (-1)."""
    b, t, c = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    z = draw(arrays.arrays(np.float32, (b, t, c), elements=st.floats(-20, 20, width=32)))
    y = draw(arrays.arrays(np.int64, (b, t), elements=st.integers(-1, c - 1)))
    return z, y


def loss_and_gradient(y, z, weight=None, mask=None, **options):
    leaf = torch.tensor(z, requires_grad=True)
    value = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, **options)(
        y, leaf, weight, mask
    )
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


@settings(deadline=None)
@given(batches(), st.sampled_from(REDUCTIONS), st.data())
def test_every_reduction_equals_the_oracle(batch, reduction, data):
    z, y = batch
    shape = data.draw(st.sampled_from([y.shape, (y.shape[0], 1), (1, y.shape[1]), (1, 1)]))
    weight = data.draw(arrays.arrays(np.float32, shape, elements=quarters))
    mask = data.draw(st.none() | arrays.arrays(np.bool_, y.shape))
    value, gradient = loss_and_gradient(y, z, weight, mask, reduction=reduction)
    options = {"reduction": reduction, "from_logits": True, "ignore_class": -1}
    exact = right(make_case(y, z, weight, mask, **options))
    want, slope = exact.value, exact.gradient
    assert slope is not None
    # What is added up before it cancels: losses up to 40 + log 6, weights up to 3, 16 positions.
    size = max(1.0, float(np.abs(want).max(initial=0)), 42 * 3 * (16 if reduction == "sum" else 1))
    if reduction == "mean_with_sample_weight":
        size *= 16 / max(0.25, abs(float(weight.sum())))
    assert ulps(value, want, size) <= 8
    assert ulps(gradient, slope, max(1.0, float(np.abs(slope).max(initial=0)))) <= 16


@settings(deadline=None)
@given(batches(), st.sampled_from(SCALARS), st.data())
def test_a_reduction_is_its_formula_on_the_unreduced_losses(batch, reduction, data):
    z, y = batch
    weight = data.draw(arrays.arrays(np.float32, y.shape, elements=quarters))
    value, _ = loss_and_gradient(y, z, weight, reduction=reduction)
    each, _ = loss_and_gradient(y, z, weight, reduction="none")
    counts = torch.tensor(y != -1)
    total = each.double().sum()
    divisor = {
        "sum": torch.tensor(1.0),
        "mean": counts.sum(),
        "sum_over_batch_size": counts.sum(),
        "mean_with_sample_weight": (torch.tensor(weight) * counts).sum(),
    }[reduction]
    want = total / divisor if divisor else torch.tensor(0.0)
    scale = each.abs().sum() / max(abs(divisor.item()), 0.25)
    assert ulps(value, want, max(float(scale), 1e-30)) <= 16


@settings(deadline=None)
@given(st.sampled_from(REDUCTIONS), st.data())
def test_the_factors_of_a_reduction_are_its_derivatives(reduction, data):
    """Half masks too. A derivative has a rounding for its product and one for the quotient."""
    shape = data.draw(st.sampled_from([(), (1,), (4,), (0,), (2, 3), (2, 1), (0, 3)]))
    ranks = [(), *[shape[:i] + (1,) * (len(shape) - i) for i in range(len(shape) + 1)]]

    def drawn(elements):
        of_shape = data.draw(st.sampled_from(ranks))
        return torch.tensor(data.draw(arrays.arrays(np.float32, of_shape, elements=elements)))

    weight = data.draw(st.none() | st.builds(lambda: drawn(quarters)))
    mask = data.draw(st.none() | st.builds(lambda: drawn(st.sampled_from([0.0, 0.5, 1.0, 2.0]))))
    if mask is not None and data.draw(st.booleans()):
        mask = mask.bool()
    losses = torch.rand(shape, dtype=torch.float64)
    losses = (losses if mask is None else losses * mask.bool()).requires_grad_()
    (want,) = torch.autograd.grad(reduce(losses, weight, mask, reduction).sum(), losses)
    if reduction in ("none", None):  # nothing is divided
        reduction = "sum"
    found = factors(losses.detach(), weight, mask, reduction)
    assert found.shape == shape and found.dtype == torch.float64
    assert ((found - want).abs() <= 2**-51 * want.abs()).all()


@settings(deadline=None)
@given(batches(), st.sampled_from(REDUCTIONS), st.data())
def test_a_zero_weight_removes_a_sample_from_the_sum(batch, reduction, data):
    z, y = batch
    weight = data.draw(arrays.arrays(np.float32, y.shape, elements=st.sampled_from([0.0, 1.0])))
    other = np.where(weight[..., None] == 0, z[::-1, ::-1], z)
    value, gradient = loss_and_gradient(y, z, weight, reduction=reduction)
    same, _ = loss_and_gradient(y, other, weight, reduction=reduction)
    assert torch.equal(value, same)
    assert (gradient.numpy()[weight == 0] == 0).all()


@settings(deadline=None)
@given(batches(), st.sampled_from([0.25, 2.0, 8.0]), st.sampled_from(REDUCTIONS))
def test_scaling_the_weights_scales_the_loss_but_not_their_mean(batch, scale, reduction):
    """By powers of two, which round nothing."""
    z, y = batch
    weight = np.linspace(0.25, 1, y.size, dtype=np.float32).reshape(y.shape)
    value, gradient = loss_and_gradient(y, z, weight, reduction=reduction)
    scaled, scaled_gradient = loss_and_gradient(
        y, z, weight * np.float32(scale), reduction=reduction
    )
    factor = 1 if reduction == "mean_with_sample_weight" else scale
    torch.testing.assert_close(scaled, value * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled_gradient, gradient * factor, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(batches())
def test_the_losses_of_a_batch_are_those_of_its_parts(batch):
    """To a few ulps: how a row is computed may depend on how many there are."""
    z, y = batch
    whole, _ = loss_and_gradient(y, z, reduction="none")
    parts = [
        loss_and_gradient(y[i : i + 1], z[i : i + 1], reduction="none")[0] for i in range(len(y))
    ]
    assert ulps(torch.cat(parts), whole.numpy(), whole.clamp(min=1).numpy()) <= 4


@settings(deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_gradient(batch, random):
    z, y = batch
    order = list(range(z.shape[-1]))
    random.shuffle(order)
    place = np.argsort(order)
    value, gradient = loss_and_gradient(y, z, reduction="none")
    permuted, permuted_gradient = loss_and_gradient(
        np.where(y == -1, -1, place[np.maximum(y, 0)]), z[..., order], reduction="none"
    )
    assert ulps(permuted, value.numpy(), np.maximum(value.numpy(), 1)) <= 4
    assert ulps(permuted_gradient, gradient.numpy()[..., order], 1.0) <= 4


@settings(deadline=None)
@given(batches(), st.integers(-64, 64))
def test_shifting_all_logits_changes_nothing(batch, shift):
    z, y = batch
    z = np.round(z * 64) / 64  # so that the shift is exact
    value, gradient = loss_and_gradient(y, z, reduction="none")
    shifted, shifted_gradient = loss_and_gradient(y, z + np.float32(shift), reduction="none")
    assert ulps(shifted, value.numpy(), value.clamp(min=1).numpy()) <= 4
    assert ulps(shifted_gradient, gradient.numpy(), 1.0) <= 4


@settings(deadline=None)
@given(batches(), st.sampled_from(REDUCTIONS))
def test_gradient_rows_of_logits_sum_to_zero(batch, reduction):
    z, y = batch
    _, gradient = loss_and_gradient(y, z, reduction=reduction)
    assert gradient.double().sum(-1).abs().max() <= 1e-6


# losses' shape, weight's shape: all that Keras's rules accept
FITTING = [
    ((4,), ()), ((4,), (1,)), ((4,), (4,)), ((4,), (4, 1)), ((4,), (1, 4)), ((4,), (1, 1)),
    ((2, 3), ()), ((2, 3), (1,)), ((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3), (1, 3)),
    ((2, 3), (2, 3)), ((2, 3), (2, 3, 1)), ((2, 3), (2, 1, 1)), ((2, 1), (2,)),
    ((2, 3, 4), (2, 1, 1)), ((2, 3, 4), (3, 4)), ((2, 3, 1), (2, 3)), ((), ()), ((), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
@pytest.mark.parametrize(("shape", "given_shape"), FITTING)
def test_weights_and_masks_of_these_shapes_keep_the_losses_shape(shape, given_shape, argument):
    z = torch.randn(*shape, 5, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(shape, dtype=torch.int64)
    loss = SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    assert torch.equal(loss(y, z, **{argument: torch.ones(given_shape)}), loss(y, z))


REFUSED = [
    ((4,), (3,), r"broadcast to the losses' shape \(4,\), got \(3,\)$"),
    ((4,), (4, 4), r"got \(4, 4\)$"),
    ((4,), (4, 1, 1), r"got \(4, 1, 1\)$"),
    ((1,), (4,), r"got \(4,\)$"),
    ((), (3,), r"the losses' shape \(\), got \(3,\)$"),
    ((2, 3), (2,), r"for one value per example pass {}\[:, None\]$"),
    ((3, 3), (3,), r"for one value per example pass {}\[:, None\]$"),
    ((3, 2, 3), (3,), r"for one value per example pass {}\[:, None, None\]$"),
    ((2, 3), (2, 3, 3), r"got \(2, 3, 3\)$"),
]


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
@pytest.mark.parametrize(("shape", "given_shape", "message"), REFUSED)
def test_weights_and_masks_that_do_not_fit_the_losses_are_refused(
    shape, given_shape, message, argument
):
    z, y = torch.zeros(*shape, 5), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{argument} must " + ".*" + message.format(argument)):
        SparseCategoricalCrossentropy()(y, z, **{argument: torch.ones(given_shape)})


@pytest.mark.parametrize("weight", [2, 2.0, True, np.float32(2), [2.0], (1, 2), np.int8(2)])
def test_weights_may_be_numbers_lists_and_arrays(weight):
    y, z = [0, 1], torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    loss = SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    want = loss(y, z) * torch.tensor(np.asarray(weight, np.float32))
    assert torch.equal(loss(y, z, weight), want)


def test_weights_and_masks_must_hold_real_numbers():
    y, z = [0, 1], torch.zeros(2, 2)
    with pytest.raises(TypeError, match="sample_weight must hold numbers, got 'heavy'"):
        SparseCategoricalCrossentropy()(y, z, "heavy")  # pyright: ignore
    with pytest.raises(TypeError, match=r"mask must hold real numbers, got torch\.complex"):
        SparseCategoricalCrossentropy()(y, z, mask=torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize("reduction", SCALARS)
def test_nothing_that_counts_gives_zero_and_no_gradient(reduction):
    z = np.random.default_rng(0).standard_normal((3, 2, 4), np.float32)
    y: np.ndarray = np.full((3, 2), -1)
    for value, gradient in (
        loss_and_gradient(y, z, reduction=reduction),
        loss_and_gradient(y + 1, z, mask=np.zeros((3, 2)), reduction=reduction),
        loss_and_gradient(y + 1, z, np.zeros((3, 2)), reduction=reduction),
    ):
        assert value.item() == 0 and value.shape == () and (gradient == 0).all()


def test_a_small_divisor_divides():
    y, z = [0, 1], torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    loss = SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    torch.testing.assert_close(loss(y, z, [1e-30, 3e-30]), loss(y, z, [1.0, 3.0]))


def test_one_sample_with_a_scalar_weight_is_not_averaged():
    """tf.keras drops the axis of a single position for a scalar weight; the live tests check it."""
    loss = SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    z = torch.tensor([[0.0, 1.0]])
    assert loss([0], z, 2.0) == 2 * loss([0], z)
    assert loss([0], z, [2.0]) == loss([0], z)


def test_weights_keep_their_precision_in_float64():
    y, z = [0, 1], torch.tensor([[0.5, 1.0], [2.0, -1.0]], dtype=torch.float64)
    loss = SparseCategoricalCrossentropy(from_logits=True, dtype="float64")
    assert loss(y, z, 0.1) == loss(y, z, [0.1, 0.1])
    torch.testing.assert_close(loss(y, z, 0.1), 0.1 * loss(y, z), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint16, torch.uint64, torch.float16])
def test_a_mask_of_any_dtype_may_stand_beside_ignored_labels(dtype):
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    y, mask = torch.tensor([0, -1, 2, 1]), torch.tensor([1, 1, 0, 1])
    loss = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    assert loss(y, z, None, mask.to(dtype)) == loss(y, z, None, mask.bool())


def test_the_gradient_with_respect_to_a_weight_is_the_loss():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    y, weight = torch.tensor([0, 1, 2, 0]), torch.ones(4, requires_grad=True)
    SparseCategoricalCrossentropy(from_logits=True, reduction="sum")(y, z, weight).backward()
    each = SparseCategoricalCrossentropy(from_logits=True, reduction="none")(y, z)
    assert weight.grad is not None and torch.equal(weight.grad, each)


def test_the_caller_s_weights_and_labels_are_left_alone():
    z, y = torch.randn(4, 3), torch.tensor([0, -1, 2, -1])
    weight, mask = torch.arange(4.0), torch.tensor([True, True, False, True])
    before = [t.clone() for t in (z, y, weight, mask)]
    SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)(y, z, weight, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (z, y, weight, mask), strict=True))
