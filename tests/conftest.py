"""Options, and fixtures: the live tf.keras, and calls of it.

`torch_sce` is imported in functions only: after the options have said with which extension.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from torch_sce.crosscheck.answers import Answer
    from torch_sce.crosscheck.cases import Case
    from torch_sce.crosscheck.live import LiveOracle

torch.set_num_threads(1)  # there are as many workers as cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests make their tensors")
    parser.addoption(
        "--without-tensorflow",
        action="store_true",
        help="skip tests with a live tf.keras (or another Keras), instead of failing without it",
    )
    parser.addoption("--extension", type=Path, help="another build of torch_sce.kernels._cpu")
    parser.addoption(
        "--without-extension",
        action="store_true",
        help="as where the package was installed without a C compiler",
    )


def pytest_configure(config: pytest.Config) -> None:
    choose_extension(config.option.extension, config.option.without_extension)
    # Otherwise PyTorch compiles in processes of its own, which some versions do not end.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # Nor does its cache of compiled code know for which instructions that is.
    if (capability := os.environ.get("ATEN_CPU_CAPABILITY")) is not None:
        folder = Path(tempfile.gettempdir(), f"torchinductor_{capability}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch.set_default_device(config.getoption("--device"))
    # Triton's interpreter has NumPy compute what is masked afterwards.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    # Up to 3.6 it also converts arrays of one element, which NumPy 2.4 refuses.
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton"
    )


def choose_extension(path: Path | None, without: bool) -> None:
    """What `import torch_sce.kernels._cpu` gives in this process: that file, or an ImportError."""
    name = "torch_sce.kernels._cpu"
    assert (path is None and not without) or "torch_sce" not in sys.modules
    if without:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    elif path is not None:
        spec = spec_from_file_location(name, path.resolve(strict=True))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Triton's kernels run on a GPU, or in its interpreter, which needs a process of its own."""
    on_gpu = config.getoption("--device") != "cpu"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    needs = {
        "test_cuda.py": on_gpu or interpreted,
        "test_gpu.py": on_gpu,
        "test_cuda_compiles.py": find_spec("triton") is not None,  # it is for Linux
    }
    return None if needs.get(collection_path.name, True) else True


@pytest.fixture(scope="session")
def tensorflow(request: pytest.FixtureRequest) -> None:
    """For a test that needs TensorFlow or a Keras."""
    if request.config.getoption("--without-tensorflow"):
        pytest.skip("needs TensorFlow")


@pytest.fixture
def one_extension(request: pytest.FixtureRequest) -> None:
    """For a test whose other processes must have this one's extension: they have the installed."""
    if request.config.option.without_extension or request.config.option.extension:
        pytest.skip("other processes have the extension that is installed")


@pytest.fixture(scope="session")
def keras(tensorflow: None) -> Iterator[LiveOracle]:
    """The real tf.keras in its own process."""
    from torch_sce.crosscheck.live import TARGET, LiveOracle

    with LiveOracle(TARGET) as oracle:
        yield oracle


@pytest.fixture(scope="session")
def ask(keras: LiveOracle) -> Callable[..., Answer]:
    """`ask(y_true, y_pred, sample_weight, mask, **options)`: what tf.keras answers."""

    def call(
        y_true, y_pred, sample_weight=None, mask=None, upstream=None, **options: Any
    ) -> Answer:
        case = make_case(y_true, y_pred, sample_weight, mask, upstream, **options)
        return next(keras.answers([case]))

    return call


def make_case(
    y_true,
    y_pred,
    sample_weight=None,
    mask=None,
    upstream=None,
    form="class",
    name="SparseCategoricalCrossentropy",
    **options: Any,
) -> Case:
    """A case as the cross-check has them, from the arguments of a call."""
    from torch_sce.crosscheck.cases import LOSSES, Batch, Case

    y_pred = np.asarray(y_pred)
    defaults: dict[str, Any] = {}
    if name in LOSSES:
        defaults = {"from_logits": False, "axis": -1}
        defaults |= {"ignore_class": None} if name == LOSSES[0] else {"label_smoothing": 0.0}
    if form != "function":
        defaults |= {"dtype": None}
    if form == "class":
        defaults |= {"reduction": "sum_over_batch_size"}
    if upstream is None:
        n = y_pred.size  # a weight may enlarge the losses
        upstream = np.ones(min(n**2, max(n, 2**20)) + 16, np.float32)
    mask = None if mask is None else np.asarray(mask)
    batch = Batch(np.asarray(y_true), y_pred, str(y_pred.dtype), sample_weight, mask)
    return Case(
        seed=0, index=0, name=name, form=form, options=defaults | options, batch=batch,
        as_lists=False, upstream=np.asarray(upstream), features={},
    )  # fmt: skip
