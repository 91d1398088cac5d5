"""From `F.cross_entropy` as it is usually written to Keras's loss, one rule at a time.

    axis             the classes are where the loss has them
    ignored labels   samples with the label `ignore_class` are left out, and not counted
    precision        computed in the loss's dtype
    probabilities    the logarithm of probabilities, without another softmax
    mask             samples under a zero mask are left out, and not counted
    sample_weight    each loss is multiplied by its weight
    denominator      what the sum is divided by

Each step adds a rule to the ones before; the last has them all. The steps show which rule accounts
for how much of a difference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import CLIP, class_numbers, labels_for, not_ignored
from ..reduction import aligned, combine_masks, fraction
from .cases import Case


@dataclass(frozen=True)
class Step:
    """The value and its gradient with some of the rules, or the error PyTorch raises."""

    rule: str  # the one that is added
    why: str
    value: float | None = None
    gradient: np.ndarray | None = None
    error: str = ""


class Inputs:
    """A case as tensors, in the shapes that the rules need. N samples, C classes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x = torch.tensor(case.y_pred).to(getattr(torch, case.y_pred_dtype))
        self.dtype = getattr(torch, case.loss_dtype)
        self.axis = case.options["axis"] % self.x.ndim
        self.classes = self.x.shape[self.axis]
        self.y_true = torch.as_tensor(case.y_true)
        labels = labels_for(self.y_true, self.x, self.axis)
        self.labels, self.y = labels, class_numbers(labels)
        self.kept = not_ignored(labels, case.options["ignore_class"])
        none = torch.zeros_like(labels, dtype=torch.bool)
        self.ignored = none if self.kept is None else ~self.kept
        self.mask = aligned("mask", case.mask, self.x, labels.shape)
        self.weight = aligned("sample_weight", case.sample_weight, self.x, labels.shape)

    def usual(self, x: Tensor) -> tuple[Tensor, str]:
        """`F.cross_entropy` as it is usually written, with the code."""
        y, target, rows = self.y_true, "y_true", ""
        if self.x.ndim > 1 and self.axis != 1 and not self.fits_axis_1:
            x, y = x.movedim(self.axis, -1).reshape(-1, self.classes), y.reshape(-1)
            moved = "" if self.axis == self.x.ndim - 1 else f".movedim({self.axis}, -1)"
            rows, target = f"{moved}.reshape(-1, {self.classes})", "y_true.reshape(-1)"
        elif y.shape != self.labels.shape:
            y, target = self.labels, f"y_true.reshape({tuple(self.labels.shape)})"
        if y.dtype not in (torch.int64, torch.uint8):
            y, target = y.long(), f"{target}.long()"
        return F.cross_entropy(x, y), f"F.cross_entropy(y_pred{rows}, {target})"

    @property
    def fits_axis_1(self) -> bool:
        """Whether PyTorch takes axis 1 for the classes without a word: T = C."""
        shape = self.x.shape
        return self.x.ndim > 2 and shape[:1] + shape[2:] == self.labels.shape

    def rules(self) -> Iterator[tuple[str, str]]:
        """The rules that matter here, in order, and what each does."""
        options, total = self.case.options, self.labels.numel()
        if self.axis != 1 and self.fits_axis_1:
            why = f"PyTorch has the classes on axis 1, the loss on axis {self.axis}; both have "
            yield "axis", f"{why}{self.classes} entries, so no error shows it"
        if self.ignored.any() and options["ignore_class"] != -100:
            label = options["ignore_class"]
            why = f"{int(self.ignored.sum())} of {total} samples have the label {label}: "
            yield "ignored labels", f"{why}they are left out and not counted"
        if self.x.dtype != self.dtype:
            yield "precision", f"computed in {self.case.loss_dtype}, not {self.case.y_pred_dtype}"
        if not options["from_logits"]:
            why = "F.cross_entropy takes a softmax of its input, so probabilities get one twice; "
            yield "probabilities", f"{why}the loss clips them and takes their logarithm"
        if self.mask is not None and not (self.mask == 1).all():
            out = int((~self.mask.bool().expand(self.labels.shape)).sum())
            why = f"{out} of {total} samples are under a zero mask: "
            yield "mask", f"{why}left out and not counted"
        if self.weight is not None and not (self.weight == 1).all():
            why = "each loss is multiplied by its weight; weight= of F.cross_entropy is another "
            yield "sample_weight", f"{why}thing, one number for each class"
        before, after = float((~self.left_out({"ignored labels", "mask"})).sum()), self.divisor
        if before != after:
            yield "denominator", f"the sum is divided by {after:.7g}, not by {before:.7g}"

    def left_out(self, rules: set[str]) -> Tensor:
        """The samples that are not counted, in the labels' shape."""
        found = self.y == -100
        if "ignored labels" in rules:
            found = found | self.ignored
        if "mask" in rules and self.mask is not None:
            found = found | ~self.mask.bool()
        return found

    @property
    def divisor(self) -> float:
        """What Keras's reduction divides by."""
        mask = combine_masks(self.mask, self.kept)
        zeros = torch.zeros(self.labels.shape, dtype=self.dtype)
        _, count = fraction(zeros, self.weight, mask, self.case.options["reduction"])
        return 1.0 if count is None else float(count)

    def value(self, x: Tensor, rules: set[str]) -> Tensor:
        """The loss of `x` by these rules; the others are PyTorch's."""
        rows = x.movedim(self.axis, -1)
        if "precision" in rules:
            rows = rows.to(self.dtype)
        left_out = self.left_out(rules)
        y = torch.where(left_out, -100, self.y).reshape(-1)
        rows = rows.reshape(-1, self.classes)
        if "probabilities" in rules:
            c = rows.clamp(*CLIP[self.dtype])
            losses = F.nll_loss(c.log() - c.sum(-1, keepdim=True).log(), y, reduction="none")
        else:
            losses = F.cross_entropy(rows, y, reduction="none")
        weight = self.weight if "sample_weight" in rules else None
        mask = self.mask if "mask" in rules else None
        losses = losses.double().reshape(self.labels.shape)
        total = fraction(losses, weight, mask, self.case.options["reduction"])[0].sum()
        count = self.divisor if "denominator" in rules else float((~left_out).sum())
        return total / count if count else total


def steps(case: Case) -> list[Step]:
    """The usual line first, then one step for each rule that matters."""
    inputs = Inputs(case)
    rules = list(inputs.rules())
    x = inputs.x.clone().requires_grad_()
    found: list[Step] = []
    with torch.enable_grad():
        try:
            value, code = inputs.usual(x)
            found.append(_step("as usually written", code, value, x))
        except (IndexError, RuntimeError, ValueError) as error:
            text = str(error).splitlines()[0]
            found.append(Step("as usually written", "", error=f"{type(error).__name__}: {text}"))
        for index, (rule, why) in enumerate(rules):
            kept = {name for name, _ in rules[: index + 1]}
            try:
                found.append(_step(rule, why, inputs.value(x, kept), x))
            except IndexError as error:
                found.append(Step(rule, why, error=f"IndexError: {error}"))
    return found


def _step(rule: str, why: str, value: Tensor, x: Tensor) -> Step:
    (gradient,) = torch.autograd.grad(value, x)
    return Step(rule, why, value.item(), gradient.double().numpy())
