"""The cases of the cross-check: the same on every machine, and over every path of the kernels."""

import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_sce.crosscheck.answers import Answer, OracleError, ours
from torch_sce.crosscheck.bits import Bits
from torch_sce.crosscheck.command import CASES, SEED
from torch_sce.crosscheck.compare import MISMATCH, judge
from torch_sce.crosscheck.draw import LARGE_SIZES, draw
from torch_sce.crosscheck.recorded import RECORDED, WHOLE, RecordedOracle, record, thinned

ROOT = Path(__file__).parent.parent

# All recorded cases must be drawn alike, and some compared.
HEADS = "dc935a15ff394b00"  # a hash of those with a head
PROGRAM = f"""
import hashlib

from torch_sce.crosscheck.answers import ours
from torch_sce.crosscheck.compare import judge, mismatches
from torch_sce.crosscheck.draw import draw, with_head
from torch_sce.crosscheck.recorded import RecordedOracle

oracle = RecordedOracle()
cases = [draw({SEED}, index) for index in range({CASES})]
drawn = [case.fingerprint for case in cases]
assert drawn == [fingerprint for fingerprint, *_ in oracle.entries]
heads = [headed.fingerprint for case in cases if (headed := with_head(case))]
assert hashlib.sha256("".join(heads).encode()).hexdigest()[:16] == "{HEADS}"
some = cases[::10]
verdicts = [judge(c, a, ours(c)) for c, a in zip(some, oracle.answers(some), strict=True)]
assert not mismatches(verdicts), mismatches(verdicts)
"""


def features_off(oldest: bool) -> str:
    """The CPU features that NumPy can do without: AVX-512, or all."""
    core: Any = getattr(np, "_core", None) or np.core
    built = core._multiarray_umath.__cpu_dispatch__
    found = core._multiarray_umath.__cpu_features__  # it warns of those the CPU lacks
    names = [name for name in built if found.get(name)]
    off = [name for name in names if oldest or name.startswith(("AVX512", "X86_V4"))]
    return " ".join([os.environ.get("NPY_DISABLE_CPU_FEATURES", ""), *off]).strip()


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_recorded_cases_are_the_same_and_agree_on_older_cpus(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    if off := features_off(oldest=capability == "default"):
        environment["NPY_DISABLE_CPU_FEATURES"] = off
    command = [sys.executable, "-W", "error::ImportWarning", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_bits_are_these():
    """On any machine, with any version of NumPy."""
    bits = Bits(3, 7)
    assert bits.integers(-5, 5, (6,)).tolist() == [-3, -2, -2, -5, 3, -5]
    assert bits.uniform((2,)).tolist() == [0.7310450198785265, 0.8510360511772499]
    assert bits.normal((2,)).tolist() == [2.1565290330909193, -1.486199373146519]
    shares = [0.07820357999969428, 0.9137406563842309, 0.008055763616074841]
    assert bits.shares((3,), 6).tolist() == shares
    assert bits.pick({"a": 0.1, "b": 0.2, "c": 0.7}) == "c"


def test_the_numbers_are_distributed_as_they_say():
    bits = Bits(0)
    normal, uniform = bits.normal((50_000,)), bits.uniform((50_000,))
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert np.unique(bits.integers(-2, 3, (1000,))).tolist() == [-2, -1, 0, 1, 2]
    shares = bits.shares((1000, 40), 28)
    assert (shares > 0).all() and np.abs(shares.sum(-1) - 1).max() < 1e-14
    picked = [bits.pick({"a": 1, "b": 3}) for _ in range(4000)]
    assert abs(picked.count("b") / 4000 - 0.75) < 0.04
    assert bits.normal(()).shape == bits.uniform(()).shape == () and bits.uniform((0, 3)).size == 0


@pytest.fixture(scope="module")
def cases():
    return [draw(SEED, index) for index in range(CASES)]


def test_there_are_cases_of_all_sizes(cases):
    """On both sides of what kernels treat differently; tuning them keeps the record."""
    losses = [case for case in cases if case.is_loss]
    size = np.array([case.y_pred.size for case in losses])
    classes = np.array([case.y_pred.shape[-1] for case in losses])
    for threshold in (2**15, 2**18):  # several threads, several blocks
        assert (size > threshold).sum() >= 10 and (size < threshold).sum() >= 1000
    many = classes >= 64
    assert (many & (size > 2**18)).sum() >= 5 and (~many & (size > 2**18)).sum() >= 5


def test_the_large_cases_have_what_small_ones_have(cases):
    large = [case for case in cases if case.features.get("size") in LARGE_SIZES]
    assert 0.003 * CASES < len(large) < 0.015 * CASES
    found = {(name, value) for case in large for name, value in case.features.items()}
    for feature in (
        ("values", "an outlier"),
        ("values", "gaps"),
        ("values", "confident"),
        ("values of sample_weight", "tiny or huge"),
        ("upstream", "tiny"),
        ("upstream", "huge"),
        ("axis", "other"),
        ("loss", "CategoricalCrossentropy"),
        ("predictions are", "probabilities"),
    ):
        assert feature in found, feature
    assert any(case.y_pred_dtype in ("float16", "bfloat16") for case in large)
    assert any(case.options.get("ignore_class") is not None for case in large)
    assert any(case.mask is not None for case in large)


def test_of_a_large_gradient_some_entries_are_recorded(cases, tmp_path):
    large = next(
        c for c in cases if c.is_loss and c.y_pred.size > 100 * WHOLE and not ours(c).error
    )
    small = next(c for c in cases if c.is_loss and c.is_sparse and ours(c).gradient is not None)
    for case in (large, small):
        case = replace(case, index=0)
        answer = ours(case)
        path = tmp_path / "answers.npz"
        record(path, [case], [answer], {})
        oracle = RecordedOracle(path)
        (stored,) = oracle.answers([replace(case, seed=oracle.seed)])
        whole = answer.gradient
        assert whole is not None and stored.gradient is not None
        assert answer.value is not None and stored.value is not None
        assert np.array_equal(stored.value, answer.value, equal_nan=True)
        assert stored.gradient.size <= WHOLE
        assert np.array_equal(stored.gradient, stored.have("gradient", whole), equal_nan=True)
        assert judge(case, stored, answer).outcome == judge(case, answer, answer).outcome
        # What is wrong in entries that are not recorded is found by the float64 rules.
        wrong = whole.ravel().copy()
        places = stored.gradient_places
        recorded = (
            np.zeros(whole.size, bool) if places is None else np.isin(range(whole.size), places)
        )
        wrong[~recorded] = np.nan
        wrong = replace(answer, gradient=wrong.reshape(whole.shape))
        assert judge(case, stored, wrong).outcome == MISMATCH


def test_the_entries_are_from_every_row_and_at_labels():
    rng = np.random.default_rng(0)
    gradient = rng.random((30, 300)).astype(np.float32)
    label = rng.integers(0, 300, 30)
    gradient[range(30), label] = -5
    case = replace(draw(SEED, 0), options={"axis": -1})
    found = thinned(case, Answer(gradient=gradient))
    places, values = found.gradient_places, found.gradient
    assert places is not None and values is not None
    assert set(np.arange(30) * 300 + label) <= set(places.tolist())
    assert np.array_equal(values, gradient.ravel()[places])
    assert len(np.unique(places // 300)) == 30 and len(np.unique(places % 300)) > 250


def test_without_the_record_the_error_says_where_it_is(tmp_path):
    with pytest.raises(OracleError, match="they are in the repository and not in the wheel"):
        RecordedOracle(tmp_path / "recorded.npz")


def test_the_wheel_leaves_the_record_out():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = data["package-data"]["torch_sce.crosscheck"]
    assert not data["include-package-data"]
    assert not any(RECORDED.match(pattern) for pattern in patterns)
