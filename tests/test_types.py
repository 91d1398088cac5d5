"""What a type checker, `help()` and a checker of annotations at run time make of the package."""

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import torch_sce
from torch_sce import metrics
from torch_sce.arrays import ArrayLike

PYRIGHT = Path(sys.executable).with_name("pyright")
# A user's file. The comments say which lines are errors, and which of pyright's rules finds them.
PROGRAM = """
import numpy as np
import torch
from typing_extensions import assert_type

import torch_sce
from torch_sce import LinearSparseCategoricalCrossentropy, SparseCategoricalCrossentropy

loss, y, z = SparseCategoricalCrossentropy(ignore_class=-1), torch.tensor([0]), torch.zeros(1, 2)
head, criterion = LinearSparseCategoricalCrossentropy(), loss.as_criterion()
assert_type(loss(y, z, sample_weight=[0.5], mask=np.ones(1), denominator=2), torch.Tensor)
assert_type(head(y, z, torch.eye(2), None, np.float32(2)), torch.Tensor)
assert_type(criterion(z, y, reduction="none"), torch.Tensor)
assert_type(torch_sce.metrics.Accuracy(), torch_sce.metrics.Accuracy)
loss([0, 1], [(0.5, 1), (1, 0)])
loss([np.zeros(2)], range(2), True)
loss(y, z, **{"mask": z})
loss.reduction = criterion.reduction = "sum"


class Doubled(SparseCategoricalCrossentropy):
    def forward(self, y_true, y_pred, sample_weight=None, mask=None, denominator=None):
        return 2 * super().forward(y_true, y_pred, sample_weight, mask, denominator)


loss("abc", z)  # reportArgumentType
loss(["abc"], z)  # reportArgumentType
loss({"y": 0}, z)  # reportArgumentType
loss(y, 1j)  # reportArgumentType
loss(y, None)  # reportArgumentType
loss(y)  # reportCallIssue
loss(y, z, weight=z)  # reportCallIssue
head(y, z, weight=None)  # reportArgumentType
criterion(z, y, weight=z)  # reportCallIssue
criterion(z, y, reduction="average")  # reportArgumentType
loss.reduction = "average"  # reportAttributeAccessIssue
criterion.reduction = "average"  # reportAttributeAccessIssue
SparseCategoricalCrossentropy(reduction="average")  # reportArgumentType
SparseCategoricalCrossentropy(ignore_index=-1)  # reportCallIssue
torch_sce.sparse_categorical_crossentropy(y, z, dim=1)  # reportCallIssue
torch_sce.metrics.Nothing  # reportAttributeAccessIssue
torch_sce.nothing  # reportAttributeAccessIssue
"""


@pytest.mark.skipif(not PYRIGHT.exists(), reason="needs pyright")
def test_pyright_finds_the_mistakes_in_a_user_s_file_and_nothing_else(tmp_path):
    (tmp_path / "user.py").write_text(PROGRAM)
    root = str(Path(torch_sce.__file__).parent.parent)
    config = {"extraPaths": [root], "reportUnusedExpression": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [PYRIGHT, "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {
        (each["range"]["start"]["line"], each.get("rule"))
        for each in json.loads(done.stdout)["generalDiagnostics"]
    }
    lines = [re.search(r"# (report\w+)$", line) for line in PROGRAM.splitlines()]
    assert found == {(i, line[1]) for i, line in enumerate(lines) if line}


CALLABLES = [
    *(getattr(torch_sce, name) for name in torch_sce.__all__),
    *(getattr(metrics, name) for name in metrics.__all__),
    torch_sce.SparseCategoricalCrossentropy.forward,
    torch_sce.LinearSparseCategoricalCrossentropy.forward,
]


@pytest.mark.parametrize("call", CALLABLES, ids=lambda call: call.__qualname__)
def test_help_has_array_like_by_its_name_and_an_integer_is_a_number_at_run_time(call):
    """beartype and typeguard, unlike type checkers, do not take an int for a float."""
    assert repr(ArrayLike) == "ArrayLike" and "_Array" not in str(inspect.signature(call))
    hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    for hint in hints.values():
        kinds = typing.get_args(hint) or (hint,)
        assert float not in kinds or int in kinds
