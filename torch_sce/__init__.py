"""tf.keras's `SparseCategoricalCrossentropy` in PyTorch: same numbers, same gradients.

Also `CategoricalCrossentropy`, the functions and the accuracies. The metrics are in
`torch_sce.metrics`, which needs torchmetrics. `torch_sce.keras2` has the same names with the rules
of Keras 2.

>>> import torch, torch_sce
>>> loss = torch_sce.SparseCategoricalCrossentropy(from_logits=True)
>>> logits = torch.tensor([[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]])
>>> round(loss(torch.tensor([2, 1]), logits).item(), 6)
0.913319
"""

import importlib
from typing import TYPE_CHECKING, Any

from .accuracy import (
    categorical_accuracy,
    sparse_categorical_accuracy,
    sparse_top_k_categorical_accuracy,
    top_k_categorical_accuracy,
)
from .explain import explain
from .functional import categorical_crossentropy, sparse_categorical_crossentropy
from .linear import LinearSparseCategoricalCrossentropy, linear_sparse_categorical_crossentropy
from .losses import CategoricalCrossentropy, SparseCategoricalCrossentropy

__version__ = "0.1.0"
__all__ = [
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


if TYPE_CHECKING:
    from . import keras2 as keras2
    from . import metrics as metrics
else:

    def __getattr__(name: str) -> Any:
        """`torch_sce.metrics`, imported on first use: torchmetrics is optional; and `keras2`."""
        if name in ("keras2", "metrics"):
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
