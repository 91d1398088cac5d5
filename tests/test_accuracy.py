"""The accuracies as functions: ties, numbers that are none, shapes, dtypes."""

import numpy as np
import pytest
import torch

from torch_sce import (
    categorical_accuracy,
    metrics,
    sparse_categorical_accuracy,
    sparse_top_k_categorical_accuracy,
    top_k_categorical_accuracy,
)
from torch_sce.accuracy import accuracy

NAN, INF = float("nan"), float("inf")
FUNCTIONS = {
    "sparse": lambda y, p: sparse_categorical_accuracy(y, p),
    "dense": lambda y, p: categorical_accuracy(torch.eye(p.shape[-1])[y], p),
    "sparse top-k": lambda y, p: sparse_top_k_categorical_accuracy(y, p, k=2),
    "dense top-k": lambda y, p: top_k_categorical_accuracy(torch.eye(p.shape[-1])[y], p, k=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(5,), (0,), (3, 4), (2, 3, 2)])
def test_every_sample_is_looked_at_alone(name, shape):
    p, y = torch.randn(*shape, 4), torch.randint(0, 4, shape)
    got = FUNCTIONS[name](y, p)
    k = 2 if "top" in name else 1
    best = p.argsort(-1, descending=True)[..., :k]
    assert got.dtype == torch.float32
    assert torch.equal(got, (best == y.unsqueeze(-1)).any(-1).float())


@pytest.mark.parametrize(
    ("row", "largest"),
    [([1, 1, 0], 0), ([0, 2, 2], 1), ([0, 0, 0], 0), ([NAN, 1, 2], 2), ([3, NAN, 2], 0),
     ([NAN] * 3, 0), ([-INF] * 3, 0), ([NAN, -INF, -1], 2), ([1, INF, INF], 1)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_largest_number_is_the_prediction(row, largest, dtype):
    y_pred = torch.tensor([row], dtype=dtype).expand(3, 3)
    want = torch.eye(3)[largest]
    assert torch.equal(sparse_categorical_accuracy(torch.arange(3), y_pred), want)
    assert torch.equal(categorical_accuracy(torch.eye(3), y_pred), want)
    # And where values are not looked at, as on a device.
    compiled = torch.compile(sparse_categorical_accuracy, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.arange(3), y_pred), want)


@pytest.mark.parametrize("row", [[-0.0, 0], [0, -0.0], [-0.0, -0.0], [-0.0, 0, -0.0, 0], [1, -0.0],
    [-1, -0.0, 0], [-0.0, -0.0, 0, -1], [-1e-7, -0.0, -1], [NAN, -0.0, 0]])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_minus_zero_is_smaller_than_zero_as_in_keras(ask, row, dtype):
    n, values = len(row), torch.tensor([row] * len(row), dtype=getattr(torch, dtype))
    asked = values.float().numpy() if dtype == "bfloat16" else values.numpy()  # the same numbers
    weights = np.arange(1, n + 1, dtype=np.float32)
    for name, y in (("SparseCategoricalAccuracy", np.arange(n)),
                    ("CategoricalAccuracy", np.eye(n, dtype=np.float32))):  # fmt: skip
        function = sparse_categorical_accuracy if name[0] == "S" else categorical_accuracy
        want = ask(y, asked, form="function", name=name).value
        assert np.array_equal(function(y, values), want)
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert np.array_equal(compiled(torch.tensor(y), values), want)
        metric = getattr(metrics, name)()
        metric.update_state(y, values, weights)
        result = ask(y, asked, weights, form="metric", name=name).value
        assert metric.result().item() == pytest.approx(float(result[-1]), rel=1e-6)
    if dtype == "float32":
        hits = sparse_top_k_categorical_accuracy(np.arange(n), values, k=1)
        top = ask(np.arange(n), asked, form="function", name="SparseTopKCategoricalAccuracy", k=1)
        assert np.array_equal(hits, top.value)


def test_a_k_beyond_every_dtype_takes_all_classes():
    assert sparse_top_k_categorical_accuracy([0, 5], torch.eye(3)[:2], k=2**70).tolist() == [1, 0]
    assert top_k_categorical_accuracy(torch.eye(3), torch.eye(3), k=2**63).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("row", "k", "hits"),
    [([3, 2, 1], 1, [1, 0, 0]), ([3, 2, 1], 2, [1, 1, 0]), ([3, 2, 1], 9, [1, 1, 1]),
     ([1, 1, 0, 1], 1, [1, 1, 0, 1]), ([2, 1, 1, 0], 2, [1, 1, 1, 0]),
     ([3, NAN, 1], 3, [0, 0, 0]), ([3, INF, 1], 1, [0, 0, 0]), ([3, -INF, 1], 1, [0, 0, 0])],
)  # fmt: skip
def test_ties_with_the_kth_count_and_what_is_not_finite_misses(row, k, hits):
    y = torch.arange(len(row))
    y_pred = torch.tensor([row], dtype=torch.float32).expand(len(row), -1)
    assert sparse_top_k_categorical_accuracy(y, y_pred, k).tolist() == hits
    assert top_k_categorical_accuracy(torch.eye(len(row)), y_pred, k).tolist() == hits


def test_sorted_class_numbers_are_looked_up():
    ids = torch.tensor([[1, 0, 3], [1, 2, 3]])
    for given in (ids, ids.float()):
        hits = sparse_top_k_categorical_accuracy([2, 1], given, k=1, from_sorted_ids=True)
        assert hits.tolist() == [0, 1]
        hits = sparse_top_k_categorical_accuracy([3, 2], given, k=2, from_sorted_ids=True)
        assert hits.tolist() == [0, 1]
    padded = torch.tensor([[-1, 2]])
    assert sparse_top_k_categorical_accuracy([NAN], padded, 1, from_sorted_ids=True).tolist() == [0]


@pytest.mark.parametrize("label", [-1, 4, 255, 2**40])
def test_a_label_that_is_no_class_is_never_right(label):
    p = torch.randn(1, 4)
    assert sparse_categorical_accuracy([label], p).item() == 0
    assert sparse_top_k_categorical_accuracy([label], p, k=4).item() == 0


def test_labels_are_compared_as_they_are():
    p = torch.eye(300)[[256, 257]].bfloat16()
    assert sparse_categorical_accuracy([257, 257], p).tolist() == [0, 1]
    assert accuracy([257, 257], torch.tensor([256, 258]).bfloat16()).tolist() == [0, 0]
    assert accuracy([257.0], torch.tensor([256.0]).bfloat16()).tolist() == [0]
    near = torch.tensor([[2**24, 2**24 + 1]])
    assert sparse_top_k_categorical_accuracy([0], near, k=1).tolist() == [0]
    assert sparse_categorical_accuracy([1], near).tolist() == [1]
    assert accuracy([257, 256], torch.tensor([256.0, 256.0])).tolist() == [0, 1]
    assert sparse_categorical_accuracy([1.5, 1.0], torch.eye(3)[[1, 1]]).tolist() == [0, 1]
    # Top-k truncates, as Keras does, but knows that NaN is no number.
    floats = torch.tensor([1.9, NAN, -0.5])
    assert sparse_top_k_categorical_accuracy(floats, torch.eye(3)[[1, 1, 0]], 1).tolist() == [
        1, 0, 1
    ]  # fmt: skip
    assert accuracy(torch.tensor([1.7]), torch.tensor([1])).tolist() == [0]
    assert accuracy(np.array([0.1]), torch.tensor([0.1])).tolist() == [1]
    big = 2**53 + 1
    assert accuracy(torch.tensor([big]), torch.tensor([big - 1])).tolist() == [0]


@pytest.mark.parametrize(
    ("y_true", "shape", "plain", "top_k"),
    [((4,), (4, 3), (4,), (4,)), ((4, 1), (4, 3), (4,), (4, 1)), ((2, 4, 1), (2, 4, 3), (2, 4),
     (2, 4, 1)), ((4, 1), (4, 1, 3), (4,), (4, 1)), ((1,), (3,), (1,), None), ((), (3,), (), None)],
)  # fmt: skip
def test_results_have_keras_s_shapes(y_true, shape, plain, top_k):
    y, p = torch.zeros(y_true, dtype=torch.int64), torch.rand(shape)
    assert sparse_categorical_accuracy(y, p).shape == plain
    if top_k is not None:
        assert sparse_top_k_categorical_accuracy(y, p).shape == top_k


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.float16,
                                   torch.float64])  # fmt: skip
@pytest.mark.parametrize("name", FUNCTIONS)
def test_predictions_may_have_any_real_dtype(name, dtype):
    p, y = torch.randint(0, 9, (20, 4)), torch.randint(0, 4, (20,))
    assert torch.equal(FUNCTIONS[name](y, p.to(dtype)), FUNCTIONS[name](y, p.float()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_compile_to_full_graphs(name):
    torch.compiler.reset()
    p, y = torch.randint(0, 3, (6, 2, 5)).float(), torch.randint(0, 5, (6, 2))
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True)
    assert torch.equal(compiled(y, p), FUNCTIONS[name](y, p))


def test_a_k_that_varies_compiles_to_a_full_graph():
    torch.compiler.reset()
    p, y = torch.rand(6, 5), torch.randint(0, 5, (6,))
    function = sparse_top_k_categorical_accuracy
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for k in (1, 2, 3, 4):
        assert torch.equal(compiled(y, p, k), function(y, p, k))


P = torch.rand(4, 3)
ERRORS = [
    (sparse_categorical_accuracy, (P, torch.arange(4)), ValueError, "labels come first in"),
    (sparse_categorical_accuracy, ([0], P), ValueError, r"\(4,\), got \(1,\)"),
    (sparse_categorical_accuracy, (P, P), ValueError, "one-hot, use CategoricalAccuracy"),
    (sparse_categorical_accuracy, ([0], torch.rand(1, 0)), ValueError, "at least one class"),
    (sparse_categorical_accuracy, (["a"], P[:1]), TypeError, "y_true must hold numbers"),
    (
        categorical_accuracy,
        (torch.arange(4), P),
        ValueError,
        "If y_true holds class numbers, use SparseCategoricalAcc",
    ),
    (categorical_accuracy, (P[:, :2], P), ValueError, r"\(4, 3\), .* got \(4, 2\)"),
    (sparse_top_k_categorical_accuracy, ([0] * 4, P, 0), ValueError, "k must be at least 1, got 0"),
    (sparse_top_k_categorical_accuracy, ([0] * 4, P, 2.5), TypeError, "k must be an integer"),
    (sparse_top_k_categorical_accuracy, ([0] * 4, P, True), TypeError, "k must be an integer"),
    (sparse_top_k_categorical_accuracy, ([0] * 4, P, 1, "no"), TypeError, "from_sorted_ids must"),
    (sparse_top_k_categorical_accuracy, (0, P[0]), ValueError, r"one example pass y_pred\[None\]"),
    (top_k_categorical_accuracy, (P, P, -1), ValueError, "k must be at least 1, got -1"),
    (accuracy, (torch.arange(4), P), ValueError, "Accuracy compares labels with labels"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS)
def test_wrong_input_is_named_with_its_rule_and_value(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
