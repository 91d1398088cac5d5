"""The cross-check itself: that it can fail, that it is reproducible, and how it ends."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_case
from mutations import MUTATIONS
from paths import INTERPRETED, PATHS, SLOWEST, take_path

import torch_sce
from torch_sce.crosscheck import campaign, report
from torch_sce.crosscheck.answers import OracleError, ours
from torch_sce.crosscheck.cases import LOSSES, to_bfloat16
from torch_sce.crosscheck.command import (
    AGREEMENT,
    CASES,
    DISAGREEMENT,
    NO_ORACLE,
    SEED,
    USAGE,
    main,
)
from torch_sce.crosscheck.compare import AGREES, MISMATCH, Verdict, judge, mismatches
from torch_sce.crosscheck.draw import EVERYDAY, draw, is_everyday
from torch_sce.crosscheck.live import LiveOracle
from torch_sce.crosscheck.recorded import RecordedOracle
from torch_sce.crosscheck.reference import right
from torch_sce.crosscheck.results import Results, Setting, everyday
from torch_sce.crosscheck.tally import Tally

PACKAGE = Path(torch_sce.__file__).parent


@pytest.fixture(scope="module")
def recorded():
    """The default cases, tf.keras's answers to them, and the float64 answers."""
    cases = [draw(SEED, index) for index in range(CASES)]
    return list(zip(cases, RecordedOracle().answers(cases), strict=True))


@pytest.mark.filterwarnings("default")  # a mutation may make PyTorch warn
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_cross_check_catches(name, recorded, monkeypatch):
    mutation = MUTATIONS[name]
    likely_first = sorted(recorded, key=lambda pair: not mutation.is_about(pair[0]))
    mutation.apply(monkeypatch)

    def is_caught(case, answer):
        mine = ours(case)
        # Any other error is the mutation's own: it does not fit the package any more.
        return mine.error in (None, "ValueError") and judge(case, answer, mine).outcome == MISMATCH

    assert any(is_caught(case, answer) for case, answer in likely_first)


@pytest.fixture(scope="module")
def verdicts(recorded):
    return [judge(case, answer, ours(case)) for case, answer in recorded]


def test_without_a_mutation_nothing_is_caught(verdicts):
    assert mismatches(verdicts) == []


def test_a_mismatch_names_its_case_and_the_command_that_shows_it():
    verdict = Verdict(draw(3, 123), MISMATCH, "float64 and ours: value 1 and 2")
    command = "python scripts/cross_check.py --seed 3 --case 123"
    text = f"case 123: float64 and ours: value 1 and 2; {command}"
    assert mismatches([verdict, Verdict(draw(3, 124), AGREES)]) == [text]


@pytest.mark.parametrize("path", [path for path in PATHS if path != SLOWEST])
def test_every_path_agrees_with_keras(path, recorded, monkeypatch):
    """Most cases are small: here they take the paths of large ones, and of other devices, too."""
    take_path(path, monkeypatch)
    small = [(case, answer) for case, answer in recorded if case.y_pred.size < 60_000]
    cases = {"any device": recorded[::4], "any device, many blocks": small[::4]}.get(path, recorded)
    # The interpreter is slow, and truncates to bfloat16 where devices round.
    if INTERPRETED:
        cases = [
            (case, answer)
            for case, answer in small[::48]
            if case.is_loss and "bfloat16" not in (case.y_pred_dtype, case.options.get("dtype"))
        ]
    verdicts = [judge(case, answer, ours(case)) for case, answer in cases]
    assert mismatches(verdicts) == []


def test_our_errors_are_no_larger_than_keras_s(verdicts):
    """For targets both do the same in another order: neither mean may be a fifth larger."""
    for name, part in itertools.product(LOSSES, ("value", "gradient")):
        found = [v.ulps for v in verdicts if v.case.name == name and f"ours, {part}" in v.ulps]
        mine, theirs = (np.array([u[f"{who}, {part}"] for u in found]) for who in ("ours", "Keras"))
        assert len(found) > 300
        if name == LOSSES[0]:
            assert np.median(mine) <= np.median(theirs)
            assert mine.mean() <= theirs.mean()
            assert mine.max() <= theirs.max()
        else:
            assert mine.mean() <= 1.2 * theirs.mean()


def test_the_sentence_on_everyday_use_counts_what_it_says(recorded):
    """In one case of four tf.keras's value is a unit off."""
    tally = Tally()
    pairs = [(case, ours(case)) for case, _ in recorded[:1500] if is_everyday(case)]
    numbers = [
        (c, a) for c, a in pairs if a.value is not None and a.value.ndim == 0 and a.value > 1
    ]
    for number, (case, answer) in enumerate(numbers[:40]):
        assert answer.value is not None
        off = answer if number % 4 else replace(answer, value=np.nextafter(answer.value, np.inf))
        tally.add(judge(case, off, answer))
    results = Results(tally, range(1), Setting("", [], "", {}, "", "keras3"), [], [])
    (said,) = everyday(results)
    assert "40 of 40 cases agree, 0 differ on purpose. The value is the same as tf.keras's" in said
    assert "to the last bit in 75.0% of those that agree, within 1 ulp in 100.0%" in said
    assert "worst entry is the same as tf.keras's to the last bit in 100.0%" in said
    assert list(everyday(replace(results, tally=Tally()))) == []


def test_the_features_of_everyday_use_are_drawn(recorded):
    cases = [case for case, _ in recorded]
    seen = {(name, value) for case in cases for name, value in case.features.items()}
    assert all((name, value) in seen for name, values in EVERYDAY.items() for value in values)
    found = [case for case in cases if is_everyday(case)]
    assert len(found) > 200 and {case.name for case in found} == set(LOSSES)
    assert all(case.y_pred_dtype == case.loss_dtype == "float32" for case in found)
    assert all(np.isfinite(case.y_pred).all() for case in found)


def test_where_labels_are_not_read_bad_ones_give_nan_and_nothing_else_changes(
    recorded, monkeypatch
):
    """What `--device cuda` expects, on the CPU with the reading of labels turned off."""
    monkeypatch.setattr("torch_sce.samples.values_can_be_read", lambda *tensors: False)
    verdicts = [judge(case, answer, ours(case), poisons=True) for case, answer in recorded]
    assert mismatches(verdicts) == []
    assert sum(v.reason == "bad labels on a device" for v in verdicts) > 20


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_with_sample_weight"])
def test_the_float64_gradients_are_the_derivatives_of_the_values(name, from_logits, reduction):
    """Central differences; the values themselves are compared with tf.keras's in all cases."""
    rng = np.random.default_rng(0)
    inputs = {"y_pred": rng.dirichlet([2.0] * 4, (3, 2)), "y_true": rng.integers(-1, 4, (3, 2))}
    options: dict[str, Any] = {"from_logits": from_logits, "reduction": reduction}
    options |= {"ignore_class": -1} if name == LOSSES[0] else {"label_smoothing": 0.1}
    if name == LOSSES[1]:
        inputs["y_true"] = rng.dirichlet([2.0] * 4, (3, 2)) * 1.5
    weight, mask = rng.random((3, 1)), np.array([[True, True], [False, True], [True, True]])

    def answer(**given):
        return right(
            make_case(
                **given, sample_weight=weight, mask=mask, name=name, dtype="float64", **options
            )
        )

    for argument, part in {"y_pred": "gradient", "y_true": "target_gradient"}.items():
        gradient = getattr(answer(**inputs), part)
        if gradient is None:
            continue
        for at in np.ndindex(gradient.shape):
            step = np.zeros(gradient.shape)
            step[at] = 1e-5
            up, down = (answer(**inputs | {argument: inputs[argument] + h}) for h in (step, -step))
            assert (up.value - down.value) / 2e-5 == pytest.approx(gradient[at], rel=1e-6, abs=1e-8)


def test_bfloat16_rounds_to_nearest_even():
    import torch

    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x[:4] = [np.nan, np.inf, -np.inf, 1 + 2**-8]
    want = torch.tensor(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(to_bfloat16(x), want)


def test_a_case_depends_on_its_seed_and_number_alone():
    assert draw(3, 77).fingerprint == draw(3, 77).fingerprint
    assert len({draw(seed, index).fingerprint for seed in range(3) for index in range(50)}) == 150


class TestCommand:
    def run(self, capsys, *arguments):
        code = main(list(arguments))
        return code, capsys.readouterr().out

    def test_agreement_is_exit_code_0(self, capsys):
        code, out = self.run(capsys, "--cases", "60", "--oracle", "recorded")
        assert code == AGREEMENT == 0
        assert "60 of the cases of --seed 0" in out and "0 mismatches" in out
        assert re.search(r"ours median [\d.]+, mean [\d.]+, largest [\d.]+", out)

    def test_the_package_is_the_command_too(self, tmp_path):
        command = [sys.executable, "-m", "torch_sce.crosscheck", "--oracle", "float64"]
        root = {"PYTHONPATH": str(PACKAGE.parent)}
        done = subprocess.run([*command, "--cases", "3", "--workers", "2"], cwd=tmp_path,
                              env=os.environ | root, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == AGREEMENT, done.stderr
        count = len(list(campaign.drawn(SEED, range(3))))  # with and without a head
        assert f"{count} of {count} cases agree with the float64 rules" in done.stdout

    @pytest.mark.filterwarnings("default")
    def test_a_mismatch_is_exit_code_1_with_the_command_that_shows_it(self, capsys, monkeypatch):
        MUTATIONS["epsilon 1e-6"].apply(monkeypatch)
        code, out = self.run(capsys, "--cases", "100", "--oracle", "recorded")
        assert code == DISAGREEMENT == 1
        (first, *_) = re.findall(r"python scripts/cross_check.py (--seed 0 --case .*)", out)
        code, out = self.run(capsys, *first.split())
        assert code == DISAGREEMENT
        for part in (
            "y_true, ",
            "y_pred, float",
            "\ntf.keras",
            "\nours",
            "\nin float64",
            "Mismatch",
        ):
            assert part in out

    @pytest.mark.parametrize("arguments", [
        ["--cases", "0"], ["--cases", "many"], ["--oracle", "pytorch"], ["--unknown"],
        ["--cases", "20", "--filter", "reduction: product"], ["--device", "cuda:99"],
        ["--cases", "20", "--filter", "reduction: sum", "--filter", "reduction: mean"],
        ["--case", "3", "--filter", "reduction: sum"], ["--case", "-3"], ["--seed", "-1"],
        ["--case", "3", "--workers", "2"],
        ["--device", "gpu"], ["--json", "/no/such/folder/x.json"],
        ["--record", "x.npz", "--oracle", "recorded"],
    ])  # fmt: skip
    def test_wrong_usage_is_exit_code_2(self, arguments, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == USAGE == 2
        assert "error:" in capsys.readouterr().err

    @pytest.mark.parametrize(("program", "message"), [
        ("import sys; sys.exit('no memory')", "crashed with exit code 1; it last said:\nno memory"),
        ("import pickle, sys; pickle.dump({'missing': 'no tensorflow'}, sys.stdout.buffer)",
         "the oracle tf.keras is not installed (no tensorflow): pip install"),
        ("import time; time.sleep(60)", "gave no answer in 1 s"),
        ("import pickle, sys, time; pickle.dump({'versions': {}}, sys.stdout.buffer); "
         "sys.stdout.flush(); time.sleep(60)", "gave no answer in 1 s"),
        ("import sys, time; sys.stdout.write('no pickle'); sys.stdout.flush(); time.sleep(60)",
         "crashed with exit code -9"),
        ("import pickle, sys; pickle.dump({'versions': {}}, sys.stdout.buffer); "
         "pickle.dump([], sys.stdout.buffer)", "gave no answer to each of its cases"),
        ("import pickle, sys, os; pickle.dump({'versions': {}}, sys.stdout.buffer); "
         "sys.stdout.flush(); sys.stdin.read(10); os.kill(os.getpid(), 9)",
         "crashed with exit code -9"),
    ])  # fmt: skip
    def test_an_oracle_that_fails_is_exit_code_3(
        self, program, message, capsys, monkeypatch, tmp_path
    ):
        worker = tmp_path / "worker.py"
        worker.write_text(program)
        silent = program.startswith("import time")
        monkeypatch.setattr(LiveOracle, "start_timeout", 1.0 if silent else 60.0)
        monkeypatch.setattr(LiveOracle, "batch_timeout", 1.0 if "sleep" in program else 60.0)
        monkeypatch.setattr(campaign, "LiveOracle", lambda name: LiveOracle(name, worker))
        code, out = self.run(capsys, "--cases", "300")  # more than the pipes hold
        assert code == NO_ORACLE == 3
        assert message in out

    def test_a_single_case_says_what_came_of_it(self, capsys, recorded):
        outcomes = {report.outcome(judge(c, a, ours(c))): c.index for c, a in recorded[:300]}
        for wanted in ("Agrees in value", "Agrees: both raise", "Differs on purpose: "):
            index = next(index for text, index in outcomes.items() if text.startswith(wanted))
            code, out = self.run(capsys, "--case", str(index), "--oracle", "recorded")
            assert code == AGREEMENT and wanted in out

    def test_cases_without_float32_are_reported_without_plots(self, capsys, tmp_path):
        page = tmp_path / "page.html"
        arguments = ("--cases", "100", "--filter", "dtype of y_pred: float64", "--html", str(page))
        code, _ = self.run(capsys, "--oracle", "recorded", *arguments)
        assert code == AGREEMENT
        assert "<img" not in page.read_text() and "0 mismatches" in page.read_text()

    def test_a_single_case_is_reported_too(self, capsys, tmp_path):
        found, page = tmp_path / "found.json", tmp_path / "page.html"
        arguments = ("--case", "0", "--json", str(found), "--html", str(page))
        code, _ = self.run(capsys, "--oracle", "recorded", *arguments)
        assert code == AGREEMENT and json.loads(found.read_text())["cases"] == 1
        assert "cross_check.py --seed 0 --case 0 --oracle recorded" in page.read_text()

    def test_cases_that_were_not_recorded_are_exit_code_3(self, capsys):
        for arguments in (("--seed", "9"), ("--cases", str(CASES + 1)), ("--seeds", "2")):
            code, out = self.run(capsys, *arguments, "--oracle", "recorded")
            assert code == NO_ORACLE
            assert f"answers are recorded for --seed 0 and cases below {CASES}" in out
            assert "compared" not in out  # raised at once

    def test_a_case_that_has_changed_is_not_compared_with_its_record(self):
        case = draw(SEED, 0)
        changed = make_case(case.y_true + 1, case.y_pred)
        with pytest.raises(OracleError, match="is not the one that was recorded"):
            next(RecordedOracle().answers([changed]))

    def test_a_filter_keeps_the_cases_with_that_feature(self, capsys, tmp_path):
        found = tmp_path / "found.json"
        code, _ = self.run(
            capsys, "--cases", "300", "--oracle", "recorded", "--filter", "reduction: sum",
            "--filter", "predictions are: logits", "--json", str(found),
        )  # fmt: skip
        assert code == AGREEMENT
        results = json.loads(found.read_text())
        assert set(results["features"]["reduction"]) == {"sum"}
        assert set(results["features"]["predictions are"]) == {"logits"}
        assert 10 < results["cases"] < 100

    def test_reports_are_written(self, capsys, tmp_path):
        found, page = tmp_path / "found.json", tmp_path / "page.html"
        code, _ = self.run(
            capsys,
            "--cases",
            "80",
            "--oracle",
            "recorded",
            "--json",
            str(found),
            "--html",
            str(page),
        )
        assert code == AGREEMENT
        results = json.loads(found.read_text())
        assert results["cases"] == 80 == sum(results["outcomes"].values())
        assert results["versions"]["keras"] and results["mismatches"] == []
        assert set(results["ulps"]) == {
            f"{who}, {part}" for who in ("ours", "Keras") for part in ("value", "gradient")
        }
        text = page.read_text()
        assert text.count("data:image/png;base64,") == 2
        assert not re.search(r'(src|href)="(?!data:)', text)  # nothing to fetch
        assert "0 mismatches" in text

    @pytest.mark.usefixtures("tensorflow")
    @pytest.mark.parametrize("name", ["tf_keras", "keras-torch", "keras-jax"])
    def test_other_kerases_are_compared_with_tf_keras(self, name, capsys):
        code, out = self.run(capsys, "--cases", "24", "--oracle", name)
        assert code == AGREEMENT
        flat = re.sub(r"\s+", " ", out)
        assert re.search(rf"{name} \(.*\) differs from tf.keras in [1-9]\d* of 24 cases", flat)

    @pytest.mark.usefixtures("tensorflow")
    def test_answers_can_be_recorded(self, capsys, tmp_path):
        path = tmp_path / "answers.npz"
        code, _ = self.run(capsys, "--seed", "5", "--cases", "30", "--record", str(path))
        assert code == AGREEMENT
        cases = [draw(5, index) for index in range(30)]
        stored = list(RecordedOracle(path).answers(cases))
        assert len(stored) == 30
        verdicts = [judge(c, a, ours(c)) for c, a in zip(cases, stored, strict=True)]
        assert mismatches(verdicts) == []
