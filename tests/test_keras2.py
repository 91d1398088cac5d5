"""torch_sce.keras2: what tf_keras gives, asked live; and what it shares with the main module."""

import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_case
from mutations import OF_KERAS2

import torch_sce
from torch_sce import keras2
from torch_sce.crosscheck import campaign
from torch_sce.crosscheck.answers import ours
from torch_sce.crosscheck.campaign import drawn
from torch_sce.crosscheck.cases import LOSSES, Case, Keras2Case
from torch_sce.crosscheck.command import AGREEMENT, USAGE, main
from torch_sce.crosscheck.compare import AGREES, DELIBERATE, MISMATCH, judge, mismatches
from torch_sce.crosscheck.differences_keras2 import DIFFERENCES_KERAS2
from torch_sce.crosscheck.live import LiveOracle
from torch_sce.crosscheck.profiles import KERAS2

Sparse, Categorical = keras2.SparseCategoricalCrossentropy, keras2.CategoricalCrossentropy
Y = torch.tensor([[0, 2, 1], [1, 1, 0]])  # (B, T)
Z = torch.tensor(np.random.default_rng(0).standard_normal((2, 3, 4)), dtype=torch.float32)


@pytest.fixture(scope="module")
def tf_keras(tensorflow):
    """The real tf_keras in its own process."""
    with LiveOracle("tf_keras") as oracle:
        yield oracle


@pytest.fixture(scope="module")
def answered(tf_keras):
    """The first cases of the profile but the largest, some of metrics, and tf_keras's answers."""
    cases = list(filter(is_asked, drawn(0, range(2000), KERAS2)))
    return list(zip(cases, tf_keras.answers(cases), strict=True))


def is_asked(case):
    """Some rules of metrics show only where shapes differ from one update to the next."""
    unlike = case.form == "metric" and case.y_pred.ndim > 2 and len(case.more) > 0
    return case.y_pred.size < 20_000 and (case.index < 400 or unlike)


class Open:
    """An oracle that stays open after it has been used."""

    def __init__(self, oracle, name):
        self.oracle, self.versions = oracle, oracle.versions
        assert name == oracle.name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __getattr__(self, name):
        return getattr(self.oracle, name)


def make(y_true, y_pred, sample_weight=None, mask=None, more=(), lists=False, **options: Any):
    """A case of Keras 2, from the arguments of a call."""
    case = make_case(y_true, y_pred, sample_weight, mask, **options)
    given = {each.name: getattr(case, each.name) for each in fields(Case)}
    kept = {"dtype"} if case.is_loss else set()
    kept |= {"axis"} if case.is_sparse and case.form != "function" else set()
    given["options"] = {key: x for key, x in case.options.items() if key not in kept}
    return Keras2Case(**given | {"more": more, "as_lists": lists})


class TestTheCrossCheck:
    def test_random_cases_agree_with_tf_keras(self, answered):
        verdicts = [judge(case, answer, ours(case)) for case, answer in answered]
        assert mismatches(verdicts) == []
        agreeing = [verdict for verdict in verdicts if verdict.outcome == AGREES]
        assert len(verdicts) > 400 and len(agreeing) > 0.8 * len(verdicts)

    @pytest.mark.filterwarnings("default")  # a mutation may make PyTorch warn
    @pytest.mark.parametrize("name", OF_KERAS2)
    def test_it_catches(self, name, answered, monkeypatch):
        mutation = OF_KERAS2[name]
        likely_first = sorted(answered, key=lambda pair: not mutation.is_about(pair[0]))
        mutation.apply(monkeypatch)

        def is_caught(case, answer):
            mine = ours(case)
            wrong = mine.error in (None, "ValueError")
            return wrong and judge(case, answer, mine).outcome == MISMATCH

        assert any(is_caught(case, answer) for case, answer in likely_first)

    def test_where_labels_are_not_read_bad_ones_give_nan(self, answered, monkeypatch):
        """What `--device cuda` expects, on the CPU with the reading of labels turned off."""
        monkeypatch.setattr("torch_sce.samples.values_can_be_read", lambda *tensors: False)
        verdicts = [judge(case, answer, ours(case), poisons=True) for case, answer in answered]
        assert mismatches(verdicts) == []
        assert any(verdict.reason == "bad labels on a device" for verdict in verdicts)

    def test_the_command(self, tf_keras, capsys, monkeypatch):
        monkeypatch.setattr(campaign, "LiveOracle", lambda name: Open(tf_keras, name))
        arguments = ["--profile", "keras2", "--cases", "3"]
        assert main(arguments) == AGREEMENT
        assert "cases agree with tf_keras" in capsys.readouterr().out
        assert main([*arguments, "--oracle", "float64"]) == AGREEMENT
        assert "3 of 3 cases agree with the float64 rules" in capsys.readouterr().out

    @pytest.mark.parametrize("oracle", ["tf.keras", "recorded", "keras-torch"])
    def test_other_oracles_are_wrong_usage(self, oracle, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["--profile", "keras2", "--oracle", oracle])
        assert stopped.value.code == USAGE
        assert "--profile keras2 has no --oracle but tf_keras" in capsys.readouterr().err

    def test_a_mismatch_names_the_profile(self):
        (case,) = drawn(0, [5], KERAS2)
        said = str(judge(case, None, ours(make(Y, Z))))
        assert "--seed 0 --case 5 --profile keras2" in said


RNG = np.random.default_rng(1)
LOGITS = RNG.standard_normal((2, 2, 2, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, (2, 2, 2))
TARGETS = np.eye(3, dtype=np.float32)[LABELS]
TOP, ACCURACY = "SparseTopKCategoricalAccuracy", "SparseCategoricalAccuracy"
PLANTED = {  # a case for each row of the table
    "half-precision arithmetic": make(
        np.zeros(10_000, int), np.array([[0, 7]] * 10_000, np.float16),
        upstream=np.ones(1, np.float32), from_logits=True,
    ),
    "weights as a list": make(LABELS[0, 0], LOGITS[0, 0].astype(np.float64), [0.1, 0.7]),
    "lists with a last axis of size 1": make(
        TARGETS[0, 0, :, :, None], LOGITS[0, 0], name=LOSSES[1], lists=True
    ),
    "rounded weights": make(
        [1, 2], np.array([1, 3], np.int32), np.array([0.5, 1.5]), [True, True],
        form="metric", name="Accuracy",
    ),
    "larger than the losses": make(LABELS[0, 0, :1], LOGITS[0, 0, :1], np.ones(2)),
    "wrong axis": make(LABELS, LOGITS, np.ones(2)),
    "one weight of a metric": make(LABELS, LOGITS, np.ones(1), form="metric", name=ACCURACY),
    "masked values": make(LABELS[0, 0], LOGITS[0, 0], None, [False, False], from_logits=True),
    "combined masks": make(LABELS[0, 0], LOGITS[0, 0], None, [1, 1], ignore_class=-1),
    "one position": make(0, LOGITS[0, 0, 0], ignore_class=-1),
    "one class": make([0, 0], np.ones((2, 1), np.float32)),
    "order of labels": make(np.ones((3, 2, 1), int), Z.numpy(), from_logits=True),
    "axis out of range": make(LABELS[0, 0], LOGITS[0, 0], axis=3, form="function"),
    "negative axis": make(
        TARGETS[0, 0], LOGITS[0, 0], name=LOSSES[1], axis=-2, from_logits=True
    ),
    "targets that do not sum to 1": make(
        TARGETS[0, 0] * 2, LOGITS[0, 0], name=LOSSES[1], from_logits=True
    ),
    "smoothing out of range": make(
        TARGETS[0, 0], LOGITS[0, 0], name=LOSSES[1], from_logits=True, label_smoothing=1.5
    ),
    "no classes": make(np.ones((2, 0), "f"), np.ones((2, 0), "f"), name=LOSSES[1]),
    "shapes of metrics": make([1], LOGITS[0, 0], form="metric", name=ACCURACY),
    "trailing axes of size 1 of a weight": make(
        LOGITS[0, 0].argmax(-1), LOGITS[0, 0], np.ones((2, 1, 1)), form="metric", name=ACCURACY
    ),
    "top-k of other dtypes": make(
        LABELS[0, 0], LOGITS[0, 0], form="metric", name=TOP, k=1, dtype="float64"
    ),
    "k below 1": make(LABELS[0, 0], LOGITS[0, 0], form="metric", name=TOP, k=0),
}  # fmt: skip


def test_every_difference_is_planted():
    assert list(PLANTED) == [each.name for each in DIFFERENCES_KERAS2]


@pytest.mark.parametrize("name", PLANTED)
def test_a_difference_is_one(name, tf_keras):
    case = PLANTED[name]
    verdict = judge(case, next(tf_keras.answers([case])), ours(case))
    assert (verdict.outcome, verdict.reason) == (DELIBERATE, name)


class TestTheLosses:
    def test_a_mean_of_nothing_is_nan_and_has_the_gradient_0(self):
        for mask, ignored in ((torch.zeros(2, 3), None), (None, 7)):
            z = Z.clone().requires_grad_()
            value = Sparse(True, ignored)(torch.where(Y < 0, Y, 7), z, mask=mask)
            value.backward()
            assert value.isnan() and z.grad is not None and z.grad.eq(0).all()
            assert Sparse(True, ignored, "sum")(Y * 0 + 7, Z, mask=mask) == 0

    @pytest.mark.parametrize("loss", [Sparse(True), Categorical(True)])
    def test_weights_of_examples_weigh_their_positions(self, loss):
        y = Y if isinstance(loss, Sparse) else torch.eye(4)[Y]
        w = torch.tensor([1.0, 3.0])
        assert torch.equal(loss(y, Z, w), loss(y, Z, w[:, None].expand(2, 3)))
        assert torch.equal(loss(y, Z, mask=w > 2), loss(y[1:], Z[1:]))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_results_have_the_dtype_of_predictions(self, dtype):
        z, t = Z.to(dtype), torch.eye(4)[Y]
        for value in (
            Sparse(True)(Y, z, [0.5, 1.0]),
            Sparse(True, reduction="none")(Y, z),
            Categorical(True)(t, z),
            keras2.sparse_categorical_crossentropy(Y, z, True),
            keras2.categorical_crossentropy(t, z, True),
        ):
            assert value.dtype == dtype

    def test_labels_of_another_rank_are_flattened(self):
        want = keras2.sparse_categorical_crossentropy(Y, Z, True)
        for y in (Y.reshape(-1), Y[..., None], Y[..., None, None], Y.float() + 0.5):
            assert torch.equal(keras2.sparse_categorical_crossentropy(y, Z, True), want)
            assert torch.equal(Sparse(True, reduction="none")(y, Z), want)
        first = Z.movedim(-1, 1)  # (B, C, T)
        for y in (Y, Y[:, None], Y.reshape(-1)):
            found = keras2.sparse_categorical_crossentropy(y, first, True, 1)
            torch.testing.assert_close(found, want)

    def test_the_function_has_the_axis_before_the_ignored_class(self):
        found = keras2.sparse_categorical_crossentropy(Y, Z, True, -1, 2)
        want = torch_sce.sparse_categorical_crossentropy(Y, Z, True, 2, -1)
        assert torch.equal(found, want) and found[0, 1] == 0

    def test_lists_and_arrays_are_accepted(self):
        weights = [0.25, 3]
        want = Sparse(True)(Y, Z, weights)
        assert torch.equal(Sparse(True)(Y.tolist(), Z.tolist(), weights), want)
        assert torch.equal(Sparse(True)(Y.numpy(), Z.numpy(), np.array(weights)), want)

    @pytest.mark.parametrize("smoothing", [None, 0.1])
    def test_gradients_are_derivatives(self, smoothing):
        loss = Sparse(True, 1) if smoothing is None else Categorical(True, smoothing)
        y = Y if smoothing is None else torch.eye(4)[Y].double()
        weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        given = (Z.double().requires_grad_(), weight)
        assert torch.autograd.gradcheck(lambda z, w: loss(y, z, w), given)

    @pytest.mark.parametrize("reduction", ["auto", "sum", "none"])
    def test_they_compile_in_one_graph(self, reduction):
        torch.compiler.reset()
        for loss, y in (
            (Sparse(True, 1, reduction), Y),
            (Categorical(True, 0.1, reduction=reduction), torch.eye(4)[Y]),
        ):
            compiled = torch.compile(loss, fullgraph=True, backend="eager")
            results = []
            for call in (loss, compiled):
                z = Z.clone().requires_grad_()
                value = call(y, z, torch.tensor([1.0, 3.0]), torch.tensor([[1], [0]]))
                value.sum().backward()
                results.append((value.detach(), z.grad))
            torch.testing.assert_close(*results)

    def test_nothing_that_counts_is_nan_in_a_graph_too(self):
        torch.compiler.reset()
        compiled = torch.compile(Sparse(True, 7), fullgraph=True, backend="aot_eager")
        z = Z.clone().requires_grad_()
        value = compiled(torch.full_like(Y, 7), z)
        value.backward()
        assert value.isnan() and z.grad is not None and z.grad.eq(0).all()

    def test_the_functions_compile_in_one_graph(self):
        torch.compiler.reset()
        for function, y in (
            (keras2.sparse_categorical_crossentropy, Y.reshape(-1)),
            (keras2.categorical_crossentropy, torch.eye(4)[Y]),
        ):
            compiled = torch.compile(function, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(y, Z, True), function(y, Z, True))

    def test_they_have_tf_keras_s_arguments_in_its_order(self):
        assert repr(Sparse(True, -1, "sum", "a")) == (
            "SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction='sum', "
            "name='a')"
        )
        assert repr(Categorical(True, 0.1, 1, "none", "a")) == (
            "CategoricalCrossentropy(from_logits=True, label_smoothing=0.1, axis=1, "
            "reduction='none', name='a')"
        )

    @pytest.mark.parametrize(
        "loss", [Sparse(True, -1, "sum", "a"), Categorical(True, 0.1, 1, "none"), Sparse()]
    )
    def test_configs_copies_and_pickles_have_the_options(self, loss):
        for other in (
            type(loss).from_config(loss.get_config()),
            type(loss).from_config({"fn": "a function", **loss.get_config()}),
            copy.deepcopy(loss),
            pickle.loads(pickle.dumps(loss)),
        ):
            assert repr(other) == repr(loss) and other.get_config() == loss.get_config()
        assert "dtype" not in loss.get_config()

    def test_options_are_parsed_when_they_are_set(self):
        loss = Sparse()
        loss.ignore_class = 1.5
        assert loss.ignore_class == 1  # as labels are
        loss.reduction = "sum"
        for name, value in {"reduction": None, "ignore_class": "1", "from_logits": "no"}.items():
            with pytest.raises((ValueError, TypeError), match=name):
                setattr(loss, name, value)

    @pytest.mark.parametrize(("call", "message"), [
        (lambda: Sparse(reduction="mean"),  # pyright: ignore
         r"reduction must be one of \('auto', 'sum_over_batch_size', 'sum', 'none'\), got 'mean'"),
        (lambda: Sparse(axis=1), "has no argument 'axis'"),  # pyright: ignore
        (lambda: Sparse(dtype="float64"), "has no argument 'dtype'"),  # pyright: ignore
        (lambda: Sparse()(Y, Z, weight=Y),  # pyright: ignore
         "the call of SparseCategoricalCrossentropy has no argument 'weight': use sample_weight"),
        (lambda: Sparse()(Y, Z, torch.ones(3)),
         r"sample_weight must broadcast to the losses' shape \(2, 3\), got \(3,\)"),
        (lambda: Sparse()(Y[None], Z[None], mask=torch.ones(2)),
         r"mask must broadcast to the losses' shape \(1, 2, 3\), got \(2,\)"),
        (lambda: Sparse()(Y.T[..., None], Z), r"y_true must have the shape of y_pred without"),
        (lambda: Sparse()(Y.T, Z), r"y_true must have the shape of y_pred without"),
        (lambda: Sparse()(Y + 4, Z), r"y_true must hold labels in \[0, 4\)"),
        (lambda: Sparse()(Y, Y[..., None]), r"y_pred must be float16, bfloat16, float32 or"),
        (lambda: Categorical()(Y, Z), r"y_true must have y_pred's shape"),
        (lambda: keras2.sparse_categorical_crossentropy(Y, Z, axis=5), r"axis must be in \[-3,"),
        (lambda: keras2.sparse_categorical_crossentropy(Y, Z, dim=1),  # pyright: ignore
         "has no argument 'dim': use axis"),
        (lambda: keras2.categorical_crossentropy(Z, Z, weight=1),  # pyright: ignore
         "has no argument 'weight'"),
    ])  # fmt: skip
    def test_errors_name_the_argument(self, call, message):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


METRICS = [getattr(keras2.metrics, name) for name in keras2.metrics.__all__]


def updates(cls) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch of sequences, and one of shorter ones."""
    batches = []
    for y, z in ((Y, Z), (Y[:, :1], -Z[:, :1])):
        p = z.softmax(-1)
        if cls is keras2.metrics.Accuracy:
            p = p.argmax(-1)
        batches.append((y if "Sparse" in cls.__name__ or p.ndim == 2 else torch.eye(4)[y], p))
    return batches


class TestTheMetrics:
    def test_they_have_the_names_of_the_main_ones(self):
        assert keras2.metrics.__all__ == torch_sce.metrics.__all__

    @pytest.mark.parametrize("cls", METRICS)
    def test_every_element_counts(self, cls):
        metric, values = cls(), []
        for y, p in updates(cls):
            metric.update_state(y, p)
            each = cls()
            each.update_state(y, p)
            values += [each.result()] * (y.shape[0] * y.shape[1])
        assert metric.count == len(values) == 8
        torch.testing.assert_close(metric.result(), torch.stack(values).mean())

    @pytest.mark.parametrize("cls", METRICS)
    def test_weights_weigh_elements(self, cls):
        (y, p), _ = updates(cls)
        weights: list[Any] = [torch.tensor([1.0, 2.0]), torch.tensor([[1.0] * 3, [2.0] * 3])]
        found = []
        for weight in weights:
            found.append(cls())
            found[-1].update_state(y, p, weight)
            assert found[-1].count == 9
        assert found[0].result() == found[1].result()
        scaled, plain = cls(), cls()
        scaled.update_state(y, p, 2)
        plain.update_state(y, p)
        assert scaled.count == 12 and scaled.result() == plain.result()

    @pytest.mark.parametrize("cls", METRICS)
    def test_a_mask_is_a_factor_of_the_weights(self, cls):
        (y, p), _ = updates(cls)
        masked, part = cls(), cls()
        masked.update_state(y, p, mask=torch.tensor([False, True]))
        part.update_state(y[1:], p[1:])
        assert masked.count == 3 and masked.result() == part.result()

    def test_ignored_positions_are_not_counted(self):
        metric = keras2.metrics.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)
        metric.update_state(Y, Z)
        assert metric.count == 3
        torch.testing.assert_close(metric.result(), Sparse(True, 1)(Y, Z))
        metric.reset_state()
        metric.update_state(torch.ones_like(Y), Z)
        assert metric.count == 0 and metric.result() == 0

    @pytest.mark.parametrize("cls", METRICS)
    def test_it_compiles_and_has_its_options_in_its_config(self, cls):
        torch.compiler.reset()
        metric, other = cls(name="a"), cls(name="a")
        compiled = torch.compile(other.update_state, fullgraph=True, backend="eager")
        for y, p in updates(cls):
            metric.update_state(y, p)
            compiled(y, p)
        torch.testing.assert_close(metric.result(), other.result())
        again = cls.from_config(metric.get_config())
        assert repr(again) == repr(metric) == f"{cls.__name__}(name='a')"

        class Mine(cls):
            pass

        assert repr(Mine.from_config(metric.get_config())) == "Mine(name='a')"

    def test_a_collection_keeps_them_apart_from_the_main_ones(self):
        from torchmetrics import MetricCollection

        both = MetricCollection(
            {"2": keras2.metrics.Accuracy(), "3": torch_sce.metrics.Accuracy()},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both.update(Y[:, 0], Y[:, 0])  # the same total and count
            both.update(Y, Y)
        assert both["2"].count == 8 and both["3"].count == 4

    def test_they_are_imported_when_they_are_asked_for(self):
        program = """
import sys
sys.modules["torchmetrics"] = None
import torch_sce
assert "torch_sce.keras2" not in sys.modules
print(torch_sce.keras2.SparseCategoricalCrossentropy())
torch_sce.keras2.metrics
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout == "SparseCategoricalCrossentropy(from_logits=False)\n"
        assert "torch_sce.metrics needs torchmetrics" in done.stderr
        with pytest.raises(AttributeError, match=r"'torch_sce.keras2' has no attribute 'nothing'"):
            _ = keras2.nothing  # pyright: ignore


def test_the_names_are_those_of_the_main_module():
    """But for those that no Keras has."""
    main = {name for name in torch_sce.__all__ if "inear" not in name and name != "explain"}
    assert set(keras2.__all__) == main
