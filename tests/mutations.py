"""Mistakes that the cross-check must find, each as the wrong function in place of the right one.

A wrong function gets the right one first, then its arguments. It is decorated with the name of
the mistake, the functions or methods that it replaces, and the features of cases that show it best.
Those in `OF_HEADS` are found by the cases with a linear head, those in `OF_KERAS2` by the profile
of Keras 2.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from torch_sce import accuracy, kernels, metrics, samples
from torch_sce.arrays import HALVES
from torch_sce.crosscheck.cases import Case
from torch_sce.keras2 import accuracy as accuracy_keras2
from torch_sce.keras2 import losses as losses_keras2
from torch_sce.keras2 import metrics as metrics_keras2
from torch_sce.keras2 import rules
from torch_sce.kernels import aten, cpu, cpu_targets, head, targets
from torch_sce.losses import CategoricalCrossentropy, SparseCategoricalCrossentropy
from torch_sce.options import FLOATS, MEANS
from torch_sce.reduction import (
    divisor_and_factor,
    example_means,
    numerator_and_denominator,
    reduce,
    weighted,
)


@dataclass
class Mutation:
    """What replaces which object; and the features of cases that show it best."""

    changes: list[tuple[Any, Any]]
    features: Mapping[str, str] = field(default_factory=dict)

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces each object wherever the package has it."""
        for right, wrong in self.changes:
            places = list(_places(right))
            assert places, f"torch_sce does not have {right}"
            for holder, name in places:
                monkeypatch.setattr(holder, name, wrong)

    def is_about(self, case: Case) -> bool:
        """Whether the case is likely to show the mistake."""
        return self.features.items() <= case.features.items()


MUTATIONS: dict[str, Mutation] = {}
OF_HEADS: dict[str, Mutation] = {}
OF_KERAS2: dict[str, Mutation] = {}


def _places(thing: Any) -> Iterator[tuple[Any, str]]:
    """The modules and classes of the package that have it, and by what name.

    Not those of the cross-check, which must stay right.
    """
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] != "torch_sce" or path.startswith("torch_sce.crosscheck"):
            continue
        if module is None:  # with --without-extension
            continue
        classes = [x for x in vars(module).values() if getattr(x, "__module__", "") == path]
        for holder in (module, *(x for x in classes if isinstance(x, type))):
            yield from ((holder, name) for name, x in list(vars(holder).items()) if x is thing)


def mistake(
    name: str,
    *rights: Callable[..., Any],
    features: Mapping[str, str] | None = None,
    among: dict[str, Mutation] = MUTATIONS,
) -> Callable[[Callable[..., Any]], None]:
    """Registers the decorated function as the replacement of `rights`."""

    def register(wrong: Callable[..., Any]) -> None:
        changes = [(right, _given(right, wrong)) for right in rights]
        among[name] = Mutation(changes, features or {})

    return register


def _given(right: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(right)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrong(right, *args, **kwargs)

    return replacement


# Probabilities and their bounds


def _bounds(dtype: torch.dtype, epsilon: float) -> tuple[float, ...]:
    return tuple(torch.tensor([epsilon, 1 - epsilon], dtype=dtype, device="cpu").tolist())


LARGER_EPSILON = {dtype: _bounds(dtype, 1e-6) for dtype in FLOATS}
MUTATIONS["epsilon 1e-6"] = Mutation([(samples.CLIP, LARGER_EPSILON)])

HALVES_AS_FLOAT32 = samples.CLIP | dict.fromkeys(HALVES, samples.CLIP[torch.float32])
MUTATIONS["halves clipped as float32 is"] = Mutation([(samples.CLIP, HALVES_AS_FLOAT32)])


@mistake("probabilities renormalised before the clip", kernels.row_losses)
def _(right, z, *rest):
    q = z if rest[2] is None else z / z.sum(-1, keepdim=True)
    return right(q, *rest)


@mistake("exclusive clip bounds", cpu.backward, aten.backward)
def _(right, g, z, y, counted, clip, saved, *rest):
    dz = right(g, z, y, counted, clip, saved, *rest)
    if clip is None:
        return dz
    low, high = clip
    q = z.double()
    return dz.masked_fill((q == low) | (q == high), 0)


@mistake("gradient without the clip mask", cpu.backward, aten.backward)
def _(right, g, z, y, counted, clip, saved, *rest):
    everything = None if clip is None else (-torch.inf, torch.inf)
    return right(g, z, y, counted, everything, saved, *rest)


# Rows with a label


def _clipped_at_label(z, y, clip):
    return aten.at_label(z, y.clamp(0, z.shape[-1] - 1)).clamp(*clip)


def _of_rows(g, y, out=None, divisor=1.0, factor=None):
    return (g / divisor if factor is None else g / divisor * factor).expand(y.shape)


def _add_at_label(dz, y, values):
    return dz.scatter_add(-1, y.clamp(0, dz.shape[-1] - 1).unsqueeze(-1), values.unsqueeze(-1))


@mistake("no maximum subtracted", cpu.forward, aten.forward)
def _(right, z, y, counted, clip):
    loss, saved = right(z, y, counted, clip)
    if clip is None:
        label = y.clamp(0, z.shape[-1] - 1)
        naive = z.to(loss.dtype).exp().sum(-1).log() - aten.at_label(z, label)
        loss = torch.where(loss == 0, loss, naive)
    return loss, saved


@mistake("logits without the label's entry", cpu.backward, aten.backward)
def _(right, g, z, y, counted, clip, saved, *rest):
    dz = right(g, z, y, counted, clip, saved, *rest)
    if clip is not None:
        return dz
    return _add_at_label(dz, y, _of_rows(g, y, *rest).to(dz.dtype))  # g p_y, not g (p_y - 1)


@mistake("probabilities without the label's entry", cpu.backward, aten.backward)
def _(right, g, z, y, counted, clip, saved, *rest):
    dz = right(g, z, y, counted, clip, saved, *rest)
    if clip is None:
        return dz
    p, g = _clipped_at_label(z, y, clip), _of_rows(g, y, *rest)
    return _add_at_label(dz, y, (g / p).to(dz.dtype))  # g / s, not g (1 / s - 1 / p)


@mistake("ignored rows with a gradient", cpu.backward, aten.backward)
def _(right, g, z, y, counted, clip, saved, *rest):
    return right(g, z, y, None, clip, saved, *rest)


@mistake("upstream gradient not on the label", cpu.backward, aten.backward)
def _(right, g, z, y, counted, clip, saved, *rest):
    dz = right(g, z, y, counted, clip, saved, *rest)
    if clip is None:
        return dz
    p, g = _clipped_at_label(z, y, clip), _of_rows(g, y, *rest)
    return _add_at_label(dz, y, ((g - 1) / p).to(dz.dtype))  # g / s - 1 / p


# Averages


@mistake("mean over B, not B * T", reduce)
def _(right, losses, weight, mask, reduction):
    value = right(losses, weight, mask, reduction)
    averaged = reduction in MEANS and losses.ndim > 0 and len(losses) > 0
    return value * (losses.numel() / len(losses)) if averaged else value


@mistake("weights in the denominator of the plain mean", reduce)
def _(right, losses, weight, mask, reduction):
    if reduction in MEANS and weight is not None:
        reduction = "mean_with_sample_weight"
    return right(losses, weight, mask, reduction)


@mistake("masked mean over all", reduce)
def _(right, losses, weight, mask, reduction):
    if reduction in MEANS and mask is not None:
        return weighted(losses, weight, mask, reduction).sum() / max(losses.numel(), 1)
    return right(losses, weight, mask, reduction)


@mistake("ignored positions counted", reduce)
def _(right, losses, weight, mask, reduction):
    return right(losses, weight, None, reduction)


@mistake("half a mask counted whole", reduce, features={"dtype of mask": "half"})
def _(right, losses, weight, mask, reduction):
    if reduction in MEANS and mask is not None:
        mask = mask.bool()
    return right(losses, weight, mask, reduction)


@mistake("mean_with_sample_weight without the mask", reduce)
def _(right, losses, weight, mask, reduction):
    if reduction == "mean_with_sample_weight" and weight is not None and mask is not None:
        return right(losses * mask.to(losses.dtype), weight, None, reduction)
    return right(losses, weight, mask, reduction)


@mistake(
    "a scalar weight divided as often as it counts",
    reduce,
    features={"reduction": "mean_with_sample_weight", "sample_weight": "scalar"},
)
def _(right, losses, weight, mask, reduction):
    if reduction == "mean_with_sample_weight" and weight is not None:
        weight = weight.expand(losses.shape)
    return right(losses, weight, mask, reduction)


@mistake("division by zero", reduce)
def _(right, losses, weight, mask, reduction):
    if reduction not in (*MEANS, "mean_with_sample_weight"):
        return right(losses, weight, mask, reduction)
    total, divisor = numerator_and_denominator(losses, weight, mask, reduction)
    return total / divisor


@mistake("auto is the sum", reduce, features={"reduction": "auto"})
def _(right, losses, weight, mask, reduction):
    return right(losses, weight, mask, "sum" if reduction == "auto" else reduction)


# Averages in one step, of constants that can be read


@mistake("one step: the mean over all, whatever counts", kernels.sum_of_losses)
def _(right, z, y, counted, clip, divisor, *rest):
    return right(z, y, counted, clip, 1 if divisor == 1 else y.numel(), *rest)


@mistake("one step: ignored positions with a loss", kernels.sum_of_losses)
def _(right, z, y, counted, *rest):
    return right(z, y.clamp(0, z.shape[-1] - 1), None, *rest)


@mistake("one step: no weights", kernels.sum_of_losses)
def _(right, z, y, counted, clip, divisor, factor, *rest):
    return right(z, y, counted, clip, divisor, None, *rest)


@mistake("one step: no weights in the gradient", cpu.backward)
def _(right, *arguments):
    return right(*arguments[:8])


@mistake("one step: weights in the denominator of the plain mean", divisor_and_factor)
def _(right, losses, weight, mask, reduction, count):
    divisor, factor = right(losses, weight, mask, reduction, count)
    if reduction in MEANS and factor is not None:
        divisor = float(factor.sum())
    return divisor, factor


@mistake(
    "one step: half a mask counted whole", divisor_and_factor, features={"dtype of mask": "half"}
)
def _(right, losses, weight, mask, reduction, count):
    if reduction in MEANS and mask is not None:
        mask = mask.bool()
    return right(losses, weight, mask, reduction, count)


@mistake(
    "one step: a scalar weight divided as often as it counts",
    divisor_and_factor,
    features={"reduction": "mean_with_sample_weight", "sample_weight": "scalar"},
)
def _(right, losses, weight, mask, reduction, count):
    if reduction == "mean_with_sample_weight" and weight is not None:
        weight = weight.expand(losses.shape)
    return right(losses, weight, mask, reduction, count)


# Shapes, labels and dtypes


@mistake("weights along the wrong axis", samples.align)
def _(right, name, value, shape):
    if 0 < value.ndim == len(shape) - 1:
        value = value.unsqueeze(-1)
    return right(name, value, shape)


@mistake("labels rounded, not truncated", samples.class_numbers)
def _(right, labels):
    return right(labels.round() if labels.is_floating_point() else labels)


@mistake(
    "ignore_class compared after truncation", samples.not_ignored, features={"labels": "fractional"}
)
def _(right, labels, ignore_class):
    whole = samples.class_numbers(labels) if labels.is_floating_point() else labels
    return right(whole, ignore_class)


@mistake("trailing 1 not squeezed", samples.labels_for)
def _(right, y_true, y_pred, axis, *sibling):
    if y_true.ndim == y_pred.ndim:
        raise ValueError("y_true must have fewer axes than y_pred")
    return right(y_true, y_pred, axis, *sibling)


@mistake("bad labels not refused", samples.values_can_be_read, features={"labels": "outside"})
def _(right, *tensors):
    return False


@mistake("float64 kept by default", SparseCategoricalCrossentropy.forward)
def _(right, self, y_true, y_pred, *rest, **named):
    is_wide = getattr(y_pred, "dtype", None) == torch.float64
    computed = self._with(dtype=torch.float64) if is_wide else self
    return right(computed, y_true, y_pred, *rest, **named)


@mistake("the loss in the predictions' half precision", SparseCategoricalCrossentropy.forward)
def _(right, self, y_true, y_pred, *rest, **named):
    is_half = getattr(y_pred, "dtype", None) in HALVES
    computed = self._with(dtype=y_pred.dtype) if is_half else self
    return right(computed, y_true, y_pred, *rest, **named)


@mistake(
    "sums in half precision",
    SparseCategoricalCrossentropy._losses,
    CategoricalCrossentropy._losses,
)
def _(right, self, samples):
    return right(self, samples).to(self.dtype)


# Targets


@mistake(
    "targets in the loss's half precision",
    CategoricalCrossentropy._losses,
    features={"loss": "CategoricalCrossentropy", "dtype": "bfloat16"},
)
def _(right, self, samples):
    return right(self, samples._replace(y=samples.y.to(self.dtype)))


@mistake(
    "targets smoothed along the last axis",
    CategoricalCrossentropy._losses,
    features={"loss": "CategoricalCrossentropy", "axis": "other"},
)
def _(right, self, samples):
    smoothing, y = self.label_smoothing, samples.y.to(aten.row_dtype(samples.z))
    y = y * (1 - smoothing) + smoothing / y.movedim(-1, self.axis).shape[-1]
    return kernels.target_losses(samples.z, y, samples.counted, samples.clip)


@mistake("targets' probabilities renormalised after the clip", cpu_targets.forward, targets.forward)
def _(right, z, t, counted, clip, smoothing):
    loss, saved = right(z, t, counted, clip, smoothing)
    if clip is not None:
        z, t = targets._as_counted(z, t, counted, smoothing)
        c = z.clamp(*clip)
        loss = -(t * (c / c.sum(-1, keepdim=True)).log()).sum(-1)
    return loss, saved


@mistake("targets detached", kernels.target_losses)
def _(right, z, t, *options):
    return right(z, t.detach(), *options)


@mistake(
    "targets treated as a distribution in the gradient",
    cpu_targets.backward,
    targets.backward,
    features={"targets": "unnormalised", "predictions are": "logits", "size": "many classes"},
)
def _(right, g, z, t, counted, clip, smoothing, needs, saved):
    dz, dt = right(g, z, t, counted, clip, smoothing, needs, saved)
    if clip is None and dz is not None:
        z, t = targets._as_counted(z, t, counted, smoothing)
        excess = t.sum(-1, keepdim=True) - 1
        dz -= g.unsqueeze(-1) * excess * z.softmax(-1)
    return dz, dt


@mistake(
    "smoothing not in the gradient of targets",
    cpu_targets.backward,
    targets.backward,
    features={"loss": "CategoricalCrossentropy", "size": "many examples"},
)
def _(right, g, z, t, counted, clip, smoothing, needs, saved):
    dz, _ = right(g, z, t, counted, clip, smoothing, needs, saved)
    _, dt = right(g, z, t, counted, clip, 0.0, needs, saved)
    return dz, dt


@mistake("clipped entries of targets with a gradient", cpu_targets.backward, targets.backward)
def _(right, g, z, t, counted, clip, smoothing, needs, saved):
    dz, dt = right(g, z, t, counted, clip, smoothing, needs, saved)
    if clip is not None and dz is not None:
        wide, t = targets._as_counted(z, t, counted, smoothing)
        s = wide.sum(-1, keepdim=True)
        w = t / (wide / s).clamp(*clip)
        rest = g.unsqueeze(-1) * ((w * wide / s).sum(-1, keepdim=True) - w) / s
        dz = (
            rest.to(dz.dtype)
            if counted is None
            else rest.where(counted.unsqueeze(-1), 0).to(dz.dtype)
        )
    return dz, dt


@mistake("masked targets counted", kernels.target_losses)
def _(right, z, t, counted, clip, smoothing):
    return right(z, t, None, clip, smoothing)


# Accuracies


@mistake("ties to the last class", accuracy._largest)
def _(right, values):
    return values.shape[-1] - 1 - right(values.flip(-1))


@mistake("a NaN is the largest", accuracy._largest)
def _(right, values):
    if not values.is_floating_point():
        return right(values)
    return torch.where(values.isnan().any(-1), values.argmax(-1), right(values))


@mistake("strict top-k", accuracy._in_top_k)
def _(right, y, y_pred, k):
    classes = y_pred.shape[-1]
    score = y_pred.gather(-1, y.clamp(0, classes - 1).unsqueeze(-1))
    at_least = (y_pred >= score).sum(-1)
    return right(y, y_pred, k) & (at_least <= min(k, classes))


@mistake("scores that are not finite hit", accuracy._in_top_k)
def _(right, y, y_pred, k):
    return right(y, y_pred.nan_to_num(), k)


@mistake(
    "labels outside [0, C) hit",
    accuracy._in_top_k,
    features={"metric": "SparseTopKCategoricalAccuracy", "labels": "outside"},
)
def _(right, y, y_pred, k):
    return right(y.clamp(0, y_pred.shape[-1] - 1), y_pred, k)


@mistake(
    "labels of an accuracy truncated",
    accuracy._equal,
    features={"form": "metric", "labels": "fractional"},
)
def _(right, y_true, y_pred):
    return right(y_true.trunc() if y_true.is_floating_point() else y_true, y_pred)


# Metrics


@mistake("element-wise mean of a metric", example_means)
def _(right, values, *weights):
    if all(weight is None for weight in weights):
        values = values.flatten()
    return right(values, *weights)


@mistake("weights not in the count", example_means)
def _(right, values, *weights):
    total, _ = right(values, *weights)
    ones = (None if weight is None else torch.ones_like(weight) for weight in weights)
    _, count = right(values, *ones)
    return total, count


@mistake("mask of a metric ignored", example_means)
def _(right, values, weight, mask, kept):
    return right(values, weight, None, kept)


@mistake(
    "ignored positions of a metric not counted",
    metrics.SparseCategoricalCrossentropy.update,
    features={"metric": "SparseCategoricalCrossentropy"},
)
def _(right, self, preds, target, weight=None, mask=None):
    if mask is None and self.options.get("ignore_class") is not None:
        mask = True  # any mask at all makes the metric leave them out
    right(self, preds, target, weight, mask)


@mistake(
    "ignored positions of a metric weighted",
    example_means,
    features={"metric": "SparseCategoricalCrossentropy"},
)
def _(right, values, weight, mask, kept):
    return right(values, weight, mask)


@mistake("reset forgets nothing", metrics.Accuracy.reset_state)
def _(right, self):
    pass


# Linear heads

of_a_head = functools.partial(mistake, among=OF_HEADS)


@of_a_head("a chunk dropped", head._chunks)
def _(right, given):
    count = sum(1 for _ in right(given))
    yield from itertools.islice(right(given), max(1, count - 1))


@of_a_head("a smaller last chunk scaled twice", head._SumOfProducts.add)
def _(right, self, dz, x):
    rows = vars(self).setdefault("rows", len(dz))
    right(self, dz * 2 if len(dz) < rows else dz, x)


@of_a_head("d weight of the last chunk alone", head._SumOfProducts.add)
def _(right, self, dz, x):
    self.chunks = 0
    right(self, dz, x)


@of_a_head("a mean of every chunk", head.gradients)
def _(right, g, needs, *inputs):
    given = head.Head(*inputs)
    sizes = [len(x) for _, x, _ in head._chunks(head._prepared(given))]
    if given.counted is not None or len(sizes) < 2:
        return right(g, needs, *inputs)
    parts = [part * (len(g) / len(part) / len(sizes)) for part in g.split(sizes)]
    return right(torch.cat(parts), needs, *inputs)


@of_a_head("the slope of the softcap left out", head.gradients)
def _(right, g, needs, *inputs):
    given = head.Head(*inputs)
    x, weight, softcap = given.x, given.weight, given.softcap
    if softcap is None or not all(needs) or len(weight) > 300 or given.counted is not None:
        return right(g, needs, *inputs)
    capped = softcap * (torch.nn.functional.linear(x, weight, given.bias) / softcap).tanh()
    given = given._replace(x=capped, weight=torch.eye(len(weight)).to(x), bias=None, softcap=None)
    loss, dz, *_ = right(g, [True, False, False], *given)
    return loss, dz @ weight, dz.T @ x, dz.sum(0)


@of_a_head("rows that do not count multiplied by their gradient of 0", head._chunks)
def _(right, given):
    return right(given._replace(counted=None))


@of_a_head("the rows overwritten", head._chunks)
def _(right, given):
    for rows, x, z in right(given):
        yield rows, x, z
        given.x[rows] = 0


# Keras 2

of_keras2 = functools.partial(mistake, among=OF_KERAS2)


@of_keras2("0 where nothing counts", rules.reduce)
def _(right, losses, weight, mask, reduction):
    return right(losses, weight, mask, reduction).nan_to_num(nan=0.0)


@of_keras2("a masked mean over all", rules.reduce)
def _(right, losses, weight, mask, reduction):
    if reduction in ("sum", "none") or mask is None:
        return right(losses, weight, mask, reduction)
    return right(losses, weight, mask, "sum") / max(losses.numel(), 1)


@of_keras2("weights in the denominator", rules.reduce)
def _(right, losses, weight, mask, reduction):
    if reduction in ("sum", "none") or weight is None:
        return right(losses, weight, mask, reduction)
    return reduce(losses, weight, mask, "mean_with_sample_weight")


@of_keras2("a mask counts as 0 or 1", rules.reduce, features={"dtype of mask": "half"})
def _(right, losses, weight, mask, reduction):
    return right(losses, weight, None if mask is None else mask.bool(), reduction)


@of_keras2("auto is the sum", rules.reduce, features={"reduction": "auto"})
def _(right, losses, weight, mask, reduction):
    return right(losses, weight, mask, "sum" if reduction == "auto" else reduction)


@of_keras2("nan for an empty batch", rules.reduce, features={"size": "no positions"})
def _(right, losses, weight, mask, reduction):
    value = right(losses, weight, mask, reduction)
    return value / 0 if losses.numel() == 0 and value.ndim == 0 else value


@of_keras2("weights along the last axis", rules.align, features={"sample_weight": "last axis only"})
def _(right, name, value, shape):
    return samples.align(name, value, shape)


@of_keras2("results in float32", losses_keras2._Loss.forward)
def _(right, *args, **kwargs):
    return right(*args, **kwargs).float()


@of_keras2("labels not truncated before ignore_class", rules.labels_of)
def _(right, y_true, y_pred, axis):
    found = right(y_true, y_pred, axis)
    return y_true.reshape(found.shape)


@of_keras2("labels not flattened", rules.labels_of, features={"shape of y_true": "flat"})
def _(right, y_true, y_pred, axis):
    return y_true.trunc() if y_true.is_floating_point() else y_true


@of_keras2(
    "a last axis of targets kept", rules.squeezed, features={"shape of y_true": "trailing 1"}
)
def _(right, y_true, y_pred):
    return y_true, y_pred


@of_keras2("a metric averages examples", rules.element_sums)
def _(right, values, weight, *masks):
    return example_means(values, weight, *masks)


@of_keras2("a metric counts ignored positions", rules.element_sums)
def _(right, values, weight, mask, kept):
    return right(values, weight, mask)


@of_keras2("a scalar weight counts once", rules.lead, features={"sample_weight": "scalar"})
def _(right, name, value, shape):
    return value if value.ndim == 0 else right(name, value, shape)


@of_keras2("a metric's weights along its last axes", rules.lead)
def _(right, name, value, shape):
    return right(name, value[(None,) * (len(shape) - value.ndim)] if value.ndim else value, shape)


@of_keras2(
    "weights matched to a metric's positions",
    metrics_keras2.SparseCategoricalAccuracy._values,
    metrics.SparseTopKCategoricalAccuracy._values,
)
def _(right, *args):
    values, kept = right(*args)
    return values.squeeze(-1) if values.ndim > 1 and values.shape[-1] == 1 else values, kept


@of_keras2("-0.0 smaller than 0.0", accuracy_keras2._with_one_zero, features={"values": "ties"})
def _(right, name, value, *like):
    return right(name, value, *like) if isinstance(value, list) else value


@of_keras2("a metric in the predictions' dtype", metrics_keras2.prepare)
def _(right, *args, **options):
    return right(*args, **options | {"dtype": None} if "mask" in options else options)
