"""Targets for every class: the rows, the function and the module, `CategoricalCrossentropy`."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from ulps import ulps

from torch_sce import (
    CategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    categorical_crossentropy,
    kernels,
)
from torch_sce.crosscheck.reference import targets_from_logits, targets_from_probabilities
from torch_sce.kernels import aten, row_losses, target_losses
from torch_sce.kernels.contract import SmoothedLabels
from torch_sce.samples import CLIP

MODELS = {"logits": None, "probabilities": CLIP[torch.float32]}
SMOOTHINGS = {"plain": 0.0, "smoothed": 0.1}
# By the CPU's kernels, by those of any device in one block or in many, and by PyTorch's autograd.
PATHS = ("cpu", "any device", "any device, many blocks", "definition")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param != "cpu":
        monkeypatch.setattr(kernels, "kernels_for", lambda z: aten)
    if request.param == "definition":
        monkeypatch.setattr(kernels, "needs_definition", lambda *tensors: True)
    if request.param == "any device, many blocks":
        monkeypatch.setattr(aten, "CPU_BLOCK", 20)
    return request.param


def rows(classes, model, shape=(3, 4), dtype=torch.float32):
    """Predictions, targets that sum to 1 and an upstream gradient."""
    generator = torch.Generator().manual_seed(classes)
    z, t = (torch.randn(*shape, classes, generator=generator) * 2 for _ in range(2))
    z = z if MODELS[model] is None else z.softmax(-1)
    g = torch.randn(shape, generator=generator)
    return z.to(dtype), t.softmax(-1).to(dtype), g.to(dtype)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", [1, 2, 7, 300])
def test_rows_equal_the_oracle(classes, model, smoothing, path):
    z, t, g = rows(classes, model)
    t[1] = torch.eye(classes)[torch.randint(0, classes, (4,))]
    t[2, 1:] *= 3
    z.requires_grad_()
    t.requires_grad_()
    loss = target_losses(z, t, None, MODELS[model], SMOOTHINGS[smoothing])
    loss.backward(g)
    rule = targets_from_logits if model == "logits" else targets_from_probabilities
    exact_z, exact_t = (x.detach().double().numpy() for x in (z, t))
    right = rule(exact_z, exact_t, SMOOTHINGS[smoothing] or 0)
    dz, dt = np.where(right.clipped, 0, right.gradient), right.target_gradient
    want, g = right.loss, g.numpy()[..., None]
    assert ulps(loss, want, np.maximum(np.abs(want), 1)) <= 8
    # A gradient is a difference of T p_j and t_j, or for probabilities of these over q_j.
    assert z.grad is not None and t.grad is not None and dt is not None
    size = np.abs(g) * np.maximum(np.abs(dz).max(-1, keepdims=True), 1)
    assert ulps(z.grad, g * dz, size) <= 8
    assert ulps(t.grad, g * dt, np.abs(g) * np.maximum(np.abs(dt), 1)) <= 8


@pytest.mark.parametrize("model", MODELS)
def test_derivatives_match_finite_differences(model, path):
    z, t, _ = rows(5, model, (2, 3), torch.float64)
    z.requires_grad_()
    t.requires_grad_()
    counted = torch.tensor([[True, False, True], [True, True, True]])
    clip = None if model == "logits" else CLIP[torch.float64]

    def losses(z, t):
        return target_losses(z, t, counted, clip, 0.1)

    assert gradcheck(losses, (z, t), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(losses, (z, t))


@pytest.mark.parametrize("compiled", [False, True])
def test_both_bounds_are_inclusive_in_the_gradient(compiled, path):
    low, high = clip = MODELS["probabilities"]
    call = target_losses
    if compiled:
        torch.compiler.reset()
        call = torch.compile(target_losses, fullgraph=True)
    q = torch.tensor([[low, high], [low / 2, 1 - low / 2]], requires_grad=True)
    assert (q.sum(-1) == 1).all()  # so nothing is rounded away from a bound
    call(q, torch.full((2, 2), 0.5), None, clip).sum().backward()
    want = torch.tensor([[1 - 0.5 / low, 1 - 0.5 / high], [0, 0]])
    torch.testing.assert_close(q.grad, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_functional_transforms_agree_with_autograd(model):
    z, t, g = rows(5, model, (4,), torch.float64)
    clip = MODELS[model]

    def total(z, t, g):
        return target_losses(z, t, None, clip) * g

    each = torch.func.vmap(torch.func.grad(total))(z, t, g)
    leaf = z.clone().requires_grad_()
    target_losses(leaf, t, None, clip).backward(g)
    torch.testing.assert_close(each, leaf.grad)


@pytest.mark.parametrize("model", MODELS)
def test_rows_that_do_not_count_may_hold_anything(model, path):
    z, t, g = rows(7, model)
    z[1, 2], t[0, 1], t[2, 2], g[0, 1] = torch.nan, torch.inf, torch.nan, torch.nan
    counted = torch.ones(3, 4, dtype=torch.bool)
    counted[1, 2] = counted[0, 1] = counted[2, 2] = False
    z.requires_grad_()
    t.requires_grad_()
    loss = target_losses(z, t, counted, MODELS[model], 0.1)
    dz, dt = torch.autograd.grad(loss, (z, t), g)
    for part in (loss, dz, dt):
        assert part.isfinite().all() and (part[~counted] == 0).all() and (part[counted] != 0).any()


def test_layouts_are_walked_without_a_difference(path):
    z, t, g = rows(6, "logits", (3, 4, 5))
    want = target_losses(z, t)
    for order in ((3, 0, 1, 2), (0, 3, 1, 2), (2, 3, 1, 0)):
        back = [order.index(axis) for axis in range(4)]
        moved = z.permute(order).contiguous().permute(back).requires_grad_()
        got = target_losses(moved, t)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        (dz,) = torch.autograd.grad(got, moved, g)
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(target_losses(leaf, t), leaf, g)
        torch.testing.assert_close(dz, expected, rtol=1e-5, atol=1e-6)
        assert path == "definition" or dz.stride() == moved.stride()
    crop = z[:, 1:, :2]
    assert torch.equal(target_losses(crop, t[:, 1:, :2]), target_losses(crop.clone(), t[:, 1:, :2]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16,
                                   torch.bfloat16, torch.float64])  # fmt: skip
def test_targets_may_have_any_real_dtype(dtype, path):
    z, y = torch.randn(6, 5), torch.randint(0, 5, (6,))
    hot = torch.eye(5)[y]
    want = categorical_crossentropy(hot, z, True, 0.1)
    t = hot.to(dtype)
    if t.is_floating_point():
        t.requires_grad_()
    got = categorical_crossentropy(t, z, True, 0.1)
    torch.testing.assert_close(got, want)
    assert got.dtype == torch.float32
    if t.is_floating_point():
        got.sum().backward()
        assert t.grad is not None and t.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("from_logits", [True, False])
def test_halves_are_computed_in_float32(dtype, from_logits, path):
    z, t, _ = rows(9, "logits" if from_logits else "probabilities")
    z = z.to(dtype).requires_grad_()
    loss = CategoricalCrossentropy(from_logits)
    value = loss(t, z)
    value.backward()
    wide = z.detach().float().requires_grad_()
    loss(t, wide).backward()
    assert value.dtype == torch.float32 and z.grad is not None and wide.grad is not None
    assert z.grad.dtype == dtype
    torch.testing.assert_close(z.grad, wide.grad.to(dtype))
    assert torch.equal(value, loss(t, wide))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("classes", [1, 2, 7, 300])
def test_smoothed_labels_have_the_bits_of_one_hot_targets(classes, model, dtype, smoothing, path):
    """The definition, which makes no targets, is within a few roundings."""
    z, _, g = rows(classes, model, dtype=dtype)
    y, g = torch.randint(0, classes, (3, 4)), g.to(aten.row_dtype(z))
    counted = torch.ones(3, 4, dtype=torch.bool)
    counted[1, 2], y[1, 2], z[1, 2] = False, -1, torch.nan
    hot = torch.nn.functional.one_hot(y.clamp(0), classes)
    clip = None if model == "logits" else CLIP[dtype]
    found = []
    for losses in (
        lambda z: row_losses(z, y, counted, clip, smoothing),
        lambda z: target_losses(z, hot, counted, clip, smoothing),
    ):
        leaf = z.clone().requires_grad_()
        loss = losses(leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf, g)))
    (loss, dz), (want, want_dz) = found
    assert not loss.signbit().any() and loss[1, 2] == 0 and (dz[1, 2] == 0).all()
    if path == "definition":
        torch.testing.assert_close(loss, want, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(dz, want_dz)
    else:
        assert torch.equal(loss, want) and torch.equal(dz, want_dz)


@pytest.mark.parametrize("model", MODELS)
def test_derivatives_of_smoothed_labels_match_finite_differences(model, path):
    z, *_ = rows(5, model, (2, 3), torch.float64)
    z[0, 1] = torch.nan
    y, counted = torch.tensor([[0, -1, 4], [2, 1, 0]]), torch.ones(2, 3, dtype=torch.bool)
    counted[0, 1] = False
    z.requires_grad_()
    clip = None if model == "logits" else CLIP[torch.float64]

    def losses(z):
        z = torch.where(counted.unsqueeze(-1), z, torch.nan)
        return row_losses(z, y, counted, clip, 0.1)

    z = z.detach().nan_to_num(0.5).requires_grad_()
    assert gradcheck(losses, z, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(losses, z)


@pytest.mark.parametrize("model", MODELS)
def test_a_smoothed_label_that_is_no_class_poisons_its_row_and_no_other(model, path):
    z, _, g = rows(7, model)
    y = torch.zeros(3, 4, dtype=torch.int64)
    y[0, 1], y[1, 2], y[2, 3] = 7, -1, 2**62
    z.requires_grad_()
    loss = row_losses(z, y, None, MODELS[model], 0.1)
    (dz,) = torch.autograd.grad(loss, z, g)
    assert torch.equal(loss.isnan(), y != 0)
    assert torch.equal(dz.isnan().all(-1), y != 0) and torch.equal(dz.isnan().any(-1), y != 0)


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothed_labels_and_minus_infinity(smoothing, path):
    """The loss is infinite, the gradient is not: as with one-hot targets."""
    z = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 2.0, -torch.inf], [-torch.inf] * 3])
    z, y = z.requires_grad_(), torch.tensor([0, 2, 1])
    want = target_losses(z, torch.eye(3)[y], None, None, smoothing)
    loss = row_losses(z, y, None, None, smoothing)
    assert loss[:2].tolist() == [torch.inf] * 2 and loss[2].isnan()
    (dz,), (want_dz,) = (torch.autograd.grad(x.sum(), z) for x in (loss, want))
    assert dz[:2].isfinite().all()
    torch.testing.assert_close(dz, want_dz, equal_nan=True)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_smoothed_labels_may_be_written_over_their_predictions(model, path):
    if path == "definition":
        pytest.skip("it writes nothing")
    for dtype, classes in product((torch.float32, torch.float64, torch.bfloat16), (7, 300)):
        z, *_ = rows(classes, model, (6,), dtype)
        y, counted = torch.arange(6), torch.arange(6) != 2
        given = (y, counted, None if model == "logits" else CLIP[dtype])
        # Those of any device add up a copy of the rows, in another order if it has other strides.
        for z in (z, z.t().contiguous().t()) if path == "cpu" else (z,):  # noqa: B020
            module = SmoothedLabels(kernels.target_kernels(z, y), 0.1)
            g = torch.randn(6, dtype=aten.row_dtype(z))
            _, saved = module.forward(z, *given)
            want = module.backward(g, z, *given, saved)
            over = torch.empty_strided(z.shape, z.stride(), dtype=dtype).copy_(z)
            assert module.backward(g, over, *given, saved, over) is over
            assert torch.equal(over, want) and not want.isnan().any()


@pytest.mark.parametrize("model", MODELS)
def test_functional_transforms_of_smoothed_labels_agree_with_autograd(model):
    z, _, g = rows(5, model, (4,), torch.float64)
    y, clip = torch.tensor([0, 4, 2, 2]), MODELS[model]

    def total(z, y, g):
        return row_losses(z, y, None, clip, 0.1) * g

    each = torch.func.vmap(torch.func.grad(total))(z, y, g)
    leaf = z.clone().requires_grad_()
    total(leaf, y, g).sum().backward()
    torch.testing.assert_close(each, leaf.grad)


def test_one_hot_logits_are_the_sparse_loss():
    z, y = torch.randn(4, 5, 6), torch.randint(0, 6, (4, 5))
    weight = torch.rand(4, 1)
    for reduction in ("sum", "mean", "mean_with_sample_weight", "none"):
        dense = CategoricalCrossentropy(True, reduction=reduction)
        sparse = SparseCategoricalCrossentropy(True, reduction=reduction)
        got = dense(torch.eye(6)[y], z, weight, mask=y != 0)
        torch.testing.assert_close(got, sparse(y, z, weight, mask=y != 0))


def test_a_sum_of_many_smoothed_targets_stays_exact():
    """PyTorch's cross_entropy loses the sum of 100,000 small targets: 1e-4 of the gradient."""
    z, hot = torch.randn(1, 100_000) * 20, torch.zeros(1, 100_000)
    hot[0, 7] = 1
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = z.clone().to(dtype).requires_grad_()
        categorical_crossentropy(hot, leaf, True, 0.1).backward()
        gradients.append(leaf.grad)
    assert ulps(gradients[0], gradients[1], np.ones(z.shape)) <= 8


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("from_logits", [True, False])
def test_the_class_axis_may_be_anywhere(axis, from_logits):
    z, t, _ = rows(7, "logits" if from_logits else "probabilities", (3, 4))
    want = categorical_crossentropy(t, z, from_logits, 0.2)
    got = categorical_crossentropy(t.movedim(-1, axis), z.movedim(-1, axis), from_logits, 0.2, axis)
    torch.testing.assert_close(got, want)


def test_the_examples_of_keras_s_documentation():
    y_true, y_pred = [[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]
    loss = CategoricalCrossentropy()
    assert loss(y_true, y_pred).item() == pytest.approx(1.177, abs=5e-4)
    weighted = loss(y_true, y_pred, sample_weight=[0.3, 0.7])
    assert weighted.item() == pytest.approx(0.814, abs=5e-4)
    each = CategoricalCrossentropy(reduction=None)(y_true, y_pred)
    assert each.tolist() == pytest.approx([0.0513, 2.303], abs=5e-4)
    smooth = CategoricalCrossentropy(True, 0.1)([[1, 0, 0]], [[100.0, -100.0, -100.0]])
    assert smooth.item() == pytest.approx(400 * 0.1 / 3)


def test_the_signature_is_keras_s_and_a_config_round_trips():
    loss = CategoricalCrossentropy(True, 0.2, 1, "sum", "mine", "float64")
    config = {"from_logits": True, "label_smoothing": 0.2, "axis": 1, "reduction": "sum",
              "name": "mine", "dtype": "float64"}  # fmt: skip
    assert loss.get_config() == config
    serialized = {"class_name": "CategoricalCrossentropy", "config": config}
    for given in (config, serialized):
        again = CategoricalCrossentropy.from_config(given)
        assert again.get_config() == config and repr(again) == repr(loss)
    assert repr(loss) == (
        "CategoricalCrossentropy(from_logits=True, label_smoothing=0.2, reduction='sum', axis=1, "
        "name='mine', dtype='float64')"
    )
    with pytest.raises(ValueError, match=r"must be that of a SparseCat.* of a CategoricalCross"):
        SparseCategoricalCrossentropy.from_config(serialized)


def test_it_lives_in_pytorch_like_any_module():
    loss = CategoricalCrossentropy(True, 0.1)
    z, t = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 1]]
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.half()):
        assert torch.equal(again(t, z), loss(t, z))
    assert not loss.state_dict()
    assert torch.equal(loss.as_criterion()(z, t), loss(t, z))
    assert loss(t.to("meta"), z.to("meta")).shape == ()
    with FakeTensorMode():
        leaf = torch.empty(3, 100, requires_grad=True)
        loss(torch.empty(3, 100), leaf).backward()
    assert leaf.grad is not None and leaf.grad.shape == (3, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(t, z.bfloat16()), loss(t, z.bfloat16().float()))


@pytest.mark.parametrize("from_logits", [True, False])
def test_it_compiles_to_a_full_graph(from_logits):
    torch.compiler.reset()
    z, t, _ = rows(6, "logits" if from_logits else "probabilities")
    weight, mask = torch.rand(3, 1), torch.rand(3, 4) < 0.7
    z, t = z.movedim(-1, 1), t.movedim(-1, 1)
    loss = CategoricalCrossentropy(from_logits, 0.1, axis=1)
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (t, z)]
        value = call(*leaves, sample_weight=weight, mask=mask)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-6)
    function = torch.compile(categorical_crossentropy, fullgraph=True)
    torch.testing.assert_close(
        function(t, z, from_logits, axis=1), categorical_crossentropy(t, z, from_logits, axis=1)
    )


Z = torch.zeros
ERRORS = [
    ((Z(4), Z(4, 3)), {}, ValueError,
     r"y_pred's shape, \(4, 3\), a target for every class, got \(4,\). If y_true holds class "
     r"numbers, use SparseCategoricalCrossentropy, or pass torch.nn.functional.one_hot"),
    ((Z(4, 1), Z(4, 3)), {}, ValueError, r"one_hot\(y_true.squeeze\(1\), 3\)$"),
    ((Z(2, 5), Z(2, 3, 5)), {"axis": 1}, ValueError, r"one_hot\(y_true, 3\).movedim\(-1, 1\)$"),
    ((Z(4, 2), Z(4, 3)), {}, ValueError, r"got \(4, 2\)$"),
    ((Z(1, 3), Z(4, 3)), {}, ValueError, r"got \(1, 3\)$"),
    ((Z(4, 3), Z(4, 3)), {"axis": 2}, ValueError, r"axis must be in \[-2, 2\)"),
    ((Z(4, 0), Z(4, 0)), {}, ValueError, "at least one class"),
    ((Z(()), Z(())), {}, ValueError, "must have a class axis, got a scalar"),
    ((Z(4, 3), Z(4, 3)), {"label_smoothing": 1.5}, ValueError, r"in \[0, 1\], got 1.5"),
    ((Z(4, 3), Z(4, 3)), {"label_smoothing": np.nan}, ValueError, r"in \[0, 1\], got nan"),
    ((Z(4, 3), Z(4, 3)), {"label_smoothing": "0.1"}, TypeError, r"number in \[0, 1\], got '0.1'"),
    ((Z(4, 3), Z(4, 3)), {"label_smoothing": True}, TypeError, r"number in \[0, 1\], got True"),
    ((Z(4, 3), Z(4, 3)), {"from_logits": "yes"}, TypeError, "from_logits must be True or False"),
    ((Z(4, 3), Z(4, 3)), {"axis": True}, TypeError, "axis must be an integer, got True"),
    ((["a"], Z(1, 3)), {}, TypeError, "y_true must hold numbers"),
    ((Z(4, 3, dtype=torch.complex64), Z(4, 3)), {}, TypeError, "y_true must hold real numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_wrong_input_is_named_with_its_rule_and_value(arguments, options, error, message):
    with pytest.raises(error, match=message):
        categorical_crossentropy(*arguments, **options)
    with pytest.raises(error, match=message):
        CategoricalCrossentropy(**options)(*arguments)
