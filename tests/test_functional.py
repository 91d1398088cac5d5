"""The unreduced function: labels, shapes, the class axis, ignored classes, and its errors."""

import re

import numpy as np
import pytest
import torch
from conftest import make_case
from ulps import ulps

from torch_sce import (
    CategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    categorical_crossentropy,
    sparse_categorical_crossentropy,
)
from torch_sce.crosscheck.reference import right
from torch_sce.samples import class_numbers

LABEL_DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


def predictions(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def labels(shape, classes, seed=1) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_labels_may_have_any_real_dtype(dtype):
    z, y = predictions((6, 5)), labels((6,), 5)
    want = sparse_categorical_crossentropy(y, z, from_logits=True)
    assert torch.equal(sparse_categorical_crossentropy(y.to(dtype), z, from_logits=True), want)


def test_labels_may_be_bool():
    z, y = predictions((6, 2)), labels((6,), 2)
    want = sparse_categorical_crossentropy(y, z, from_logits=True)
    assert torch.equal(sparse_categorical_crossentropy(y.bool(), z, from_logits=True), want)


def test_float_labels_are_truncated_toward_zero():
    z = predictions((4, 3))
    floats = torch.tensor([1.9, -0.9, 2.0, 0.5], dtype=torch.float64)
    want = sparse_categorical_crossentropy(torch.tensor([1, 0, 2, 0]), z, from_logits=True)
    assert torch.equal(sparse_categorical_crossentropy(floats, z, from_logits=True), want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1.0])
def test_a_float_that_is_no_class_gets_no_class_number(value):
    number = class_numbers(torch.tensor([value], dtype=torch.float64)).item()
    assert not 0 <= number < 2**31


def test_unsigned_labels_past_int64_are_not_taken_for_minus_one():
    y = torch.from_numpy(np.array([2**64 - 1, 0], np.uint64))
    with pytest.raises(ValueError, match="got 18446744073709551615 at position"):
        sparse_categorical_crossentropy(y, predictions((2, 3)), True, ignore_class=-1)


@pytest.mark.parametrize("ignored", [2**63, 2.0**63, np.uint64(2**63)])
def test_an_ignore_class_past_int64_is_compared_exactly(ignored):
    z, y = predictions((2, 3)), torch.from_numpy(np.array([2**63, 1], np.uint64))
    want = sparse_categorical_crossentropy([0, 1], z, True)
    got = sparse_categorical_crossentropy(y, z, True, ignore_class=ignored)
    assert got[0] == 0 and got[1] == want[1]
    for other in (2**63 + 1, 2**62, -(2**63)):
        with pytest.raises(ValueError, match="got 9223372036854775808 at position"):
            sparse_categorical_crossentropy(y, z, True, ignore_class=other)


def test_both_of_numpy_s_names_for_64_bits_are_taken():
    z = predictions((2, 3))
    want = sparse_categorical_crossentropy([2, 1], z, True)
    for dtype in (np.longlong, np.ulonglong, np.int64, np.uint64):
        assert torch.equal(sparse_categorical_crossentropy(np.array([2, 1], dtype), z, True), want)


# y_true's shape, y_pred's shape, axis, the losses' shape
SHAPES = [
    ((4,), (4, 3), -1, (4,)),
    ((4, 1), (4, 3), -1, (4,)),
    ((4, 5), (4, 5, 3), -1, (4, 5)),
    ((4, 5, 1), (4, 5, 3), -1, (4, 5)),
    ((), (3,), -1, ()),
    ((1,), (3,), 0, ()),
    ((2, 4, 5), (2, 4, 5, 3), 3, (2, 4, 5)),
    ((2, 4, 5, 1), (2, 4, 5, 3), -1, (2, 4, 5)),
    ((2, 4, 5), (2, 3, 4, 5), 1, (2, 4, 5)),
    ((2, 1, 4, 5), (2, 3, 4, 5), 1, (2, 4, 5)),
    ((2, 4, 5, 1), (2, 3, 4, 5), -3, (2, 4, 5)),
    ((4, 5), (3, 4, 5), 0, (4, 5)),
    ((4,), (4, 1), -1, (4,)),  # one class
    ((4, 5), (4, 5, 1), -1, (4, 5)),
    ((0,), (0, 3), -1, (0,)),
    ((4, 0), (4, 0, 3), -1, (4, 0)),
]


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize(("y_shape", "shape", "axis", "loss_shape"), SHAPES)
def test_every_shape_equals_the_oracle(y_shape, shape, axis, loss_shape, from_logits):
    z = predictions(shape) if from_logits else predictions(shape).softmax(axis)
    y, z = labels(y_shape, shape[axis]), z.requires_grad_()
    losses = sparse_categorical_crossentropy(y, z, from_logits, axis=axis)
    upstream = predictions(loss_shape, seed=2)
    want = right(make_case(
        y.numpy(), z.detach().numpy(), upstream=upstream.reshape(-1).numpy(), form="function",
        from_logits=from_logits, axis=axis,
    ))  # fmt: skip
    assert losses.shape == loss_shape
    assert ulps(losses, want.value, np.maximum(want.value, 1)) <= 4
    losses.backward(upstream)
    assert z.grad is not None and want.gradient is not None
    size = np.abs(want.gradient).max(axis, keepdims=True, initial=1)
    assert ulps(z.grad, want.gradient, size) <= 8


@pytest.mark.parametrize("ignored", [-1, 0, 2, 255, -100, 1.0, True, np.int64(1), np.float32(2)])
def test_ignored_samples_have_no_loss_and_no_gradient(ignored):
    z, y = predictions((8, 4)), labels((8,), 4)
    y[2], y[5] = int(ignored), int(ignored)
    z[2] = torch.nan
    z.requires_grad_()
    losses = sparse_categorical_crossentropy(y, z, True, ignore_class=ignored)
    losses.sum().backward()
    kept = y != int(ignored)
    want = sparse_categorical_crossentropy(y[kept], z.detach()[kept], True)
    assert ulps(losses[kept], want.numpy(), want.clamp(min=1).numpy()) <= 4
    assert z.grad is not None and (losses[~kept] == 0).all() and (z.grad[~kept] == 0).all()


@pytest.mark.parametrize("ignored", [1.5, -7, np.nan, np.inf, 2.0**70])
def test_an_ignore_class_that_no_label_has_changes_nothing(ignored):
    z, y = predictions((8, 4)), labels((8,), 4)
    want = sparse_categorical_crossentropy(y, z, True)
    assert torch.equal(sparse_categorical_crossentropy(y, z, True, ignore_class=ignored), want)


def test_ignore_class_is_compared_exactly_with_float_labels():
    z = predictions((1, 3000))
    half = torch.tensor([2048.0], dtype=torch.float16)
    assert sparse_categorical_crossentropy(half, z, True, ignore_class=2049).item() != 0
    assert sparse_categorical_crossentropy([1.0], z, True, ignore_class=1 + 1e-9).item() != 0


def test_ignore_class_does_not_wrap_around():
    z, y = predictions((2, 300)), torch.tensor([255, 1], dtype=torch.uint8)
    assert (sparse_categorical_crossentropy(y, z, True, ignore_class=-1) != 0).all()
    assert sparse_categorical_crossentropy(y, z, True, ignore_class=255)[0] == 0


def test_ignore_class_is_compared_before_labels_are_truncated():
    z = predictions((3, 3))
    y = torch.tensor([1.5, 1.0, 0.0])
    losses = sparse_categorical_crossentropy(y, z, True, ignore_class=1)
    want = sparse_categorical_crossentropy(torch.tensor([1, 0]), z[[0, 2]], True)
    assert torch.equal(losses, torch.stack([want[0], torch.zeros(()), want[1]]))


@pytest.mark.parametrize("from_logits", [True, False])
def test_labels_may_be_smoothed(from_logits):
    z, y = predictions((4, 5, 3)).sigmoid(), labels((4, 3), 5)
    y[1, 2] = 9
    found = sparse_categorical_crossentropy(y, z, from_logits, 9, 1, 0.3)
    hot = torch.nn.functional.one_hot(y.where(y != 9, 0), 5).movedim(-1, 1)
    want = categorical_crossentropy(hot, z, from_logits, 0.3, 1)
    assert found[1, 2] == 0 and torch.equal(found, want.where(y != 9, 0))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        sparse_categorical_crossentropy(y, z, label_smoothing=1.5)


@pytest.mark.parametrize("convert", [np.asarray, np.ndarray.tolist, torch.from_numpy])
def test_arrays_lists_and_tensors_are_the_same(convert):
    z, y = predictions((4, 3)).numpy(), labels((4,), 3).numpy()
    losses = sparse_categorical_crossentropy(convert(y), convert(z), True)
    want = sparse_categorical_crossentropy(torch.tensor(y), torch.tensor(z), True)
    assert torch.equal(losses, want)


def test_odd_arrays_are_taken_as_they_are():
    z, y = predictions((4, 3)).numpy(), labels((4,), 3).numpy()
    want = sparse_categorical_crossentropy(y, z, True)
    read_only = z.copy()
    read_only.flags.writeable = False
    for odd in (z[::-1].copy()[::-1], z.astype(">f4"), np.asfortranarray(z), read_only):
        assert torch.equal(sparse_categorical_crossentropy(y, odd, True), want)


ARGUMENTS = ("y_true", "y_pred", "sample_weight", "mask")
LOSSES = {
    "class numbers": SparseCategoricalCrossentropy(True, reduction="sum"),
    "one-hot": CategoricalCrossentropy(True, label_smoothing=0.1, reduction="sum"),
    "probabilities": SparseCategoricalCrossentropy(reduction="sum"),
    "one-hot, probabilities": CategoricalCrossentropy(reduction="sum"),
}
OTHER = {name: "y_true" if "one-hot" in name else "sample_weight" for name in LOSSES}


def batch_for(name: str, rows: int, argument: str) -> dict[str, np.ndarray]:
    """Arrays for a loss, of few rows, and of more than any path for small tensors takes.

    A mask only where it is meant: labels and weights are copied where there is one.
    """
    y, z = labels((rows,), 4).numpy(), predictions((rows, 4)).numpy()
    batch = {
        "y_true": np.eye(4, dtype=np.float32)[y] if "one-hot" in name else y,
        "y_pred": np.exp(z) / np.exp(z).sum(-1, keepdims=True) if "prob" in name else z,
        "sample_weight": np.linspace(1, 2, rows, dtype=np.float32),
    }
    if argument == "mask":
        batch["mask"] = np.linspace(0.5, 1, rows, dtype=np.float32) * (np.arange(rows) % 3 > 0)
    return batch


@pytest.mark.parametrize("rows", [6, 2**17])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_array_written_into_before_the_backward_pass_changes_nothing(argument, name, rows):
    """As in Keras. The leaf is another argument: a gradient through what was saved of this one."""
    gradients = []
    for writes in (False, True):
        batch = batch_for(name, rows, argument)
        of = "y_pred" if argument != "y_pred" else OTHER[name]
        leaf = torch.tensor(batch[of], requires_grad=True)
        loss = LOSSES[name](**(batch | {of: leaf}))
        if writes:
            batch[argument][...] = batch[argument][::-1] * 0.5
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("rows", [6, 2**17])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_tensor_written_into_before_the_backward_pass_raises_or_does_not_matter(
    argument, name, rows
):
    gradients = []
    for writes in (False, True):
        batch = {
            key: torch.from_numpy(value) for key, value in batch_for(name, rows, argument).items()
        }
        of = "y_pred" if argument != "y_pred" else OTHER[name]
        leaf = batch[of].requires_grad_()
        loss = LOSSES[name](**batch)
        if writes:
            batch[argument].copy_(batch[argument].flip(0) * 0.5)
        try:
            loss.backward()
        except RuntimeError as error:
            assert writes and "modified by an inplace operation" in str(error)
            return
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


LENGTHS = (3, 1, 2)
ROWS = [predictions((n, 4), seed=n) for n in LENGTHS]
NUMBERS = [labels((n,), 4, seed=n) for n in LENGTHS]
HIDDEN = np.array([0, 1, 0, 0, 1, 0], bool)
Z6, Y6 = predictions((6, 4)), labels((6,), 4)


def advised(name: str, value) -> dict:
    """What the error for an argument says to pass."""
    with pytest.raises(TypeError, match=f"^{name} must be ") as raised:
        SparseCategoricalCrossentropy(True)(**({"y_true": Y6, "y_pred": Z6} | {name: value}))
    text = re.search(r"\bpass (.*)$", str(raised.value))
    assert text is not None
    given = {name: value, "torch": torch, "np": np, "axis": -1}
    if masked := re.match("(.*), and mask=(.*) to a loss or metric$", text[1]):
        return {name: eval(masked[1], given), "mask": eval(masked[2], given)}
    return {name: eval(text[1], given)}


@pytest.mark.filterwarnings("ignore:.*MaskedTensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["strided", "masked labels", "masked predictions",
    "masked weights", "masked mask", "tensor labels", "tensor predictions", "tensor weights",
    "tensor mask"])  # fmt: skip
def test_the_advice_of_an_error_gives_the_loss_of_what_counts(kind):
    def masked(data, hidden):
        if kind.startswith("masked"):
            return np.ma.MaskedArray(data, hidden)
        return torch.masked.MaskedTensor(torch.tensor(data), ~torch.tensor(hidden))

    odd = {
        "strided": {
            "y_true": torch.nested.as_nested_tensor(NUMBERS),
            "y_pred": torch.nested.as_nested_tensor(ROWS),
        },
        "labels": {"y_true": masked(Y6.numpy(), HIDDEN)},
        "predictions": {"y_pred": masked(Z6.numpy(), HIDDEN[:, None] & (np.arange(4) == 1))},
        "weights": {"sample_weight": masked(np.ones(6, np.float32), HIDDEN)},
        "mask": {"mask": masked(np.ones(6, np.float32), HIDDEN)},
    }[kind.removeprefix("masked ").removeprefix("tensor ")]
    y, z = (Y6[~HIDDEN], Z6[~HIDDEN]) if " " in kind else (torch.cat(NUMBERS), torch.cat(ROWS))
    want = torch.nn.functional.cross_entropy(z.double(), y).item()
    call = {"y_true": Y6, "y_pred": Z6}
    for argument in odd.items():
        call |= advised(*argument)
    value = SparseCategoricalCrossentropy(True)(**call)
    assert value.item() == pytest.approx(want, rel=1e-6)


def test_a_masked_array_without_a_mask_counts_in_full():
    call = advised("y_true", np.ma.masked_array(Y6.numpy()))
    loss = SparseCategoricalCrossentropy(True)
    assert loss(y_pred=Z6, **call) == loss(Y6, Z6)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
     (torch.float32, torch.float32), (torch.float64, torch.float64)],
)  # fmt: skip
def test_the_result_is_float32_or_float64_and_the_gradient_as_the_predictions(dtype, result):
    z = predictions((4, 3)).to(dtype).requires_grad_()
    losses = sparse_categorical_crossentropy(labels((4,), 3), z, True)
    losses.sum().backward()
    assert losses.dtype == result and z.grad is not None and z.grad.dtype == dtype


Z = torch.zeros
ERRORS = [
    # arguments in PyTorch's order
    ((Z(4, 3), Z(4)), {}, ValueError, r"labels come first in loss\(y_true, y_pred\)"),
    ((Z(2, 5, 3), Z(2, 5)), {}, ValueError, r"as_criterion\(\)\(input, target\)"),
    ((Z(2, 3, 5), Z(2, 5)), {"axis": 1}, ValueError, "fit if labels and predictions are swapped"),
    # one-hot labels
    ((Z(4, 3), Z(4, 3)), {}, ValueError, "one-hot, use CategoricalCrossentropy, or pass"),
    # shapes
    ((Z(5), Z(4, 3)), {}, ValueError, r"without its class axis, \(4,\), got \(5,\)"),
    ((Z(1, 4), Z(4, 3)), {}, ValueError, r"got \(1, 4\)"),
    ((Z(10), Z(2, 5, 3)), {}, ValueError, r"\(2, 5\), got \(10,\)"),
    ((Z(2, 5, 4), Z(2, 3, 5, 4)), {}, ValueError, "If the classes are on axis 1, pass axis=1, or"),
    ((0, Z(4, 3)), {}, ValueError, r"\(4,\), got \(\)"),
    ((0, 0.5), {}, ValueError, "y_pred must have a class axis, got a scalar"),
    # labels
    (([0, 3, 7, 0], Z(4, 3)), {}, ValueError, 
     r"\[0, 3\), the classes on axis 1 of y_pred, got 3 at position \(1,\) and at 1 other"),
    (([[0, 1], [9, 0]], Z(2, 2, 3)), {}, ValueError, r"got 9 at position \(1, 0\)\.$"),
    (([0, -1], Z(2, 3)), {}, ValueError,
     "If -1 marks positions to leave out, pass ignore_class=-1"),
    (([0, -100], Z(2, 3)), {}, ValueError, "pass ignore_class=-100"),
    (([0, 255], Z(2, 3)), {}, ValueError, "pass ignore_class=255"),
    (([1, 3, 2], Z(3, 3)), {}, ValueError, "The labels seem to start at 1: subtract 1"),
    (([0.0, np.nan], Z(2, 3)), {}, ValueError, r"got nan at position \(1,\)"),
    (([0.0, np.inf], Z(2, 3)), {}, ValueError, r"got inf at position \(1,\)"),
    (([0, 5], Z(2, 3)), {"ignore_class": -1}, ValueError, "got 5 at position"),
    # axis and classes
    (([0], Z(1, 3)), {"axis": 2}, ValueError,
     r"axis must be in \[-2, 2\) for y_pred of shape \(1, 3\), got 2"),
    (([0], Z(1, 3)), {"axis": -3}, ValueError, "got -3"),
    (([0], Z(1, 3)), {"axis": "last"}, TypeError, "axis must be an integer, got 'last'"),
    (([0], Z(1, 0)), {}, ValueError, r"at least one class on axis 1, got shape \(1, 0\)"),
    # values that are no numbers
    ((["a"], Z(1, 3)), {}, TypeError, r"y_true must hold numbers, got \['a'\]"),
    (([0], "abc"), {}, TypeError, "y_pred must hold numbers, got 'abc'"),
    ((None, Z(1, 3)), {}, TypeError, "y_true must hold numbers, got None"),
    (([1j], Z(1, 3)), {}, TypeError, "y_true must hold real numbers, got torch.complex128"),
    (([0], Z(1, 3, dtype=torch.complex64)), {}, TypeError, "y_pred must hold real numbers"),
    (([0], Z(1, 3, dtype=torch.int64)), {}, TypeError,
     r"y_pred must be float16, .* got torch\.int64"),
    (([0], Z(1, 3).to_sparse()), {}, TypeError, "dense tensor of numbers, got torch.sparse"),
    (([0, 1], [Z(3), Z(3)]), {}, ValueError, r"If each is one row, pass torch.stack\(y_pred\)\.$"),
    (([torch.tensor(0)] * 2, Z(2, 3)), {}, TypeError, r"tensors: pass torch.stack\(y_true\)"),
    (([0], [[Z(()), Z(())]]), {}, TypeError, "a list of tensors and others: make one ten"),
    (([torch.tensor(0), 1], Z(2, 3)), {}, TypeError, "a list of tensors and others: make"),
    (([0], [np.ma.MaskedArray([1, 2], [False, True])]), {}, TypeError, "array of it by np.ma.st"),
    (([0, np.ma.masked], Z(2, 3)), {}, TypeError, "y_true must be a plain array, got a list with"),
    (([0], np.zeros((1, 3), np.longdouble)), {}, TypeError, "a dtype that PyTorch has, got float"),
    (([{"a": 1}], Z(1, 3)), {}, TypeError, r"y_true must hold numbers, got \[{'a': 1}\]"),
    (([0, 1, 2], Z(3)), {}, ValueError, r"must be \(B, C\): its class axis seems to be missing"),
    ((Z(4, 3), Z(4, 1)), {}, ValueError, "fit if labels and predictions are swapped"),
    (([0], Z(1, 3), Z(1)), {}, TypeError, "from_logits must be True or False, got a tensor"),
    (([0], Z(1, 3), "False"), {}, TypeError, "from_logits must be True or False, got 'False'"),
    (([[0, 1], [2]], Z(2, 2, 3)), {}, ValueError,
     r"y_true must have the layout of y_pred, a dense Tensor .*, got a list with the lengths \[2"),
    (([[[0], [1, 2]], [[1], [2]]], Z(2, 2, 3)), {}, ValueError, "y_true must be a tensor or conv"),
    (([0], Z(1, 3)), {"ignore_class": "void"}, TypeError,
     "ignore_class must be a number or None, got 'void'"),
    (([0], Z(1, 3)), {"ignore_class": [1]}, TypeError, r"got \[1\]"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_wrong_input_is_named_with_its_rule_and_value(arguments, options, error, message):
    with pytest.raises(error, match=message):
        sparse_categorical_crossentropy(*arguments, **options)


def test_options_that_vary_compile_to_full_graphs():
    """Dynamo makes a symbol of an integer that has had two values."""
    torch.compiler.reset()
    z, y = predictions((3, 3, 3)), labels((3, 3), 3)
    compiled = torch.compile(sparse_categorical_crossentropy, fullgraph=True, backend="eager")
    for axis, ignore in ((0, 0), (1, 1), (-1, 2), (-2, -1), (2, None)):
        got = compiled(y, z, True, ignore, axis)
        want = sparse_categorical_crossentropy(y, z, True, ignore, axis)
        torch.testing.assert_close(got, want)


def test_no_shape_fits_both_orders_of_arguments_unless_there_is_one_class():
    shapes = [(), (1,), (2,), (3,), (1, 2), (2, 1), (2, 2), (2, 3), (3, 3), (2, 2, 2), (2, 3, 2)]
    for first in shapes:
        for second in shapes:
            fits = []
            for y_true, y_pred in ((first, second), (second, first)):
                try:
                    sparse_categorical_crossentropy(Z(y_true), Z(y_pred))
                    fits.append(y_pred[-1])
                except ValueError:
                    pass
            assert len(fits) < 2 or 1 in fits, (first, second)
