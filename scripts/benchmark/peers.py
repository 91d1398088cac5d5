"""The implementations compared: torch_sce and its peers.

Each function makes a candidate for a case, or returns None if there is nothing to compare.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import torch_sce

from .cases import (
    COMPILED,
    CROSS_ENTROPY,
    KERAS_TORCH,
    LIGER,
    LOGITS,
    NONE_IGNORED,
    OF_FLOAT,
    OF_LOG,
    OURS,
    PROBABILITIES,
    TF_KERAS,
    Case,
    labels,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(case: Case, device: str) -> Loss:
    if case.soft:
        return torch_sce.CategoricalCrossentropy(case.kind == LOGITS, axis=case.axis)
    return torch_sce.SparseCategoricalCrossentropy(
        from_logits=case.kind == LOGITS,
        ignore_class=-100 if case.half_ignored else None,
        axis=case.axis,
    )


def ours_none_ignored(case: Case, device: str) -> Loss | None:
    if not case.half_ignored:
        return None
    all_counted = replace(case, half_ignored=False)
    loss, y_true = ours(all_counted, device), labels(all_counted).to(device)
    return lambda _, y_pred: loss(y_true, y_pred)


def cross_entropy(case: Case, device: str, function: Loss = F.cross_entropy) -> Loss | None:
    return of_rows(case, function) if case.kind == LOGITS else None


def of_rows(case: Case, function: Loss) -> Loss:
    """`function` of the tensors as they are for axis 1, otherwise of their rows."""
    if case.axis == 1:
        return lambda y_true, y_pred: function(y_pred, y_true)
    last = -2 if case.soft else -1
    return lambda y_true, y_pred: function(y_pred.flatten(0, -2), y_true.flatten(0, last))


def compiled_cross_entropy(case: Case, device: str) -> Loss | None:
    if case.half_ignored or (case.dtype != "float32" and device == "cpu"):
        return None
    torch._dynamo.reset()  # otherwise a second shape makes it compile for any shape
    return cross_entropy(case, device, torch.compile(F.cross_entropy, dynamic=False))


def cross_entropy_of_float(case: Case, device: str) -> Loss | None:
    if case.dtype == "float32":
        return None
    return cross_entropy(case, device, lambda z, y: F.cross_entropy(z.float(), y))


def cross_entropy_of_log(case: Case, device: str) -> Loss | None:
    if case.kind != PROBABILITIES:
        return None
    return of_rows(case, lambda q, y: F.cross_entropy(q.clamp(1e-7, 1 - 1e-7).log(), y))


def keras_on_torch(case: Case, device: str) -> Loss | None:
    if not case.for_keras:
        return None
    # Keras reads both when it is first imported.
    os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE=device)
    import keras

    if keras.backend.backend() != "torch":
        raise ImportError(f"Keras runs on {keras.backend.backend()} in this process")
    return keras_loss(keras.losses, case)


def keras_loss(losses: Any, case: Case) -> Any:
    made = losses.CategoricalCrossentropy if case.soft else losses.SparseCategoricalCrossentropy
    return made(from_logits=case.kind == LOGITS)


def liger_kernel(case: Case, device: str) -> Loss | None:
    if device == "cpu" or case.kind != LOGITS or case.axis != -1 or case.soft:
        return None
    from liger_kernel.transformers import LigerCrossEntropyLoss  # pyright: ignore

    return cross_entropy(case, device, LigerCrossEntropyLoss())


CANDIDATES: dict[str, Callable[[Case, str], Loss | None]] = {
    OURS: ours,
    CROSS_ENTROPY: cross_entropy,
    COMPILED: compiled_cross_entropy,
    OF_FLOAT: cross_entropy_of_float,
    OF_LOG: cross_entropy_of_log,
    NONE_IGNORED: ours_none_ignored,
    KERAS_TORCH: keras_on_torch,
    LIGER: liger_kernel,
}
PEERS = tuple(name for name in CANDIDATES if name != OURS)
NAMES = (*PEERS, TF_KERAS)
