"""Answers to a case, and this package's own."""

import importlib
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType

import numpy as np
import torch

from .cases import Batch, Case, Head

FLOAT64 = "float64"  # the oracle without a Keras: only the rules of `reference`


class OracleError(RuntimeError):
    """The oracle is not installed, has crashed, or has no recorded answer."""


@dataclass(frozen=True)
class Answer:
    """A value and its gradients with respect to y_pred, to targets and to a head, or an error.

    The value of a metric is its results after each update. Half-precision results are stored in
    float32; the dtype's name says what they were. For a large recorded gradient only some entries
    are stored, with their places in the flattened gradient.
    """

    value: np.ndarray | None = None
    value_dtype: str | None = None
    gradient: np.ndarray | None = None
    gradient_dtype: str | None = None
    target_gradient: np.ndarray | None = None
    target_gradient_dtype: str | None = None
    weight_gradient: np.ndarray | None = None  # of a head
    weight_gradient_dtype: str | None = None
    bias_gradient: np.ndarray | None = None
    bias_gradient_dtype: str | None = None
    error: str | None = None
    message: str = ""
    gradient_places: np.ndarray | None = None
    target_gradient_places: np.ndarray | None = None

    def have(self, part: str, array: np.ndarray) -> np.ndarray:
        """The entries of an array of that gradient's shape for which this answer has the part's."""
        places = getattr(self, f"{part}_places", None)
        return array if places is None or array.shape == places.shape else array.ravel()[places]


def ours(case: Case, device: str = "cpu", package: ModuleType | None = None) -> Answer:
    """What `package`, ours for the case unless another is given, answers to it."""
    if package is None:
        package = importlib.import_module(case.package)
    try:
        if case.head is not None:
            return _loss_of_head(case, case.head, device, package)
        if case.is_loss:
            return _loss(case, device, package)
        if case.form == "function":
            y_true, y_pred = _tensors(case.batch, device)
            return _answer(value=getattr(package, case.function)(y_true, y_pred, **case.options))
        return _metric(case, device, package)
    except (ValueError, TypeError) as error:
        return Answer(error=type(error).__name__, message=str(error))
    except Exception as error:  # not an error we mean to raise: never the right answer
        return Answer(error=f"unintended {type(error).__name__}", message=str(error))


def _loss(case: Case, device: str, package: ModuleType) -> Answer:
    t, x = y_true, y_pred = _tensors(case.batch, device)
    if x.is_floating_point():
        x.requires_grad_()
    if t.is_floating_point() and not case.is_sparse:
        t.requires_grad_()
    if case.as_lists:
        y_true, y_pred = case.y_true.tolist(), case.y_pred.tolist()
    if case.form == "function":
        value = getattr(package, case.function)(y_true, y_pred, **case.options)
    else:
        loss = getattr(package, case.name)(**case.options)
        mask = None if case.mask is None else _tensor(case.mask, device)
        value = loss(y_true, y_pred, sample_weight=case.sample_weight, mask=mask)
    _backward(value, case)
    return _answer(value=value.detach(), gradient=x.grad, target_gradient=t.grad)


def _loss_of_head(case: Case, head: Head, device: str, package: ModuleType) -> Answer:
    """The loss in chunks, of the inputs, weight and bias of the head.

    Raises:
        RuntimeError: the call has changed one of these.
    """
    arrays = [case.y_pred, head.weight, *([] if head.bias is None else [head.bias])]
    given = [_of_dtype(array, case.y_pred_dtype, device, head.transposed) for array in arrays]
    before = [tensor.clone() for tensor in given]
    for tensor in given:
        tensor.requires_grad_()
    options = {key: case.options[key] for key in case.options if key not in ("from_logits", "axis")}
    options |= {"logit_softcap": head.softcap, "chunk_bytes": head.chunk_bytes}
    y_true = _tensor(case.y_true, device)
    if case.form == "function":
        value = getattr(package, f"linear_{case.function}")(y_true, *given, **options)
    else:
        loss = getattr(package, f"Linear{case.name}")(**options)
        mask = None if case.mask is None else _tensor(case.mask, device)
        value = loss(y_true, *given, sample_weight=case.sample_weight, mask=mask)
    _backward(value, case)
    for name, tensor, copy in zip(("hidden", "weight", "bias"), given, before, strict=False):
        if not torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num()):
            raise RuntimeError(f"the call has changed {name}")
    parts = ("gradient", "weight_gradient", "bias_gradient")
    gradients = {part: tensor.grad for part, tensor in zip(parts, given, strict=False)}
    return _answer(value=value.detach(), **gradients)


def _backward(value: torch.Tensor, case: Case) -> None:
    if value.requires_grad:
        upstream = torch.tensor(case.upstream[: value.numel()], device=value.device)
        value.backward(upstream.reshape(value.shape).to(value.dtype))


def _metric(case: Case, device: str, package: ModuleType) -> Answer:
    metrics = importlib.import_module(f"{package.__name__}.metrics")
    metric = getattr(metrics, case.name)(**case.options).to(device)
    results = []
    for batch in case.steps:
        if batch is None:
            metric.reset_state()
        else:
            y_true, y_pred = _tensors(batch, device)
            if case.as_lists:
                y_true, y_pred = batch.y_true.tolist(), batch.y_pred.tolist()
            mask = None if batch.mask is None else _tensor(batch.mask, device)
            metric.update_state(y_true, y_pred, batch.sample_weight, mask)
        results.append(metric.result())
    return _answer(value=torch.stack(results))


def _answer(**parts: torch.Tensor | None) -> Answer:
    fields = {}
    for name, tensor in parts.items():
        if tensor is not None:
            fields[f"{name}_dtype"] = str(tensor.dtype).removeprefix("torch.")
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            fields[name] = tensor.to(wide).cpu().numpy()
    return Answer(**fields)


def _tensors(batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    y_pred = _of_dtype(batch.y_pred, batch.y_pred_dtype, device)
    return _tensor(batch.y_true, device), y_pred


def _of_dtype(array: np.ndarray, dtype: str, device: str, transposed: bool = False) -> torch.Tensor:
    """The array as a tensor; `transposed`: the first axis is contiguous, not the last."""
    tensor = torch.tensor(array, device=device).to(getattr(torch, dtype))
    axes = range(tensor.ndim - 1, -1, -1)
    return tensor.permute(*axes).contiguous().permute(*axes) if transposed else tensor


def _tensor(array: np.ndarray, device: str) -> torch.Tensor:
    return torch.tensor(np.asarray(array), device=device)


def our_versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch-sce", "torch", "numpy")}
