"""From `F.cross_entropy` as it is usually written to Keras's loss, one rule at a time.

    axis             the classes are where the loss has them
    ignored labels   positions with the label `ignore_class` are left out, and not counted
    precision        computed in the loss's dtype
    probabilities    the logarithm of probabilities, without another softmax
    mask             positions with mask 0 are left out, and not counted
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

from ..arrays import to_tensor
from ..kernels.aten import clamp_inclusive
from ..reduction import numerator_and_denominator
from ..samples import CLIP, aligned, class_numbers, combine_masks, labels_for, not_ignored
from .blocks import Gaps, blocks_of, measured
from .cases import Case

ELEMENTS = 2**22  # computed at a time: with less, PyTorch's threads wait for each other


@dataclass(frozen=True)
class Step:
    """The value with some of the rules, or the error PyTorch raises."""

    rule: str  # the one that is added
    why: str
    value: float | None = None
    length: float | None = None  # of the gradient
    distance: float | None = None  # and how far from another, see `Gaps`
    error: str = ""


class Inputs:
    """A case as tensors, in the shapes that the rules need. N positions, C classes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x = to_tensor("y_pred", case.y_pred).to(getattr(torch, case.y_pred_dtype))
        self.dtype = getattr(torch, case.loss_dtype)
        self.axis = case.options["axis"] % self.x.ndim
        self.classes = self.x.shape[self.axis]
        self.y_true = torch.as_tensor(np.asarray(case.y_true))
        labels = labels_for(self.y_true, self.x, self.axis)
        self.labels, self.y = labels, class_numbers(labels)
        self.kept = not_ignored(labels, case.options["ignore_class"])
        none = torch.zeros_like(labels, dtype=torch.bool)
        self.ignored = none if self.kept is None else ~self.kept
        given = (case.sample_weight, case.mask)
        self.weight, self.mask = aligned(*given, self.x, labels.shape)

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
        """Whether PyTorch silently uses axis 1 as the class axis: T = C."""
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
            why = f"{int(self.ignored.sum())} of {total} positions have the label {label}: "
            yield "ignored labels", f"{why}they are left out and not counted"
        if self.x.dtype != self.dtype:
            yield "precision", f"computed in {self.case.loss_dtype}, not {self.case.y_pred_dtype}"
        if not options["from_logits"]:
            why = "F.cross_entropy takes a softmax of its input, so probabilities get one twice; "
            yield "probabilities", f"{why}the loss clips them and takes their logarithm"
        if self.mask is not None and not (self.mask == 1).all():
            out = int((~self.mask.bool().expand(self.labels.shape)).sum())
            why = f"{out} of {total} positions have mask 0: "
            yield "mask", f"{why}left out and not counted"
        if self.weight is not None and not (self.weight == 1).all():
            why = "each loss is multiplied by its weight; weight= of F.cross_entropy is another "
            yield "sample_weight", f"{why}thing, one number for each class"
        before, after = float((~self.left_out({"ignored labels", "mask"})).sum()), self.divisor
        if before != after:
            yield "denominator", f"the sum is divided by {after:.7g}, not by {before:.7g}"

    def left_out(self, rules: set[str]) -> Tensor:
        """The positions that are not counted, in the labels' shape."""
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
        given = (zeros, self.weight, mask, self.case.options["reduction"])
        return float(numerator_and_denominator(*given)[1])

    def value(self, rules: set[str], gaps: Gaps) -> float:
        """The loss with these rules and otherwise PyTorch's; its gradient is added to `gaps`."""
        left_out = self.left_out(rules)
        y = torch.where(left_out, -100, self.y).reshape(-1)
        losses = torch.zeros(self.labels.shape, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(self.reduced(losses, rules, left_out), losses)
        found = []
        for rows in blocks_of(self.x.shape, self.axis, ELEMENTS):
            where = torch.as_tensor(rows.numbers)
            x = torch.as_tensor(rows.of(self.case.y_pred)).to(self.x.dtype).requires_grad_()
            found.append(self.row_losses(x, y[where], rules))
            (gradient,) = torch.autograd.grad(found[-1], x, slopes.reshape(-1)[where])
            gaps.add(_array(gradient), rows)
        losses = torch.cat(found).detach().reshape(self.labels.shape)
        return self.reduced(losses, rules, left_out).item()

    def row_losses(self, rows: Tensor, y: Tensor, rules: set[str]) -> Tensor:
        """(n,), in float64, of rows (n, C)."""
        if "precision" in rules:
            rows = rows.to(self.dtype)
        if "probabilities" in rules:
            c = clamp_inclusive(rows, *CLIP[self.dtype])
            log = c.log() - c.sum(-1, keepdim=True).log()
            return F.nll_loss(log, y, reduction="none").double()
        return F.cross_entropy(rows, y, reduction="none").double()

    def reduced(self, losses: Tensor, rules: set[str], left_out: Tensor) -> Tensor:
        weight = self.weight if "sample_weight" in rules else None
        mask = self.mask if "mask" in rules else None
        total, _ = numerator_and_denominator(losses, weight, mask, self.case.options["reduction"])
        count = self.divisor if "denominator" in rules else float((~left_out).sum())
        return total / count if count else total


def steps(case: Case, other: np.ndarray | None = None) -> list[Step]:
    """The usual line first, then one step for each rule that matters.

    `other` is the gradient that the steps' gradients are compared with.
    """
    inputs = Inputs(case)
    rules = list(inputs.rules())
    found: list[Step] = []
    with torch.enable_grad():
        try:
            found.append(_usual(inputs, other))
        except (IndexError, RuntimeError, ValueError) as error:
            text = str(error).splitlines()[0]
            found.append(Step("as usually written", "", error=f"{type(error).__name__}: {text}"))
        for index, (rule, why) in enumerate(rules):
            kept = {name for name, _ in rules[: index + 1]}
            gaps = Gaps(other)
            try:
                value = inputs.value(kept, gaps)
                found.append(Step(rule, why, value, gaps.length, gaps.distance))
            except IndexError as error:
                found.append(Step(rule, why, error=f"IndexError: {error}"))
    return found


def _usual(inputs: Inputs, other: np.ndarray | None) -> Step:
    x = inputs.x.detach().requires_grad_()
    value, code = inputs.usual(x)
    (gradient,) = torch.autograd.grad(value, x)
    gaps = measured(_array(gradient), other)
    return Step("as usually written", code, value.item(), gaps.length, gaps.distance)


def _array(tensor: Tensor) -> np.ndarray:
    """As an array; NumPy has no bfloat16."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
