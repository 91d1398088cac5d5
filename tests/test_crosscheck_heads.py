"""The cross-check's cases with a linear head in front of the loss, whose logits come in chunks.

Compared with the rules in float64, and with the live tf.keras: `Dense` and its loss under a
`GradientTape`.
"""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_case
from mutations import OF_HEADS

from torch_sce.crosscheck.answers import ours
from torch_sce.crosscheck.cases import OF_A_HEAD, Head
from torch_sce.crosscheck.command import AGREEMENT, CASES, DISAGREEMENT, SEED, main
from torch_sce.crosscheck.compare import AGREES, MISMATCH, judge, mismatches
from torch_sce.crosscheck.draw import draw, with_head
from torch_sce.crosscheck.heads import expected_of_head
from torch_sce.kernels import head

PARTS = 4  # tests of the same cases, for as many processes
ALL_HEADS = ("--filter", f"loss: {OF_A_HEAD}")


def heads(start, stop, step=1):
    cases = (with_head(draw(SEED, index)) for index in range(start, stop, step))
    return [case for case in cases if case is not None]


@pytest.fixture
def chunks(monkeypatch):
    """The numbers of rows of the chunks, a list for every time that all logits are computed."""
    seen, right = [], head._chunks

    def watched(given):
        seen.append([])
        for rows, x, z in right(given):
            seen[-1].append(len(x))
            yield rows, x, z

    monkeypatch.setattr(head, "_chunks", watched)
    return seen


@pytest.mark.parametrize("part", range(PARTS))
def test_value_and_gradients_are_those_of_the_unfused_loss_in_float64(part, chunks):
    verdicts = [judge(case, None, ours(case)) for case in heads(part, CASES, PARTS)]
    assert mismatches(verdicts) == []
    assert sum(verdict.reason != "raises" for verdict in verdicts) >= 1000 / PARTS
    several = [sizes for sizes in chunks if sum(sizes) > 1]
    for kind in (
        [sizes for sizes in several if max(sizes) == 1],
        [sizes for sizes in several if len(sizes) == 1],
        [sizes for sizes in several if sizes[-1] < sizes[0]],
    ):
        assert len(kind) >= 100 / PARTS


def test_where_labels_are_not_read_bad_ones_give_nan_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr("torch_sce.samples.values_can_be_read", lambda *tensors: False)
    verdicts = [judge(case, None, ours(case), poisons=True) for case in heads(0, CASES, 5)]
    assert mismatches(verdicts) == []


def test_value_and_gradients_are_those_of_a_dense_layer_of_the_live_tf_keras(keras):
    cases = heads(0, 500)
    answers = keras.answers(cases)
    verdicts = [judge(c, a, ours(c)) for c, a in zip(cases, answers, strict=True)]
    assert mismatches(verdicts) == []
    compared = [v for v in verdicts if v.outcome == AGREES and v.reason != "raises"]
    assert len(compared) >= 100
    found = Counter(v.case.features["dtype of y_pred"] for v in compared)
    assert min(found[dtype] for dtype in ("float16", "bfloat16", "float32", "float64")) > 5


@pytest.fixture(scope="module")
def cases():
    return heads(0, 600)


@pytest.mark.filterwarnings("default")  # a mutation may make PyTorch warn
@pytest.mark.parametrize("name", OF_HEADS)
def test_a_mistake_is_found(name, cases, monkeypatch):
    OF_HEADS[name].apply(monkeypatch)
    assert any(judge(case, None, ours(case)).outcome == MISMATCH for case in cases)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_with_sample_weight"])
def test_the_float64_gradients_are_the_derivatives_of_the_values(softcap, reduction):
    """Central differences; the values themselves are compared with tf.keras's."""
    rng = np.random.default_rng(0)
    labels, sample_weight = rng.integers(-1, 4, (3, 2)), rng.random((3, 1))
    shapes = {"y_pred": (3, 2, 3), "weight": (4, 3), "bias": (4,)}
    given = {key: rng.standard_normal(shape) for key, shape in shapes.items()}

    def answer(y_pred, weight, bias):
        case = make_case(
            labels, y_pred, sample_weight, reduction=reduction, ignore_class=-1, dtype="float64",
            from_logits=True,
        )  # fmt: skip
        return expected_of_head(replace(case, head=Head(weight, bias, softcap, None, False)))

    parts = {"y_pred": "gradient", "weight": "weight_gradient", "bias": "bias_gradient"}
    for key, part in parts.items():
        gradient = getattr(answer(**given), part)
        for at in np.ndindex(gradient.shape):
            step = np.zeros(gradient.shape)
            step[at] = 1e-5
            up, down = (answer(**given | {key: given[key] + h}) for h in (step, -step))
            assert (up.value - down.value) / 2e-5 == pytest.approx(gradient[at], rel=1e-6, abs=1e-8)


class TestCommand:
    def run(self, capsys, *arguments):
        code = main(list(arguments))
        return code, capsys.readouterr().out

    def test_heads_are_a_line_of_the_table_and_can_be_selected(self, capsys):
        code, out = self.run(capsys, "--cases", "60", "--oracle", "float64")
        assert code == AGREEMENT and OF_A_HEAD[:20] in out
        code, only = self.run(capsys, "--cases", "60", "--oracle", "float64", *ALL_HEADS)
        assert code == AGREEMENT
        count = len(heads(0, 60))
        assert f"of {count} cases agree" in only and f"of {60 + count} cases agree" in out

    @pytest.mark.filterwarnings("default")
    def test_a_mismatch_is_shown_by_its_command(self, capsys, monkeypatch):
        OF_HEADS["a chunk dropped"].apply(monkeypatch)
        code, out = self.run(capsys, "--cases", "40", "--oracle", "float64")
        assert code == DISAGREEMENT
        (first, *_) = re.findall(r"python scripts/cross_check.py (--seed 0 --case .*)", out)
        code, out = self.run(capsys, *first.split())
        assert code == DISAGREEMENT
        for text in ("\nweight, float", "\nours, gradient of the weight, ", "Mismatch of float64"):
            assert text in out

    def test_recorded_answers_are_to_cases_without_a_head(self, capsys):
        code, out = self.run(capsys, "--cases", "60", "--oracle", "recorded")
        assert code == AGREEMENT and "of 60 cases agree" in out
