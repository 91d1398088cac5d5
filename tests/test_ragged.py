"""Examples of different lengths: jagged nested tensors, PackedSequences, lists of tensors.

All must give what padding with a mask gives, what tf_keras gives for a RaggedTensor, and the same
bits as each other. Padding is NaN, so that reading it would show.
"""

import json
import re
import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from ulps import ulps

import torch_sce
from torch_sce import (
    CategoricalCrossentropy,
    LinearSparseCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    categorical_crossentropy,
    explain,
    keras2,
    linear_sparse_categorical_crossentropy,
    metrics,
    sparse_categorical_accuracy,
    sparse_categorical_crossentropy,
)
from torch_sce.distributed import device_of
from torch_sce.kernels import native
from torch_sce.options import REDUCTIONS, Reduction

pytestmark = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="the values of lengths are read"
)

LENGTHS = (3, 1, 4, 2)
UNREDUCED = ("none", None)


def jagged(values, lengths=LENGTHS):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def listed(values, lengths=LENGTHS):
    return list(values.split(list(lengths)))


def in_sequence(values, lengths=LENGTHS):
    return pack_sequence(listed(values, lengths), enforce_sorted=False)


WAYS = {"jagged": jagged, "list": listed, "packed": in_sequence}
EVERY_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def ways_for(lengths):
    """The ways that can hold these: a list has no classes without examples, a pack no gaps."""
    can_hold = {"jagged": True, "list": lengths, "packed": lengths and min(lengths)}
    return [way for name, way in WAYS.items() if can_hold[name]]


def values_of(x):
    """The positions of something ragged, example by example."""
    if isinstance(x, PackedSequence):
        return torch.cat(unpack_sequence(x))
    return x.values() if isinstance(x, torch.Tensor) else torch.cat(x)


def padded(values, lengths, fill):
    """(B, T, ...), and where the positions are, (B, T); T is one more than the longest."""
    steps = torch.arange(max(lengths, default=0) + 1)
    exists = steps < torch.tensor(lengths, dtype=torch.int64)[:, None]
    whole = values.new_full((*exists.shape, *values.shape[1:]), fill)
    whole[exists] = values
    return whole, exists


class Problem:
    """Arguments for N positions, example by example, or for (N, *inner)."""

    def __init__(
        self, lengths=LENGTHS, classes=5, targets=False, from_logits=True, seed=0, inner=()
    ):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.inner = list(lengths), inner
        self.targets, self.from_logits = targets, from_logits
        N = (sum(lengths), *inner)
        self.z = torch.randn(*N, classes, generator=generator) * 3
        self.y = torch.randint(classes, N, generator=generator)
        if targets:
            self.y = torch.randn(*N, classes, generator=generator).softmax(-1)
        if not from_logits:
            self.z = self.z.softmax(-1)
        self.w = torch.rand(N, generator=generator) + 0.1
        self.mask = torch.rand(N, generator=generator) < 0.7
        self.of_examples = torch.rand(len(lengths), generator=generator) + 0.1
        self.g = torch.randn(N, generator=generator)

    def loss(self, reduction: Reduction | None = "sum_over_batch_size", **options):
        kind = CategoricalCrossentropy if self.targets else SparseCategoricalCrossentropy
        return kind(self.from_logits, reduction=reduction, **options)

    def result(self, loss, way, weight=None, mask=None, **others):
        """The value of a loss and its gradient, each example by example.

        `weight` and `mask`: of positions (N,), which become ragged, or of something else.
        """
        leaf = self.z.clone().requires_grad_()

        def given(x):
            return way(x, self.lengths) if x is not None and x.shape[:1] == leaf.shape[:1] else x

        value = loss(given(self.y), given(leaf), given(weight), given(mask), **others)
        return self.differentiated(loss, value, leaf)

    def differentiated(self, loss, value, leaf):
        value = value if loss.reduction not in UNREDUCED else values_of(value)
        (dz,) = torch.autograd.grad(value, leaf, self.g if value.ndim else None)
        return value.detach(), dz

    def padded_result(self, loss, weight=None, mask=None):
        """The same by padding with a mask."""
        leaf = self.z.clone().requires_grad_()
        z, exists = padded(leaf, self.lengths, torch.nan)
        y, _ = padded(self.y, self.lengths, -7)

        def whole(x, fill) -> Any:
            if x is None or x.ndim == 0:
                return x
            if len(x) == len(leaf):
                return padded(x, self.lengths, fill)[0]
            return x.view(-1, 1, *[1] * len(self.inner))

        counts = exists.view(*exists.shape, *[1] * len(self.inner))
        counts = counts if mask is None else counts & whole(mask, 0).bool()
        value = loss(y, z, whole(weight, torch.nan), counts)
        return self.differentiated(
            loss, jagged(value[exists], self.lengths) if value.ndim else value, leaf
        )


@st.composite
def calls(draw):
    """A problem, options of a loss, a weight and a mask."""
    lengths = draw(st.lists(st.integers(0, 4), max_size=4))
    targets, from_logits = draw(st.booleans()), draw(st.booleans())
    problem = Problem(lengths, draw(st.sampled_from([1, 3, 40])), targets, from_logits,
                      draw(st.integers(0, 99)), draw(st.sampled_from([(), (2,)])))  # fmt: skip
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "class_weight": draw(st.sampled_from([None, {0: 2.0}])),
    }
    if not targets:
        options["ignore_class"] = draw(st.sampled_from([None, 0, -7]))
    # Of as many positions as examples, a weight could be either: none is drawn.
    differ = len(lengths) != sum(lengths)
    weights = [None, torch.tensor(0.3), problem.w, *[problem.of_examples] * differ]
    masks = [None, problem.mask, *[problem.of_examples > 0.6] * differ]
    return problem, options, draw(st.sampled_from(weights)), draw(st.sampled_from(masks))


@given(calls())
@settings(max_examples=150, deadline=None)
def test_it_is_padding_with_a_mask(call):
    """A sum of at most 16 losses: each rounds by a few units, and so does the sum."""
    problem, options, weight, mask = call
    loss = problem.loss(**options)
    want, slope = problem.padded_result(loss, weight, mask)
    results = [problem.result(loss, way, weight, mask) for way in ways_for(problem.lengths)]
    for value, dz in results:
        assert ulps(value, want, want.abs().clamp(min=1)) <= 16
        assert ulps(dz, slope, slope.abs().amax(-1, keepdim=True).clamp(min=1e-3)) <= 16
        assert torch.equal(value, results[0][0]) and torch.equal(dz, results[0][1])


# Lanes of the CPU's kernels are rows for few classes, and classes for many; sums are long.
@pytest.mark.parametrize("classes", [7, 600])
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight", "none"])
def test_a_dense_batch_and_the_others_have_the_same_bits(reduction, targets, classes):
    B, T = 9, 67
    problem = Problem([T] * B, classes, targets)
    loss = problem.loss(reduction)

    def dense(x, _lengths):
        return x.view(B, T, *x.shape[1:])

    for weight in (None, problem.w):
        if reduction == "none":
            leaf = problem.z.clone().requires_grad_()
            of = None if weight is None else dense(weight, None)
            value = loss(dense(problem.y, None), dense(leaf, None), of).flatten()
            (dz,) = torch.autograd.grad(value, leaf, problem.g)
            value = value.detach()
        else:
            value, dz = problem.result(loss, dense, weight)
        for way in WAYS.values():
            found, gradient = problem.result(loss, way, weight)
            assert torch.equal(found, value) and torch.equal(gradient, dz)


@pytest.mark.parametrize("inner", [(), (3,), (2, 1)])
@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight"])
def test_a_packed_sequence_is_added_up_example_by_example(reduction, inner):
    """Its positions are step by step, and 5000 losses in another order have another sum.

    They are added up in float64, where a huge one tells: what follows it is lost.
    """
    lengths = torch.randint(1, 100, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    problem = Problem(lengths, inner=inner)
    loss = problem.loss(reduction)
    for weight in (None, problem.w, problem.of_examples):
        results = [problem.result(loss, way, weight, problem.mask) for way in WAYS.values()]
        assert all(
            torch.equal(a, b) for each in results for a, b in zip(each, results[0], strict=True)
        )
    problem.z[lengths[0] - 1, ..., 1], problem.y[lengths[0] - 1] = 1e17, 0
    packed = [in_sequence(x, lengths) for x in (problem.y, problem.z)]
    wide = problem.loss(reduction, dtype="float64")
    if native or not inner:  # the lanes of PyTorch's own sum may hide the order
        assert wide(*(x.data for x in packed)) != wide(*packed)


class TestKinds:
    """With reduction "none" losses come back as predictions are given."""

    @EVERY_WAY
    @pytest.mark.parametrize("axes", [(), (2,)])
    def test_losses_come_back_in_the_layout_of_the_predictions(self, way, axes):
        z = torch.randn(10, *axes, 5)
        y = torch.randint(5, (10, *axes))
        given: Any = way(z)
        want = sparse_categorical_crossentropy(y, z, True)
        smoothed = sparse_categorical_crossentropy(y, z, True, label_smoothing=0.1)
        loss = SparseCategoricalCrossentropy(True, reduction="none")
        hot = torch.nn.functional.one_hot(y, 5)
        results: list[tuple[Any, torch.Tensor]] = [
            (loss(way(y), given), want),
            (loss(way(y), given, mask=way(y >= 0)), want),
            (loss.call(way(y), given), want),
            (loss.as_criterion()(given, way(y)), want),
            (sparse_categorical_crossentropy(way(y), given, True), want),
            (categorical_crossentropy(way(hot), given, True, 0.1), smoothed),
            (keras2.sparse_categorical_crossentropy(way(y), given, True), want),
            (keras2.categorical_crossentropy(way(hot), given, True, 0.1), smoothed),
        ]
        for found, losses in results:
            assert type(found) is type(given) and torch.equal(values_of(found), losses)
            if isinstance(found, torch.Tensor):  # the same symbolic size: they can be multiplied
                nested = cast("torch.Tensor", given)
                assert found.shape == nested.shape[:-1]
                assert torch.equal((found * nested.sum(-1)).values(), losses * z.sum(-1))
            elif isinstance(given, PackedSequence):
                assert all(a is b for a, b in zip(found[1:], given[1:], strict=True))
            else:
                assert [len(x) for x in found] == list(LENGTHS)

    def test_lists_of_other_dtypes_are_not_rounded(self):
        big = 2**24 + 1
        y = [torch.tensor([1, big, 0]), torch.tensor([0.0])]
        z = [torch.zeros(3, 2), torch.zeros(1, 2)]
        loss = SparseCategoricalCrossentropy(True, ignore_class=big, reduction="none")
        assert next(iter(loss(y, z)))[1] == 0
        y[1] = torch.tensor([1], dtype=torch.uint16)
        assert next(iter(loss(y, z)))[1] == 0

    @pytest.mark.parametrize("module", [torch_sce, keras2])
    def test_lists_of_numbers_are_float32_whatever_their_lengths(self, module):
        for z in ([[[0.0, 1]], [[0.0, 1]]], [[[0.0, 1], [0, 1]], [[0.0, 1]]]):
            y = [[0] * len(row) for row in z]
            losses = module.sparse_categorical_crossentropy(y, z, True)
            assert all(x.dtype == torch.float32 for x in losses)

    @EVERY_WAY
    def test_keras2_has_the_same_bits_in_every_layout(self, way):
        problem = Problem()
        loss = keras2.SparseCategoricalCrossentropy(True)
        want, found = (problem.result(loss, each, problem.w) for each in (listed, way))
        assert all(np.array_equal(a, b) for a, b in zip(want, found, strict=True))

    def test_a_tuple_comes_back_as_a_tuple(self):
        z, y = torch.randn(10, 5), torch.randint(5, (10,))
        found = sparse_categorical_crossentropy(listed(y), tuple(listed(z)), True)
        assert type(found) is tuple and found[2].shape == (4,)

    def test_arrays_and_lists_of_different_lengths_are_lists(self):
        z, y = torch.randn(10, 5), torch.randint(5, (10,))
        loss = SparseCategoricalCrossentropy(True)
        want = loss(y, z)
        arrays = [[x.numpy() for x in listed(x)] for x in (y, z)]
        lists = [[x.tolist() for x in listed(x)] for x in (y, z)]
        for batch in (arrays, lists, (arrays[0], listed(z)), (lists[0], listed(z))):
            assert loss(*batch) == want
        # Beside tensors also of equal lengths, which are an array otherwise.
        assert loss([[0, 1], [2, 3]], list(z[:4].split(2))) == loss([0, 1, 2, 3], z[:4])

    def test_a_gradient_has_the_layout_of_a_leaf(self):
        problem = Problem()
        leaf = jagged(problem.z).detach().requires_grad_()
        loss = problem.loss()
        loss(jagged(problem.y), leaf).backward()
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
        assert torch.equal(leaf.grad.values(), problem.result(loss, listed)[1])

    def test_sorted_examples_may_be_packed_without_indices(self):
        z, y, lengths = torch.randn(10, 5), torch.randint(5, (10,)), (4, 3, 3)
        loss = SparseCategoricalCrossentropy(True)
        labels, logits = (pack_sequence(listed(x, lengths), enforce_sorted=True) for x in (y, z))
        assert logits.sorted_indices is None
        assert loss(labels, logits, torch.ones(3)) == loss(y, z, torch.ones(10))
        assert loss(labels, in_sequence(z, lengths)) == loss(y, z)
        assert loss(in_sequence(y, lengths), logits) == loss(y, z)


class TestWeights:
    """One for each example, (B,) or (B, 1), as in tf_keras; nothing else can be meant."""

    @EVERY_WAY
    @pytest.mark.parametrize("axes", [(), (2,)])
    def test_a_weight_for_each_example_is_one_for_each_of_its_positions(self, way, axes):
        z, y = torch.randn(10, *axes, 5), torch.randint(5, (10, *axes))
        w = torch.tensor([0.5, 2.0, 1.0, 3.0], requires_grad=True)
        repeated = w.repeat_interleave(torch.tensor(LENGTHS)).view(10, *[1] * len(axes))
        for reduction in ("mean", "mean_with_sample_weight"):
            loss = SparseCategoricalCrossentropy(True, reduction=reduction)
            want = loss(y, z, repeated)
            (slope,) = torch.autograd.grad(want, w, retain_graph=True)
            for weight in (w, w[:, None]):
                found = loss(way(y), way(z), weight)
                assert torch.equal(found, want)
                assert ulps(torch.autograd.grad(found, w)[0], slope, slope.abs() + 1) <= 4

    @EVERY_WAY
    def test_other_sizes_are_refused(self, way):
        loss = SparseCategoricalCrossentropy(True)
        for shape in ((3,), (1,), (10,), (4, 2), (4, 4)):
            message = r"^sample_weight must .* got a dense Tensor of the shape .* pass \(4,\) or"
            with pytest.raises(ValueError, match=message):
                loss(way(torch.zeros(10)), way(torch.zeros(10, 5)), torch.ones(shape))

    def test_a_denominator_takes_the_place_of_the_number_of_positions(self):
        problem = Problem()
        loss = problem.loss("mean_with_sample_weight")
        want = problem.result(loss, listed, problem.w)
        for way in WAYS.values():
            given = [way(x) for x in (problem.y, problem.z, problem.w)]
            n = loss.denominator(*given)
            assert n.item() == pytest.approx(problem.w.sum().item())
            value, dz = problem.result(loss, way, problem.w, denominator=n)
            assert ulps(value, want[0]) <= 2 and ulps(dz, want[1], want[1].abs() + 0.1) <= 2
        assert loss.denominator(tuple(listed(problem.y)), tuple(listed(problem.z))) == 10


HEAD = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


class TestOthers:
    """What else takes ragged arguments."""

    @EVERY_WAY
    def test_a_linear_head(self, way):
        problem = Problem()  # 5 features
        y = problem.y
        for reduction in ("mean", "none"):
            loss = LinearSparseCategoricalCrossentropy(reduction=reduction)
            leaves = [problem.z.clone().requires_grad_() for _ in range(2)]
            want = loss(y, leaves[0], HEAD, None, problem.w)
            found = loss(way(y), way(leaves[1]), HEAD, None, way(problem.w))
            found = values_of(found) if reduction == "none" else found
            assert ulps(found, want.detach(), want.detach() + 1) <= 4
            g = problem.g if reduction == "none" else None
            slopes = [
                torch.autograd.grad(a, b, g)[0] for a, b in zip((want, found), leaves, strict=True)
            ]
            assert ulps(slopes[1], slopes[0], slopes[0].abs() + 1) <= 4
        losses = linear_sparse_categorical_crossentropy(way(y), way(problem.z), HEAD)
        assert torch.equal(
            values_of(losses), linear_sparse_categorical_crossentropy(y, problem.z, HEAD)
        )
        assert LinearSparseCategoricalCrossentropy().denominator(way(y), way(problem.z)) == 10
        with pytest.raises(ValueError, match="y_true must have the layout of hidden"):
            loss(y, way(problem.z), HEAD)

    @EVERY_WAY
    def test_metrics_count_positions(self, way):
        problem = Problem()
        hot = torch.nn.functional.one_hot(problem.y, 5)
        for metric, labels in (
            (metrics.SparseCategoricalAccuracy, problem.y),
            (metrics.SparseTopKCategoricalAccuracy, problem.y),
            (metrics.SparseCategoricalCrossentropy, problem.y),
            (metrics.CategoricalAccuracy, hot),
            (metrics.CategoricalCrossentropy, hot),
        ):
            for weight in (None, problem.w, problem.of_examples):
                packed = metric()
                spread = weight
                if weight is not None and len(weight) == 4:
                    spread = weight.repeat_interleave(torch.tensor(LENGTHS))
                packed.update_state(labels, problem.z, spread)
                ragged = metric()
                weight = way(weight) if weight is problem.w else weight
                ragged.update_state(way(labels), way(problem.z), weight)
                assert ragged.result().item() == pytest.approx(packed.result().item())
                assert ragged.count.item() == pytest.approx(packed.count.item())
        equal = metrics.Accuracy()
        equal.update_state(way(problem.y), way(problem.y.where(problem.mask, -1)))
        assert equal.result().item() == pytest.approx(problem.mask.float().mean().item())
        with pytest.raises(ValueError, match="axis must be -1"):
            metrics.SparseCategoricalCrossentropy(axis=1).update(way(problem.z), way(problem.y))

    @EVERY_WAY
    def test_explain(self, way):
        problem = Problem()
        loss = problem.loss()
        found = explain(loss, way(problem.y), way(problem.z), way(problem.w))
        assert found.value == loss(way(problem.y), way(problem.z), way(problem.w))
        assert len(found.positions["label"]) == 10
        assert "must have the layout of y_pred" in explain(loss, problem.y, way(problem.z)).error
        head = LinearSparseCategoricalCrossentropy()
        assert explain(head, way(problem.y), way(problem.z), weight=HEAD).denominator == 10

    def test_the_device_is_that_of_the_values(self):
        values = torch.zeros(10, 5, device="meta")
        assert device_of(listed(values)).type == device_of(in_sequence(values)).type == "meta"
        assert device_of([]).type == device_of([[1.0]]).type == "cpu"


Y, Z = torch.zeros(10, dtype=torch.int64), torch.zeros(10, 5)
OTHER = (1, 3, 4, 2)  # as many positions
KINDS = {"jagged": "a jagged nested tensor", "list": "a list", "packed": "a PackedSequence"}


class TestErrors:
    """Each names what is given and what it must be."""

    loss = SparseCategoricalCrossentropy(True, reduction="sum")

    @EVERY_WAY
    @pytest.mark.parametrize("name", ["y_true", "sample_weight", "mask"])
    def test_lengths_that_differ(self, way, name):
        given = {"y_true": way(Y), "y_pred": way(Z)} | {name: way(Y, OTHER)}
        message = (
            rf"^{name} must have the layout of y_pred, .* with the lengths \[3, 1, 4, 2\], got .* "
            r"with the lengths \[1, 3, 4, 2\] \(example 0 has 3 and 1\)$"
        )
        with pytest.raises(ValueError, match=message):
            self.loss(**given)
        given[name] = way(Y[:9], (3, 1, 4, 1))
        with pytest.raises(ValueError, match=r"got .* lengths \[3, 1, 4, 1\] \(example 3 has 2"):
            self.loss(**given)
        given[name] = way(Y, (3, 1, 4, 1, 1))
        with pytest.raises(ValueError, match=r"got .* lengths \[3, 1, 4, 1, 1\]"):
            self.loss(**given)

    def test_values_before_the_first_example(self):
        def gap(x):
            return torch.nested.nested_tensor_from_jagged(x, torch.tensor([1, 3, 10]))

        with pytest.raises(ValueError, match="without gaps between its examples"):
            self.loss(gap(Y), gap(Z))

    def test_a_shape_has_no_lengths(self):
        with pytest.raises(ValueError, match=r"y_pred must be a nested tensor, too, got a shape"):
            SparseCategoricalCrossentropy(True).denominator(jagged(Y), jagged(Z).shape)

    @EVERY_WAY
    def test_long_lists_of_lengths_are_cut(self, way):
        y, z = Y.repeat(2), Z.repeat(2, 1)
        lengths = [1] * 18 + [2]
        with pytest.raises(ValueError, match=r"1, 1\] and 7 more, got .*\(example 17 has 1 and 2"):
            self.loss(way(y, [1] * 17 + [2, 1]), way(z, lengths))

    @pytest.mark.parametrize("wanted", WAYS)
    @pytest.mark.parametrize("given", WAYS)
    def test_the_advice_for_another_kind_can_be_followed(self, given, wanted):
        problem = Problem()
        want = self.loss(problem.y, problem.z)
        y, z = WAYS[given](problem.y), WAYS[wanted](problem.z)
        if given != wanted:
            message = f"of y_pred, {KINDS[wanted]} with .*, got {KINDS[given]} with .*: pass (.*)$"
            with pytest.raises(ValueError, match=message) as raised:
                self.loss(y, z)
            advice = re.search("pass (.*)$", str(raised.value))
            assert advice is not None
            y = eval(advice[1], {"torch": torch, "y_true": y})
        assert self.loss(y, z) == want

    @EVERY_WAY
    def test_dense_beside_ragged(self, way):
        for y, z in ((Y, way(Z)), (torch.zeros(4, 4), way(Z)), ([0] * 10, way(Z))):
            with pytest.raises(ValueError, match=r"^y_true must have the .* got a dense"):
                self.loss(y, z)
        for name in ("y_true", "sample_weight", "mask"):
            with pytest.raises(ValueError, match=rf"^{name} must .*, a dense Tensor of the shape"):
                self.loss(**{"y_true": Y, "y_pred": Z} | {name: way(Y)})

    def test_a_list_beside_a_dense_batch_of_its_shape_can_be_stacked(self):
        y, z = Y.view(2, 5), Z.view(2, 5, 5)
        with pytest.raises(ValueError, match=r": pass torch.stack\(y_true\)$"):
            self.loss(list(y), z)
        assert self.loss(torch.stack(list(y)), z) == self.loss(Y, Z)

    @EVERY_WAY
    def test_labels_out_of_range_are_named_by_example_and_step(self, way):
        y = Y.clone()
        y[6] = 9
        with pytest.raises(ValueError, match=r"on axis 2 of y_pred, got 9 at position \(2, 2\)\.$"):
            self.loss(way(y), way(Z))

    @EVERY_WAY
    def test_the_class_axis_is_the_last(self, way):
        for axis in (0, 1, 2, -2):
            with pytest.raises(ValueError, match=f"axis must be -1 for examples .*, got {axis}$"):
                SparseCategoricalCrossentropy(True, axis=axis)(way(Y), way(Z))
        for loss in (self.loss, CategoricalCrossentropy(True)):
            with pytest.raises(ValueError, match=r"y_pred must have a class axis.*swapped\?"):
                loss(way(Z), way(Y))
            with pytest.raises(ValueError, match=r"y_pred must have a class axis"):
                loss(way(Y), way(Y))

    def test_nested_tensors_that_are_not_packed(self):
        z = jagged(Z)
        with pytest.raises(ValueError, match=r"ragged axis .*: pass y_pred.transpose\(1, 2\)$"):
            self.loss(jagged(Y), z.transpose(1, 2))
        base, starts, lengths = torch.randn(2, 6, 5), torch.tensor([1, 0]), torch.tensor([2, 4])
        with_gaps = torch.nested.narrow(base, 1, starts, lengths, layout=torch.jagged)
        with pytest.raises(
            ValueError, match=r"y_pred must be .* without gaps .* y_pred.unbind\(\)"
        ):
            self.loss(jagged(Y[:6], (2, 4)), with_gaps)
        assert self.loss(listed(Y[:6], (2, 4)), with_gaps.unbind()) > 0
        beyond = torch.nested.nested_tensor_from_jagged(Z, torch.tensor([0, 3, 8]))
        with pytest.raises(ValueError, match="without gaps"):
            self.loss(jagged(Y[:8], (3, 5)), beyond)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    def test_strided_nested_tensors(self):
        y, z = (torch.nested.as_nested_tensor(listed(x)) for x in (Y, Z))
        with pytest.raises(TypeError, match=r"y_pred must be .*: pass y_pred.unbind\(\)$"):
            self.loss(y, z)
        with pytest.raises(ValueError, match="got a nested tensor"):
            self.loss(y, z.unbind())
        with pytest.raises(ValueError, match="of y_pred, a nested tensor"):
            self.loss(listed(Y), z)
        assert self.loss(y.unbind(), z.unbind()) == self.loss(Y, Z)

    def test_tensors_in_a_list_differ_in_the_first_axis_only(self):
        with pytest.raises(ValueError, match=r"first axis only, got \[\(2, 5\), \(2, 4\)\]$"):
            self.loss(listed(Y[:4], (2, 2)), [Z[:2], Z[:2, :4]])
        with pytest.raises(ValueError, match=r"y_true\[1\] must be on y_pred's device"):
            self.loss([Y[:2], Y[:2].to("meta")], [Z[:2], Z[:2]])

    def test_functions_without_ragged_arguments_say_what_to_pass(self):
        for way, advice in ((jagged, r"y_pred.values\(\)"), (listed, r"torch.cat\(y_pred\)"),
                            (in_sequence, "y_pred.data")):  # fmt: skip
            with pytest.raises(TypeError, match=f"y_pred must be .*: pass {advice}$"):
                sparse_categorical_accuracy(Y, way(Z))


class Mode(TorchDispatchMode):
    """Under a mode values cannot be read, as on other devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class TestUnreadable:
    """Where values cannot be read, lengths that differ give NaN: nothing is copied to the host."""

    @EVERY_WAY
    @pytest.mark.parametrize("name", ["y_true", "sample_weight", "mask"])
    @pytest.mark.parametrize("targets", [False, True])
    def test_lengths_that_differ_give_nan(self, way, name, targets):
        if way is listed:
            return  # their lengths are known
        problem = Problem(targets=targets)
        parts = {"y_true": problem.y, "sample_weight": problem.w, "mask": problem.mask}
        z = way(problem.z)
        for reduction in REDUCTIONS:
            loss = problem.loss(reduction)
            right = {key: way(x) for key, x in parts.items()}
            with Mode():
                found = loss(y_pred=z, **right)
                lost = loss(y_pred=z, **right | {name: way(parts[name], OTHER)})
            want = loss(y_pred=z, **right)
            if reduction in UNREDUCED:
                found, want, lost = map(values_of, (found, want, lost))
                lost = lost[problem.mask] if name != "mask" else lost
            assert ulps(found, want, want.abs().clamp(min=1)) <= 8 and lost.isnan().all()

    def test_as_many_positions_can_be_seen(self):
        with Mode(), pytest.raises(ValueError, match="y_true must have the layout"):
            SparseCategoricalCrossentropy()(jagged(Y[:9], (3, 1, 4, 1)), jagged(Z))


class TestCompiler:
    @pytest.fixture(autouse=True)
    def afresh(self):
        torch.compiler.reset()

    # PyTorch 2.13 cannot return a jagged tensor with a gradient from a compiled graph.
    @pytest.mark.parametrize(
        ("way", "reduction", "backend"),
        [(jagged, "mean_with_sample_weight", "aot_eager"), (jagged, "none", "eager"),
         (in_sequence, "none", "eager"), (listed, "none", "eager")],
    )  # fmt: skip
    def test_it_compiles_to_one_graph(self, way, reduction, backend):
        loss = SparseCategoricalCrossentropy(True, ignore_class=0, reduction=reduction)
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
        for lengths in (LENGTHS, (2, 5, 1, 1)):
            problem = Problem(lengths)
            want = problem.result(loss, way, problem.w)
            found = problem.result(compiled, way, problem.w)
            torch.testing.assert_close(found, want)

    @pytest.mark.parametrize("way", [jagged, in_sequence])
    def test_lengths_that_differ_give_nan(self, way):
        loss = SparseCategoricalCrossentropy(True)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert compiled(way(Y), way(Z)) > 0 and compiled(way(Y, OTHER), way(Z)).isnan()

    @pytest.mark.parametrize("module", [metrics, keras2.metrics])
    @pytest.mark.parametrize("name", ["SparseCategoricalAccuracy", "TopKCategoricalAccuracy"])
    def test_metrics_of_lengths_that_differ_are_nan(self, module, name):
        metric = getattr(module, name)()
        compiled = torch.compile(metric.update_state, fullgraph=True, backend="eager")
        y = Y if name.startswith("Sparse") else torch.nn.functional.one_hot(Y, 5)
        compiled(jagged(y), jagged(Z))
        assert not metric.result().isnan()
        compiled(jagged(y, OTHER), jagged(Z))
        assert metric.result().isnan()


KERAS = """
import json, sys
import numpy as np, tensorflow as tf, tf_keras

found, ragged = [], tf.RaggedTensor.from_row_lengths
for lengths, name, options, y, z, weight, is_ragged, g in json.load(sys.stdin):
    is_sparse = name.startswith("Sparse")
    y = np.array(y, "int64") if is_sparse else np.array(y, "float32").reshape(-1, 5)
    z = tf.constant(np.array(z, "float32").reshape(-1, 5))
    y = ragged(tf.constant(y), lengths)
    if weight is not None:
        weight = tf.constant(weight, "float32")
        weight = ragged(weight, lengths) if is_ragged else weight
    with tf.GradientTape() as tape:
        tape.watch(z)
        loss = getattr(tf_keras.losses, name)(**options)
        value = loss(y, ragged(z, lengths), sample_weight=weight)
        is_reduced = options["reduction"] != "none"
        value = value if is_reduced else value.flat_values
    gradient = tape.gradient(value, z, None if is_reduced else tf.constant(g, "float32"))
    metric = tf_keras.metrics.SparseCategoricalAccuracy()
    if is_sparse:  # CategoricalAccuracy takes the argmax over an axis of size 1, and returns 1
        metric.update_state(y, ragged(z, lengths))
        metric.update_state(y[:1], ragged(z, lengths)[:1])
    found.append([value.numpy().tolist(), gradient.numpy().tolist(), float(metric.result())])
print(json.dumps(found))
"""


@pytest.mark.usefixtures("tensorflow")
def test_it_is_tf_keras_on_ragged_tensors():
    drawn = np.random.default_rng(0).integers(0, 9, 12).tolist()
    calls, questions = [], []
    for number, lengths in enumerate(([3, 1, 2], [3, 0, 2], [2, 2], [0, 1], [0, 0], drawn)):
        for targets, from_logits in ((False, False), (False, True), (True, False), (True, True)):
            problem = Problem(lengths, 5, targets, from_logits)
            weights = (None, problem.w, problem.of_examples, problem.of_examples[:, None])
            for i, reduction in enumerate(("sum_over_batch_size", "sum", "none")):
                loss, weight = problem.loss(reduction), weights[(i + number) % 4]
                calls.append((problem, loss, weight))
                numbers = (problem.y, problem.z, weight)
                options = {"from_logits": from_logits, "reduction": reduction}
                questions.append([
                    lengths, type(loss).__name__, options,
                    *(None if x is None else x.tolist() for x in numbers), weight is problem.w,
                    problem.g.tolist(),
                ])  # fmt: skip
    environment = {"PATH": "/usr/bin:/bin", "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERAS], input=json.dumps(questions), capture_output=True, text=True,
        env=environment | {"CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for (problem, loss, weight), (value, gradient, right) in zip(calls, answers, strict=True):
        for way in ways_for(problem.lengths):
            found, dz = problem.result(loss, way, weight)
            # Each is a sum of up to 50 float32 losses, in some order.
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(dz, np.reshape(gradient, dz.shape), rtol=1e-4, atol=1e-5)
            of_keras2 = getattr(keras2, type(loss).__name__)
            loss2 = of_keras2(loss.from_logits, reduction=loss.reduction)
            found, dz = problem.result(loss2, way, weight)
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(dz, np.reshape(gradient, dz.shape), rtol=1e-4, atol=1e-5)
            if not problem.targets:
                first = problem.lengths[0]
                metric = metrics.SparseCategoricalAccuracy()
                metric.update_state(*(way(x, problem.lengths) for x in (problem.y, problem.z)))
                metric.update_state(problem.y[:first], problem.z[:first])
                assert metric.result().item() == pytest.approx(right, abs=1e-6)
