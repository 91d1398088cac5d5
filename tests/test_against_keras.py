"""The live tf.keras, on the same tensors. Nothing here is skipped: without TensorFlow it fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
import test_losses
import torch
from conftest import make_case

import torch_sce
from torch_sce import SparseCategoricalCrossentropy
from torch_sce.crosscheck.answers import Answer, ours
from torch_sce.crosscheck.bounds import SLACK, UNIT, growth
from torch_sce.crosscheck.cases import command
from torch_sce.crosscheck.command import CASES, SEED
from torch_sce.crosscheck.compare import AGREES, GRADIENTS, differs, judge, reference
from torch_sce.crosscheck.draw import draw
from torch_sce.crosscheck.recorded import RecordedOracle

EDGE = test_losses.TestValuesAtTheEdge
REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none", None)

# classification; a sequence; a map; large enough for sums to round; a vocabulary, in two chunks
SHAPES = [(16, 10), (4, 7, 11), (2, 6, 5, 3), (512, 100), (100, 5000)]


def agrees(keras, y_true, y_pred, *weights, **options) -> None:
    """Our answer is Keras's: value, gradient, shape and dtype, within the bound of rounding."""
    rng = np.random.default_rng(1)
    upstream = rng.standard_normal(np.asarray(y_true).size + 1).astype(np.float32)
    case = make_case(y_true, y_pred, *weights, upstream=upstream, **options)
    (answer,) = keras.answers([case])
    verdict = judge(case, answer, ours(case))
    assert not answer.error, answer.message
    assert verdict.outcome == AGREES, str(verdict)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_tensors(keras, shape, from_logits, reduction):
    rng = np.random.default_rng(0)
    y_pred = 4 * rng.standard_normal(shape)
    if not from_logits:
        y_pred = np.exp(y_pred) / np.exp(y_pred).sum(-1, keepdims=True)
    y_pred = y_pred.astype(np.float32)
    y_true = rng.integers(0, shape[-1], shape[:-1])
    options = {"from_logits": from_logits, "reduction": reduction}
    agrees(keras, y_true, y_pred, **options)
    agrees(keras, y_true[..., None], y_pred, **options)
    weight = rng.random(shape[:-1]).astype(np.float32)
    agrees(keras, y_true, y_pred, weight, **options)
    mask = rng.random(shape[:-1]) < 0.7
    agrees(keras, y_true, y_pred, weight, mask, **options)
    y_true[rng.random(shape[:-1]) < 0.3] = -1
    agrees(keras, y_true, y_pred, weight, ignore_class=-1, **options)
    agrees(keras, y_true, y_pred, None, mask, ignore_class=-1, **options)


@pytest.mark.parametrize("reduction", ("sum_over_batch_size", "none"))
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_tensors_and_targets(keras, shape, from_logits, reduction):
    rng = np.random.default_rng(0)
    y_pred = 4 * rng.standard_normal(shape)
    if not from_logits:
        y_pred = np.exp(y_pred) / np.exp(y_pred).sum(-1, keepdims=True)
    y_pred = y_pred.astype(np.float32)
    hot = np.eye(shape[-1], dtype=np.float32)[rng.integers(0, shape[-1], shape[:-1])]
    soft = rng.dirichlet(np.full(shape[-1], 0.3), shape[:-1]).astype(np.float32)
    options = {"name": "CategoricalCrossentropy", "from_logits": from_logits,
               "reduction": reduction}  # fmt: skip
    weight = rng.random(shape[:-1]).astype(np.float32)
    agrees(keras, hot, y_pred, **options)
    agrees(keras, soft, y_pred, weight, label_smoothing=0.1, **options)
    agrees(keras, hot.astype(np.int64), y_pred, None, weight < 0.7, **options)


@pytest.mark.parametrize("reduction", ("sum_over_batch_size", "none"))
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_smoothed_labels_are_keras_s_smoothed_one_hot_targets(keras, shape, from_logits, reduction):
    """Also of probabilities that do not sum to 1, of which some are clipped."""
    rng = np.random.default_rng(0)
    y_pred = (4 * rng.standard_normal(shape)).astype(np.float32)
    if not from_logits:
        y_pred = np.maximum(np.exp(y_pred) - 0.01, 0)
    y_true = rng.integers(0, shape[-1], shape[:-1])
    mask = rng.random(shape[:-1]) < 0.7
    options = {"from_logits": from_logits, "reduction": reduction, "label_smoothing": 0.1}
    upstream = rng.standard_normal(y_true.size + 1).astype(np.float32)
    hot = np.eye(shape[-1], dtype=np.int64)[y_true]
    case = make_case(hot, y_pred, None, mask, upstream, name="CategoricalCrossentropy", **options)
    (answer,) = keras.answers([case])
    # The case with labels; what is right, and how far off it may be, is that of the targets.
    leaf = torch.tensor(y_pred, requires_grad=True)
    loss = SparseCategoricalCrossentropy(ignore_class=-1, **options)
    value = loss(np.where(mask, y_true, -1), leaf)
    value.backward(torch.tensor(upstream[: value.numel()]).view(value.shape))
    assert leaf.grad is not None
    mine = Answer(value.detach().numpy(), "float32", leaf.grad.numpy(), "float32")
    verdict = judge(case, answer, mine)
    assert verdict.outcome == AGREES, str(verdict)


FIT = """
import json, sys
import keras, numpy as np

found = []
for name, y, z, class_weight, reduction in json.load(sys.stdin):
    y, z = np.array(y), np.array(z, "f")
    inputs = keras.Input(z.shape[1:])
    dense = keras.layers.Dense(z.shape[-1], use_bias=False)
    model = keras.Model(inputs, dense(inputs))
    dense.set_weights([np.eye(z.shape[-1], dtype="f")])  # gives back what it gets
    loss = getattr(keras.losses, name)(from_logits=True, reduction=reduction)
    model.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
    class_weight = {int(label): weight for label, weight in class_weight.items()}
    try:
        one_batch = {"batch_size": len(z), "shuffle": False, "verbose": 0}
        history = model.fit(z, y, class_weight=class_weight, **one_batch).history
        step = np.eye(z.shape[-1]) - dense.get_weights()[0]
        found.append([history["loss"][0], step.tolist()])
    except Exception as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""


def fitted(*calls):
    """For each call what `fit` reports, and the gradient of the weights; or the error it raises."""
    line = [sys.executable, "-c", FIT]
    given = json.dumps(calls, default=np.ndarray.tolist)
    done = subprocess.run(line, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("tensorflow")
def test_class_weights_are_those_of_fit():
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 4, 30), rng.standard_normal((30, 4)).astype(np.float32)
    sparse, dense = "SparseCategoricalCrossentropy", "CategoricalCrossentropy"
    kinds = [(sparse, y), (sparse, y[:, None]), (dense, np.eye(4)[y]),
             (dense, rng.dirichlet([1, 1, 1, 1], 30))]  # fmt: skip
    calls = [
        (name, labels, z, weights, reduction)
        for name, labels in kinds
        for weights in ({0: 0.5, 1: 3.0, 2: 1.5, 3: 2.0}, {1: 3.0}, {2: -2.0})
        for reduction in ("sum_over_batch_size", "mean_with_sample_weight")
    ]
    for call, (reported, step) in zip(calls, fitted(*calls), strict=True):
        name, labels, _, weights, reduction = call
        loss = getattr(torch_sce, name)(True, reduction=reduction, class_weight=weights)
        kernel = torch.eye(4, requires_grad=True)
        value = loss(labels, torch.tensor(z) @ kernel)
        value.backward()
        # Both add up 30 weighted losses in float32, in some order.
        assert value.item() == pytest.approx(reported, rel=1e-5, abs=1e-5), call
        assert kernel.grad is not None
        np.testing.assert_allclose(kernel.grad, step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_sample_and_a_scalar_weight(ask, reduction):
    """The result has no axes in Keras, and here those of the losses: the numbers are compared."""
    p = np.array([[0.2, 0.8]], np.float32)
    answer = ask(np.array([0]), p, 2.0, reduction=reduction)
    value = SparseCategoricalCrossentropy(reduction=reduction)([0], p, 2.0)
    assert value.item() == pytest.approx(answer.value.item(), rel=3e-7)


def test_a_python_number_as_weight_keeps_its_precision(keras):
    p = np.array([[0.2, 0.8], [0.6, 0.4]])
    agrees(keras, np.array([0, 1]), p, 0.1, dtype="float64")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("computed", [None, "float64"])
def test_dtypes(keras, dtype, computed):
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((8, 5)).astype(dtype), rng.integers(0, 5, 8)
    agrees(keras, y, z, from_logits=True, reduction="none", dtype=computed)


@pytest.mark.parametrize(
    ("from_logits", "table"),
    [
        (False, EDGE.PROBABILITIES),
        (True, EDGE.LOGITS),
    ],
)
def test_values_at_the_edge(keras, from_logits, table):
    for row, label, *_ in table:
        y_pred = np.array([row], np.float32)
        agrees(keras, np.array([label]), y_pred, from_logits=from_logits, reduction="none")


def test_keras_still_answers_as_the_tables_of_edges_say(ask):
    for from_logits, table in (
        (False, EDGE.PROBABILITIES),
        (True, EDGE.LOGITS),
    ):
        for row, label, value, gradient in table:
            answer = ask([label], np.array([row], np.float32), from_logits=from_logits)
            assert answer.value == pytest.approx(value, rel=2e-6, abs=6e-8, nan_ok=True)
            assert answer.gradient[0].tolist() == pytest.approx(
                gradient, rel=1e-4, abs=1e-6, nan_ok=True
            )


def same_bits(a, b) -> bool:
    return a is None if b is None else np.array_equal(a, b, equal_nan=True)


def test_the_recorded_answers_are_the_live_ones(keras):
    recorded = RecordedOracle()
    cases = [draw(SEED, index) for index in range(0, CASES, 3)]
    assert len(recorded.entries) == CASES
    assert recorded.versions == keras.versions
    for case, live, stored in zip(
        cases, keras.answers(cases), recorded.answers(cases), strict=True
    ):
        assert live.error == stored.error, command(case.seed, case.index)
        pairs = [(live.value, stored.value)]
        for part in GRADIENTS:
            whole = getattr(live, part)
            some = None if whole is None else stored.have(part, whole)
            pairs.append((some, getattr(stored, part)))
        if all(same_bits(a, b) for a, b in pairs):
            continue
        # Another processor may round differently: within the bounds, where there is an answer.
        right, _ = reference(case)
        if right is not None:
            assert differs(live, stored, right, case) is None, command(case.seed, case.index)
        else:
            assert all(nearly(a, b, case) for a, b in pairs), command(case.seed, case.index)


def nearly(a, b, case) -> bool:
    """Whether two answers of tf.keras are the same but for rounding, where the rules have none.

    No number in them is made of more terms than there are predictions, which bound the terms.
    """
    if a is None or b is None or a.shape != b.shape:
        return a is b
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    values = (abs(x[np.isfinite(x)]).max(initial=0) for x in (a, b, case.y_pred))
    bound = 2 * (growth(case.y_pred.size) + SLACK) * UNIT[case.loss_dtype] * max(values)
    return np.allclose(a, b, rtol=0, atol=bound, equal_nan=True)


def test_what_is_nearly_the_same():
    case = draw(SEED, 0)
    a = np.array([np.nan, np.inf, 1.0, -3.0], np.float32)
    assert nearly(None, None, case) and nearly(a, a * np.float32(1 + 2**-23), case)
    assert not nearly(a, None, case) and not nearly(a, a[:3], case)
    assert not nearly(a, a * 2, case) and not nearly(a, np.nan_to_num(a), case)
