"""Rows: losses and gradients against the oracle, derivatives, transforms, rounding."""

from functools import reduce
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data, floats, integers, sampled_from
from paths import INTERPRETED, PATHS, SAVING, take_path
from torch.autograd import gradcheck, gradgradcheck
from ulps import ulps

from torch_sce import kernels
from torch_sce.crosscheck.reference import from_logits, from_probabilities
from torch_sce.kernels import aten
from torch_sce.kernels.contract import Summary, loss_of, sums
from torch_sce.samples import CLIP

# One: nothing to choose; 2: the least; 7: no power of two; many: several vectors and tiles.
MANY = 40 if INTERPRETED else 1000
CLASSES = (1, 2, 7, MANY)
MODELS = {"logits": None, "probabilities": CLIP[torch.float32]}
IGNORED = -(2**62)  # the label, in these tests, of rows that do not count


@pytest.fixture(params=PATHS, autouse=True)
def path(request, monkeypatch):
    take_path(request.param, monkeypatch)
    return request.param


def counted_in(y):
    """Which rows count; None if it can be seen that all do."""
    counted = y != IGNORED
    return None if not kernels.is_traced() and bool(counted.all()) else counted


def row_losses(z, y, clip=None):
    return kernels.row_losses(z, y, counted_in(y), clip)


def definition(z, y, clip=None):
    return aten.row_losses(z, y, counted_in(y), clip)


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def rows(classes, model, shape=(3, 4), dtype=torch.float32, seed=0):
    """Predictions (*shape, C), labels and an upstream gradient."""
    generator = seeded(seed)
    z = torch.randn(*shape, classes, generator=generator, dtype=torch.float64) * 3
    if MODELS[model] is not None:
        z = z.softmax(-1)
    y = torch.randint(0, classes, shape, generator=generator)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    return z.to(dtype), y, g.to(dtype if dtype == torch.float64 else torch.float32)


def expected(z, y, g, model):
    """The losses and their gradients by the float64 rules."""
    rule = from_logits if model == "logits" else from_probabilities
    z, y, g = (x.cpu().numpy() for x in (z.double(), y, g.double()))
    want = rule(z, y)
    return want.loss, want.gradient * g[..., None]


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
    size = np.abs(dz).max(-1, keepdims=True)
    assert ulps(z.grad, dz, np.maximum(size, g.abs().cpu().numpy()[..., None])) <= 8


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_path_gives_the_definition_to_a_few_ulps(model, classes):
    """Four roundings are between them: of exp(z), s, g / s and a product, or of z - m instead."""
    z, y, g = rows(classes, model)
    y[0, 0] = IGNORED
    fast, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = row_losses(fast, y, MODELS[model])
    loss.backward(g)
    want = definition(plain, y, MODELS[model])
    want.backward(g)
    assert ulps(loss, want, want.detach().abs().clamp(min=1)) <= 4
    assert fast.grad is not None and plain.grad is not None
    # g p - g cancels where p is near 1.
    size = torch.maximum(plain.grad.abs().amax(-1), g.abs()).unsqueeze(-1)
    assert ulps(fast.grad, plain.grad, size) <= 4


@pytest.mark.parametrize("model", MODELS)
def test_an_ignored_row_has_no_loss_and_no_gradient_for_any_values(model):
    z, y, g = rows(7, model)
    z[1, 2], z[0, 1, 3], y[1, 2], y[0, 1] = torch.nan, torch.inf, IGNORED, IGNORED
    z.requires_grad_()
    for losses in (row_losses(z, y, MODELS[model]), definition(z, y, MODELS[model])):
        (dz,) = torch.autograd.grad(losses, z, g)
        assert losses.isfinite().all() and dz.isfinite().all()
        assert losses[1, 2] == 0 and losses[0, 1] == 0
        assert (dz[1, 2] == 0).all() and (dz[0, 1] == 0).all() and (dz[0, 0] != 0).any()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", [-1, 7, 255, 2**62])
def test_a_label_that_is_no_class_poisons_its_row_and_no_other(model, label):
    z, y, g = rows(7, model)
    y[1, 2] = label
    z.requires_grad_()
    for losses in (row_losses(z, y, MODELS[model]), definition(z, y, MODELS[model])):
        (dz,) = torch.autograd.grad(losses, z, g)
        poisoned = torch.zeros(y.shape, dtype=torch.bool)
        poisoned[1, 2] = True
        assert torch.equal(losses.isnan(), poisoned)
        assert torch.equal(dz.isnan().all(-1), poisoned)
        assert torch.equal(dz.isnan().any(-1), poisoned)


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
    assert gradcheck(lambda z: definition(z, y, clip), z)
    assert gradgradcheck(lambda z: definition(z, y, clip), z)


@pytest.mark.parametrize("model", MODELS)
def test_functional_transforms_agree_with_autograd(model):
    z, y, g = rows(5, model, shape=(2, 3), dtype=torch.float64)
    batch = torch.stack([z, z.flip(0), z.roll(1, -1)])
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
    tangent = torch.randn(z.shape, dtype=z.dtype, generator=seeded(1))
    derivative = torch.func.jvp(total, (z,), (tangent,))[1]
    torch.testing.assert_close(derivative, (gradients[0] * tangent).sum())
    hessian = torch.func.hessian(total)(z)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(total, z))


@pytest.mark.parametrize("model", MODELS)
def test_ignored_rows_have_no_second_derivative_for_any_values(model):
    z, y, g = rows(5, model, dtype=torch.float64)
    z[0, 1], y[0, 1] = torch.nan, IGNORED
    z.requires_grad_()
    total = (row_losses(z, y, MODELS[model]) * g).sum()
    (first,) = torch.autograd.grad(total, z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    assert second.isfinite().all() and (second[0, 1] == 0).all() and (second != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tangents_of_half_precision_rows_are_float32(dtype):
    z, y, _ = rows(100, "logits", dtype=dtype)
    tangent = torch.ones_like(z)
    tangent[..., ::2] = 0.5
    found = torch.func.jvp(lambda z: row_losses(z, y), (z,), (tangent,))
    want = torch.func.jvp(lambda z: row_losses(z, y), (z.float(),), (tangent.float(),))
    assert all(part.dtype == torch.float32 for part in found)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_an_offset_of_all_logits_costs_no_precision(offset):
    """Saving (m, s) keeps the gradient within 2e-6; saving logsumexp would give 4e-3."""
    z, y, _ = rows(MANY, "logits", shape=(16,))
    z = (z + offset).requires_grad_()
    row_losses(z, y).sum().backward()
    exact = z.detach().double().softmax(-1)
    assert z.grad is not None
    others = torch.ones_like(exact, dtype=torch.bool).scatter(-1, y.unsqueeze(-1), False)
    error = ((z.grad.double() - exact) / exact)[others].abs().max()
    assert error < 2e-6


def test_tiny_probabilities_do_not_cancel():
    """log s - log p would be off by 4 ulps here: both logarithms are near -15."""
    q, y = torch.tensor([[3e-7, 1e-7]]), torch.tensor([0])
    want, _ = expected(q, y, torch.ones(1), "probabilities")
    assert ulps(row_losses(q, y, MODELS["probabilities"]), want, 1.0) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_computed_in_float32(dtype):
    z, y, g = rows(MANY, "logits", dtype=dtype)
    half, single = z.clone().requires_grad_(), z.float().requires_grad_()
    losses = row_losses(half, y)
    reference = row_losses(single, y)
    losses.backward(g)
    reference.backward(g)
    assert losses.dtype == torch.float32 and half.grad is not None and single.grad is not None
    assert torch.equal(losses, reference)
    assert half.grad.dtype == dtype
    want = single.grad.to(dtype)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates, devices round
        assert (half.grad.view(torch.int16) - want.view(torch.int16)).abs().max() <= 1
    else:
        assert torch.equal(half.grad, want)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0)])
def test_no_rows_give_empty_results(model, shape):
    z, y = torch.zeros(*shape, 5, requires_grad=True), torch.zeros(shape).long()
    losses = row_losses(z, y, MODELS[model])
    losses.sum().backward()
    assert losses.shape == shape and z.grad is not None and z.grad.shape == z.shape


LAYOUTS = {
    "class axis second": lambda z: z.movedim(-1, 1).contiguous().movedim(1, -1),
    "class axis first": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "time before batch": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda z: torch.zeros(10, 6, 14)[::2, ::2, ::2].copy_(z),
    "all but the last": lambda z: torch.cat([z, z[:, :1]], 1)[:, :-1],
    "a map's middle": lambda z: torch.nn.functional.pad(z.movedim(-1, 0), (1, 1, 1, 1))[
        :, 1:-1, 1:-1
    ].movedim(0, -1),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ignoring", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_may_lie_anywhere_in_memory(layout, ignoring, model):
    z, y, g = rows(7, model, shape=(5, 3))
    if ignoring:
        y[1], y[3, 2] = IGNORED, IGNORED
    given = LAYOUTS[layout](z)
    assert torch.equal(given, z) and not given.is_contiguous()
    before = given.clone()
    leaf, copy = given.detach().requires_grad_(), z.clone().requires_grad_()
    a, b = row_losses(leaf, y, MODELS[model]), row_losses(copy, y, MODELS[model])
    assert ulps(a, b, 1.0) <= 4
    (da,), (db,) = torch.autograd.grad(a, leaf, g), torch.autograd.grad(b, copy, g)
    assert ulps(da, db, torch.maximum(g.abs().unsqueeze(-1), db.abs())) <= 4
    assert torch.equal(given, before)  # nothing has been written over the predictions


def test_rows_may_share_memory():
    z, y, g = rows(7, "logits", shape=(5, 3))
    leaf, copy = z[:1].expand(5, -1, -1).requires_grad_(), z[:1].repeat(5, 1, 1).requires_grad_()
    a, b = row_losses(leaf, y), row_losses(copy, y)
    assert ulps(a, b, 1.0) <= 4
    (da,), (db,) = torch.autograd.grad(a, leaf, g), torch.autograd.grad(b, copy, g)
    assert ulps(da, db, g.abs().unsqueeze(-1)) <= 4


@pytest.mark.parametrize("labels_are", ["all classes", "partly ignored"])
@pytest.mark.parametrize("model", MODELS)
def test_predictions_are_not_written_over(model, labels_are):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        z, y, g = rows(7, model, dtype=dtype)
        if labels_are == "partly ignored":
            y[0, 1] = IGNORED
        before = z.clone()
        row_losses(z.requires_grad_(), y, MODELS[model]).backward(g)
        assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_may_be_written_over_their_predictions(model, dtype):
    """In the bits of those in another tensor; also where classes are not contiguous."""
    clip = None if model == "logits" else CLIP[dtype]
    for classes in (7,) if INTERPRETED else (7, MANY + 3):  # the interpreter is slow
        z, y, g = rows(classes, model, (3,), dtype)
        y[0], g[1] = IGNORED, 0
        gaps = torch.nn.functional.pad(z, (1, 2))[:, 1:-2]
        for z in (z.clone(), z.t().contiguous().t(), gaps):  # noqa: B020
            options = (y, counted_in(y), clip)
            module = kernels.kernels_for(z)
            _, saved = module.forward(z, *options)
            want = module.backward(g, z, *options, saved)
            over = torch.empty_strided(z.shape, z.stride(), dtype=dtype).copy_(z)
            found = module.backward(g, over, *options, saved, over)
            assert found is over and torch.equal(found, want) and not found.isnan().any()


# Where m = 0 will not do: sums too large, too small, and one that is right among them; rows that
# the first block gives no warning of; entries that underflow, which are to be exactly 0.
FAR = {
    "high": lambda z: z + 100,
    "low": lambda z: z - 100,
    "mixed": lambda z: z + torch.tensor([0.0, 60.0, -60.0, 500.0]).unsqueeze(-1),
    "late": lambda z: z + torch.linspace(0, 50, 3)[:, None, None],
    "steep": lambda z: torch.where(torch.arange(7) % 3 == 1, -1e9, z),
    "minus infinity first": lambda z: torch.where(torch.arange(7) < 4, -torch.inf, z),
    "minus infinity": lambda z: torch.where(torch.arange(7) % 3 == 1, -torch.inf, z),
    "rows of minus infinity": lambda z: z + torch.tensor([0, 0, -torch.inf, 0]).unsqueeze(-1),
    "an infinity": lambda z: torch.where(torch.arange(84).view(3, 4, 7) == 30, torch.inf, z),
    "a NaN": lambda z: torch.where(torch.arange(84).view(3, 4, 7) == 30, torch.nan, z),
}


@pytest.mark.parametrize("far", FAR)
def test_logits_of_any_size_equal_the_definition(far):
    z, y, g = rows(7, "logits")
    z, y = FAR[far](z), torch.where(y % 3 == 1, 0, y)
    fast, plain = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, right = row_losses(fast, y), definition(plain, y)
    (dz,), (want,) = torch.autograd.grad(loss, fast, g), torch.autograd.grad(right, plain, g)
    torch.testing.assert_close(loss, right.float(), rtol=4e-7, atol=4e-7, equal_nan=True)
    size = g.abs().unsqueeze(-1).nan_to_num() * 2**-20
    assert torch.equal(dz.isnan(), want.isnan())
    assert ((dz - want).abs() <= size)[~want.isnan()].all()
    if far in ("steep", "minus infinity"):
        assert (dz[..., [1, 4]] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -1.0, 2.0, 0.0])
def test_probabilities_of_any_size_equal_the_definition(bad):
    q, y, g = rows(7, "probabilities")
    q[1, 2, 3], q[0, 0, y[0, 0]] = bad, bad
    clip = MODELS["probabilities"]
    fast, plain = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss, right = row_losses(fast, y, clip), definition(plain, y, clip)
    loss.backward(g)
    wide = q.double()
    want = aten.row_gradients(g.double(), wide, y, None, clip, aten.summarize(wide, y, clip))
    torch.testing.assert_close(loss, right, rtol=4e-7, atol=4e-7, equal_nan=True)
    torch.testing.assert_close(fast.grad, want.float(), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_bounds_are_inclusive_in_first_and_second_derivatives(dtype):
    """That of `clamp` at a bound is 1 before PyTorch 2.15, and 0 there."""
    low, high = clip = CLIP[dtype]
    bounds = torch.tensor(clip, dtype=dtype)
    outside = torch.nextafter(bounds, torch.tensor([0.0, 2.0], dtype=dtype))
    q = torch.stack([bounds, outside], 1).view(1, 4).requires_grad_()  # low, less, high, more
    s = 2 * low + 2 * high
    first = [1 / s - 1 / low, 0, 1 / s, 0]
    second = [1 / low**2 - 2 / s**2, 0, -2 / s**2, 0]  # of the sum of the first
    y = torch.tensor([0])
    for losses in (row_losses(q, y, clip), definition(q, y, clip)):
        (dq,) = torch.autograd.grad(losses, q, torch.ones_like(losses), create_graph=True)
        (again,) = torch.autograd.grad(dq.sum(), q)
        torch.testing.assert_close(dq, dq.new_tensor([first]), rtol=1e-6, atol=0)
        torch.testing.assert_close(again, dq.new_tensor([second]), rtol=1e-6, atol=0)


# Over every threshold of the kernels, in two blocks and more; Triton's interpreter is slow.
LARGE = (6, 40) if INTERPRETED else (2 * aten.CPU_BLOCK // 1000, 1000)
OUTLIERS = (28.0, -70.0, 100.0, -1e4, 1e30, torch.inf, -torch.inf, torch.nan)


def large(model, seed=0, channels_first=False):
    z, y, g = rows(LARGE[1], model, shape=LARGE[:1], seed=seed)
    return (z.t().contiguous().t() if channels_first else z), y, g


def loss_and_gradient(z, y, g, model):
    leaf = z.detach().requires_grad_()
    loss = row_losses(leaf, y, MODELS[model])
    return loss.detach(), *torch.autograd.grad(loss, leaf, g)


@pytest.mark.parametrize("offset", [0.0, 10.0, -25.0])
def test_the_loss_of_one_class_is_0(offset):
    z = torch.randn(300, 1, generator=seeded(0)) + offset
    z[7] = 100
    assert (row_losses(z, torch.zeros(300, dtype=torch.int64)) == 0).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", [2, 7, MANY])
@given(data())
@settings(
    max_examples=5 if INTERPRETED else 20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_loss_is_negative(model, classes, draws):
    """Confident rows, with any outliers in them or in others."""
    seed, confident = draws.draw(integers(0, 99)), draws.draw(floats(0, 200))
    z, y, _ = rows(classes, "logits", shape=(40,), seed=seed)
    z = torch.where(torch.arange(classes) == y.unsqueeze(-1), z + confident, z)
    z = z if model == "logits" else z.softmax(-1)
    z[draws.draw(integers(0, 39)), draws.draw(integers(0, classes - 1))] = draws.draw(
        sampled_from(OUTLIERS[:-3]) | floats(width=32, allow_nan=False, allow_infinity=False)
    )
    loss = row_losses(z, y, MODELS[model])
    assert (loss >= 0).all() and not loss.signbit().any()


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_no_row_depends_on_another(model, channels_first):
    """Not on its values, not on its label, not on whether it is ignored: not in one bit."""
    z, y, g = large(model, channels_first=channels_first)
    y[5] = IGNORED
    before = loss_and_gradient(z, y, g, model)
    for number, outlier in enumerate(OUTLIERS[1::3] if INTERPRETED else OUTLIERS):
        changed, label = z.clone(), y.clone()
        changed[2, 3], changed[3] = outlier, outlier
        label[4] = (IGNORED, -1, 0)[number % 3]
        after = loss_and_gradient(changed, label, g, model)
        others = torch.ones(len(y), dtype=torch.bool)
        others[2:5] = False
        assert all(torch.equal(a[others], b[others]) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("at_label", [False, True])
@pytest.mark.parametrize("outlier", [28.0, -70.0, 60.0, -88.0, 98.0, -104.0, 200.0, -1e4, 1e30])
def test_an_outlier_among_many_rows_is_exact(outlier, at_label):
    """Finite logits have finite losses, which are those in float64."""
    z, y, g = large("logits")
    z[:4] = 0
    z[0, 0], z[1, y[1] if at_label else 1] = 28, outlier
    z[0, y[0]], z[2, y[2]], z[3, y[3]] = -70, -outlier, outlier
    loss, dz = loss_and_gradient(z, y, g, "logits")
    want, exact = loss_and_gradient(z.double(), y, g.double(), "logits")
    assert loss.isfinite().all()
    assert ulps(loss, want, want.abs().clamp(min=1)) <= 4
    assert ulps(dz, exact, g.abs().unsqueeze(-1)) <= 4


@pytest.mark.parametrize("exponent", [-115, -60, 60, 100])
@pytest.mark.parametrize("offset", [22.0, -36.0])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_scale_with_the_upstream_gradient(model, offset, exponent):
    """Weights are upstream gradients: a power of two shifts the exponents and nothing else."""
    z, y, g = large(model)
    z = z + offset if model == "logits" else z
    _, dz = loss_and_gradient(z, y, g, model)
    _, scaled = loss_and_gradient(z, y, g * 2.0**exponent, model)
    # Below the least normal number digits are lost, or all of them.
    least = 2.0 ** (-126 - exponent)
    assert ((scaled * 2.0**-exponent - dz).abs() <= 2**-22 * dz.abs() + 2 * least).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("positions", [2, 9])
def test_many_classes_along_another_axis_are_as_exact(model, positions):
    """Adding them up one by one would be off by 11 ulps, and the gradient by 1e-5."""
    classes = 250 if INTERPRETED else 60_000
    z, y, g = rows(classes, model, shape=(1, positions))
    z = z.movedim(-1, 1).contiguous().movedim(1, -1)
    loss, dz = loss_and_gradient(z, y, g, model)
    last, want = loss_and_gradient(z.contiguous(), y, g, model)
    assert ulps(loss, last) <= 1
    # Of each number by itself: both are within 4 ulps, an exponential, a sum, two products.
    assert ulps(dz, want, want.abs()) <= 8


@pytest.mark.parametrize("model", MODELS)
def test_the_precision_of_matrix_products_changes_no_bit(model):
    z, y, g = rows(40, model, shape=(12,))
    results = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        leaf = z.clone().requires_grad_()
        losses = row_losses(leaf, y, MODELS[model])
        results.append((losses.detach(), *torch.autograd.grad(losses, leaf, g)))
    torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_changes_no_bit():
    z, y, g = rows(7, "logits", shape=(10, 3))
    results = []
    for enabled in (False, True):
        leaf = z.clone().requires_grad_()
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=enabled):
            losses = row_losses(leaf, y)
        results.append((losses.detach(), *torch.autograd.grad(losses, leaf, g)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_default_device_or_dtype_changes_nothing():
    z, y, _ = rows(7, "logits", shape=(100, 3))
    y[3] = IGNORED
    want = row_losses(z, y)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = row_losses(z, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, want)


@pytest.mark.parametrize("model", MODELS)
def test_labels_of_rows_that_do_not_count_change_no_bit(model):
    z, y, g = large(model)
    y[::3] = IGNORED
    counted, clip = y != IGNORED, MODELS[model]
    results = []
    for label in (y, y.masked_fill(~counted, 2**62), y.masked_fill(~counted, 0)):
        leaf = z.clone().requires_grad_()
        losses = kernels.row_losses(leaf, label, counted, clip)
        results.append((losses.detach(), *torch.autograd.grad(losses, leaf, g)))
    first, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("few", [1e-7, 1e-4])
def test_second_derivatives_keep_their_digits_where_the_label_is_unlikely(few, model, path):
    """And where it is nearly certain: neither -r / s nor e / s - 1 keeps them for both."""
    if (path, model) == ("small", "logits"):
        pytest.skip("PyTorch's own loss, which small tensors take, does not keep them")
    q = torch.tensor([[few, 0.3, 0.6], [1.0 - few, few / 2, few / 2]])
    z, y = q.log() if model == "logits" else q, torch.tensor([0, 0])
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = z.to(dtype).requires_grad_()
        total = row_losses(leaf, y, MODELS[model]).sum()
        (dz,) = torch.autograd.grad(total, leaf, create_graph=True)
        results += [dz.detach()[:, 0].double()]
        results += [each.double() for each in torch.autograd.grad(dz[:, 0].sum(), leaf)]
    first, second, first_exact, second_exact = results
    # Logits down to -16 have an exponential that is off by as many ulps.
    torch.testing.assert_close(second, second_exact, rtol=4e-6, atol=0)
    if model == "probabilities":
        torch.testing.assert_close(first, first_exact, rtol=1e-6, atol=0)


# Every way to cut six classes into slices, in order.
CUTS = [list(pairwise((0, *inner, 6))) for n in range(6) for inner in combinations(range(1, 6), n)]
# Added to logits: nothing, the same for all, steps that only the last or the first slice survives,
# and minus infinity for whole slices at either end, in the middle, for all but one and for all.
ADDED = torch.tensor([
    [0.0] * 6, [1e4] * 6, [-1e4] * 6, [1e4 * j for j in range(6)], [-1e4 * j for j in range(6)],
    [0, 1e4, -1e4, 1e4, 0, -1e4], [10.0 * j for j in range(6)],
    [-torch.inf] * 3 + [0.0] * 3, [0.0] * 3 + [-torch.inf] * 3,
    [0, 0, -torch.inf, -torch.inf, 0, 0], [-torch.inf] * 5 + [1e4], [-torch.inf] * 6,
], device="cpu")  # fmt: skip


def six_classes(model, labels):
    """Rows of every kind for every label, (kinds, labels, 6), and their labels."""
    z, _, _ = rows(6, "logits", (len(ADDED), len(labels)))
    z = z + ADDED.to(z.device).unsqueeze(1)
    if model == "probabilities":  # among them 0 and 1, and rows of NaN, of which there is no part
        z = z.softmax(-1).nan_to_num(0.25)
    return z, torch.tensor(labels).expand(z.shape[:-1])


def slices(z, y, cut, clip):
    return [aten.summarize(z[..., start:stop], y - start, clip) for start, stop in cut]


def merge(*parts):
    return aten.merge(Summary(*map(torch.stack, zip(*parts, strict=True))))


def both_ways(parts):
    """All slices merged at once, and two at a time, from the first to the last and back."""
    yield merge(*parts)
    yield reduce(merge, parts)
    yield reduce(lambda last, part: merge(part, last), reversed(parts))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: ",".join(str(stop) for _, stop in cut))
def test_slices_of_the_classes_merge_into_the_whole_row(cut, model):
    clip = MODELS[model]
    z, y = six_classes(model, range(6))
    whole = aten.summarize(z.double(), y, clip)
    s, loss = sums(whole, clip), loss_of(whole, clip)
    # In ulps of s, which is 1 and more for logits. A term's exponential and argument are rounded,
    # and the additions of five terms; a merge also rounds an exponential and a product.
    bound = 4 + 1.5 * (len(cut) - 1)
    for found in both_ways(slices(z, y, cut, clip)):
        assert torch.equal(found.m.double(), whole.m)
        assert torch.equal(found.p.double(), whole.p)
        assert ulps(found.r, whole.r, s.nan_to_num(1.0)) <= bound
        # The loss: that of s or s / p, a logarithm, and one more operation.
        error = ulps(loss_of(found, clip), loss, loss.abs().clamp(min=1).nan_to_num())
        assert error <= bound + 2
        assert torch.equal(loss_of(found, clip).isnan(), loss.isnan())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cut", [cut for cut in CUTS if len(cut) == 2], ids=str)
def test_two_slices_merge_in_either_order(cut, model):
    z, y = six_classes(model, range(6))
    a, b = slices(z, y, cut, MODELS[model])
    for one, other in zip(merge(a, b), merge(b, a), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cut", CUTS[::5], ids=str)
def test_a_label_outside_of_all_slices_has_no_p(cut, model):
    """All classes are others then."""
    clip = MODELS[model]
    z, y = six_classes(model, [-1, 6, 2**40, IGNORED])
    wide = z.double()
    m = wide.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    want = (wide - m).exp().sum(-1) if clip is None else wide.clamp(*clip).sum(-1)
    for found in both_ways(slices(z, y, cut, clip)):
        assert (found.p == (-torch.inf if clip is None else 0)).all()
        assert ulps(found.r, want, want.clamp(min=1)) <= 4 + 1.5 * (len(cut) - 1)


@pytest.mark.parametrize("kernels_", SAVING, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_summary_is_what_is_saved(classes, model, kernels_):
    """In shared rows too. Rows that do not count may have any label."""
    clip = MODELS[model]
    z, y, _ = rows(classes, model)
    y[0, 1], y[1, 2], y[2, 0] = -1, classes, IGNORED
    if model == "logits":
        z[1, 1] = -torch.inf
    counted = y != IGNORED
    found = Summary(*kernels_.forward(z, y, counted, clip)[1])
    want = aten.summarize(z.double(), y, clip)
    if clip is not None and found.m.numel() == 0:
        found = found._replace(m=torch.zeros_like(found.r))  # they are known, and not stored
    assert all(part.shape == y.shape and part.dtype == torch.float32 for part in found)
    assert torch.equal(found.m[counted].double(), want.m[counted])
    assert torch.equal(found.p[counted].double(), want.p[counted])
    # An exponential, and at most ten sums over tiles.
    size = sums(want, clip).nan_to_num(1.0)
    assert ulps(found.r[counted], want.r[counted], size[counted]) <= 8
