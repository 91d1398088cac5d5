"""The metrics: Keras's methods and means, and torchmetrics' features."""

import copy
import pickle
import re
import socket
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics

import torch_sce
from torch_sce import metrics
from torch_sce.reduction import example_means
from torch_sce.samples import leading

NAN = float("nan")
ALL = [getattr(metrics, name) for name in metrics.__all__]
OPTIONS: dict[str, dict[str, list]] = {name: {} for name in metrics.__all__} | {
    "SparseTopKCategoricalAccuracy": {"k": [1, 5], "from_sorted_ids": [False, True]},
    "TopKCategoricalAccuracy": {"k": [1, 5]},
    "SparseCategoricalCrossentropy": {
        "from_logits": [False, True], "ignore_class": [None, -1], "axis": [-1, 1],
    },
    "CategoricalCrossentropy": {
        "from_logits": [False, True], "label_smoothing": [0.0, 0.1], "axis": [-1, 1],
    },
}  # fmt: skip


def batch(cls, shape=(6,), classes=4, seed=0):
    """Labels and predictions for this metric."""
    generator = torch.Generator().manual_seed(seed)
    y, p = torch.randint(0, classes, shape, generator=generator), torch.rand(*shape, classes)
    if cls is metrics.Accuracy:
        return y, torch.randint(0, classes, shape, generator=generator)
    if cls.__name__.startswith("Sparse"):
        return y, p
    return torch.eye(classes)[y], p


@pytest.mark.parametrize("cls", ALL)
class TestEveryMetric:
    def test_it_is_0_before_any_update_and_says_nothing(self, cls):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cls().result().item() == 0

    def test_two_batches_give_the_mean_over_their_examples(self, cls):
        (y1, p1), (y2, p2) = batch(cls), batch(cls, (3,), seed=1)
        metric = cls()
        metric.update_state(y1, p1)
        first = metric.result()
        metric.update_state(y2, p2)
        other = cls()
        other.update_state(y2, p2)
        want = (6 * first + 3 * other.result()) / 9
        torch.testing.assert_close(metric.result(), want)
        assert metric.count == 9
        metric.reset_state()
        assert metric.result() == 0 and metric.count == 0
        metric.update_state(y1, p1)
        assert metric.result() == first

    def test_torchmetrics_calls_take_predictions_first(self, cls):
        (y1, p1), (y2, p2) = batch(cls), batch(cls, (3,), seed=1)
        weight = torch.rand(6)
        keras, metric = cls(), cls()
        keras.update_state(y1, p1, weight)
        metric.update(p1, y1, weight)
        assert torch.equal(metric.compute(), keras.result())
        alone = cls()
        alone.update_state(y2, p2)
        assert torch.equal(metric(p2, y2), alone.result())  # forward: of this batch alone
        keras.update_state(y2, p2)
        torch.testing.assert_close(metric.compute(), keras.result())
        metric.reset()
        assert metric.result() == 0

    def test_what_is_masked_is_not_there(self, cls):
        y, p = batch(cls, (4, 3))
        keep = torch.tensor([True, False, True, True])
        metric, other = cls(), cls()
        metric.update_state(y, p, mask=keep)
        other.update_state(y[keep], p[keep])
        torch.testing.assert_close(metric.result(), other.result())
        assert metric.count == 3
        if p.is_floating_point():
            p[1] = NAN
            y = y.clone()
            y[1] = 99
            again = cls()
            again.update_state(y, p, mask=keep)
            assert torch.equal(again.result(), metric.result())

    def test_arrays_and_lists_are_taken(self, cls):
        y, p = batch(cls)
        results = []
        for given in ((y, p), (y.numpy(), p.numpy()), (y.tolist(), p.tolist())):
            metric = cls()
            metric.update_state(*given, sample_weight=[1, 2, 3, 4, 5, 6.5])
            results.append(metric.result())
        assert torch.equal(results[0], results[1])
        torch.testing.assert_close(results[0], results[2])

    def test_it_lives_in_a_checkpoint_a_copy_and_a_pickle(self, cls):
        y, p = batch(cls)
        metric = cls()
        metric.update_state(y, p)
        metric.persistent(True)
        again = cls()
        again.persistent(True)
        again.load_state_dict(metric.state_dict())
        for other in (again, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
            other.update_state(y, p)
            assert other.count == 12
            torch.testing.assert_close(other.result(), metric.result())

    def test_a_config_round_trips(self, cls):
        metric = cls(name="mine", dtype="float64")
        config = metric.get_config()
        assert config["name"] == "mine" and config["dtype"] == "float64"
        for given in (config, {"class_name": cls.__name__, "config": config}):
            again = cls.from_config(given)
            assert again.get_config() == config and repr(again) == repr(metric)
        assert repr(metric) == f"{cls.__name__}(name='mine', dtype='float64')"
        assert cls(name=None).name == cls().name
        assert cls.from_config({"name": "keras", "dtype": "float32"}).name == "keras"

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_the_result_has_the_metric_s_dtype(self, cls, dtype):
        made, set_later, cast = cls(dtype=dtype), cls(), cls()
        set_later.dtype = dtype
        assert cast.set_dtype(dtype) is cast
        for metric in (made, set_later, cast):
            metric.update_state(*batch(cls))
            assert metric.dtype == metric.result().dtype == getattr(torch, dtype)
            assert metric.get_config()["dtype"] == dtype

    def test_casting_a_model_does_not_round_its_state(self, cls):
        for cast in (
            lambda metric: metric.half(),
            lambda metric: metric.to(torch.bfloat16),
            lambda metric: torch.nn.ModuleDict({"m": metric}).to(torch.float16)["m"],
            lambda metric: metric.set_dtype("float16"),
            lambda metric: torchmetrics.MetricCollection([metric]).set_dtype(torch.float16),
        ):
            metric = cls()
            metric.update_state(*batch(cls), sample_weight=2049.0)
            cast(metric)
            assert int(metric.count) == 2049
            assert metric.count.dtype == metric.total.dtype == torch.float64
            metric.reset()
            assert int(metric.count) == 0 and metric.count.dtype == torch.float64
        assert metric.to("meta").count.device.type == "meta"

    def test_its_options_are_attributes_that_only_the_constructor_sets(self, cls):
        metric = cls()
        assert set(metric.options) == set(OPTIONS[cls.__name__])
        for name, values in OPTIONS[cls.__name__].items():
            for value in values:
                metric = cls(**{name: value})
                assert getattr(metric, name) == metric.get_config()[name] == value
                with pytest.raises(
                    AttributeError, match=rf"{name} of a metric .*\({name}={value!r}"
                ):
                    setattr(metric, name, value)
                assert getattr(copy.deepcopy(metric), name) == value

    def test_its_name_and_dtype_are_parsed_when_they_are_set(self, cls):
        metric = cls()
        metric.name, metric.dtype = "mine", "float64"
        assert metric.get_config() == cls(name="mine", dtype="float64").get_config()
        metric.name = None
        assert metric.name == cls().name
        for name, value in (("name", 3), ("dtype", "int32")):
            with pytest.raises(TypeError, match=f"^{name} must be .*, got {value!r}"):
                setattr(metric, name, value)
            with pytest.raises(TypeError, match=f"^{name} must be .*, got {value!r}"):
                cls(**{name: value})

    def test_a_subclass_with_a_constructor_of_its_own_lives_as_others_do(self, cls):
        def init(self, tag):
            cls.__init__(self, name="n")
            self.tag = tag

        def passing(self, tag="", **kwargs):
            cls.__init__(self, **kwargs)
            self.tag = tag

        metric = type("Mine", (cls,), {"__init__": init})("t")
        assert repr(metric) == "Mine(name='n')"
        assert "(0): Mine(name='n')" in repr(torch.nn.Sequential(metric))
        assert copy.deepcopy(metric).get_config() == metric.get_config()
        with pytest.raises(ValueError, match=r"a Mine, which has no options .* only \['tag'\]"):
            type(metric).from_config(metric.get_config())
        other = type("Passing", (cls,), {"__init__": passing})
        again = other.from_config(metric.get_config() | {"tag": "t"})
        assert again.get_config() == metric.get_config() and again.tag == "t"
        renamed = type("Renamed", (cls,), {"get_config": lambda self: {"other": 1}})()
        assert repr(renamed) == "Renamed()"

    @pytest.mark.parametrize(("config", "error", "message"), [
        (None, TypeError, "config must be a dict, as .* got None"),
        ({"config": [1]}, TypeError, r"config must be a dict, .* got {'config': \[1\]}"),
        ({"class_name": "Mean", "config": {}}, ValueError, "got one of a Mean"),
        ({"reduction": "sum"}, ValueError, r"no options \['reduction'\], only \['"),
        ({"kwargs": 1, "options": 2}, ValueError, r"no options \['kwargs', 'options'\]"),
    ])  # fmt: skip
    def test_a_config_of_something_else_is_refused(self, cls, config, error, message):
        with pytest.raises(error, match=message):
            cls.from_config(config)

    def test_it_updates_in_a_compiled_full_graph(self, cls):
        torch.compiler.reset()
        y, p = batch(cls)
        weight = torch.rand(6)
        metric, other = cls(), cls()
        step = torch.compile(metric.update_state, fullgraph=True, backend="eager")
        for _ in range(12):
            step(y, p, weight)
            other.update_state(y, p, weight)
        # PyTorch 2.6 does not compile the context managers in torchmetrics' `compute`.
        whole = not torch.__version__.startswith("2.6.")
        result = torch.compile(metric.result, fullgraph=whole, backend="eager")
        torch.testing.assert_close(result(), other.result())
        assert torch.equal(metric.count, other.count)
        torch.compile(metric.reset_state, fullgraph=True, backend="eager")()
        assert metric.count == 0 and metric.result() == 0

    def test_nothing_keeps_a_graph(self, cls):
        y, p = batch(cls)
        weight, mask = (torch.rand(6, requires_grad=True) for _ in range(2))
        metric = cls()
        value = metric(p.requires_grad_() if p.is_floating_point() else p, y, weight, mask)
        assert not value.requires_grad and not metric.result().requires_grad
        torch.testing.assert_close(metric.count.float(), (weight * mask).sum().detach())
        copy.deepcopy(metric)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_values_are_those_of_the_function_in_any_dtype(self, cls, dtype):
        if cls.__name__.endswith("Crossentropy"):
            y, p = torch.tensor([0, 1]), torch.eye(3)[[1, 1]].to(dtype)
            labels = y if cls.__name__.startswith("Sparse") else torch.eye(3)[y]
            function = getattr(torch_sce, cls().name)
            metric = cls(dtype="float64")
            metric.update_state(labels, p)
            assert metric.result() == function(labels, p).double().mean()

    def test_it_says_whether_more_is_better(self, cls):
        assert cls().higher_is_better is not cls.__name__.endswith("Crossentropy")


class TestMeans:
    """`example_means`; the cross-check compares all shapes of weights with Keras."""

    VALUES = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])

    @pytest.mark.parametrize(
        ("weight", "total", "count"),
        [(None, 1.0, 2.0), (2.0, 1.0, 2.0), ([3.0, 1.0], 2 + 1 / 3, 4.0),
         ([[3.0], [1.0]], 2 + 1 / 3, 4.0), ([[3, 6, 0], [0, 0, 3]], 2.0, 4.0),
         ([[1.0, 1.0, 4.0]], 5 / 3 + 4 / 3, 4.0), ([5.0], 5.0, 10.0)],
    )  # fmt: skip
    def test_weights_belong_to_the_leading_axes(self, weight, total, count):
        weight = None if weight is None else torch.tensor(weight)
        got = example_means(self.VALUES, weight)
        assert float(got[0]) == pytest.approx(total) and float(got[1]) == pytest.approx(count)

    def test_batches_of_other_lengths_weigh_by_their_examples(self):
        """Keras 3 has 0.5 here, Keras 2, which counts elements, 0.75."""
        metric = metrics.SparseCategoricalAccuracy()
        metric.update_state([[0, 0, 0]], torch.eye(2)[:1].expand(1, 3, 2))
        metric.update_state([[1]], torch.eye(2)[:1].expand(1, 1, 2))
        assert metric.result() == 0.5

    def test_an_ignored_sample_is_counted_unless_there_are_weights(self):
        y, p = [0, -1, 2], torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
        losses = -np.log([0.9, 0.6])
        metric = metrics.SparseCategoricalCrossentropy(ignore_class=-1)
        metric.update_state(y, p)
        assert metric.result().item() == pytest.approx(losses.sum() / 3, rel=1e-5)
        metric.reset_state()
        metric.update_state(y, p, sample_weight=[1, 1, 1])
        assert metric.result().item() == pytest.approx(losses.sum() / 2, rel=1e-5)

    @pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 2, 3), (2, 3, 1, 2)])
    def test_a_weight_of_another_shape_is_refused(self, shape):
        rule = re.escape(f"(2, 3) from the first axis, as (2,) does, got {shape}")
        with pytest.raises(ValueError, match="sample_weight must broadcast to .* " + rule):
            leading("sample_weight", torch.ones(shape), self.VALUES.shape)
        metric = metrics.SparseCategoricalCrossentropy()
        with pytest.raises(ValueError, match="mask must broadcast to .* " + rule):
            metric.update_state([[0, 0, 0]] * 2, torch.rand(2, 3, 4), mask=torch.ones(shape))

    def test_counts_are_exact_past_2_to_the_24(self):
        metric = metrics.SparseCategoricalAccuracy()
        metric.update_state([0], [[1.0, 0.0]], sample_weight=[2.0**24])
        for _ in range(3):
            metric.update_state([1], [[1.0, 0.0]])
        assert metric.count == 2**24 + 3 and metric.total == 2**24


def test_tensors_given_to_a_constructor_are_refused():
    y, p = batch(metrics.SparseCategoricalAccuracy)
    given: Any = (y, p)
    with pytest.raises(TypeError, match=r"name must be .* tensors where it is called or updated"):
        metrics.SparseCategoricalAccuracy(*given)
    with pytest.raises(TypeError, match="k must be an integer"):
        metrics.SparseTopKCategoricalAccuracy(*given)
    with pytest.raises(TypeError, match="are labels and predictions swapped"):
        metrics.SparseCategoricalCrossentropy().update(y, p)


class TestCollection:
    def test_top_1_and_top_5_stay_apart_even_if_their_first_batch_is_the_same(self):
        """torchmetrics merges metrics if their states are equal after the first batch."""
        many = torchmetrics.MetricCollection({
            "top1": metrics.SparseTopKCategoricalAccuracy(k=1),
            "top2": metrics.SparseTopKCategoricalAccuracy(k=2),
            "accuracy": metrics.SparseCategoricalAccuracy(),
            "again": metrics.SparseCategoricalAccuracy(name="again"),
            "theirs": torchmetrics.Accuracy("multiclass", num_classes=4),
        })  # fmt: skip
        many.update(torch.eye(4)[:2], torch.tensor([0, 1]))
        many.update(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([1]))
        found = {key: value.item() for key, value in many.compute().items()}
        two_thirds = pytest.approx(2 / 3)
        assert found == {"top1": two_thirds, "top2": 1, "accuracy": two_thirds,
                         "again": two_thirds, "theirs": two_thirds}  # fmt: skip
        many.reset()
        assert many["top2"].count == 0

    def test_weights_go_by_name(self):
        many = torchmetrics.MetricCollection(
            [metrics.SparseCategoricalAccuracy(), metrics.SparseCategoricalCrossentropy()]
        )
        p, y = torch.rand(3, 4), torch.tensor([0, 1, 2])
        many.update(p, y, sample_weight=torch.tensor([1.0, 2.0, 0.0]))
        assert many["SparseCategoricalAccuracy"].count == 3


RANK = """
import sys
import torch
import torch.distributed as dist
from torch_sce import metrics

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
y, p = torch.randint(0, 4, (10,), generator=generator), torch.rand(10, 4, generator=generator)
w = torch.rand(10, generator=generator)
mine = slice(0, 7) if rank == 0 else slice(7, 10)
for name in metrics.__all__:
    y_true, y_pred = y, p
    if name == "Accuracy":
        y_pred = p.argmax(-1)
    elif not name.startswith("Sparse"):
        y_true = torch.eye(4)[y]
    cls = getattr(metrics, name)
    whole, part = cls(sync_on_compute=False), cls()
    whole.update_state(y_true, y_pred, w)
    part.update_state(y_true[mine], y_pred[mine], w[mine])
    before = part.total.clone()
    torch.testing.assert_close(part.result(), whole.result())
    with part.sync_context():
        torch.testing.assert_close(part.count, whole.count)
    assert part.total == before, "a rank keeps its own part"
    assert 0 < whole.result(), name
dist.destroy_process_group()
print("same")
"""


def test_two_ranks_give_the_value_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), port], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, error = rank.communicate(timeout=120)
        assert rank.returncode == 0 and out.splitlines()[-1] == "same", error
