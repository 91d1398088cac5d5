"""The module: tutorials' numbers, options, and PyTorch's features."""

import copy
import io
import json
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_sce
from torch_sce import (
    CategoricalCrossentropy,
    LinearSparseCategoricalCrossentropy,
    SparseCategoricalCrossentropy,
    metrics,
)

BOTH = pytest.mark.parametrize("cls", [SparseCategoricalCrossentropy, CategoricalCrossentropy])
LOGITS = torch.tensor([[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]])
LABELS = torch.tensor([2, 1])


class TestTutorials:
    """The numbers printed where people learn this loss."""

    def test_from_logits_and_from_their_softmax(self):
        logits, y = LOGITS.double(), LABELS
        by_logits = SparseCategoricalCrossentropy(from_logits=True, dtype="float64")(y, logits)
        by_softmax = SparseCategoricalCrossentropy(dtype="float64")(y, logits.softmax(-1))
        assert by_logits.item() == pytest.approx(0.9133191704750061, abs=1e-7)
        assert by_softmax.item() == pytest.approx(0.9133191704750061, abs=2e-7)
        single = SparseCategoricalCrossentropy(from_logits=True)(y, LOGITS)
        assert single.item() == pytest.approx(0.9133191704750061, abs=6e-8)

    @pytest.mark.parametrize(
        ("y_pred", "value"),
        [([[0.99, 0, 0.01], [0.03, 0.97, 0], [0.01, 0, 0.99]], 0.016853359),
         ([[0.9, 0, 0.1], [0.1, 0.9, 0], [0.3, 0, 0.7]], 0.1891321)],
    )  # fmt: skip
    def test_three_examples(self, y_pred, value):
        assert SparseCategoricalCrossentropy()([0, 1, 2], y_pred).item() == pytest.approx(
            value, abs=1e-7
        )

    def test_the_examples_of_keras_s_documentation(self):
        y_true, y_pred = [1, 2], [[0.05, 0.95, 0], [0.1, 0.8, 0.1]]
        loss = SparseCategoricalCrossentropy()
        assert loss(y_true, y_pred).item() == pytest.approx(1.177, abs=5e-4)
        weighted = loss(y_true, y_pred, sample_weight=[0.3, 0.7])
        assert weighted.item() == pytest.approx(0.814, abs=5e-4)
        summed = SparseCategoricalCrossentropy(reduction="sum")(y_true, y_pred)
        assert summed.item() == pytest.approx(2.354, abs=5e-4)
        each = SparseCategoricalCrossentropy(reduction=None)(y_true, y_pred)
        assert each.tolist() == pytest.approx([0.0513, 2.303], abs=5e-4)


class TestOptions:
    def test_the_signature_is_keras_s(self):
        loss = SparseCategoricalCrossentropy(True, -1, "sum", 1, "mine", "float64")
        assert loss.get_config() == {
            "from_logits": True, "ignore_class": -1, "reduction": "sum", "axis": 1, "name": "mine",
            "dtype": "float64", "label_smoothing": 0.0,
        }  # fmt: skip

    @pytest.mark.parametrize(
        "options",
        [{}, {"from_logits": True, "ignore_class": 255, "reduction": None, "axis": 1,
              "name": "x", "dtype": "bfloat16"},
         {"label_smoothing": 0.1, "class_weight": {1: 2.0}}, {"class_weight": torch.rand(9)}],
    )  # fmt: skip
    def test_a_config_round_trips(self, options):
        loss = SparseCategoricalCrossentropy(**options)
        serialized = {"class_name": "SparseCategoricalCrossentropy", "config": loss.get_config()}
        again = SparseCategoricalCrossentropy.from_config(serialized)
        assert again.get_config() == loss.get_config()
        again = SparseCategoricalCrossentropy.from_config(loss.get_config())
        assert again.get_config() == loss.get_config()
        assert repr(again) == repr(loss)

    @pytest.mark.parametrize("given", [
        None, "float32", torch.float32, np.float32, np.dtype("float32"), "mixed_float32",
        "torch.float32", "float",
    ])  # fmt: skip
    def test_float32_may_be_named_in_many_ways(self, given):
        assert SparseCategoricalCrossentropy(dtype=given).dtype == torch.float32

    def test_a_keras_policy_gives_its_compute_dtype(self):
        class Policy:
            compute_dtype = "float16"
            name = "mixed_float16"

        for given in (Policy(), "mixed_float16"):
            loss = SparseCategoricalCrossentropy(dtype=given)
            assert loss.dtype == torch.float16
            assert loss([0], [[0.5, 0.5]]).dtype == torch.float16

    @pytest.mark.parametrize(("options", "error", "message"), [
        ({"reduction": "average"}, ValueError,
         r"reduction must be one of \('sum_over_batch_size', .*\), got 'average'"),
        ({"reduction": 1}, ValueError, "got 1"),
        ({"dtype": "foo"}, ValueError, "dtype must be None or one of .* got 'foo'"),
        ({"dtype": "int32"}, TypeError, "got 'int32'"),
        ({"dtype": torch.bool}, TypeError, "got torch.bool"),
        ({"dtype": 3}, ValueError, "got 3"),
        ({"axis": "a"}, TypeError, "axis must be an integer, got 'a'"),
        ({"axis": 1.0}, TypeError, "got 1.0"),
        ({"axis": True}, TypeError, "got True"),
        ({"ignore_class": "void"}, TypeError, "ignore_class must be a number or None, got 'void'"),
        ({"ignore_class": 1j}, TypeError, "got 1j"),
        ({"from_logits": "False"}, TypeError, "from_logits must be True or False, got 'False'"),
        ({"from_logits": LABELS}, TypeError, "options are given where"),
        ({"smoothing": 0.1}, TypeError, "smoothing"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"class_weight": 2.0}, ValueError, r"class_weight must have .* \(C,\), .* shape \(\)"),
        ({"class_weight": [[1, 2]]}, ValueError, r"a dict {class: weight}, got .* \(1, 2\)"),
        ({"class_weight": ["a"]}, TypeError, "class_weight must hold numbers"),
        ({"class_weight": {"cat": 2.0}}, ValueError, "as keys, .* got {'cat': 2.0}"),
        ({"class_weight": {1.5: 2.0}}, ValueError, "got {1.5: 2.0}"),
        ({"class_weight": {-1: 2.0}}, ValueError, "from 0 on, as keys, .* got {-1: 2.0}"),
        ({"class_weight": {1: "a"}}, ValueError, "numbers as weights, got {1: 'a'}"),
        ({"name": 3}, TypeError, "name must be a string or None, got 3"),
        ({"name": LABELS}, TypeError, "name must be a string or None, got a tensor: options are"),
    ])  # fmt: skip
    def test_wrong_options_are_refused_when_the_loss_is_made(self, options, error, message):
        with pytest.raises(error, match=message):
            SparseCategoricalCrossentropy(**options)

    @pytest.mark.parametrize(("config", "error", "message"), [
        (None, TypeError, "config must be a dict, as .* got None"),
        (["sum"], TypeError, r"config must be a dict, as .* got \['sum'\]"),
        ({"config": [1]}, TypeError, r"config must be a dict, .* got {'config': \[1\]}"),
        ({"config": None}, TypeError, "have one under 'config', got"),
        ({"class_name": "SparseCategoricalCrossentropy"}, TypeError, "have one under 'config'"),
        ({"class_name": "Dense", "config": {}}, ValueError, "Sparse.*, got one of a Dense"),
        ({"class_name": ["x"], "config": {}}, ValueError, r"got one of a \['x'\]"),
        ({"config": {"config": {}}}, ValueError, r"has no options \['config'\]"),
        ({"smoothing": 0.1}, ValueError, r"\['smoothing'\], only \['from_logits'"),
        ({"registered_name": None}, ValueError, r"no options \['registered_name'\]"),
        ({"self": 1}, ValueError, r"no options \['self'\]"),
        ({1: 2}, ValueError, r"no options \[1\]"),
        ({"from_logits": [True]}, TypeError, r"from_logits must be True or False, got \[True\]"),
        ({"reduction": ["sum"]}, ValueError, r"reduction must be one of .* got \['sum'\]"),
        ({"axis": [1]}, TypeError, r"axis must be an integer, got \[1\]"),
        ({"ignore_class": [1]}, TypeError, "ignore_class must be a number or None"),
        ({"name": ["n"]}, TypeError, "name must be a string or None"),
        ({"dtype": ["float32"]}, ValueError, "dtype must be None or one of"),
    ])  # fmt: skip
    def test_a_config_of_something_else_is_refused(self, config, error, message):
        with pytest.raises(error, match=message):
            SparseCategoricalCrossentropy.from_config(config)

    def test_what_keras_serializes_is_taken(self):
        """`keras.losses.serialize` of Keras 3 adds a module and a name; Keras 2 a function."""
        config = {"name": "n", "reduction": "sum", "from_logits": True, "ignore_class": None}
        about = {"module": "keras.losses", "registered_name": None}
        given = about | {"class_name": "SparseCategoricalCrossentropy", "config": config}
        loss = SparseCategoricalCrossentropy.from_config(given)
        assert repr(loss) == (
            "SparseCategoricalCrossentropy(from_logits=True, reduction='sum', name='n')"
        )
        again = SparseCategoricalCrossentropy.from_config(config | {"fn": "sparse_cate"})
        assert again.get_config() == loss.get_config() and set(given["config"]) == set(config)

    def test_wrong_calls_are_refused_as_by_the_function(self):
        loss: Any = SparseCategoricalCrossentropy(from_logits=True)
        for y_true, y_pred, error, message in (
            (LOGITS, LABELS, ValueError, "labels come first in loss"),
            (torch.eye(4)[LABELS], LOGITS, ValueError, "one-hot"),
            ([1, 4], LOGITS, ValueError, "start at 1"),
            (["cat", "dog"], LOGITS, TypeError, "y_true must hold numbers"),
            (LABELS, None, TypeError, "y_pred must hold numbers, got None"),
        ):
            with pytest.raises(error, match=message):
                loss(y_true, y_pred)

    def test_a_tensor_on_another_device_is_refused(self):
        with pytest.raises(ValueError, match=r"y_true must be on y_pred's device, meta, got cpu"):
            SparseCategoricalCrossentropy()(LABELS, LOGITS.to("meta"))

    def test_the_gradient_comes_back_in_the_predictions_dtype(self):
        for given in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for computed in ("float16", "bfloat16", "float32", "float64"):
                z = LOGITS.clone().to(given).requires_grad_()
                value = SparseCategoricalCrossentropy(from_logits=True, dtype=computed)(LABELS, z)
                value.backward()
                assert value.dtype == getattr(torch, computed)
                assert z.grad is not None and z.grad.dtype == given

    def test_integer_predictions_are_cast(self):
        loss = SparseCategoricalCrossentropy(from_logits=True)
        assert torch.equal(loss([0], torch.tensor([[1, 2]])), loss([0], torch.tensor([[1.0, 2.0]])))


class TestOptionsSetLater:
    """An option is parsed wherever it is given: by the constructor, and on assignment."""

    @pytest.mark.parametrize(("name", "given", "parsed"), [
        ("dtype", "bfloat16", torch.bfloat16), ("dtype", None, torch.float32),
        ("from_logits", 1, True), ("from_logits", None, False), ("axis", np.int64(-2), -2),
        ("reduction", None, None), ("name", None, "sparse_categorical_crossentropy"),
        ("ignore_class", np.int32(3), 3),
    ])  # fmt: skip
    def test_it_is_as_if_it_had_been_given_to_the_constructor(self, name, given, parsed):
        loss = SparseCategoricalCrossentropy()
        setattr(loss, name, given)
        made = SparseCategoricalCrossentropy(**{name: given})
        for each in (loss, made):
            assert getattr(each, name) == parsed and type(getattr(each, name)) is type(parsed)
        assert loss.get_config() == made.get_config() and repr(loss) == repr(made)

    @pytest.mark.parametrize(("name", "value", "error"), [
        ("dtype", "int32", TypeError), ("dtype", "float17", ValueError),
        ("from_logits", "False", TypeError), ("from_logits", nn.Parameter(LOGITS), TypeError),
        ("reduction", "bad", ValueError), ("axis", 1.0, TypeError),
        ("ignore_class", "x", TypeError), ("name", 3, TypeError),
        ("name", nn.Linear(1, 1), TypeError),
    ])  # fmt: skip
    def test_a_wrong_one_is_refused_and_changes_nothing(self, name, value, error):
        loss = SparseCategoricalCrossentropy(from_logits=True)
        before = loss.get_config()
        with pytest.raises(error, match=f"^{name} must be"):
            setattr(loss, name, value)
        assert loss.get_config() == before and not list(loss.parameters())

    def test_what_is_no_option_is_an_attribute_like_any_other(self):
        loss = CategoricalCrossentropy()
        loss.label_smoothing = 1
        assert loss.label_smoothing == 1.0 and type(loss.label_smoothing) is float
        with pytest.raises(ValueError, match="label_smoothing must be in"):
            loss.label_smoothing = 2
        other: Any = loss
        other.ignore_class = "void"
        assert "ignore_class" not in other.get_config()

    def test_it_takes_effect_in_the_next_call(self):
        loss: Any = SparseCategoricalCrossentropy()
        loss.from_logits, loss.reduction, loss.dtype = True, "sum", "float64"
        other = SparseCategoricalCrossentropy(True, reduction="sum", dtype="float64")
        assert torch.equal(loss(LABELS, LOGITS), other(LABELS, LOGITS))
        criterion: Any = loss.as_criterion()
        criterion.loss.reduction = "none"
        assert criterion(LOGITS, LABELS).shape == (2,)

    def test_it_takes_effect_in_compiled_code_which_is_not_compiled_again_without_one(self):
        torch.compiler.reset()
        graphs = []

        def count(graph, _inputs):
            graphs.append(graph)
            return graph.forward

        loss = SparseCategoricalCrossentropy(from_logits=True)
        compiled: Any = torch.compile(loss, fullgraph=True, backend=count)
        for _ in range(3):
            assert torch.equal(compiled(LABELS, LOGITS), loss(LABELS, LOGITS))
            loss.name = loss.name  # no graph is about the name
        assert len(graphs) == 1
        compiled.reduction = "sum"
        assert loss.reduction == "sum"
        assert torch.equal(compiled(LABELS, LOGITS), loss(LABELS, LOGITS))
        assert len(graphs) == 2
        with pytest.raises(TypeError, match="from_logits must be True or False"):
            compiled.from_logits = "False"

    def test_a_pickle_from_before_options_were_parsed_on_assignment_still_loads(self):
        """It holds the attributes by their names, as this class does."""
        loss = SparseCategoricalCrossentropy.__new__(SparseCategoricalCrossentropy)
        nn.Module.__init__(loss)
        want = SparseCategoricalCrossentropy(True, -1, "sum", dtype="float16")
        names = ("from_logits", "ignore_class", "reduction", "axis", "name", "dtype")
        loss.__setstate__(loss.__dict__ | {name: getattr(want, name) for name in names})
        assert loss.get_config() == want.get_config()
        later = {"process_group", "class_group", "label_smoothing", "class_weight"}
        assert vars(loss).keys() | later == vars(want).keys()


class Tempered(SparseCategoricalCrossentropy):
    """A subclass with a constructor of its own, as people write them."""

    def __init__(self, temperature: float) -> None:
        super().__init__(from_logits=True, reduction="sum")
        self.temperature = temperature


class Passing(CategoricalCrossentropy):
    def __init__(self, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"temperature": self.temperature}


class Renamed(SparseCategoricalCrossentropy):
    def __init__(self, logits: bool = True) -> None:
        super().__init__(from_logits=logits)

    def get_config(self) -> dict[str, Any]:
        return {"logits": self.from_logits}


@dataclass(eq=False, repr=False)
class Data(SparseCategoricalCrossentropy):
    temperature: float

    def __post_init__(self) -> None:
        super().__init__(from_logits=True)


class Tagged:
    def __init__(self, *, tag: Any = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tag = tag


class Mixed(Tagged, SparseCategoricalCrossentropy):
    pass


class TestSubclasses:
    @pytest.mark.parametrize(("loss", "shown"), [
        (Tempered(2.0), "Tempered(from_logits=True, reduction='sum')"),
        (Passing(2.0, label_smoothing=0.1), "Passing(from_logits=False, label_smoothing=0.1)"),
        (Renamed(), "Renamed(from_logits=True)"),
        (Data(2.0), "Data(from_logits=True)"),
        (Mixed(tag="t", from_logits=True), "Mixed(from_logits=True)"),
    ])  # fmt: skip
    def test_it_has_a_repr_and_copies_wherever_it_is(self, loss, shown):
        assert repr(loss) == shown
        assert f"(0): {shown}" in repr(nn.Sequential(loss))
        assert f"(a): {shown}" in repr(nn.ModuleDict({"a": loss}))
        assert f"(loss): {shown}" in repr(loss.as_criterion())
        y = LABELS if isinstance(loss, SparseCategoricalCrossentropy) else torch.eye(4)[LABELS]
        for other in (loss, copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert repr(other) == shown and vars(other).keys() == vars(loss).keys()
            assert torch.equal(other(y, LOGITS), loss(y, LOGITS))
        for predictions in (LOGITS, LOGITS.softmax(-1)):
            assert shown in str(torch_sce.explain(loss, y, predictions))

    def test_its_config_goes_through_its_own_constructor(self):
        loss = Passing(2.0, label_smoothing=0.1, axis=1)
        again = Passing.from_config(loss.get_config())
        assert again.get_config() == loss.get_config() and again.temperature == 2.0
        assert Renamed.from_config({"logits": False}).from_logits is False
        mixed = Mixed.from_config({"tag": "t", "from_logits": True})
        assert mixed.tag == "t" and mixed.from_logits
        for name in ("Passing", "CategoricalCrossentropy"):  # its own, and Keras's
            given = {"class_name": name, "config": {"from_logits": True}}
            assert Passing.from_config(given).from_logits

    @pytest.mark.parametrize(("cls", "config", "message"), [
        (Tempered, {"axis": 1}, r"a Tempered, which has no .* only \['temperature'\]"),
        (Passing, {"ignore_class": 1}, r"\['ignore_class'\], only \['temperature', 'from"),
        (Mixed, {"self": 1, "kwargs": 2}, r"\['self', 'kwargs'\], only \['tag', 'from_"),
        (Mixed, {"class_name": "Tagged", "config": {}}, "got one of a Tagged"),
    ])  # fmt: skip
    def test_what_its_constructor_does_not_take_is_refused_by_name(self, cls, config, message):
        with pytest.raises(ValueError, match=message):
            cls.from_config(config)

    def test_its_options_are_parsed_and_its_other_attributes_are_its_own(self):
        loss: Any = Tempered(2.0)
        loss.temperature = "hot"
        with pytest.raises(TypeError, match="from_logits must be"):
            loss.from_logits = "False"

    @BOTH
    def test_one_whose_call_would_have_no_effect_cannot_be_made(self, cls):
        """In Keras, a loss's value is made from `call`."""

        def call(self, y_true, y_pred):
            return 2 * cls.call(self, y_true, y_pred)

        with pytest.raises(TypeError, match=r"Twice must not override call, .* Override forward\("):
            type("Twice", (cls,), {"call": call})
        with pytest.raises(TypeError, match="Mixture must not override call"):
            type("Mixture", (type("Doubling", (), {"call": call}), cls), {})


class TestCall:
    """`call` is Keras's: the losses before weights and reduction."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("options", [
        {}, {"from_logits": True, "reduction": "sum"}, {"axis": 1, "dtype": "float16"},
    ])  # fmt: skip
    @BOTH
    def test_it_is_the_function_with_the_loss_s_options(self, cls, options, dtype):
        sparse = cls is SparseCategoricalCrossentropy
        own: dict[str, Any] = {"ignore_class": 1} if sparse else {"label_smoothing": 0.1}
        loss, axis = cls(**options, **own), options.get("axis", -1)
        p = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(axis).to(dtype)
        y = p.argmax(axis) if sparse else p.roll(1, axis)
        p.requires_grad_()
        function = getattr(torch_sce, loss.get_config()["name"])
        want = function(y, p, options.get("from_logits", False), axis=axis, **own)
        got = loss.call(y, p)
        assert torch.equal(got, want) and got.dtype == want.dtype
        (slope,), (wanted,) = (torch.autograd.grad(x.sum(), p) for x in (got, want))
        assert torch.equal(slope, wanted)

    @pytest.mark.parametrize(("cls", "y", "p"), [
        (SparseCategoricalCrossentropy, (2, 3), (2, 3, 4)),
        (SparseCategoricalCrossentropy, (2, 3, 1), (2, 3, 4)),
        (SparseCategoricalCrossentropy, (), (4,)),
        (CategoricalCrossentropy, (2, 3, 4), (2, 3, 4)),
        (CategoricalCrossentropy, (3,), (3, 1)),
        (CategoricalCrossentropy, (2, 3, 1), (2, 3)),
    ])  # fmt: skip
    def test_its_shapes_are_those_of_the_loss_without_reduction(self, cls, y, p):
        """These shapes, and float32, are those of tf.keras."""
        y = torch.ones(y) if cls is CategoricalCrossentropy else torch.zeros(y, dtype=torch.int64)
        p, loss = torch.rand(p), cls(reduction="none")
        assert torch.equal(loss.call(y, p), loss(y, p))

    def test_it_compiles(self):
        torch.compiler.reset()
        loss = SparseCategoricalCrossentropy(from_logits=True)
        compiled = torch.compile(loss.call, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(LABELS, LOGITS), loss.call(LABELS, LOGITS))


class TestValuesAtTheEdge:
    """Rows of Keras's behaviour, as float32 loss and gradient; the live tests run Keras itself."""

    PROBABILITIES: ClassVar = [
        ([0.05, 0.95, 0], 0, 2.995732, [-19, 1, 0]),
        ([0.05, 0.95, 0], 1, 0.05129344, [1, -0.0526317, 0]),
        ([2, 3, 5], 0, 1.0986123, [0, 0, 0]),
        ([0.2, 0.3, 0.05], 0, 1.011601, [-3.1818, 1.8182, 1.8182]),
        ([1, 0, 0], 0, 2.3841855e-07, [0, 0, 0]),
        ([1, 0, 0], 1, 16.118095, [0, 0, 0]),
        ([0, 0, 0], 0, 1.0986123, [0, 0, 0]),
        ([1, 1, 1], 0, 1.0986123, [0, 0, 0]),
        ([-1, 0.5, 0.5], 0, 16.118095, [0, 1, 1]),
        ([np.float32(1e-7), np.float32(1 - 1e-7), 0.5], 0, 16.523561, [-9999999, 2 / 3, 2 / 3]),
        ([np.nan, 0.3, 0.2], 0, np.nan, [0, np.nan, np.nan]),
        ([np.inf, 0.3, 0.2], 1, 1.609438, [0, -2.6667, 0.6667]),
        ([-np.inf, 0.3, 0.2], 0, 15.424949, [0, 2, 2]),
        ([-np.inf, -np.inf, 0], 0, 1.0986123, [0, 0, 0]),
        ([2, -1, 0.5], 0, 0.40546525, [0, 0, 0.6667]),
        ([0.3], 0, 0.0, [0]),
    ]
    LOGITS: ClassVar = [
        ([1e4, -1e4, 0], 1, 20000, [1, -1, 0]),
        ([1e38, -1e38, 0], 1, 2e38, [1, -1, 0]),
        ([3e38, -3e38, 0], 1, np.inf, [1, -1, 0]),
        ([3e38, -3e38, 0], 0, 0, [0, 0, 0]),
        ([-np.inf, 0.3, 0.2], 0, np.inf, [-1, 0.525, 0.475]),
        ([-np.inf, 0.3, 0.2], 1, 0.6443967, [0, -0.475, 0.475]),
        ([np.inf, 0, 0], 0, np.nan, [np.nan] * 3),
        ([np.inf, np.inf, 0], 0, np.nan, [np.nan] * 3),
        ([-np.inf] * 3, 0, np.nan, [np.nan] * 3),
        ([np.nan, 0, 0], 1, np.nan, [np.nan] * 3),
        ([7.0], 0, 0, [0]),
    ]

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize(("from_logits", "table"), [(False, PROBABILITIES), (True, LOGITS)])
    def test_rows(self, from_logits, table, compiled):
        loss = SparseCategoricalCrossentropy(from_logits=from_logits)
        call = torch.compile(loss, fullgraph=True) if compiled else loss
        for row, label, value, gradient in table:
            x = torch.tensor([row], dtype=torch.float32, requires_grad=True)
            got = call(torch.tensor([label]), x)
            got.backward()
            expect = pytest.approx(value, rel=2e-6, abs=6e-8, nan_ok=True)
            assert got.item() == expect, (row, label)
            assert x.grad is not None
            expect = pytest.approx(gradient, rel=1e-4, abs=1e-6, nan_ok=True)
            assert x.grad[0].tolist() == expect, (row, label)


class TestCriterion:
    def test_it_takes_predictions_first(self):
        loss = SparseCategoricalCrossentropy(from_logits=True)
        criterion = loss.as_criterion()
        assert isinstance(criterion, nn.Module)
        assert torch.equal(criterion(LOGITS, LABELS), loss(LABELS, LOGITS))
        assert torch.equal(criterion(input=LOGITS, target=LABELS), loss(LABELS, LOGITS))
        weight, mask = torch.tensor([0.5, 2.0]), torch.tensor([True, False])
        weighted = criterion(LOGITS, LABELS, weight, mask)
        assert torch.equal(weighted, loss(LABELS, LOGITS, weight, mask))

    def test_it_pickles_with_its_loss(self):
        criterion = SparseCategoricalCrossentropy(True, reduction="sum").as_criterion()
        again = pickle.loads(pickle.dumps(criterion))
        assert torch.equal(again(LOGITS, LABELS), criterion(LOGITS, LABELS))
        assert type(again) is type(criterion) and again.reduction == "sum"

    @BOTH
    def test_it_is_pytorch_s_if_predictions_are_logits(self, cls):
        """What skorch asks before it applies a softmax."""
        for from_logits in (True, False):
            criterion = cls(from_logits).as_criterion()
            assert isinstance(criterion, nn.CrossEntropyLoss) == from_logits
            assert not criterion.state_dict() and not list(criterion.parameters())

    @pytest.mark.parametrize(("ours", "theirs"), [
        ("sum_over_batch_size", "mean"), ("mean", "mean"), ("auto", "mean"), ("sum", "sum"),
        ("none", "none"), (None, "none"), ("mean_with_sample_weight", "mean_with_sample_weight"),
    ])  # fmt: skip
    def test_its_reduction_has_pytorch_s_name_and_is_the_loss_s(self, ours, theirs):
        loss = SparseCategoricalCrossentropy(from_logits=True, reduction=ours)
        criterion = loss.as_criterion()
        assert criterion.reduction == theirs
        weight, other = torch.tensor([0.5, 2.0]), SparseCategoricalCrossentropy(True)
        for name in (ours, theirs):
            other.as_criterion().reduction = name
            assert torch.equal(other(LABELS, LOGITS, weight), loss(LABELS, LOGITS, weight))
        with pytest.raises(ValueError, match="reduction must be one of"):
            criterion.reduction = "average"  # pyright: ignore

    @pytest.mark.parametrize("from_logits", [True, False])
    def test_a_reduction_that_is_set_for_one_call_and_set_back_leaves_no_trace(self, from_logits):
        """As opacus and fastai do; they take it for a mean only if it is called one."""
        loss = SparseCategoricalCrossentropy(from_logits, ignore_class=1)
        criterion, q = loss.as_criterion(), LOGITS.softmax(-1)
        before, old = loss.get_config(), criterion.reduction
        criterion.reduction = "none"
        each = criterion(q, LABELS)
        criterion.reduction = old
        assert each.shape == (2,) and each[1] == 0 and loss.get_config() == before
        assert torch.equal(criterion(q, LABELS), each[0]) and criterion.ignore_index == 1

    @BOTH
    def test_a_reduction_in_the_call_is_that_of_the_call(self, cls):
        loss = cls(from_logits=True)
        y = LABELS if cls is SparseCategoricalCrossentropy else torch.eye(4)[LABELS]
        criterion, z = loss.as_criterion(), LOGITS.clone().requires_grad_()
        each = criterion(z, y, reduction="none")
        each.sum().backward()
        assert torch.equal(each, cls(True, reduction=None)(y, LOGITS)) and z.grad is not None
        assert torch.equal(criterion(z, y, reduction="sum"), each.sum())
        assert torch.equal(criterion(z, y, reduction="mean"), criterion(z, y))
        assert loss.reduction == "sum_over_batch_size" and criterion.reduction == "mean"
        with pytest.raises(ValueError, match="reduction must be one of"):
            criterion(z, y, reduction="average")

    def test_it_compiles_in_one_graph(self):
        torch.compiler.reset()
        criterion = SparseCategoricalCrossentropy(from_logits=True).as_criterion()
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        assert torch.equal(compiled(LOGITS, LABELS), criterion(LOGITS, LABELS))


class Weighted(SparseCategoricalCrossentropy):
    def __init__(self, class_weight: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_weight = class_weight


class TestArgumentsThatDoNotExist:
    """The errors name ours for PyTorch's."""

    @pytest.mark.parametrize(("cls", "name", "use"), [
        (SparseCategoricalCrossentropy, "ignore_index", ": use ignore_class"),
        (SparseCategoricalCrossentropy, "dim", ": use axis"),
        (SparseCategoricalCrossentropy, "mask", ": use mask in the call"),
        (SparseCategoricalCrossentropy, "weight", r": use (class_weight, or )?sample_weight in"),
        (SparseCategoricalCrossentropy, "smoothing", "$"),
        (Weighted, "weight", ": use class_weight, or sample_weight in the call"),
        (Weighted, "dim", ": use axis"),
        (CategoricalCrossentropy, "dim", ": use axis"),
        (CategoricalCrossentropy, "ignore_index", "$"),
        (LinearSparseCategoricalCrossentropy, "ignore_index", ": use ignore_class"),
        (LinearSparseCategoricalCrossentropy, "dim", "$"),
        (metrics.SparseCategoricalCrossentropy, "ignore_index", ": use ignore_class"),
        (metrics.SparseCategoricalCrossentropy, "weight", ": use sample_weight in update_state"),
        (metrics.CategoricalCrossentropy, "dim", ": use axis"),
    ])  # fmt: skip
    def test_in_a_constructor(self, cls, name, use):
        with pytest.raises(TypeError, match=f"^{cls.__name__} has no argument '{name}'{use}"):
            cls(**{name: 1})

    @pytest.mark.parametrize(("name", "use"), [
        ("weight", ": use sample_weight"), ("ignore_index", ": use ignore_class in the construct"),
        ("from_logits", ": use from_logits in the constructor"), ("weights", "$"),
    ])  # fmt: skip
    def test_in_a_call(self, name, use):
        loss = SparseCategoricalCrossentropy(from_logits=True)
        compiled: Any = torch.compile(loss, backend="eager")
        message = f"^the call of Sparse.* has no argument '{name}'{use}"
        for call in (loss, compiled, lambda y, z, **given: loss.as_criterion()(z, y, **given)):
            with pytest.raises(TypeError, match=message):
                call(LABELS, LOGITS, **{name: LOGITS})
        with pytest.raises(TypeError, match=r"^the call of Linear.* no argument 'dim'$"):
            LinearSparseCategoricalCrossentropy()(LABELS, LOGITS, LOGITS, dim=1)  # pyright: ignore

    @pytest.mark.parametrize(("function", "name", "use"), [
        (torch_sce.sparse_categorical_crossentropy, "ignore_index", ": use ignore_class"),
        (torch_sce.sparse_categorical_crossentropy, "dim", ": use axis"),
        (torch_sce.sparse_categorical_crossentropy, "weight", ": use sample_weight in the call of"),
        (torch_sce.categorical_crossentropy, "dim", ": use axis"),
        (torch_sce.categorical_crossentropy, "ignore_index", "$"),
        (torch_sce.linear_sparse_categorical_crossentropy, "ignore_index", ": use ignore_class"),
    ])  # fmt: skip
    def test_of_a_function(self, function, name, use):
        message = f"^{function.__name__} has no argument '{name}'{use}"
        with pytest.raises(TypeError, match=message):
            function(LABELS, LOGITS, LOGITS, **{name: 1})


class TestModule:
    @pytest.mark.parametrize("copied", [
        copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)),
        lambda loss: loss.to("cpu"), lambda loss: loss.to(torch.float64), lambda loss: loss.eval(),
        lambda loss: loss.half(), lambda loss: nn.Sequential(loss).double()[0],
    ])  # fmt: skip
    def test_copies_and_moves_change_nothing(self, copied):
        loss = SparseCategoricalCrossentropy(True, ignore_class=-1, reduction="sum", name="n")
        assert copied(loss).get_config() == loss.get_config()
        assert torch.equal(copied(loss)(LABELS, LOGITS), loss(LABELS, LOGITS))

    def test_it_adds_nothing_to_a_model_s_state(self):
        loss = SparseCategoricalCrossentropy()
        assert not list(loss.parameters()) and not list(loss.buffers()) and not loss.state_dict()
        buffer = io.BytesIO()
        torch.save(loss, buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=False).get_config() == loss.get_config()

    def test_its_repr_names_what_is_not_default(self):
        assert repr(SparseCategoricalCrossentropy()) == (
            "SparseCategoricalCrossentropy(from_logits=False)"
        )
        loss = SparseCategoricalCrossentropy(True, -1, "sum", 1, "n", "float64")
        assert repr(loss) == (
            "SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction='sum', "
            "axis=1, name='n', dtype='float64')"
        )
        loss = SparseCategoricalCrossentropy(label_smoothing=0.1, class_weight=torch.ones(999))
        assert repr(loss) == (
            "SparseCategoricalCrossentropy(from_logits=False, label_smoothing=0.1, "
            "class_weight=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...])"
        )

    def test_no_grad_and_inference_mode_give_the_same_value(self):
        loss = SparseCategoricalCrossentropy(from_logits=True)
        z = LOGITS.clone().requires_grad_()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                value = loss(LABELS, z)
            assert not value.requires_grad and torch.equal(value, loss(LABELS, z))

    def test_autocast_leaves_the_loss_in_float32(self):
        linear, loss = nn.Linear(5, 4), SparseCategoricalCrossentropy(from_logits=True)
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = linear(x)
            value = loss(LABELS, logits)
        assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
        assert torch.equal(value, loss(LABELS, logits.float()))
        value.backward()
        assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32

    def test_a_grad_scaler_steps_as_without_one(self):
        weights = []
        for enabled in (True, False):
            torch.manual_seed(0)
            model = nn.Linear(5, 4)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
            value = SparseCategoricalCrossentropy(from_logits=True)(LABELS, model(torch.ones(2, 5)))
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            weights.append(model.weight.detach().clone())
        torch.testing.assert_close(*weights)

    @pytest.mark.parametrize("from_logits", [True, False])
    def test_derivatives_through_the_module_match_finite_differences(self, from_logits):
        options = {"from_logits": from_logits, "ignore_class": 0, "dtype": "float64"}
        y, weight = torch.tensor([[0, 1, 2], [1, 1, 3]]), torch.rand(2, 3, dtype=torch.float64)
        mask = torch.tensor([[True, True, False], [True, True, True]])
        x = torch.randn(2, 3, 4, dtype=torch.float64).softmax(-1).requires_grad_()
        for reduction in ("none", "mean", "mean_with_sample_weight"):
            loss = SparseCategoricalCrossentropy(reduction=reduction, **options)

            def call(x, weight, loss=loss):
                return loss(y, x, weight, mask)

            weight.requires_grad_()
            assert torch.autograd.gradcheck(call, (x, weight))
            assert torch.autograd.gradgradcheck(call, (x, weight))

    def test_create_graph_gives_second_derivatives(self):
        z = LOGITS.clone().requires_grad_()
        value = SparseCategoricalCrossentropy(from_logits=True, reduction="sum")(LABELS, z)
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        first.square().sum().backward()
        p = LOGITS.softmax(-1)
        slope = p - torch.eye(4)[LABELS]
        want = 2 * p * (slope - (slope * p).sum(-1, keepdim=True))
        torch.testing.assert_close(z.grad, want)

    def test_per_sample_gradients_by_vmap(self):
        loss = SparseCategoricalCrossentropy(from_logits=True)
        per_example = torch.func.vmap(torch.func.grad(lambda z, y: loss(y, z)))(LOGITS, LABELS)
        torch.testing.assert_close(per_example, LOGITS.softmax(-1) - torch.eye(4)[LABELS])

    def test_meta_and_fake_tensors_give_shapes(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        loss = SparseCategoricalCrossentropy(from_logits=True, reduction="none", ignore_class=-1)
        assert loss(LABELS.to("meta"), LOGITS.to("meta")).shape == (2,)
        with FakeTensorMode():
            z = torch.empty(2, 4, requires_grad=True)
            value = loss(torch.zeros(2, dtype=torch.int64), z)
            value.sum().backward()
        assert value.shape == (2,) and z.grad is not None and z.grad.shape == (2, 4)


class TestCompiler:
    """Full graphs, one for all sizes."""

    def setup_method(self):
        torch.compiler.reset()

    @pytest.mark.parametrize("from_logits", [True, False])
    @pytest.mark.parametrize("options", [
        {}, {"reduction": "none", "ignore_class": -1}, {"reduction": "mean_with_sample_weight"},
    ])  # fmt: skip
    def test_compiled_values_and_gradients_are_the_eager_ones(self, from_logits, options):
        loss = SparseCategoricalCrossentropy(from_logits=from_logits, **options)
        compiled = torch.compile(loss, fullgraph=True)
        y = torch.randint(0, 5, (6, 4))
        if "ignore_class" in options:
            y[1, 2] = -1
        weight, mask = torch.rand(6, 1), torch.rand(6, 4) < 0.7
        x = torch.randn(6, 4, 5).softmax(-1)
        results = []
        for call in (loss, compiled):
            leaf = x.clone().requires_grad_()
            value = call(y, leaf, weight, mask)
            value.sum().backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves_are_computed_in_float32_when_compiled(self, dtype):
        loss = SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        z = (torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        y = torch.tensor([0, 1, 2, 3])
        torch.testing.assert_close(torch.compile(loss, fullgraph=True)(y, z), loss(y, z))

    @pytest.mark.parametrize("from_logits", [True, False])
    def test_new_sizes_compile_no_more_than_once(self, from_logits):
        """The first call may be for its sizes alone; the second is for all."""
        loss = SparseCategoricalCrossentropy(from_logits=from_logits, ignore_class=-1)
        graphs = []

        def count(graph, _inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(loss, fullgraph=True, backend=count)
        for b, t, c in ((3, 4, 5), (6, 7, 8), (9, 2, 11), (2, 31, 17), (5, 6, 64)):
            x = torch.rand(b, t, c, requires_grad=True)
            y = torch.randint(0, c, (b, t))
            got, want = compiled(y, x, torch.ones(b, 1)), loss(y, x, torch.ones(b, 1))
            torch.testing.assert_close(got, want)
        assert len(graphs) <= 2
        graphs.clear()
        torch.compiler.reset()
        dynamic = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
        for b, t, c in ((3, 4, 5), (6, 7, 8), (9, 2, 11)):
            dynamic(torch.randint(0, c, (b, t)), torch.rand(b, t, c))
        assert len(graphs) == 1

    def test_the_function_compiles_too(self):
        from torch_sce import sparse_categorical_crossentropy

        compiled = torch.compile(sparse_categorical_crossentropy, fullgraph=True)
        z = torch.randn(2, 3, 4, 5, requires_grad=True)
        y = torch.randint(0, 3, (2, 4, 5))
        got = compiled(y, z, True, axis=1)
        want = sparse_categorical_crossentropy(y, z, True, axis=1)
        torch.testing.assert_close(got, want)
        (a,), (b,) = (torch.autograd.grad(v.sum(), z) for v in (got, want))
        torch.testing.assert_close(a, b)

    def test_a_bad_label_gives_nan_in_its_row_when_compiled(self):
        loss = SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        z = LOGITS.clone().requires_grad_()
        losses = torch.compile(loss, fullgraph=True)(torch.tensor([7, 1]), z)
        losses[1].backward(retain_graph=True)
        assert losses.isnan().tolist() == [True, False]

    @pytest.mark.parametrize("strict", [True, False])
    def test_it_exports_with_dynamic_sizes(self, strict):
        class Step(nn.Module):
            def __init__(self):
                super().__init__()
                self.loss = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)

            def forward(self, y, z):
                return self.loss(y, z)

        sizes = {0: torch.export.Dim("b", min=2), 1: torch.export.Dim("t", min=2)}
        y, z = torch.randint(0, 5, (3, 4)), torch.randn(3, 4, 5)
        exported = torch.export.export(
            Step(), (y, z), dynamic_shapes={"y": sizes, "z": sizes}, strict=strict
        )
        y, z = torch.randint(0, 5, (6, 7)), torch.randn(6, 7, 5)
        y[2, 3] = -1
        torch.testing.assert_close(exported.module()(y, z), Step()(y, z))


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])


@pytest.fixture
def sequences():
    """Labels (B, T) with some to ignore, logits (B, T, C), and weights."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    y = torch.randint(-1, 4, (3, 3), generator=generator)
    z, w = torch.randn(3, 3, 4, generator=generator), torch.rand(3, 1, generator=generator)
    return y, z, w


class TestSmoothedLabels:
    @pytest.mark.parametrize("from_logits", [True, False])
    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", None])
    def test_they_are_smoothed_one_hot_targets(self, sequences, from_logits, reduction):
        y, z, w = sequences
        z = z if from_logits else z.sigmoid()  # not normalised
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.2, "axis": 1}
        sparse = SparseCategoricalCrossentropy(from_logits, -1, **options)
        hot = torch.nn.functional.one_hot(y.clamp(0), 4).movedim(-1, 1)
        leaf, other = (z.movedim(-1, 1).clone().requires_grad_() for _ in range(2))
        value = sparse(y, leaf, w)
        want = CategoricalCrossentropy(from_logits, **options)(hot, other, w, y != -1)
        assert torch.equal(value, want)
        value.sum().backward()
        want.sum().backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, other.grad)

    def test_it_is_not_where_name_and_dtype_are(self):
        with pytest.raises(TypeError, match=r"name must be a string or None, got 0\.1"):
            SparseCategoricalCrossentropy(True, None, "sum", -1, 0.1)  # pyright: ignore


class TestClassWeights:
    @pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight",
                                           "sum", None])  # fmt: skip
    def test_they_multiply_the_sample_weights(self, sequences, reduction):
        y, z, w = sequences
        options: dict[str, Any] = {"reduction": reduction}
        plain = SparseCategoricalCrossentropy(True, -1, **options)
        weighted = SparseCategoricalCrossentropy(True, -1, class_weight=WEIGHTS, **options)
        by_label = WEIGHTS[y.clamp(0)]
        assert torch.equal(weighted(y, z), plain(y, z, by_label))
        assert torch.equal(weighted(y, z, w), plain(y, z, by_label * w))
        mask = torch.tensor([[1, 1, 0]])
        assert torch.equal(weighted(y, z, w, mask), plain(y, z, by_label * w, mask))
        if reduction in ("sum_over_batch_size", "mean_with_sample_weight"):
            n = weighted.denominator(y, z.shape, w)
            assert torch.equal(n, plain.denominator(y, z.shape, by_label * w))
            parts = [weighted(y[i], z[i], w[i], denominator=n) for i in range(3)]
            torch.testing.assert_close(sum(parts), weighted(y, z, w))

    def test_both_averages_have_their_names(self, sequences):
        y, z, _ = sequences
        weight = SparseCategoricalCrossentropy(
            True, -1, "mean_with_sample_weight", class_weight=WEIGHTS
        )
        want = F.cross_entropy(z.flatten(0, 1), y.flatten(), WEIGHTS, ignore_index=-1)
        torch.testing.assert_close(weight(y, z), want)
        number = SparseCategoricalCrossentropy(True, -1, class_weight=WEIGHTS)
        losses = F.cross_entropy(
            z.flatten(0, 1), y.flatten(), WEIGHTS, ignore_index=-1, reduction="none"
        )
        torch.testing.assert_close(number(y, z), losses.sum() / (y != -1).sum())

    @pytest.mark.parametrize("given", [
        WEIGHTS.tolist(), WEIGHTS.numpy(), WEIGHTS.double(), nn.Parameter(WEIGHTS),
        {0: 0.5, 1: 2, 3: 3.0}, {np.int64(3): np.float32(3), 1.0: 2.0, "0": torch.tensor(0.5)},
    ])  # fmt: skip
    def test_they_may_be_given_in_many_ways(self, sequences, given):
        """A class that a dict leaves out has the weight 1, as in Keras."""
        y, z, w = sequences
        want = SparseCategoricalCrossentropy(True, -1, class_weight=WEIGHTS)(y, z, w)
        loss = SparseCategoricalCrossentropy(True, -1, class_weight=given)
        assert torch.equal(loss(y, z, w), want)
        assert not list(loss.parameters()) and not loss.state_dict()
        again = json.loads(json.dumps(loss.get_config()))
        copies = (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), loss.half(),
                  SparseCategoricalCrossentropy.from_config(again))  # fmt: skip
        for other in copies:
            assert torch.equal(other(y, z, w), want)

    @pytest.mark.parametrize("given", [WEIGHTS, {3: 3.0, 0: 0.5}])
    def test_they_compile_to_a_full_graph_and_take_transforms(self, sequences, given):
        torch.compiler.reset()
        y, z, w = sequences
        loss = SparseCategoricalCrossentropy(True, -1, label_smoothing=0.1, class_weight=given)
        want = loss(y, z, w)
        torch.testing.assert_close(torch.compile(loss, fullgraph=True)(y, z, w), want)
        each = torch.func.vmap(loss)(y, z, w)
        torch.testing.assert_close(each, torch.stack([loss(*x) for x in zip(y, z, w, strict=True)]))
        assert loss(y.to("meta"), z.to("meta")).shape == ()

    @pytest.mark.parametrize("axis", [1, -1])
    def test_that_of_targets_is_that_of_the_largest(self, axis):
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)
        t, z = torch.rand(2, 3, 4, 5, generator=generator).softmax(axis)
        weights = torch.rand(t.shape[axis], generator=generator)
        loss = CategoricalCrossentropy(True, axis=axis, class_weight=weights)
        plain = CategoricalCrossentropy(True, axis=axis)
        assert torch.equal(loss(t, z), plain(t, z, weights[t.argmax(axis)]))
        hot = t == t.amax(axis, keepdim=True)  # bool
        assert torch.equal(loss(hot, z), plain(hot, z, weights[t.argmax(axis)]))

    def test_those_that_do_not_fit_the_classes_are_refused(self, sequences):
        y, z, _ = sequences
        for given, message in (
            ([1.0, 2.0], "one weight for each of the 4 classes, got 2"),
            ({4: 1.0}, r"classes in \[0, 4\) as keys, got 4"),
        ):
            for loss, labels in (
                (SparseCategoricalCrossentropy(True, -1, class_weight=given), y),
                (CategoricalCrossentropy(True, class_weight=given), z.softmax(-1)),
            ):
                with pytest.raises(ValueError, match=f"^class_weight must have {message}"):
                    loss(labels, z)

    def test_a_label_outside_is_still_an_error(self, sequences):
        _, z, _ = sequences
        loss = SparseCategoricalCrossentropy(True, class_weight={1: 2.0})
        with pytest.raises(ValueError, match="y_true must hold labels"):
            loss(torch.full((3, 3), 7), z)
