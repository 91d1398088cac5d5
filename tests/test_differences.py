"""Each row in which we differ from tf.keras on purpose: what Keras does, and what we do."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_against_keras import fitted

from torch_sce import (
    CategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    categorical_accuracy,
    metrics,
    sparse_categorical_accuracy,
    sparse_categorical_crossentropy,
    sparse_top_k_categorical_accuracy,
)

Y = np.array([0, 2, 1])
P = np.array([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.05, 0.85, 0.1]], np.float32)
Z = np.array([[8, 1, 1], [0, 9, 1], [2, 3, 5]], np.float32)
Loss = SparseCategoricalCrossentropy

KERAS = """
import json, os, sys, warnings
import numpy as np, tensorflow as tf
losses = tf.keras.losses
loss = losses.SparseCategoricalCrossentropy
facts = {}
if os.environ["TF_USE_LEGACY_KERAS"] == "0":
    y, p = [0], [[0.5, 0.5]]
    try:
        loss()(y, p)
    except Exception as error:
        facts["lists"] = type(error).__name__
    made = loss(from_logits=True, ignore_class=-1, reduction="sum", axis=1, dtype="float64")
    z = tf.constant([[50.0, 0.0, -50.0]])
    facts["through softmax"] = float(loss()(np.array([2]), tf.keras.layers.Softmax()(z)))
    model = tf.keras.Sequential([tf.keras.layers.Softmax()])
    facts["in a training loop"] = float(loss()(np.array([2]), model(z)))
    facts["of predict"] = float(loss()(np.array([2]), model.predict(z, verbose=0)))
    facts["with ignore_class"] = float(loss(ignore_class=-1)(np.array([2]), model(z)))
    half = tf.keras.layers.Softmax(dtype="float16")(z)
    facts["in another dtype"] = float(loss()(np.array([2]), half))
    facts["of probabilities"] = float(loss()(np.array([2]), tf.nn.softmax(z)))
    metric = tf.keras.metrics.SparseCategoricalAccuracy()
    metric.update_state([0], [[1.0, 0.0]], sample_weight=[2.0**24])
    metric.update_state([0], [[1.0, 0.0]])
    facts["count past 2^24"] = float(metric.count)
    rounds = tf.keras.metrics.sparse_categorical_accuracy
    found = rounds(np.array([257]), tf.cast(np.eye(300)[[256]], "bfloat16"))
    facts["bfloat16 label 257 is class 256"] = float(found[0])
    facts["of logits"] = float(loss(from_logits=True)(np.array([2]), z))
    metric = tf.keras.metrics.SparseCategoricalCrossentropy(dtype="int32")
    metric.update_state(np.zeros(3, int), np.array([[0.2, 0.8], [0.2, 0.8], [0.4, 0.6]], "f"))
    facts["losses 1.61, 1.61 and 0.92 in int32"] = float(metric.result())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses.CategoricalCrossentropy()(np.ones((3, 1), "f"), np.ones((3, 1), "f"))
    facts["of one class"] = [each.category.__name__ for each in caught]
    mask = tf.constant([0.0, 1.0])
    for reduction in ("sum", "mean_with_sample_weight"):
        with tf.GradientTape() as tape:
            tape.watch(mask)
            q = tf.constant([[0.5, 0.5], [0.2, 0.8]])
            q._keras_mask = mask
            value = loss(reduction=reduction)(np.array([0, 0]), q, sample_weight=[2.0, 3.0])
        facts["mask, " + reduction] = tape.gradient(value, mask).numpy().tolist()
else:
    made = loss(from_logits=True, ignore_class=-1)
facts["config"] = made.get_config()
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tensorflow):
    """Things that only a Keras object can tell, from both generations."""
    found = {}
    for name, legacy in (("keras 3", "0"), ("keras 2", "1")):
        environment = {
            "PATH": "/usr/bin:/bin",
            "TF_USE_LEGACY_KERAS": legacy,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        done = subprocess.run(
            [sys.executable, "-c", KERAS], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def value(y_true, y_pred, sample_weight=None, mask=None, **options) -> float:
    return Loss(**options)(y_true, y_pred, sample_weight, mask).item()


def test_lists_are_arrays(facts):
    assert facts["keras 3"]["lists"] == "ValueError"
    assert value(Y.tolist(), P.tolist()) == value(Y, P)


def test_auto_is_the_mean_over_the_batch(ask):
    assert ask(Y, P, reduction="auto").error == "ValueError"
    assert value(Y, P, reduction="auto") == value(Y, P)


@pytest.mark.parametrize("axis", [0, 1, -2, -3])
def test_any_class_axis_works(ask, axis):
    p = np.random.default_rng(0).dirichlet([1, 1, 1], (4, 5)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 3, (4, 5))
    moved = np.ascontiguousarray(np.moveaxis(p, -1, axis))
    assert ask(y, moved, axis=axis).error == "ValueError"
    assert value(y, moved, axis=axis) == value(y, p) == pytest.approx(float(ask(y, p).value))


@pytest.mark.parametrize(("dtype", "label"), [("float16", 2049), ("bfloat16", 257)])
def test_labels_are_never_rounded_to_the_loss_s_dtype(ask, dtype, label):
    z = np.zeros((1, 5000), np.float32)
    z[0, label] = 3
    exact = value([label], z, from_logits=True)
    rounded = ask(np.array([label]), z, from_logits=True, dtype=dtype)
    assert rounded.value == pytest.approx(exact + 3, abs=0.05)
    assert value([label], z, from_logits=True, dtype=dtype) == pytest.approx(exact, abs=0.05)
    # An ignored class is compared exactly too.
    ignored = ask(np.array([label - 1]), z, from_logits=True, dtype=dtype, ignore_class=label)
    assert ignored.value == 0
    assert value([label - 1], z, from_logits=True, dtype=dtype, ignore_class=label) > 8
    # float32 cannot hold this label either, and makes it 3.
    almost = np.array([2.9999999999])
    assert ask(almost, Z[:1]).error == "InvalidArgumentError"
    assert value(almost, Z[:1], from_logits=True) == value([2], Z[:1], from_logits=True)


def test_sums_in_half_precision_do_not_overflow(ask):
    y, z = np.zeros(10_000, np.int64), np.tile(np.array([0, 7], np.float32), (10_000, 1))
    options = {"from_logits": True, "dtype": "float16"}
    assert np.isinf(ask(y, z, **options).value)
    assert value(y, z, **options) == pytest.approx(7.0, abs=4e-3)
    # Nor does the reciprocal of a small probability on its way to the gradient.
    p = np.array([[1.2e-7, 0.9]])
    assert np.isinf(ask([1], p, dtype="float16").gradient).any()
    leaf = torch.tensor(p, requires_grad=True)
    Loss(dtype="float16")([1], leaf).backward()
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, [[1 / 0.9, 0]], atol=2e-3)


def test_the_function_computes_halves_in_float32(ask):
    p = P.astype(np.float16)
    answer = ask(Y, p, form="function")
    losses = sparse_categorical_crossentropy(Y, p)
    assert answer.value_dtype == "float16" and losses.dtype == torch.float32
    np.testing.assert_allclose(losses, answer.value, rtol=2e-3)


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
def test_a_weight_that_would_enlarge_the_loss_is_refused(ask, argument):
    given = np.ones((3, 3), np.float32)
    assert ask(Y, P, reduction="none", **{argument: given}).value.shape == (3, 3)
    with pytest.raises(ValueError, match=rf"{argument} must broadcast .* \(3,\), got \(3, 3\)"):
        value(Y, P, **{argument: given})


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
def test_a_weight_with_a_trailing_1_keeps_the_losses_shape(ask, argument):
    given = np.array([[1], [0], [1]], np.float32)
    answer = ask(Y, P, reduction="none", **{argument: given})
    losses = Loss(reduction="none")(Y, P, **{argument: given})
    assert answer.value.shape == (3, 1) and losses.shape == (3,)
    np.testing.assert_allclose(losses, answer.value[:, 0], rtol=1e-6)


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
@pytest.mark.parametrize("reduction", ["none", None])
def test_a_scalar_weight_of_one_position_keeps_the_losses_shape(ask, argument, reduction):
    answer = ask(Y[:1], P[:1], reduction=reduction, **{argument: np.float32(2)})
    losses = Loss(reduction=reduction)(Y[:1], P[:1], **{argument: 2.0})
    assert answer.value.shape == () and losses.shape == (1,)
    np.testing.assert_allclose(losses[0], answer.value, rtol=1e-6)


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
def test_a_weight_per_sample_does_not_meet_the_time_axis(ask, argument):
    rng = np.random.default_rng(0)
    square, y = rng.dirichlet([1, 1, 1], (4, 4)).astype(np.float32), rng.integers(0, 3, (4, 4))
    given = np.array([1, 0, 0, 0], np.float32)
    each = Loss(reduction="none")(y, square).numpy()
    along_time = ask(y, square, reduction="none", **{argument: given}).value
    np.testing.assert_allclose(along_time[:, 0], each[:, 0], rtol=1e-5)
    assert (along_time[:, 1:] == 0).all()
    with pytest.raises(ValueError, match=rf"pass {argument}\[:, None\]"):
        value(y, square, **{argument: given})
    assert ask(y[:, :3], square[:, :3], **{argument: given}).error == "InvalidArgumentError"
    per_position = Loss(reduction="none")(y, square, **{argument: given[:, None]})
    np.testing.assert_array_equal(per_position[1:], 0)


def test_what_is_masked_does_not_matter(ask):
    p, y, mask = P.copy(), Y.copy(), np.array([True, False, True])
    p[1] = np.nan
    assert np.isnan(ask(y, p, mask=mask).value)
    leaf = torch.tensor(p, requires_grad=True)
    loss = Loss()(y, leaf, mask=mask)
    loss.backward()
    assert loss.item() == value(Y[mask], P[mask])
    assert leaf.grad is not None and (leaf.grad[1] == 0).all() and leaf.grad.isfinite().all()
    y[1] = -100
    assert ask(y, P, mask=mask).error == "InvalidArgumentError"
    assert value(y, P, None, mask) == value(Y[mask], P[mask])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_with_sample_weight"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_weight_under_a_zero_mask_does_not_matter(ask, odd, reduction):
    weight, mask = np.array([2, odd, 3], np.float32), np.array([1, 0, 0.5], np.float32)
    ignored = np.array([0, -1, 1])
    for y, given, ignore in ((Y, mask, None), (ignored, None, -1)):
        options: dict = {"reduction": reduction, "from_logits": True, "ignore_class": ignore}
        assert np.isnan(ask(y, Z, weight, given, **options).value).any()
        found = []
        for w in (weight, np.array([2, 1, 3], np.float32)):
            leaves = [torch.tensor(x, requires_grad=True) for x in (Z, w, mask)]
            shown = None if given is None else leaves[2]
            Loss(**options)(y, leaves[0], leaves[1], shown).sum().backward()
            found.append([leaf.grad for leaf in leaves[: 2 + (given is not None)]])
            found[-1].append(Loss(**options)(y, Z, w, given))
        assert all(part.isfinite().all() for part in found[0])
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][-1], found[1][-1])
        assert (found[0][0][1] == 0).all() and found[0][1][1] == 0


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["SparseCategoricalCrossentropy", "SparseCategoricalAccuracy"])
def test_a_weight_of_a_metric_under_a_zero_mask_does_not_matter(ask, name, odd):
    weight, mask = np.array([2, odd, 3], np.float32), np.array([True, False, True])
    assert np.isnan(ask(Y, P, weight, mask, form="metric", name=name).value)
    found = []
    for w in (weight, np.array([2, 1, 3], np.float32)):
        metric = getattr(metrics, name)()
        metric.update_state(Y, P, w, mask)
        found.append(metric.result().item())
    assert found[0] == found[1] and np.isfinite(found[0])
    if "Cross" in name:
        y = np.array([0, -1, 1])
        assert np.isnan(ask(y, P, weight, form="metric", name=name, ignore_class=-1).value)
        metric = metrics.SparseCategoricalCrossentropy(ignore_class=-1)
        metric.update_state(y, P, weight)
        assert metric.result().isfinite()


def test_the_gradient_with_respect_to_a_mask_has_no_loss_that_is_not_computed(facts):
    y, q, w = [0, 0], torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([2.0, 3.0])
    each = Loss(reduction="none")(y, q)
    for reduction, missing in (("sum", 2 * each[0]), ("mean_with_sample_weight", 2 / 3 * each[0])):
        mask = torch.tensor([0.0, 1.0], requires_grad=True)
        loss = Loss(reduction=reduction)  # pyright: ignore
        loss(y, q, w, mask).backward()
        theirs = facts["keras 3"][f"mask, {reduction}"]
        assert mask.grad is not None
        want = mask.grad + torch.stack([missing, torch.zeros(())])
        np.testing.assert_allclose(theirs, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("copies", [1, 2**16])
def test_an_infinite_weight_gives_an_infinite_loss_and_no_gradient_to_use(ask, from_logits, copies):
    p = Z if from_logits else P
    weight = np.array([np.inf, 1, 2], np.float32)
    answer = ask(Y, p, weight, from_logits=from_logits, reduction="sum")
    assert answer.value == np.inf and answer.gradient[0].tolist() == [-np.inf, np.inf, np.inf]
    y_pred = torch.tensor(np.tile(p, (copies, 1)), requires_grad=True)
    value = Loss(from_logits=from_logits, reduction="sum")(
        np.tile(Y, copies), y_pred, np.tile(weight, copies)
    )
    value.backward()
    assert value == np.inf and y_pred.grad is not None
    infinite = torch.tensor(np.tile(np.isinf(weight), copies))
    assert not y_pred.grad[infinite].isfinite().any()
    np.testing.assert_allclose(y_pred.grad[1:3], answer.gradient[1:3], rtol=1e-5)
    assert y_pred.grad[~infinite].isfinite().all()


def test_a_mask_is_matched_to_the_losses_alone(ask):
    z = np.stack([Z, Z[::-1]])
    y = np.array([[0, 2, -1], [1, 0, 2]])
    mask = np.array([[1, 0, 1], [1, 1, 0]], np.int32)
    options = {"from_logits": True, "ignore_class": -1}
    want = float(ask(y, z, mask=mask.astype(bool), **options).value)
    for odd in (mask, mask.astype(bool)[..., None]):
        assert ask(y, z, mask=odd, **options).error == "InvalidArgumentError"
        assert value(y, z, None, odd, **options) == pytest.approx(want)


def test_labels_that_lead_with_1_are_refused(ask):
    y = Y[None]
    assert ask(y, P, ignore_class=-1).error is None
    assert ask(y, P).error == "ValueError"
    for ignored in (None, -1):
        with pytest.raises(ValueError, match=r"\(3,\), got \(1, 3\)"):
            value(y, P, ignore_class=ignored)


def test_two_trailing_ones_are_dropped_by_the_function_too(ask):
    z, y = np.stack([Z, Z]), np.stack([Y, Y])[..., None, None]
    assert ask(y, z, form="function", from_logits=True).error == "ValueError"
    want = ask(y, z, from_logits=True, reduction="none").value
    got = sparse_categorical_crossentropy(y, z, True)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2**-23)  # tf.keras rounds 1 + r


def test_one_class_is_no_exception(ask):
    y, p = np.zeros((2, 3), np.int64), np.ones((2, 3, 1), np.float32)
    assert ask(y, p).error == "ValueError"
    assert torch.equal(Loss(reduction="none")(y, p), torch.zeros(2, 3))
    flat = np.array([0.5, 0.2, 0.3], np.float32)
    assert ask(np.array([[0], [1], [0]]) * 0, flat).value == 0
    with pytest.raises(ValueError, match=r"y_true must .* got \(3, 1\)"):
        value(np.zeros((3, 1), np.int64), flat)


@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_with_sample_weight"])
def test_the_loss_of_no_samples_is_a_scalar_zero(ask, reduction):
    y, p = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
    assert ask(y, p, reduction=reduction).value.shape == (0,)
    leaf = torch.tensor(p, requires_grad=True)
    loss = Loss(reduction=reduction)(y, leaf)
    loss.backward()
    assert loss.shape == () and loss.item() == 0 and leaf.grad is not None
    assert Loss(reduction="none")(y, p).shape == (0,)


@pytest.mark.parametrize("label", [3, -1, -100, 255])
def test_a_label_outside_the_classes_raises_on_the_cpu(ask, label):
    y = np.array([0, label, 1])
    assert ask(y, P).error == "InvalidArgumentError"
    with pytest.raises(ValueError, match=rf"\[0, 3\).* got {label} at position \(1,\)"):
        value(y, P)


def test_a_label_outside_the_classes_is_nan_where_labels_are_not_read():
    """The rule of devices, by the paths that run without one: a compiled loss reads no labels."""
    leaf = torch.tensor(Z, requires_grad=True)
    loss = torch.compile(Loss(True, reduction="none"), fullgraph=True, backend="aot_eager")
    losses = loss(torch.tensor([0, 7, 1]), leaf)
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert leaf.grad is not None
    assert leaf.grad.isnan().any(1).tolist() == [False, True, False]


DENSE = {"name": "CategoricalCrossentropy"}
HOT = np.eye(3, dtype=np.float32)[Y]


def test_targets_that_do_not_sum_to_1_get_the_derivative_of_the_loss(ask):
    t = np.array([[2, 3, 5], [0, 0, 0], [0.2, 0.5, 0.3]], np.float32)
    answer = ask(t, Z, from_logits=True, reduction="sum", **DENSE)
    leaf = torch.tensor(Z, requires_grad=True)
    value = CategoricalCrossentropy(from_logits=True, reduction="sum")(t, leaf)
    value.backward()
    p = leaf.detach().softmax(-1).numpy()
    assert value.item() == pytest.approx(float(answer.value))
    np.testing.assert_allclose(answer.gradient, p - t, rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad, t.sum(1, keepdims=True) * p - t, rtol=1e-5, atol=1e-6)


def test_smoothing_follows_the_class_axis(ask):
    t = np.eye(3, dtype=np.float32)[[[0, 1], [2, 2]]]  # (2, 2, 3)
    q = np.random.default_rng(0).dirichlet([1, 1, 1], (2, 2)).astype(np.float32)
    last = ask(t, q, label_smoothing=0.1, **DENSE)
    moved = [np.ascontiguousarray(np.moveaxis(x, -1, 1)) for x in (t, q)]  # (2, 3, 2)
    theirs = ask(*moved, label_smoothing=0.1, axis=1, **DENSE)
    ours = CategoricalCrossentropy(label_smoothing=0.1, axis=1)(*moved).item()
    assert ours == pytest.approx(float(last.value))
    assert float(theirs.value) - ours > 0.05  # 0.1 / 2 for each class, not 0.1 / 3


@pytest.mark.parametrize("smoothing", [1.5, -0.1])
def test_smoothing_out_of_range_is_refused(ask, smoothing):
    assert ask(HOT, P, label_smoothing=smoothing, **DENSE).error is None
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
        CategoricalCrossentropy(label_smoothing=smoothing)


@pytest.mark.usefixtures("tensorflow")
def test_class_weights_are_those_of_each_position_s_label():
    """Keras's `fit` looks for the largest label along the time, and broadcasts what it finds."""
    z = np.random.default_rng(0).standard_normal((3, 3, 3)).astype(np.float32)
    y = np.array([[0, 1, 2], [2, 2, 0], [1, 0, 0]])
    weights = {0: 1.0, 1: 5.0, 2: 10.0}
    name, mean = "SparseCategoricalCrossentropy", "sum_over_batch_size"
    dense = ("CategoricalCrossentropy", np.eye(3)[y], z, weights, mean)
    square, other, hot, extra = fitted(
        (name, y, z, weights, mean), (name, y[:2], z[:2], weights, mean), dense,
        (name, y[0], z[0], {**weights, 3: 2.0}, mean),
    )  # fmt: skip
    assert other == "ValueError" or other == "InvalidArgumentError"
    assert hot == "TypeError" and isinstance(extra, list)
    table = np.array([1.0, 5.0, 10.0], np.float32)
    loss = Loss(True, class_weight=weights)
    assert loss(y, z).item() == pytest.approx(Loss(True)(y, z, table[y]).item())
    found = CategoricalCrossentropy(True, class_weight=weights)(np.eye(3)[y], z)
    assert found.item() == pytest.approx(loss(y, z).item())
    along_time = np.broadcast_to(table[y.argmax(-1)], (3, 3))
    assert square[0] == pytest.approx(Loss(True)(y, z, along_time.copy()).item(), rel=1e-5)
    assert abs(square[0] / loss(y, z).item() - 1) > 0.05
    with pytest.raises(ValueError, match=r"class_weight must have classes in \[0, 3\) as keys"):
        Loss(True, class_weight={**weights, 3: 2.0})(y[0], z[0])


def test_there_is_no_crossentropy_of_no_classes(ask):
    empty = np.zeros((4, 0), np.float32)
    assert ask(empty, empty, **DENSE).value == 0
    with pytest.raises(ValueError, match="at least one class"):
        CategoricalCrossentropy()(empty, empty)


def test_labels_of_an_accuracy_do_not_broadcast(ask):
    def metric(y, p, name):
        return ask(y, p, form="metric", name=name)

    q = np.tile(P, (3, 1, 1))  # (3, 3, 3)
    assert metric(Y, q, "SparseCategoricalAccuracy").error is None
    assert metric(np.tile(Y, 3), q, "SparseTopKCategoricalAccuracy").error is None
    assert metric(HOT[:, :2], P, "CategoricalAccuracy").error is None
    for function, y, p in (
        (sparse_categorical_accuracy, Y, q),
        (sparse_top_k_categorical_accuracy, np.tile(Y, 3), q),
        (categorical_accuracy, HOT[:, :2], P),
    ):
        with pytest.raises(ValueError, match="y_true must have"):
            function(y, p)


@pytest.mark.parametrize("argument", ["sample_weight", "mask"])
def test_axes_of_size_1_behind_a_weight_of_a_metric_are_dropped(ask, argument):
    y, p, name = Y[:, None], P[:, None], "SparseCategoricalAccuracy"  # (3, 1) and (3, 1, 3)
    given = np.array([1, 0, 1], np.float32)
    long = {argument: given[:, None, None]}
    assert ask(y, p, form="metric", name=name, **long).error == "InvalidArgumentError"
    other = {"sample_weight": "mask", "mask": "sample_weight"}[argument]
    both = ask(y, p, form="metric", name=name, **long, **{other: np.ones((3, 1), np.float32)})
    want = ask(y, p, form="metric", name=name, **{argument: given}).value.item()
    assert both.value.item() == want
    metric = metrics.SparseCategoricalAccuracy()
    metric.update_state(y, p, **long)
    assert metric.result().item() == want


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_top_k_takes_predictions_of_any_dtype(ask, dtype):
    p = (P * 20).astype(dtype)
    name = "SparseTopKCategoricalAccuracy"
    assert ask(Y, p, form="metric", name=name).error == "InvalidArgumentError"
    assert sparse_top_k_categorical_accuracy(Y, p, k=1).tolist() == [1, 0, 1]


def test_a_k_below_1_is_refused(ask):
    for k in (0, -1):
        answer = ask(Y, P, form="metric", name="SparseTopKCategoricalAccuracy", k=k)
        assert answer.value == 0
        with pytest.raises(ValueError, match="k must be at least 1"):
            metrics.SparseTopKCategoricalAccuracy(k=k)


def test_labels_of_an_accuracy_are_not_rounded(facts):
    assert facts["keras 3"]["bfloat16 label 257 is class 256"] == 1
    p = torch.eye(300)[[256]].bfloat16()
    assert sparse_categorical_accuracy([257], p).tolist() == [0]


def test_counts_go_on_past_2_to_the_24(facts):
    assert facts["keras 3"]["count past 2^24"] == 2**24
    metric = metrics.SparseCategoricalAccuracy()
    metric.update_state([0], [[1.0, 0.0]], sample_weight=[2.0**24])
    metric.update_state([0], [[1.0, 0.0]])
    assert metric.count == 2**24 + 1


def test_an_integer_dtype_of_a_metric_is_refused(facts):
    assert facts["keras 3"]["losses 1.61, 1.61 and 0.92 in int32"] == pytest.approx(2 / 3)
    with pytest.raises(TypeError, match="dtype must be None or one of"):
        metrics.SparseCategoricalCrossentropy(dtype="int32")


def test_one_class_is_no_reason_to_warn(facts):
    """Any warning would be an error here."""
    assert facts["keras 3"]["of one class"] == ["SyntaxWarning"]
    CategoricalCrossentropy()(np.ones((3, 1)), np.ones((3, 1)))


def test_complex_labels_are_refused(ask):
    assert ask(Y.astype(np.complex64), P).error is None
    with pytest.raises(TypeError, match="y_true must hold real numbers"):
        value(Y.astype(np.complex64), P)


def test_a_config_keeps_axis_and_dtype(facts):
    config = facts["keras 3"]["config"]
    assert "axis" not in config and "dtype" not in config
    ours = Loss(from_logits=True, axis=1, dtype="float64")
    assert Loss.from_config(ours.get_config()).get_config()["axis"] == 1
    assert Loss.from_config(ours.get_config()).dtype == torch.float64


def test_configs_of_keras_losses_are_taken(facts):
    three, two = (Loss.from_config(facts[name]["config"]) for name in ("keras 3", "keras 2"))
    assert (three.from_logits, three.ignore_class, three.reduction) == (True, -1, "sum")
    assert (two.from_logits, two.ignore_class, two.reduction) == (True, -1, "auto")


def test_keras_looks_through_a_softmax_and_logits_match_it(facts):
    found = facts["keras 3"]
    assert found["through softmax"] == found["in a training loop"] == found["of logits"] == 100
    for lost in ("of predict", "with ignore_class", "in another dtype", "of probabilities"):
        assert found[lost] == pytest.approx(16.118095, rel=1e-6), lost
    z = torch.tensor([[50.0, 0.0, -50.0]])
    assert value([2], z, from_logits=True) == found["of logits"]
    assert value([2], z.softmax(-1)) == pytest.approx(found["of probabilities"], rel=1e-6)
