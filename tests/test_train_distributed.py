"""scripts/train_distributed.py: each way to train on several processes equals one process."""

import os
import re
from pathlib import Path

import pytest
import torch
from torchrun import torchrun

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

import train_distributed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="each rank would need a GPU")

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_distributed.py"
LINE = re.compile(
    r"(.*): differs from one process by (\S+), (within|MORE THAN) (\S+); mean of means by (\S+)"
)


def test_training_equals_that_of_one_process(tmp_path):
    plot = tmp_path / "losses.png"
    parallel, heads = train_distributed.PARALLEL, train_distributed.HEADS
    options = ["--parallel", *parallel, "--head", *heads, "--steps", 2, "--plot", plot]
    lines = LINE.findall(torchrun(4, SCRIPT, *options).stdout)
    assert [line[0] for line in lines] == [f"{each}, {head}" for head in heads for each in parallel]
    for _, found, verdict, bound, naive in lines:
        assert verdict == "within" and float(found) <= float(bound) == 1e-12
        assert float(naive) > 1e-3  # otherwise these batches could not tell the means apart
    assert plot.stat().st_size > 0


WRONG = """
import sys
import train_distributed

def own_mean(model, x, y, denominator=None):
    return forward(model, x, y)

forward = train_distributed.LanguageModel.forward
train_distributed.LanguageModel.forward = own_mean
sys.exit(train_distributed.main())
"""


def test_micro_batches_with_means_of_their_own_are_reported(tmp_path, monkeypatch):
    """In float32, whose bound is computed."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "wrong.py").write_text(WRONG)
    options = ["--steps", 2, "--dtype", "float32"]
    done = torchrun(1, tmp_path / "wrong.py", *options, fails=True)
    ((_, found, verdict, bound, _),) = LINE.findall(done.stdout)
    assert verdict == "MORE THAN" and float(found) > 1e-3 and 1e-8 < float(bound) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        ([], None, "run it by torchrun --nproc-per-node 2"),
        ([], "9", "needs at most 8 processes, as a step has 16 speeches"),
        (["--parallel", "2d"], "3", "--parallel 2d needs an even number of processes"),
        (["--steps", "0"], "2", "--steps 0: must be at least 1"),
        (["--plot", "no/losses.png"], "2", "--plot no/losses.png: there is no folder no"),
    ],
)
def test_wrong_usage_is_an_error(arguments, ranks, message, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, ranks) if ranks else monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        train_distributed.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_plot_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_distributed, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_distributed.parse(["--plot", "losses.png"])
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err
