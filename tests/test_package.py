"""What a user gets with the package before any loss is computed."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import torch_sce

HEAVY = ("tensorflow", "keras", "tf_keras", "jax", "triton", "torchmetrics", "matplotlib", "rich")


def test_importing_loads_nothing_heavier_than_torch():
    program = f"""
import sys, torch, numpy
before = set(sys.modules)
import torch_sce
new = {{name.split('.')[0] for name in set(sys.modules) - before}}
assert new <= {{"numpy", "torch_sce"}} | sys.stdlib_module_names, new
assert not set({HEAVY}) & set(sys.modules), sys.modules.keys()
assert not [m for m in sys.modules if m.startswith("torch_sce.crosscheck")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_the_metrics_are_imported_when_they_are_asked_for(there):
    program = f"""
import sys
sys.modules.update({{}} if {there} else {{"torchmetrics": None}})
import torch_sce
assert "torch_sce.metrics" not in sys.modules
try:
    print(torch_sce.metrics.Accuracy())
except ModuleNotFoundError as missing:
    print(missing)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    missing = "torch_sce.metrics needs torchmetrics: pip install torchmetrics, or in a clone"
    assert done.stdout.startswith("Accuracy()" if there else missing), done.stderr
    with pytest.raises(AttributeError, match="module 'torch_sce' has no attribute 'nothing'"):
        _ = torch_sce.nothing  # pyright: ignore


def test_the_version_is_the_installed_one():
    assert torch_sce.__version__ == metadata.version("torch-sce")


def test_the_version_has_one_source():
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "torch_sce.__version__"}
    source = (root / "torch_sce" / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE) == [torch_sce.__version__]


def test_the_package_is_typed():
    assert resources.files("torch_sce").joinpath("py.typed").is_file()


def test_the_public_names_are_keras_s_those_of_a_linear_head_and_explain():
    assert sorted(torch_sce.__all__) == [
        "CategoricalCrossentropy",
        "LinearSparseCategoricalCrossentropy",
        "SparseCategoricalCrossentropy",
        "categorical_accuracy",
        "categorical_crossentropy",
        "explain",
        "linear_sparse_categorical_crossentropy",
        "sparse_categorical_accuracy",
        "sparse_categorical_crossentropy",
        "sparse_top_k_categorical_accuracy",
        "top_k_categorical_accuracy",
    ]
    for name in torch_sce.__all__:
        assert callable(getattr(torch_sce, name))
