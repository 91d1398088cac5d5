"""The implementations compared: torch_sce and its peers.

Each function makes a candidate for a case, or returns None if there is nothing to compare.
"""

# pyright: reportPrivateUsage=false

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_sce
from torch_sce.kernels.head import Head, _chunk_rows, _step
from torch_sce.linear import CPU_CHUNK, DEVICE_CHUNK

from .cases import (
    COMPILED,
    CROSS_ENTROPY,
    CUT,
    FUSED,
    HEAD,
    KERAS_TORCH,
    LIGER,
    LIGER_HEAD,
    LINEAR,
    LOGITS,
    NONE_IGNORED,
    OF_FLOAT,
    OF_LOG,
    OURS,
    PROBABILITIES,
    TF_KERAS,
    Case,
    head,
    labels,
)
from .measuring import BOTH, duration

Loss = Callable[..., Tensor]  # of labels and predictions; or labels, hidden and weight of a head


def ours(case: Case, device: str) -> Loss:
    if case.kind == HEAD:
        return torch_sce.LinearSparseCategoricalCrossentropy()
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


def linear(case: Case, device: str) -> Loss | None:
    if case.kind != HEAD:
        return None
    return lambda y_true, hidden, weight: F.cross_entropy(F.linear(hidden, weight), y_true)


def linear_cross_entropy(case: Case, device: str) -> Loss | None:
    """In chunks of the size that is fastest here. In half precision on the CPU all are slow."""
    if case.kind != HEAD or (device == "cpu" and case.dtype != "float32"):
        return None
    fused, options = F.linear_cross_entropy, nn.LinearCrossEntropyOptions  # from PyTorch 2.13 on
    sizes = {min(rows, case.shape[0]) for rows in (128, 256, 512, 1024, 4096)}
    chunks = [options(batch_chunk_size=rows) for rows in sorted(sizes)]
    y_true, *given = labels(case).to(device), *(x.requires_grad_() for x in head(case, device))

    def of(chosen: Any) -> Loss:
        return lambda y_true, hidden, weight: fused(hidden, weight, y_true, options=chosen)

    def seconds(loss: Loss) -> float:
        call = partial(forward_and_backward, loss, y_true, *given)
        return min(duration(call, 1, device) for _ in range(2))

    return min(map(of, chunks), key=seconds)


def liger_head(case: Case, device: str) -> Loss | None:
    if device == "cpu" or case.kind != HEAD:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda y_true, hidden, weight: loss(weight, hidden, y_true)


def cut_cross_entropy(case: Case, device: str) -> Loss | None:
    if device == "cpu" or case.kind != HEAD:
        return None
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

    return lambda y_true, hidden, weight: linear_cross_entropy(hidden, weight, y_true)


def products(hidden: Tensor, weight: Tensor, passes: str) -> None:
    """Those of a head in chunks of our size: logits, and in both passes with them two more."""
    most = _chunk_rows(
        Head(
            hidden, weight, None, hidden, None, None, hidden.dtype, hidden.dtype,
            CPU_CHUNK if hidden.device.type == "cpu" else DEVICE_CHUNK,
        )
    )  # fmt: skip
    rows = _step(len(hidden), most)
    chunks = hidden.split(rows)
    work = hidden.new_empty(len(chunks[0]), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    for number, (x, dx) in enumerate(zip(chunks, dhidden.split(rows), strict=True)):
        z = torch.mm(x, weight.t(), out=work[: len(x)])
        if passes == BOTH:
            torch.mm(z, weight, out=dx)
            torch.addmm(dweight, z.t(), x, beta=min(number, 1), out=dweight)


def forward_and_backward(loss: Loss, y_true: Tensor, *leaves: Tensor) -> list[Tensor | None]:
    """The gradients; the next call finds none."""
    loss(y_true, *leaves).backward()
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


CANDIDATES: dict[str, Callable[[Case, str], Loss | None]] = {
    OURS: ours,
    CROSS_ENTROPY: cross_entropy,
    COMPILED: compiled_cross_entropy,
    OF_FLOAT: cross_entropy_of_float,
    OF_LOG: cross_entropy_of_log,
    NONE_IGNORED: ours_none_ignored,
    KERAS_TORCH: keras_on_torch,
    LIGER: liger_kernel,
    LINEAR: linear,
    FUSED: linear_cross_entropy,
    LIGER_HEAD: liger_head,
    CUT: cut_cross_entropy,
}
PEERS = tuple(name for name in CANDIDATES if name != OURS)
NAMES = (*PEERS, TF_KERAS)
