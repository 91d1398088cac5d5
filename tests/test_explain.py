"""`explain`: its parts add up, it finds planted mistakes, and reports nothing on ordinary data."""

import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import torch_sce
from torch_sce import (
    CategoricalCrossentropy,
    LinearSparseCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    explain,
)
from torch_sce.crosscheck.answers import _tensor, _tensors
from torch_sce.crosscheck.draw import draw
from torch_sce.options import REDUCTIONS

rng = np.random.default_rng(0)
LOGITS = torch.tensor(rng.standard_normal((64, 10)), dtype=torch.float32)
LABELS = torch.tensor(rng.integers(0, 10, 64))
PROBABILITIES = LOGITS.softmax(-1)
SEQUENCES = torch.tensor(rng.standard_normal((4, 20, 20)), dtype=torch.float32)


def logits_loss(**options):
    return SparseCategoricalCrossentropy(from_logits=True, **options)


def wrong(explanation):
    return [finding.name for finding in explanation.findings if finding.is_wrong]


def cases(count):
    """Calls of the losses from the cross-check: all options, odd shapes and values, bad ones."""
    for index in range(count):
        case = draw(11, index)
        if case.is_loss and case.form == "class" and not case.as_lists:
            yield case


def test_the_parts_add_up_to_the_loss_s_own_value():
    compared = raised = 0
    for case in cases(1000):
        try:
            loss = getattr(torch_sce, case.name)(**case.options)
        except (ValueError, TypeError):
            continue
        y_true, y_pred = _tensors(case.batch, "cpu")
        mask = None if case.mask is None else _tensor(case.mask, "cpu")
        arguments = (y_true, y_pred, case.sample_weight, mask)
        found = explain(loss, *arguments)
        assert str(found) and found._repr_html_()
        try:
            value = loss(*arguments)
        except (ValueError, TypeError) as error:
            assert found.error == f"{type(error).__name__}: {error}" and found.value is None
            raised += 1
            continue
        assert found.error == "" and found.value is not None
        torch.testing.assert_close(found.value, value, rtol=0, atol=0, equal_nan=True)
        parts, whole = found.positions["contribution"], value.double().numpy()
        if value.ndim == 0 and loss.reduction not in ("none", None):
            assert found.numerator is not None and found.denominator is not None
            parts = np.array([parts.sum(), found.numerator / (found.denominator or 1)])
        # Every number is rounded to the loss's dtype, and a sum of n of them up to n times.
        parts, whole, info = np.asarray(parts), np.asarray(whole), torch.finfo(loss.dtype)
        sizes = np.abs(found.positions["contribution"])
        with np.errstate(invalid="ignore"):
            size = sizes.size * sizes.sum() if value.ndim == 0 else 0
            close = np.abs(parts - whole) <= info.eps * (size + np.abs(whole)) + info.tiny
            overflowed = np.isinf(whole) & (np.abs(parts) > info.max)
        same = (parts == whole) | (np.isnan(parts) & np.isnan(whole))
        assert (close | same | overflowed).all(), case.index
        compared += 1
    assert compared > 300 and raised > 30


NUMBERS = st.sampled_from(
    [0.0, 1.0, -1.0, 0.5, -0.5, 3.0, 2.0**-100, 2.0**100, np.inf, -np.inf, np.nan]
)


@st.composite
def calls(draw):
    """A loss with any options and arguments for it; weights and masks may sum to 0."""
    shape = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    classes = draw(st.integers(1, 4))
    options = {
        "from_logits": draw(st.booleans()),
        "reduction": draw(st.sampled_from(("mean_with_sample_weight", *REDUCTIONS))),
        "dtype": draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
    }
    options["axis"] = axis = draw(st.integers(-len(shape) - 1, len(shape)))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    y_pred = np.moveaxis(generator.random((*shape, classes)), -1, axis)
    if draw(st.booleans()):
        loss = SparseCategoricalCrossentropy(
            ignore_class=draw(st.sampled_from([None, 0, -1])),
            label_smoothing=draw(st.sampled_from([0.0, 0.1])),
            class_weight=draw(st.sampled_from([None, {0: 2.0}])),
            **options,
        )
        y_true = generator.integers(0, classes, shape)
    else:
        smoothing = draw(st.sampled_from([0.0, 0.1]))
        loss = CategoricalCrossentropy(label_smoothing=smoothing, **options)
        y_true = np.moveaxis(generator.random((*shape, classes)), -1, axis)
    weight, mask = (
        draw(
            st.one_of(
                st.none(),
                NUMBERS,
                *(
                    arrays(np.float32, shape, elements=each)
                    for each in (NUMBERS, st.sampled_from([-1.0, 1.0]))
                ),
            )
        )
        for _ in range(2)
    )
    return loss, y_true, y_pred, weight, mask


@settings(max_examples=300, deadline=None)
@given(calls())
def test_contributions_add_up_for_any_weights(call):
    loss, *arguments = call
    value = loss(*arguments).double().numpy()
    found = explain(loss, *arguments)
    parts = found.positions["contribution"]
    if loss.reduction in ("none", None):
        total, sizes = parts, np.abs(parts)
    else:
        with np.errstate(invalid="ignore"):
            total, sizes = parts.sum(), parts.size * np.abs(parts).sum()
    info, rows = (
        torch.finfo(loss.dtype),
        torch.finfo(torch.promote_types(loss.dtype, torch.float32)),
    )
    # The sum is rounded n times in the rows' dtype, the value once to the loss's.
    with np.errstate(invalid="ignore"):
        bound = rows.eps * sizes + info.eps * np.abs(value) + info.tiny
        close = np.abs(total - value) <= bound
        overflowed = np.isinf(value) & (sizes > info.max)
    same = (total == value) | (np.isnan(total) & np.isnan(value))
    assert (close | same | overflowed).all(), (total, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype):
    z = torch.arange(2000.0, 0, -1)[None]
    label = torch.tensor([701])
    targets = torch.nn.functional.one_hot(label, 2000)
    losses = {logits_loss(): label, CategoricalCrossentropy(from_logits=True): targets}
    usual = [str(explain(loss, y, z, [0.7], [0.3])) for loss, y in losses.items()]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [explain(loss, y, z, [0.7], [0.3]) for loss, y in losses.items()]
    finally:
        torch.set_default_dtype(before)
    assert [each.positions["rank"].item() for each in found] == [702, 702]
    assert list(map(str, found)) == usual


@pytest.mark.parametrize("arguments", [([2.0, -2.0], None), (None, [0.5, -0.5])])
def test_weights_that_sum_to_0_are_named(arguments):
    found = explain(
        logits_loss(reduction="mean_with_sample_weight"), [0, 1], LOGITS[:2], *arguments
    )
    assert found.value == 0 and (found.positions["contribution"] == 0).all()
    text = " ".join(str(found).split())
    assert wrong(found)[0] in ("a denominator of 0", "a mask outside [0, 1]")
    assert arguments[0] is None or "the sum of the weights is 0, and a division by 0" in text


class Focal(SparseCategoricalCrossentropy):
    """A subclass with an option of its own, and without some of its parent's."""

    def __init__(self, gamma, **options):
        super().__init__(from_logits=False, **options)
        self.gamma = gamma

    def __repr__(self):
        return f"Focal({self.gamma})"


class Doubled(CategoricalCrossentropy):
    def __init__(self):
        super().__init__(from_logits=True)

    def forward(self, y_true, y_pred, sample_weight=None, mask=None, denominator=None):
        return 2 * super().forward(y_true, y_pred, sample_weight, mask, denominator)


def test_a_subclass_with_its_own_arguments_is_explained():
    found = explain(Focal(2.0, ignore_class=0), LABELS, LOGITS)
    plain = explain(SparseCategoricalCrossentropy(ignore_class=0), LABELS, LOGITS)
    assert str(found).startswith("Focal(2.0) gives ")
    assert str(found).split("gives")[1] == str(plain).split("gives")[1]
    assert wrong(found) == ["logits passed as probabilities"]


def test_a_forward_of_its_own_is_told():
    found = explain(Doubled(), ONE_HOT, LOGITS)
    assert "Doubled overrides forward: its value may differ" in " ".join(str(found).split())
    assert found.value == explain(CategoricalCrossentropy(from_logits=True), ONE_HOT, LOGITS).value


def test_it_works_in_and_with_what_comes_out_of_inference_mode():
    with torch.inference_mode():
        z = LOGITS.clone()
        inside = explain(SparseCategoricalCrossentropy(), LABELS.clone(), z)
    outside = explain(SparseCategoricalCrossentropy(), LABELS, z)
    assert (
        str(inside) == str(outside) == str(explain(SparseCategoricalCrossentropy(), LABELS, LOGITS))
    )


class Elsewhere(torch.Tensor):
    """A tensor without values of its own, as a DTensor is."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("must not be asked")

    def full_tensor(self):
        raise AssertionError("must not be called: all ranks would have to")


@pytest.mark.parametrize(("y_pred", "message"), [
    (torch.zeros(64, 10, device="meta"), r"y_pred must be .* can be read, got a meta tensor"),
    (LOGITS.as_subclass(Elsewhere), r"got a Elsewhere: pass y_pred\.full_tensor\(\), on "),
])  # fmt: skip
def test_tensors_without_values_are_refused(y_pred, message):
    with pytest.raises(TypeError, match=message):
        explain(logits_loss(), LABELS, y_pred)


def test_under_a_transform_it_says_so():
    def explained(y, z):
        explain(logits_loss(), y, z)
        return z

    with pytest.raises(RuntimeError, match=r"a transform of torch\.func .* call it outside"):
        torch.func.vmap(explained)(LABELS, LOGITS)


@pytest.mark.parametrize(("loss", "got"), [
    (SparseCategoricalCrossentropy, "the class itself: make one"),
    (SparseCategoricalCrossentropy().as_criterion(), r"pass its \.loss"),
    (torch_sce.keras2.SparseCategoricalCrossentropy(), "which has the rules of Keras 2"),
])  # fmt: skip
def test_what_is_no_loss_is_named(loss, got):
    with pytest.raises(TypeError, match=f"loss must be a torch_sce.* got .*{got}"):
        explain(loss, LABELS, LOGITS)


HIDDEN = torch.tensor(rng.standard_normal((64, 6)), dtype=torch.float32)
WEIGHT = torch.tensor(rng.standard_normal((10, 6)), dtype=torch.float32)
BIAS = torch.tensor(rng.standard_normal(10), dtype=torch.float32)


@pytest.mark.parametrize("options", [
    {},
    {"reduction": "mean_with_sample_weight", "ignore_class": 0},
    {"reduction": "none", "logit_softcap": 2.0},
    {"reduction": "sum", "logit_softcap": 0.5, "dtype": "float64"},
    {"label_smoothing": 0.1, "class_weight": {3: 2.0}},
])  # fmt: skip
def test_a_linear_head_is_explained_as_the_loss_of_its_logits(options):
    weights, mask = torch.linspace(0, 2, 64), torch.arange(64) % 5 != 0
    loss = LinearSparseCategoricalCrossentropy(**options)
    found = explain(loss, LABELS, HIDDEN, weights, mask, weight=WEIGHT, bias=BIAS)
    assert found.value is not None and found.loss is loss
    value = loss(LABELS, HIDDEN, WEIGHT, BIAS, weights, mask)
    torch.testing.assert_close(found.value, value)  # the products are of other sizes
    softcap = options.pop("logit_softcap", None)
    z = torch.nn.functional.linear(HIDDEN, WEIGHT, BIAS)
    z = z.to(loss.dtype) if softcap is not None else z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    plain = explain(logits_loss(**options), LABELS, z, weights, mask)
    assert str(found).splitlines()[2:] == str(plain).splitlines()[1:]
    capped = "" if softcap is None else f", capped at {softcap:g}"
    assert found.arguments[0] == (
        "hidden (64, 6) float32, weight (10, 6) float32, bias (10,) float32: y_pred is "
        f"hidden @ weight.T + bias{capped}"
    )


def test_a_linear_head_may_be_given_in_arrays_without_a_bias_and_in_half_precision():
    loss = LinearSparseCategoricalCrossentropy()
    y_true, hidden, weight = (x.numpy() for x in (LABELS, HIDDEN, WEIGHT))
    found = explain(loss, y_true, hidden, weight=weight)
    torch.testing.assert_close(found.value, loss(y_true, hidden, weight))
    assert "bias" not in str(found)
    half, weight = HIDDEN.bfloat16().requires_grad_(), WEIGHT.bfloat16()
    found = explain(loss, LABELS, half, weight=weight)
    torch.testing.assert_close(found.value, loss(LABELS, half, weight).detach(), rtol=1e-3, atol=0)


def test_a_mistake_with_a_linear_head_is_found():
    loss = LinearSparseCategoricalCrossentropy()
    found = explain(loss, LABELS + 1, HIDDEN, weight=WEIGHT)
    assert found.error.startswith("ValueError: y_true must hold labels in [0, 10)")
    assert wrong(found) == ["labels that start at 1"]
    found = explain(loss, LABELS, HIDDEN, weight=WEIGHT.T)
    assert found.error.startswith("ValueError: weight must be (C, H)")
    assert wrong(found) == ["a head that does not fit"] and "pass kernel.T" in str(found)
    found = explain(loss, LABELS, HIDDEN, weight=WEIGHT.double())
    assert found.error.startswith("TypeError: weight must have hidden's dtype")


def test_a_linear_head_with_a_forward_of_its_own_is_told():
    class Half(LinearSparseCategoricalCrossentropy):
        def forward(self, *arguments, **options):
            return super().forward(*arguments, **options) / 2

    found = explain(Half(), LABELS, HIDDEN, weight=WEIGHT)
    assert "Half overrides forward" in str(found) and not wrong(found)


def test_the_weight_of_a_head_is_given_by_name_and_only_for_a_head():
    with pytest.raises(TypeError, match=r"weight must be that of the head, given by name: expl"):
        explain(LinearSparseCategoricalCrossentropy(), LABELS, HIDDEN, WEIGHT)
    for part in ({"weight": WEIGHT}, {"bias": BIAS}):
        with pytest.raises(TypeError, match=r"linear head, which a Sparse.* as sample_weight"):
            explain(logits_loss(), LABELS, LOGITS, **part)
    meta = torch.zeros(10, 6, device="meta")
    with pytest.raises(TypeError, match=r"weight must be .* can be read, got a meta tensor"):
        explain(LinearSparseCategoricalCrossentropy(), LABELS, HIDDEN, weight=meta)


@pytest.mark.parametrize("from_logits", [True, False])
def test_each_sample_shows_its_probability_rank_and_loss(from_logits):
    y_pred = LOGITS if from_logits else PROBABILITIES
    positions = explain(SparseCategoricalCrossentropy(from_logits), LABELS, y_pred).positions
    p = np.exp(LOGITS.double().numpy())
    p /= p.sum(-1, keepdims=True)
    y = LABELS.numpy()
    at_label = p[np.arange(64), y]
    np.testing.assert_array_equal(positions["label"], y)
    np.testing.assert_allclose(positions["probability"], at_label, rtol=1e-5)
    np.testing.assert_allclose(positions["loss"], -np.log(at_label), rtol=1e-5)
    order = np.argsort(-p, axis=-1)
    np.testing.assert_array_equal(positions["rank"], 1 + np.argmax(order == y[:, None], axis=-1))
    np.testing.assert_allclose(positions["contribution"], positions["loss"] / 64)


@pytest.mark.parametrize("from_logits", [True, False])
def test_targets_show_the_class_with_the_largest(from_logits):
    targets = torch.nn.functional.one_hot(LABELS, 10) * 0.8 + 0.02
    y_pred = LOGITS if from_logits else PROBABILITIES
    found = explain(CategoricalCrossentropy(from_logits, label_smoothing=0.1), targets, y_pred)
    sparse = explain(SparseCategoricalCrossentropy(from_logits), LABELS, y_pred)
    for key in ("label", "rank"):
        np.testing.assert_array_equal(found.positions[key], sparse.positions[key])
    np.testing.assert_allclose(
        found.positions["probability"], sparse.positions["probability"], 1e-6
    )
    assert wrong(found) == []


@pytest.mark.parametrize("from_logits", [True, False])
def test_smoothing_and_class_weights_are_shown(from_logits):
    y_pred = LOGITS if from_logits else PROBABILITIES
    plain = explain(SparseCategoricalCrossentropy(from_logits), LABELS, y_pred)
    weights = torch.linspace(0.5, 1.5, 10)
    options: dict[str, Any] = {"label_smoothing": 0.1, "class_weight": weights}
    loss = SparseCategoricalCrossentropy(from_logits, **options)
    found = explain(loss, LABELS, y_pred)
    assert found.value is not None and torch.equal(found.value, loss(LABELS, y_pred))
    for key in ("label", "rank"):
        np.testing.assert_array_equal(found.positions[key], plain.positions[key])
    np.testing.assert_allclose(found.positions["probability"], plain.positions["probability"], 1e-6)
    np.testing.assert_array_equal(found.positions["weight"], weights[LABELS].double().numpy())
    lines = str(found).splitlines()
    assert "  label_smoothing 0.1: spread over the 10 classes evenly" in lines
    assert "  class_weight: a position's weight is multiplied by that of its class" in lines
    assert "-log p" not in str(found) and wrong(found) == []


def test_what_does_not_count_is_shown_as_such():
    y = torch.tensor([[2, 1, -1], [0, 7, 3]])
    mask, weight = torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.tensor([[2.0], [0.5]])
    z = torch.zeros(2, 3, 4)
    z[1, 1] = torch.nan
    found = explain(logits_loss(ignore_class=-1), y, z, weight, mask)
    assert wrong(found) == [] and found.denominator == 4
    assert found.numerator == pytest.approx(5 * np.log(4))
    np.testing.assert_array_equal(found.positions["mask"], [[1, 1, 0], [1, 0, 1]])
    np.testing.assert_array_equal(found.positions["weight"], [[2, 2, 2], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(np.isnan(found.positions["loss"]), [[0, 0, 1], [0, 1, 0]])
    text = str(found)
    assert "6 positions, 4 of them count (ignore_class=-1 and the mask)" in text
    assert re.search(r"\(0, 2\) +-1 +- +- +- +2 +0 +0\n", text)
    assert re.search(r"\(1, 1\) +7 +- +- +- +0.5 +0 +0\n", text)
    assert "the sum of weight * loss over the positions that count\n" in text


@pytest.mark.parametrize(("reduction", "numerator", "denominator", "words"), [
    ("sum", 3.5, 1, "a sum is not divided"),
    ("sum_over_batch_size", 3.5, 3,
     "the number of positions that count, not the sum of their weights"),
    ("mean", 3.5, 3, "the number of positions that count"),
    ("auto", 3.5, 3, "the number of positions that count"),
    ("mean_with_sample_weight", 3.5, 3.5, "the sum of the weights that count\n"),
    ("none", None, None, "there is no reduction"),
])  # fmt: skip
def test_the_steps_of_each_reduction(reduction, numerator, denominator, words):
    z, y = torch.zeros(4, 4), torch.tensor([0, 1, 2, -1])
    loss = logits_loss(ignore_class=-1, reduction=reduction)
    found = explain(loss, y, z, torch.tensor([1, 2, 0.5, 9]))
    assert found.denominator == denominator and words in str(found)
    assert found.numerator == (None if numerator is None else pytest.approx(3.5 * np.log(4)))


@pytest.mark.parametrize(("reduction", "weight", "mask", "denominator", "words"), [
    ("mean", None, [0.5, 0.25, 1, 0], 1.75, "the sum of the mask"),
    ("mean", None, [1, 1, 1, 0], 3, "the number of positions that count\n"),
    ("mean_with_sample_weight", None, None, 4, "the number of positions\n"),
    ("mean_with_sample_weight", [2, 0.5, 1, 1], None, 4.5, "the sum of the weights\n"),
    ("mean_with_sample_weight", [2.0], None, 2, "the sum of the weights, as they were given"),
    ("mean_with_sample_weight", None, [0.5, 1, 1, 0], 2.5, "the sum of the mask"),
    ("mean_with_sample_weight", None, [1, 1, 1, 0], 3, "the number of positions that count"),
])  # fmt: skip
def test_the_denominator_is_said_in_words(reduction, weight, mask, denominator, words):
    y, z = LABELS[:4], LOGITS[:4]
    found = explain(logits_loss(reduction=reduction), y, z, weight, mask)
    (line,) = [line for line in str(found).splitlines() if line.startswith("denominator")]
    assert found.denominator == denominator and words in line + "\n"


def test_a_long_batch_is_summarised():
    y, z = LABELS.repeat(100), LOGITS.repeat(100, 1) + torch.arange(6400)[:, None] % 7
    found = explain(logits_loss(), y, z)
    lines = str(found).splitlines()
    assert len(lines) < 30 and "... 6388 of 6400 positions are not shown." in lines
    losses = found.positions["loss"]
    assert sum(line.strip() == "..." for line in lines) == 1
    assert [line.strip() for line in lines].index("...") == 1 + 3 + 8 + 1
    shown = [float(line.split()[4]) for line in lines if re.match(r" *\d+ +\d", line)]
    assert len(shown) == 12
    np.testing.assert_allclose(shown[:8], np.sort(losses)[::-1][:8], rtol=1e-4)
    np.testing.assert_allclose(shown[8:], np.sort(losses)[3::-1], rtol=1e-4)
    (quantiles,) = [line for line in lines if line.startswith("Quantiles of the 6400 losses")]
    printed = [float(value) for value in re.findall(r"%: ([\d.]+)[,.]", quantiles)]
    share = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    np.testing.assert_allclose(printed, np.quantile(losses, share), rtol=2e-2)


def test_a_loss_that_is_not_a_number_is_shown_first():
    found = explain(logits_loss(), LABELS, WITH_NAN)
    lines = str(found).splitlines()
    first = lines[1 + next(i for i, line in enumerate(lines) if "p(label)" in line)]
    assert first.split() == ["3", str(LABELS[3].item()), "nan", "nan", "nan", "nan"]
    assert "Quantiles of the 63 losses that are numbers" in str(found)


ONE_BASED = LABELS % 10 + 1
PADDED = torch.where(torch.arange(64) < 50, LABELS, 255)
ONE_HOT = torch.nn.functional.one_hot(LABELS, 10)
WITH_NAN = LOGITS.clone().index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.nan))
BATCH_OF_SEQUENCES = SEQUENCES.argmax(1)

MOVED = torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))
PLANTED = {
    "logits passed as probabilities": (
        SparseCategoricalCrossentropy(), LABELS, LOGITS, {},
        r"exactly zero for 6\d\.\d% of all predictions.* label of \d\d\.\d% .*from_logits=True"),
    "probabilities passed as logits": (
        logits_loss(), LABELS, PROBABILITIES, {}, r"cannot fall below 1\.461"),
    "labels out of range": (
        logits_loss(), LABELS.clone().index_fill(0, torch.tensor([5, 9]), 12).index_fill(
            0, torch.tensor(7), 17), LOGITS, {}, r"3 of 64 .*: 12, 17, the first at 5.* need 18"),
    "labels that start at 1": (logits_loss(), ONE_BASED, LOGITS, {}, r"10, .*y_true - 1"),
    "labels that look like an ignore value": (
        logits_loss(), PADDED, LOGITS, {}, r"14 of 64 .*: 255, the first at 50.*ignore_class=255"),
    "one-hot labels": (logits_loss(), ONE_HOT, LOGITS, {}, r"argmax\(1\), or use Categorical"),
    "soft labels": (logits_loss(), PROBABILITIES, LOGITS, {}, "use CategoricalCrossentropy"),
    "labels that are not whole": (
        logits_loss(), LABELS + torch.tensor([0.7, 0]).repeat(32), LOGITS, {},
        r"32 of 64 .*, the first is \d\.7 at 0, which is treated as class \d"),
    "probabilities that do not sum to 1": (
        SparseCategoricalCrossentropy(), LABELS, LOGITS.sigmoid(), {}, r"range from \d\.\d+ to \d"),
    "a softmax along the wrong axis": (
        SparseCategoricalCrossentropy(), BATCH_OF_SEQUENCES, SEQUENCES.softmax(1), {},
        "sum to 1 along axis 1, .* pass axis=1"),
    "predictions that are not finite": (
        logits_loss(), LABELS, WITH_NAN, {}, r"1 NaN and 0 infinite .* the first at position 3\."),
    "labels that the predictions exclude": (
        logits_loss(), LABELS, LOGITS.scatter(1, LABELS[:, None], -torch.inf), {}, "64 of 64"),
    "weights that are not finite": (
        logits_loss(), LABELS, LOGITS, {"sample_weight": WITH_NAN[:, 4]}, "first at position 3"),
    "nothing counts": (
        logits_loss(ignore_class=-1), torch.full((64,), -1), LOGITS, {},
        "ignore_class=-1 leaves out all 64 positions"),
    "weights whose mean is far from 1": (
        logits_loss(), LABELS, LOGITS, {"sample_weight": 1e-3 + 1e-2 * torch.rand(64)},
        "mean weight of the 64 positions that count is 0.00"),
    "labels moved by one position": (
        logits_loss(), MOVED.roll(1), 8 * torch.nn.functional.one_hot(MOVED, 10).float(), {},
        r"worse than guessing, log 10 = 2\.3, and with the label of the position after each one "),
    "classes on another axis": (
        logits_loss(), BATCH_OF_SEQUENCES, 5 * SEQUENCES, {}, "fit axis 1 far better.* axis=1"),
    "many classes in probability mode": (
        SparseCategoricalCrossentropy(), [7], torch.nn.functional.one_hot(
            torch.tensor([7]), 50257).float(), {}, r"perfect prediction .* loss of 0\.005\."),
    "a saturated softmax": (
        SparseCategoricalCrossentropy(), LABELS, (30 * LOGITS).softmax(-1), {},
        r"capped near 16\.1 and their gradient is exactly zero"),
    "one class": (logits_loss(), [0, 0], [[3.0], [-1.0]], {}, "use binary cross-entropy"),
    "a mask outside [0, 1]": (
        logits_loss(), LABELS, LOGITS, {"mask": -(torch.arange(64) % 2)}, "range from -1 to 0"),
    "arguments that do not fit": (
        logits_loss(), LABELS[:60].reshape(6, 10), LOGITS[:60].reshape(6, 10, 10),
        {"sample_weight": torch.ones(6)}, r"pass sample_weight\[:, None\]"),
    "targets that are not a distribution": (
        CategoricalCrossentropy(from_logits=True), ONE_HOT * 3, LOGITS, {}, "from 3 to 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found_alone_and_with_its_evidence(name):
    loss, y_true, y_pred, others, evidence = PLANTED[name]
    found = explain(loss, y_true, y_pred, **others)
    assert wrong(found) == [name]
    assert re.search(evidence, " ".join(str(found).split())), str(found)


AT_SOME_POSITIONS = (
    "logits passed as probabilities", "labels out of range", "labels that start at 1",
    "labels that look like an ignore value", "labels that are not whole",
    "probabilities that do not sum to 1", "a softmax along the wrong axis",
    "predictions that are not finite", "labels that the predictions exclude",
    "weights whose mean is far from 1", "a saturated softmax",
)  # fmt: skip


@pytest.mark.parametrize("name", AT_SOME_POSITIONS)
def test_a_mistake_under_a_mask_is_none(name):
    """The same batch, masked, next to an ordinary one."""
    loss, y_true, y_pred, others, _ = PLANTED[name]
    good = torch.zeros_like(y_pred)
    if not loss.from_logits:
        good += 1 / y_pred.shape[loss.axis]
    both = torch.cat([good, y_pred])
    labels = torch.cat([torch.zeros_like(y_true), y_true])
    mask = torch.cat([torch.ones_like(y_true), torch.zeros_like(y_true)]).bool()
    weight = others.get("sample_weight")
    weight = None if weight is None else torch.cat([torch.ones_like(weight), weight])
    assert wrong(explain(loss, labels, both, weight, mask)) == []


def ordinary(generator):
    """A batch as in ordinary training: (loss, y_true, y_pred, sample_weight, mask)."""
    pick = generator.choice
    classes = int(pick([2, 3, 4, 5, 10, 21, 100, 1000]))
    shape = (int(pick([1, 2, 3, 7, 32, 64])), *map(int, pick([3, 10, 21], pick([0, 0, 1, 2]))))
    if np.prod(shape) * classes > 300_000:
        shape = shape[:1]
    # An untrained model says little; a trained one says more, and is mostly right.
    scale = float(pick([0.01, 0.3, 1, 2, 4, 8]))
    z = generator.standard_normal((*shape, classes)) * scale + pick([0, 0, 5, -30])
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if scale <= 1:
        y = generator.integers(0, classes, shape)
    else:
        y = (p.cumsum(-1) < generator.random((*shape, 1))).sum(-1).clip(0, classes - 1)
    from_logits = bool(pick([True, False]))
    y_pred = (np.log(p) if pick([True, False, False]) else z) if from_logits else p
    dtype = pick(["float32", "float32", "float64", "float16", "bfloat16"])
    y_pred = torch.tensor(y_pred).to(getattr(torch, dtype))
    options: dict[str, Any] = {"from_logits": from_logits}
    options["reduction"] = pick(["sum_over_batch_size", "mean_with_sample_weight", "sum", "none"])
    if len(shape) > 1 and pick([True, False]):
        y_pred = y_pred.movedim(-1, 1)
        options["axis"] = 1
    counted = generator.random(shape) < 0.8
    counted.flat[0] = True
    mask = counted if pick([True, False, False]) else None
    kind = pick(["none", "none", "about 1", "balanced", "by position"])
    share = np.bincount(y.ravel(), minlength=classes) / y.size
    weight = {
        "none": None,
        "about 1": generator.uniform(0.5, 1.5, shape),
        "balanced": 1 / (np.count_nonzero(share) * share[y]),
        "by position": generator.uniform(0.5, 2, shape[:1] + (1,) * (len(shape) - 1)),
    }[kind]
    if pick([True, False, False]):
        targets = (
            np.eye(classes)[y] * 0.9 + 0.1 / classes if pick([True, False]) else np.eye(classes)[y]
        )
        targets = np.moveaxis(targets, -1, options.get("axis", -1))
        return CategoricalCrossentropy(**options), targets, y_pred, weight, mask
    if pick([True, False]):
        options["ignore_class"] = int(pick([-1, 255, -100]))
        y = np.where(counted, y, options["ignore_class"])
    labels = y.astype(pick(["int64", "int32", "int16", "float32"]))
    return SparseCategoricalCrossentropy(**options), labels, y_pred, weight, mask


@pytest.mark.parametrize("seed", range(4))
def test_ordinary_batches_raise_no_alarm(seed):
    generator = np.random.default_rng(seed)
    for _ in range(1000):
        batch = ordinary(generator)
        found = explain(*batch)
        assert wrong(found) == [] and found.error == "", f"{batch}\n{found}"


def test_a_batch_that_could_be_read_either_way_is_only_noted():
    found = explain(logits_loss(), torch.randint(0, 20, (4, 20)), SEQUENCES)
    assert wrong(found) == []
    (note,) = found.findings
    assert note.name == "two axes that could hold the classes"
    assert "Nothing looks wrong.\nGood to know:\n- two axes" in str(found)


def test_weights_of_0_and_1_are_told_from_a_mask():
    weight = (torch.arange(64) < 6).float()
    found = explain(logits_loss(), LABELS, LOGITS, sample_weight=weight)
    assert wrong(found) == ["weights whose mean is far from 1"]
    assert "pass them as mask=" in str(found)
    divided = logits_loss(reduction="mean_with_sample_weight")
    assert wrong(explain(divided, LABELS, LOGITS, sample_weight=weight)) == []


QUIET = {
    "labels that fit no better when moved": (
        logits_loss(), MOVED.roll(7), 8 * torch.nn.functional.one_hot(MOVED, 10).float(), {}),
    "few labels, moved": (
        logits_loss(), MOVED[:16].roll(1),
        8 * torch.nn.functional.one_hot(MOVED[:16], 10).float(), {}),
    "labels fit both axes alike": (
        logits_loss(), torch.arange(20).repeat(4, 1), 8 * torch.eye(20).repeat(4, 1, 1), {}),
    "few positions by chance on another axis": (
        logits_loss(), SEQUENCES[:1].argmax(1), 5 * SEQUENCES[:1], {}),
    "three small weights": (
        logits_loss(), LABELS[:3], LOGITS[:3], {"sample_weight": torch.tensor([0.2, 0.3, 0.1])}),
    "rows that sum to 1 and are no probabilities": (
        logits_loss(), LABELS, (LOGITS - LOGITS.mean(1, keepdim=True)) / 5 + 0.1, {}),
    "a few that are far off": (
        logits_loss(), LABELS, LOGITS - 200 * ONE_HOT * (torch.arange(64) < 5)[:, None], {}),
    "confident and wrong": (logits_loss(), LABELS, LOGITS - 80 * ONE_HOT, {}),
    "impossible classes": (
        logits_loss(), LABELS, LOGITS.masked_fill(ONE_HOT.roll(1, 1).bool(), -torch.inf), {}),
    "bfloat16 probabilities, widened": (
        SparseCategoricalCrossentropy(), LABELS, LOGITS.bfloat16().softmax(-1).float(), {}),
    "bfloat16 targets": (
        CategoricalCrossentropy(from_logits=True), LOGITS.bfloat16().softmax(-1), LOGITS, {}),
    "two decimals": (SparseCategoricalCrossentropy(), [1], [[0.33, 0.33, 0.33]], {}),
    "focal weights": (
        logits_loss(), LABELS, LOGITS, {"sample_weight": (1 - PROBABILITIES.max(1).values) ** 2}),
    "small whole logits": (logits_loss(), [0, 1], [[0.0, 1.0], [1.0, 0.0]], {}),
    "big-endian weights": (
        logits_loss(), LABELS, LOGITS, {"sample_weight": np.ones(64, ">f4")[::-1]}),
    "no positions": (logits_loss(), LABELS[:0], LOGITS[:0], {}),
    "one number for each weight": (logits_loss(), LABELS, LOGITS, {"sample_weight": 0.01}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIET)
def test_what_may_be_right_raises_no_alarm(name):
    loss, y_true, y_pred, others = QUIET[name]
    found = explain(loss, y_true, y_pred, **others)
    assert wrong(found) == [] and found.error == "", str(found)


MORE = {
    "a few more": (
        logits_loss(), LABELS, LOGITS - 200 * ONE_HOT * (torch.arange(64) < 8)[:, None], {},
        "a saturated softmax"),
    "logits run too far apart": (
        logits_loss(), LABELS, LOGITS - 200 * ONE_HOT, {}, "a saturated softmax"),
    "an infinite prediction": (
        logits_loss(), LABELS, LOGITS.masked_fill(LOGITS > 3, torch.inf), {},
        "predictions that are not finite"),
    "a class too few": (
        logits_loss(), torch.where(torch.arange(64) < 9, 10, LABELS), LOGITS, {},
        "labels out of range"),
    "labels that start at 1, with 255 classes": (
        logits_loss(), torch.arange(1, 256), torch.randn(255, 255), {}, "labels that start at 1"),
    "one stray label": (
        logits_loss(), torch.where(torch.arange(64) == 9, 12, LABELS), LOGITS, {},
        "labels out of range"),
    "one-hot, with padding": (
        logits_loss(), ONE_HOT * (torch.arange(64) < 50)[:, None], LOGITS, {}, "one-hot labels"),
    "an impossible class that has a target of 0": (
        CategoricalCrossentropy(from_logits=True), ONE_HOT,
        LOGITS.masked_fill(ONE_HOT.roll(1, 1).bool(), -torch.inf), {},
        "a value that is not finite"),
    "weights of 0, not divided by": (
        logits_loss(reduction="sum"), LABELS, LOGITS, {"sample_weight": torch.zeros(64)},
        "weights that are all 0"),
    "half precision probabilities": (
        logits_loss(), LABELS, LOGITS.bfloat16().softmax(-1).float(), {},
        "probabilities passed as logits"),
    "probabilities in a padded batch": (
        logits_loss(ignore_class=-100), torch.where(torch.arange(64) < 40, LABELS, -100),
        torch.where(torch.arange(64)[:, None] < 40, PROBABILITIES, LOGITS), {},
        "probabilities passed as logits"),
    "probabilities, channels first": (
        logits_loss(axis=1), LABELS.reshape(8, 8), PROBABILITIES.reshape(8, 8, 10).movedim(-1, 1),
        {}, "probabilities passed as logits"),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_a_mistake_in_another_form_is_found_too(name):
    loss, y_true, y_pred, others, finding = MORE[name]
    found = explain(loss, y_true, y_pred, **others)
    assert wrong(found) == [finding], str(found)


def test_the_place_of_a_finding_has_every_axis():
    z = torch.zeros(2, 5, 3, 4)
    z[1, 2, 1, 3] = torch.nan
    (finding,) = explain(logits_loss(axis=2), torch.zeros(2, 5, 4).long(), z).findings
    assert "the first at position (1, 2, 3)." in finding.evidence


NOTES = {
    "weights of 0": (torch.arange(64) % 2).float(),
    "negative weights": torch.linspace(-2, 2, 64),  # as the advantages of a policy gradient
}


@pytest.mark.parametrize("name", NOTES)
def test_weights_that_may_be_right_are_only_noted(name):
    found = explain(logits_loss(), LABELS, LOGITS, sample_weight=NOTES[name])
    assert wrong(found) == [] and [finding.name for finding in found.findings] == [name]
    assert "Good to know:" in str(found) and "32 of 64" in str(found)


def test_the_mends_for_labels_from_1_with_a_void_work_in_any_order():
    void = torch.arange(64) % 7 == 0
    labels = torch.where(void, 255, ONE_BASED)
    found = explain(logits_loss(), labels, LOGITS)
    assert wrong(found) == ["labels that look like an ignore value", "labels that start at 1"]
    ignoring = logits_loss(ignore_class=255)
    for loss in (logits_loss(), ignoring):
        fix = explain(loss, labels, LOGITS).findings[-1].fix
        assert fix == "Subtract 1: pass torch.where(y_true == 255, 255, y_true - 1)."
    assert wrong(explain(ignoring, torch.where(void, 255, labels - 1), LOGITS)) == []


def test_where_the_loss_raises_it_says_why():
    found = explain(logits_loss(), PADDED, LOGITS)
    assert found.value is None and found.positions == {} and found.numerator is None
    assert str(found).startswith(
        "SparseCategoricalCrossentropy(from_logits=True) raises ValueError: y_true must hold labels"
    )
    assert "raises ValueError" in found._repr_html_()
    swapped = explain(logits_loss(), LOGITS, LABELS)
    assert wrong(swapped) == ["arguments that do not fit"]
    assert " ".join(str(swapped).split()).count("labels and predictions are swapped") == 1
    assert "y_true (64, 10) float32: does not fit y_pred" in str(
        explain(logits_loss(), LOGITS, LOGITS)
    )
    strings: Any = ["a"]
    assert "TypeError: y_pred must hold numbers" in explain(logits_loss(), [1], strings).error
    assert found.plot().axes == [] and "ignore_class=255" in text_in(found.plot())
    with pytest.raises(
        TypeError, match=r"loss must be a torch_sce\.Sparse.*, got torch\.nn\..*\.CrossEntropyLoss"
    ):
        explain(torch.nn.CrossEntropyLoss(), LABELS, LOGITS)  # pyright: ignore[reportArgumentType]


def test_the_table_of_a_notebook_has_every_part():
    found = explain(SparseCategoricalCrossentropy(), LABELS[:3], LOGITS[:3])
    page = found._repr_html_()
    assert page.count("<tr>") == 4 and "p(label)" in page and "denominator" in page
    assert "<b>logits passed as probabilities</b>" in page
    assert "Nothing looks wrong" in explain(logits_loss(), LABELS, LOGITS)._repr_html_()
    assert "&lt;" in explain(logits_loss(name="<b>"), LABELS, LOGITS)._repr_html_()


def text_in(figure):
    return " ".join(line.get_text() for line in figure.texts)


@pytest.mark.parametrize("count", [3, 64])
def test_the_picture_has_every_loss_and_what_they_add(count, tmp_path):
    found = explain(logits_loss(), LABELS[:count], LOGITS[:count])
    figure = found.plot()
    losses, added = figure.axes
    heights = [bar.get_height() for bar in losses.patches]
    edges = [bar.get_x() for bar in losses.patches] + [losses.patches[-1].get_x() + 1]
    np.testing.assert_array_equal(heights, np.histogram(found.positions["loss"], edges)[0])
    assert losses.get_title() == f"{count} positions that count"
    bars = np.array([bar.get_height() for bar in added.patches])
    parts, labels = found.positions["contribution"], LABELS[:count].numpy()
    by_class = [parts[labels == label].sum() for label in np.unique(labels)]
    np.testing.assert_allclose(bars, parts if count == 3 else by_class)
    assert found.value is not None and bars.sum() == pytest.approx(found.value.item())
    assert text_in(figure) == "Nothing looks wrong."
    for panel in figure.axes:
        assert panel.get_xlabel() and panel.get_ylabel() and panel.get_title()
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_positions_that_do_not_count_are_not_in_the_picture():
    ignoring = explain(logits_loss(ignore_class=int(LABELS[0])), LABELS, LOGITS)
    left = int((LABELS[0] != LABELS).sum())
    losses, _ = ignoring.plot().axes
    assert losses.get_title() == f"{left} positions that count" and left < 64
    assert sum(bar.get_height() for bar in losses.patches) == left


def test_the_picture_of_many_classes_has_those_that_add_most():
    found = explain(logits_loss(), torch.arange(64), torch.randn(64, 100))
    _, added = found.plot().axes
    bars = sorted(bar.get_height() for bar in added.patches)
    np.testing.assert_allclose(bars, np.sort(found.positions["contribution"])[-25:])
    assert added.get_xlabel() == "class, the 25 of 64 that add most"


@pytest.mark.parametrize("name", PLANTED)
def test_a_picture_of_a_broken_batch_names_the_finding(name):
    loss, y_true, y_pred, others, _ = PLANTED[name]
    figure = explain(loss, y_true, y_pred, **others).plot()
    assert f"{name}: " in text_in(figure) and "Nothing looks wrong." not in text_in(figure)
    figure.draw_without_rendering()


def test_without_matplotlib_plot_says_what_to_install(monkeypatch):
    found = explain(logits_loss(), LABELS, LOGITS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) needs matplotlib: pip install"):
        found.plot()


def test_it_leaves_the_arguments_and_their_gradients_alone():
    z = LOGITS.clone().requires_grad_()
    found = explain(SparseCategoricalCrossentropy(), LABELS, z)
    assert z.grad is None and torch.equal(z.detach(), LOGITS)
    assert found.value is not None and not found.value.requires_grad
