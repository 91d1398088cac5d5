"""What looks wrong in a batch: the usual mistakes, each with its evidence and its fix.

A check looks for one mistake, in the positions that count. It reports nothing unless the numbers
leave little doubt.

N are the positions that count, C the classes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ..losses import SparseCategoricalCrossentropy
from ..options import MEANS
from ..samples import CLIP, class_numbers
from .batch import FEW, Batch, Finding

IGNORE_VALUES = (-1, -100, 255)  # of Keras and NumPy, of PyTorch, of segmentation maps
FAR, TOO_FAR = 3.0, 10.0  # a mean weight this far from 1 is not by chance; a mistake
CONFIDENT = 0.999
MANY = 32  # labels: fewer may fit another order by chance
OFF = 2e-2  # sums of probabilities that bfloat16 has rounded stay nearer to 1 than this


def findings(batch: Batch) -> list[Finding]:
    """First what looks wrong, then what is good to know."""
    found = [finding for check in CHECKS for finding in check(batch)]
    return sorted(found, key=lambda finding: not finding.is_wrong)


def _nothing_counts(batch: Batch) -> Iterator[Finding]:
    total = batch.counted.numel()
    if total == 0:
        yield Finding(
            "an empty batch",
            f"y_pred has the shape {tuple(batch.y_pred.shape)}: there are no positions.",
            "A reduced loss is 0 then, and has no gradient.",
            is_wrong=False,
        )
    elif not batch.counted.any():
        yield Finding(
            "nothing counts",
            f"{batch.left_out_by} leave{'s' * (' and ' not in batch.left_out_by)} out all {total} "
            "positions, so the loss is 0 and there is no gradient.",
            "A mask is 1 or True where a position counts; ignore_class is a label that does not.",
        )


def _not_finite(batch: Batch) -> Iterator[Finding]:
    allowed = batch.loss.from_logits  # -inf is how logits say "impossible"
    bad = batch.rows.isnan() | (batch.rows.isinf() & ~((batch.rows < 0) & allowed))
    if bad.any():
        nans, where = int(batch.rows.isnan().sum()), batch.position(bad.any(1))
        yield Finding(
            "predictions that are not finite",
            f"{nans} NaN and {int(bad.sum()) - nans} infinite predictions in "
            f"{_share(bad.any(1))} of the positions that count, the first at position {where}.",
            "Look for their source in the model: a division by zero, the logarithm of 0, an "
            "overflow in half precision, a step that was too large.",
        )
    y = _known(batch)
    if y is not None and allowed:
        at_label = batch.rows.gather(1, y.clamp(0)[:, None])[:, 0]
        possible = batch.rows.max(1).values > -math.inf
        impossible = (y >= 0) & (at_label == -math.inf) & possible & ~bad.any(1)
        if impossible.any():
            yield Finding(
                "labels that the predictions exclude",
                f"the logit of the label is -inf in {_share(impossible)} of the positions that "
                f"count, the first at position {batch.position(impossible)}: their loss is "
                "infinite.",
                "Mask logits with -inf only where the label cannot be.",
            )
    if batch.weight is not None and not batch.weight.isfinite().all():
        odd = ~batch.weight.isfinite()
        yield Finding(
            "weights that are not finite",
            f"sample_weight is NaN or infinite for {_share(odd)} of the positions that count, the "
            f"first at position {batch.position(odd)}.",
            "To leave positions out, pass a mask or a weight of 0.",
        )


def _logits_as_probabilities(batch: Batch) -> Iterator[Finding]:
    rows = _finite(batch)
    if batch.loss.from_logits or not rows.numel() or rows.min() >= -OFF:
        return
    outside = int(((rows < 0) | (rows > 1)).sum())
    evidence = f"{outside / rows.numel():.1%} of the predictions are below 0 or above 1."
    stuck = _stuck(batch)
    if stuck is not None:
        evidence += (
            f" The gradient is exactly zero for {stuck[0]:.1%} of all predictions, and for the "
            f"label of {stuck[1]:.1%} of the positions, which cannot learn it."
        )
    fix = "Pass from_logits=True"
    with suppress(ValueError, TypeError):
        value = batch.another(from_logits=True)(*batch.arguments)
        if value.ndim == 0:
            fix += f": the loss is {value.item():.6g} then"
    yield Finding("logits passed as probabilities", evidence, fix + ".")


def _stuck(batch: Batch) -> tuple[float, float] | None:
    """The shares of entries, and of labels' entries, that get a gradient of exactly zero."""
    y = _known(batch)
    if y is None or not (y >= 0).any():
        return None
    known = y >= 0
    rows = batch.rows[known].detach().requires_grad_()
    given = batch.labels if batch.targets is None else batch.targets
    assert given is not None
    with torch.enable_grad():
        total = batch.among_rows(reduction="sum")(given[known], rows)
    (gradient,) = torch.autograd.grad(total, rows)
    is_zero = gradient == 0
    at_label = is_zero.gather(1, y[known][:, None])
    return _mean(is_zero), _mean(at_label)


def _probabilities_as_logits(batch: Batch) -> Iterator[Finding]:
    rows, classes = batch.rows, batch.classes
    if not batch.loss.from_logits or not rows.numel() or classes == 1:
        return
    floor = math.log(math.e + classes - 1) - 1
    low, high = rows.aminmax()
    if batch.are_distributions(rows):
        by_hand = len(rows) < FEW and bool((2 * rows == (2 * rows).round()).all())
        yield Finding(
            "probabilities passed as logits",
            f"all {len(rows)} rows are in [0, 1] and sum to 1, so softmax is applied twice: for "
            f"{classes} classes the loss cannot fall below {floor:.4g}, however good the model.",
            "Remove the softmax from the model (preferred), or pass from_logits=False.",
            is_wrong=not by_hand,  # 0, 1/2 and 1 could be anything
        )
    elif low >= 0 and high <= 1 and high - low > 0.5 and len(rows) >= FEW:
        yield Finding(
            "logits between 0 and 1",
            f"they range from {_low_high(rows)}; while they stay in [0, 1], the loss for {classes} "
            f"classes cannot fall below {floor:.4g}.",
            "If they come from a sigmoid, remove it from the model.",
            is_wrong=False,
        )


def _not_normalised(batch: Batch) -> Iterator[Finding]:
    rows = _finite(batch)
    if batch.loss.from_logits or not rows.numel() or rows.min() < -OFF or batch.classes == 1:
        return
    sums = rows.sum(1)
    if (sums - 1).abs().max() <= OFF:
        return
    for axis in range(batch.y_pred.ndim):
        if axis == batch.axis or batch.y_pred.shape[axis] == 1:
            continue
        others = batch.y_pred.movedim(axis, -1).flatten(0, -2).to(rows.dtype)
        others = others[~others.sum(1).isnan()]
        if len(others) and batch.are_distributions(others):
            yield Finding(
                "a softmax along the wrong axis",
                f"the predictions sum to 1 along axis {axis}, but the loss has its classes on "
                f"axis {batch.axis}, where the sums range from {_low_high(sums)}.",
                f"If the classes are on axis {axis}, pass axis={axis}; if not, take the softmax "
                f"over axis {batch.axis}.",
            )
            return
    yield Finding(
        "probabilities that do not sum to 1",
        f"the sums range from {_low_high(sums)}. The loss divides by them"
        + (
            ", so scaling all the predictions changes nothing."
            if rows.max() <= 1 + OFF
            else f", and the predictions reach {rows.max():.4g}."
        ),
        "If they are logits or scores, pass from_logits=True; if they come from a sigmoid for "
        "each class, remove the sigmoid and pass from_logits=True.",
    )


def _saturated(batch: Batch) -> Iterator[Finding]:
    y = _known(batch)
    rows = batch.rows
    if y is None or not rows.numel() or batch.classes == 1:
        return
    at_label, largest = rows.gather(1, y.clamp(0)[:, None])[:, 0], rows.max(1).values
    if batch.loss.from_logits:
        lost = (y >= 0) & (largest - at_label > 88) & rows.isfinite().all(1)
        if lost.sum() >= 0.1 * len(rows):
            yield Finding(
                "a saturated softmax",
                f"{_share(lost)} of the positions that count give their label a probability below "
                f"e^-88, which is 0 in float32; the logits range from {_low_high(rows)}.",
                "Such logits come from inputs or weights that are far too large: look at the "
                "inputs' scale, the initial weights and the learning rate.",
            )
    elif batch.are_distributions(rows, OFF):
        low, _ = CLIP[batch.loss.dtype]
        lost = (y >= 0) & (at_label < low) & (largest > CONFIDENT)
        if lost.any():
            yield Finding(
                "a saturated softmax",
                f"{_share(lost)} of the positions that count give their label a probability below "
                f"{low:.3g} and another class more than {CONFIDENT}: their loss is capped near "
                f"{-math.log(low):.1f} and their gradient is exactly zero at the label.",
                "From logits, with from_logits=True, they get a gradient.",
                is_wrong=bool(lost.sum() >= 0.25 * len(rows)),
            )


def _many_classes(batch: Batch) -> Iterator[Finding]:
    low, high = CLIP[batch.loss.dtype]
    floor = math.log1p((batch.classes - 1) * low / high)
    normalised = batch.loss.from_logits or batch.targets is not None or batch.loss.label_smoothing
    if not normalised and floor > 1e-3:
        yield Finding(
            "many classes in probability mode",
            f"each of {batch.classes} probabilities is raised to at least {low:.3g}, so that a "
            f"perfect prediction still has a loss of {floor:.2g}.",
            "Return logits and pass from_logits=True, which has no such floor.",
        )


def _one_class(batch: Batch) -> Iterator[Finding]:
    if batch.classes == 1 and batch.counted.numel():
        yield Finding(
            "one class",
            f"y_pred has the shape {tuple(batch.y_pred.shape)} and one class on axis {batch.axis}: "
            "its probability is always 1 and the loss always 0.",
            "Give a binary model two outputs, or use binary cross-entropy for one.",
        )


def _one_hot(batch: Batch) -> Iterator[Finding]:
    y = batch.y_true
    if not isinstance(batch.loss, SparseCategoricalCrossentropy) or not y.numel():
        return
    if batch.labels is not None or y.shape != batch.y_pred.shape or y.ndim < 2:
        return
    targets = y.movedim(batch.axis, -1).flatten(0, -2).double()
    targets = targets[targets.sum(1) != 0]  # padding may have no 1
    if not len(targets) or not batch.are_distributions(targets, OFF):
        return
    if ((targets == 0) | (targets == 1)).all():
        yield Finding(
            "one-hot labels",
            f"y_true has y_pred's shape, {tuple(y.shape)}, and a single 1 for each position.",
            f"Pass the class numbers, y_true.argmax({batch.axis}), or use CategoricalCrossentropy.",
        )
    else:
        yield Finding(
            "soft labels",
            f"y_true has y_pred's shape, {tuple(y.shape)}, and sums to 1 for each position.",
            "Use CategoricalCrossentropy, which takes a target for every class.",
        )


def _labels_outside(batch: Batch) -> Iterator[Finding]:
    if batch.labels is None:
        return
    y, classes = class_numbers(batch.labels), batch.classes
    bad = (y < 0) | (y >= classes)
    if not bad.any():
        return
    values = list(dict.fromkeys(map(_number, batch.labels[bad].unique().tolist())))
    shown = ", ".join(values[:5]) + (f" and {len(values) - 5} others" if len(values) > 5 else "")
    evidence = (
        f"{_share(bad)} of the labels that count are outside [0, {classes}): {shown}, the first "
        f"at {batch.position(bad)}."
    )
    marks = [v for v in values if v in map(str, IGNORE_VALUES) and v != str(classes)]
    inside, rest = y[~bad], [v for v in values if v not in marks]
    often = bad.sum() >= 3 and _mean(bad) >= 0.05
    if not marks and len(rest) == 1 and (rest[0][0] == "-" or (often and rest[0] != str(classes))):
        marks = [v for v in rest if v.lstrip("-").isdecimal() and len(v) < 7]
        rest = [v for v in rest if v not in marks]
    for mark in marks[:1]:
        yield Finding(
            "labels that look like an ignore value",
            evidence,
            f"If {mark} marks positions to leave out, pass ignore_class={mark}.",
        )
    if rest == [str(classes)] and not (inside < 1).any():
        ignored = getattr(batch.loss, "ignore_class", None)
        kept = marks[0] if marks else ignored
        fix = "y_true - 1" if kept is None else f"torch.where(y_true == {kept}, {kept}, y_true - 1)"
        yield Finding("labels that start at 1", evidence, f"Subtract 1: pass {fix}.")
    elif rest or len(marks) > 1:
        top = int(y.max()) + 1
        needed = f"; labels from 0 to {top - 1} need {top}" if classes < top < 2**31 else ""
        yield Finding(
            "labels out of range",
            evidence,
            f"There are predictions for {classes} on axis {batch.axis}{needed}. Class numbers "
            "start at 0, and positions that do not count need a mask.",
        )


def _not_whole(batch: Batch) -> Iterator[Finding]:
    if batch.labels is None or not batch.labels.is_floating_point():
        return
    odd = batch.labels.isfinite() & (batch.labels != batch.labels.trunc())
    if odd.any():
        first = batch.labels[odd][0].item()
        yield Finding(
            "labels that are not whole",
            f"{_share(odd)} of the labels that count, the first is {first:.6g} at "
            f"{batch.position(odd)}, which is treated as class {math.trunc(first)}.",
            "Labels are class numbers: check where they come from, or round them first.",
        )


def _other_axis(batch: Batch) -> Iterator[Finding]:
    shape, axis, classes = batch.y_pred.shape, batch.axis, batch.classes
    if batch.labels is None or classes == 1 or not batch.loss.from_logits:
        return  # probabilities show by their sums where the classes are
    for other in range(1, len(shape)):
        fits = shape[:other] + shape[other + 1 :] == shape[:axis] + shape[axis + 1 :]
        if other == axis or shape[other] != classes or not fits:
            continue
        here, there = (_losses_along(batch, each) for each in (axis, other))
        if here is None or there is None:
            continue
        better = there.mean() < 0.8 * min(math.log(classes), here.mean().item())
        if better and len(there) >= 30:
            yield Finding(
                "classes on another axis",
                f"axes {axis} and {other} of y_pred both have {classes} entries, and the labels "
                f"fit axis {other} far better: a mean loss of {there.mean():.4g}, not "
                f"{here.mean():.4g}.",
                f"If the classes are on axis {other}, pass axis={other}.",
            )
        else:
            yield Finding(
                "two axes that could hold the classes",
                f"axes {axis} and {other} of y_pred both have {classes} entries, so no error "
                "shows a wrong axis.",
                f"The loss has its classes on axis {axis}.",
                is_wrong=False,
            )


def _losses_along(batch: Batch, axis: int) -> Tensor | None:
    """The losses of the positions that count, with the classes on that axis."""
    y_true, y_pred, _, mask = batch.arguments
    with suppress(ValueError, TypeError):
        loss = batch.another(axis=axis, reduction="none")
        losses = loss(y_true, y_pred, mask=mask)[batch.counted].double()
        return losses if losses.isfinite().all() else None
    return None


def _weights(batch: Batch) -> Iterator[Finding]:
    weight = batch.weight
    if weight is None or not len(weight):
        return
    if (weight == 0).all():
        yield Finding(
            "weights that are all 0",
            f"all {len(weight)} positions that count have the weight 0, so the loss is 0.",
            "Look where the weights come from.",
        )
    if batch.loss.reduction not in MEANS or (weight == 0).all():
        return
    if (weight == 0).any():
        yield Finding(
            "weights of 0",
            f"{_share(weight == 0)} of the positions that count have the weight 0: they add "
            "nothing, but the mean counts them.",
            "To leave positions out of both, pass a mask or an ignore_class.",
            is_wrong=False,
        )
    if (weight < 0).any():
        yield Finding(
            "negative weights",
            f"{_share(weight < 0)} of the positions that count have a negative weight: training "
            "makes their loss larger.",
            "That is right for a policy gradient; otherwise look where the weights come from.",
            is_wrong=False,
        )
        return
    mean = weight.double().mean().item()
    if not math.isfinite(mean) or 1 / FAR <= mean <= FAR:
        return
    fix = (
        'Weights with a mean of 1 keep the loss\'s scale; reduction="mean_with_sample_weight" '
        "divides by their sum."
    )
    if ((weight == 0) | (weight == 1)).all():
        fix = (
            "If 0 means to leave a position out, pass them as mask=: what is masked is not counted."
        )
    yield Finding(
        "weights whose mean is far from 1",
        f"the mean weight of the {len(weight)} positions that count is {mean:.4g} (from "
        f"{_low_high(weight)}). The mean divides by the number of positions, not by the weights, "
        "so it scales the loss and the gradient as a learning rate does.",
        fix,
        is_wrong=not 1 / TOO_FAR <= mean <= TOO_FAR,
    )


def _mask(batch: Batch) -> Iterator[Finding]:
    mask = batch.mask
    if mask is None or mask.dtype == torch.bool or not mask.numel():
        return
    if not ((mask >= 0) & (mask <= 1)).all():
        yield Finding(
            "a mask outside [0, 1]",
            f"its values range from {_low_high(mask)}, and every value but 0 counts.",
            "A mask is 1 or True where a position counts, and 0 elsewhere: pass a comparison such "
            "as mask == 1, and weights as sample_weight.",
        )


def _targets(batch: Batch) -> Iterator[Finding]:
    targets = batch.targets
    if targets is None or not targets.numel() or batch.are_distributions(targets, OFF):
        return
    yield Finding(
        "targets that are not a distribution",
        f"the targets of a position range from {_low_high(targets)} and their sums from "
        f"{_low_high(targets.sum(1))}.",
        "Targets should be at least 0 and sum to 1 for each position; if y_true and y_pred are "
        "swapped, labels come first.",
    )


def _labels_moved(batch: Batch) -> Iterator[Finding]:
    y, rows = _known(batch), batch.rows
    if y is None or len(y) < MANY or (y < 0).any() or not rows.isfinite().all():
        return
    sparse = SparseCategoricalCrossentropy(batch.loss.from_logits)
    value, guessing = sparse(y, rows).item(), math.log(batch.classes)
    moved = {by: sparse(y.roll(-by), rows).item() for by in (1, -1)}
    by = min(moved, key=lambda by: moved[by])
    if value > guessing and moved[by] < min(value, guessing) / 2:
        where = "after" if by == 1 else "before"
        yield Finding(
            "labels moved by one position",
            f"the mean of the losses, {value:.6g}, is worse than guessing, log {batch.classes} = "
            f"{guessing:.3g}, and with the label of the position {where} each one it is "
            f"{moved[by]:.6g}.",
            "A model of sequences predicts the next label: compare y_pred[:, :-1] with "
            "y_true[:, 1:]. Or labels and inputs were read in different orders.",
        )


def _known(batch: Batch) -> Tensor | None:
    """Class numbers, -1 for a label outside [0, C)."""
    if batch.targets is not None:
        return batch.targets.argmax(1)
    if batch.labels is None:
        return None
    y = class_numbers(batch.labels)
    return torch.where(y < batch.classes, y.clamp(-1), -1)


def _finite(batch: Batch) -> Tensor:
    whole = ~batch.rows.sum(1).isnan()  # NaN also for a row with inf and -inf
    return batch.rows if whole.all() else batch.rows[whole]


def _mean(flags: Tensor) -> float:
    return int(flags.count_nonzero()) / max(flags.numel(), 1)


def _share(flags: Tensor) -> str:
    return f"{int(flags.sum())} of {flags.numel()}"


def _low_high(values: Tensor) -> str:
    return f"{values.min().item():.4g} to {values.max().item():.4g}"


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.6g}"


CHECKS: tuple[Callable[[Batch], Iterator[Finding]], ...] = (
    _one_hot,
    _labels_outside,
    _not_whole,
    _nothing_counts,
    _not_finite,
    _logits_as_probabilities,
    _probabilities_as_logits,
    _not_normalised,
    _other_axis,
    _saturated,
    _one_class,
    _weights,
    _mask,
    _targets,
    _many_classes,
    _labels_moved,
)
