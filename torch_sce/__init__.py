"""tf.keras's `SparseCategoricalCrossentropy` in PyTorch: same numbers, same gradients.

>>> import torch, torch_sce
>>> loss = torch_sce.SparseCategoricalCrossentropy(from_logits=True)
>>> logits = torch.tensor([[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]])
>>> round(loss(torch.tensor([2, 1]), logits).item(), 6)
0.913319
"""

from .functional import categorical_crossentropy, sparse_categorical_crossentropy
from .losses import CategoricalCrossentropy, SparseCategoricalCrossentropy

__version__ = "0.1.0"
__all__ = [
    "CategoricalCrossentropy",
    "SparseCategoricalCrossentropy",
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
]
