"""The losses, functions and metrics of Keras 2: `tf_keras`, or `tf.keras` before TensorFlow 2.16.

Names, arguments and their order are those of `tf_keras`. Rows are computed as everywhere in this
package; the rules around them are Keras 2's:

    dtype             results have the predictions' dtype, and there is no option for another
    weights, masks    of one axis less than the losses: along the first axes, (B,) on (B, T)
    nothing counts    a mean of losses of which none counts is NaN, not 0
    labels            of another rank are flattened; truncated before `ignore_class` is looked for
    reductions        "auto", "sum_over_batch_size", "sum" and "none"
    metrics           every element counts, not every example; ignored ones do not
    accuracies        -0.0 is as large as 0.0

`torch_sce.keras2.rules` has them in full, docs/keras2.md where this module differs from `tf_keras`
on purpose. The metrics are in `torch_sce.keras2.metrics`, which needs torchmetrics.

>>> import torch
>>> from torch_sce import keras2
>>> loss = keras2.SparseCategoricalCrossentropy(from_logits=True)
>>> labels, logits = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[[2.0, 0.0], [0.0, 2.0]]] * 2)
>>> round(loss(labels, logits, sample_weight=[1, 3]).item(), 4)  # one for each example
1.7539
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..accuracy import sparse_top_k_categorical_accuracy
from .accuracy import (
    categorical_accuracy,
    sparse_categorical_accuracy,
    top_k_categorical_accuracy,
)
from .functional import categorical_crossentropy, sparse_categorical_crossentropy
from .losses import CategoricalCrossentropy, SparseCategoricalCrossentropy

__all__ = [
    "CategoricalCrossentropy",
    "SparseCategoricalCrossentropy",
    "categorical_accuracy",
    "categorical_crossentropy",
    "sparse_categorical_accuracy",
    "sparse_categorical_crossentropy",
    "sparse_top_k_categorical_accuracy",
    "top_k_categorical_accuracy",
]


if TYPE_CHECKING:
    from . import metrics as metrics
else:

    def __getattr__(name: str) -> Any:
        """`torch_sce.keras2.metrics`, imported on first use: torchmetrics is optional."""
        if name == "metrics":
            return importlib.import_module(".metrics", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
