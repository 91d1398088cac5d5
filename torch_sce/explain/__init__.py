"""What the loss did with one batch, step by step, and what looks wrong in it.

    from a position to its loss:     p = the probability of its label,  loss = -log p
    from losses to the result:       numerator = sum of factor * loss
                                     result = numerator / denominator
    from a position to the result:   contribution = factor * loss / denominator

So the contributions add up to the result. The factor is made of the weight and the mask;
`reduction` has the rules for it and for the denominator, `checks` those for what looks wrong.
"""

# The private methods of a loss are private to torch_sce.
# pyright: reportPrivateUsage=false

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import ArrayLike, to_tensor
from ..distributed import group_of
from ..functional import sparse_categorical_crossentropy
from ..kernels import is_traced
from ..linear import LinearSparseCategoricalCrossentropy, _head, _logits, _options_of
from ..losses import CategoricalCrossentropy, SparseCategoricalCrossentropy
from ..options import MEANS, WithOptions
from ..ragged import packed
from ..reduction import is_scalar, numerator_and_denominator, weighted
from ..samples import CLIP, class_numbers
from .batch import Batch, Finding, Loss, batch_of, in_words
from .checks import findings
from .view import Explanation

__all__ = ["Explanation", "Finding", "explain"]


def explain(
    loss: Loss | LinearSparseCategoricalCrossentropy,
    y_true: ArrayLike,
    y_pred: ArrayLike,
    sample_weight: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> Explanation:
    """What `loss` does with a batch, position by position, and what looks wrong in it.

    For people, not for training or `torch.compile`: everything is moved to the host, and the
    values are read. It also works where the loss raises, and says why. With a `process_group` it
    is about this rank's batch alone.

    Args:
        loss: a `SparseCategoricalCrossentropy`, `CategoricalCrossentropy` or
            `LinearSparseCategoricalCrossentropy`.
        y_true, y_pred, sample_weight, mask: as in the call `loss(y_true, y_pred, sample_weight,
            mask)`. For a `LinearSparseCategoricalCrossentropy`, `y_pred` is what goes into the
            head, `hidden`; all of its logits are computed. Of examples of different lengths the
            positions are numbered as their values are.
        weight, bias: those of the head, for a `LinearSparseCategoricalCrossentropy` only.

    Returns:
        An `Explanation`, which prints as text, is shown as a table in a notebook, and has `plot()`.

    Raises:
        TypeError: a `loss` that is none of these or has a `class_group`, a head without its
            `weight`, a tensor whose values cannot be read here, such as a DTensor.
        RuntimeError: inside a transform of `torch.func` or a tracing mode.

    >>> loss = SparseCategoricalCrossentropy(from_logits=True)
    >>> print(explain(loss, [2, 1], [[2.0, 0.5, 1.0, 0.1], [-1.0, 2.5, 0.2, 0.8]]))
    SparseCategoricalCrossentropy(from_logits=True) gives 0.9133192
      y_pred (2, 4) float64: treated as logits; a softmax over axis 1 makes them probabilities
      y_true (2,) int64: 2 positions, 2 of them count
    <BLANKLINE>
    position  label  p(label)  rank   -log p  contribution
           0      2   0.21135     2   1.5542       0.77711
           1      1   0.76153     1  0.27242       0.13621
    <BLANKLINE>
    numerator    1.826638       the sum of the losses
    denominator  2              the number of positions
    value        0.9133192      numerator / denominator, reduction "sum_over_batch_size"
    <BLANKLINE>
    Nothing looks wrong.
    """
    _require_loss(loss)
    _require_weight(loss, weight, bias)
    if getattr(loss, "class_group", None):
        raise TypeError(
            "explain takes whole predictions, and no loss with class_group: gather the slices, and "
            "pass a loss without it"
        )
    if group_of(getattr(loss, "process_group", None)) is not None:
        raise TypeError(
            "explain takes the batch of one process, and no loss with process_group: pass a loss "
            "without it"
        )
    if is_traced():
        raise RuntimeError(
            "explain reads values, which a transform of torch.func or a tracing mode hides: call "
            "it outside"
        )
    is_linear = isinstance(loss, LinearSparseCategoricalCrossentropy)
    name = "hidden" if is_linear else "y_pred"
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        try:
            axis = getattr(loss, "axis", -1)
            given = packed(y_true, y_pred, sample_weight, mask, axis, name)[:4]
        except ValueError as error:
            return _unreadable(loss, "arguments that do not fit", error)
        arguments = tuple(map(_on_host, ("y_true", name, "sample_weight", "mask"), given))
        if is_linear:
            return _head_explained(
                loss, arguments, _on_host("weight", weight), _on_host("bias", bias)
            )
        return _explained(loss, arguments)


def _unreadable(loss: Any, name: str, error: Exception) -> Explanation:
    found = (Finding(name, str(error), ""),)
    return Explanation(loss, error=f"{type(error).__name__}: {error}", findings=found)


def _head_explained(
    loss: LinearSparseCategoricalCrossentropy,
    arguments: tuple[Any, Any, Any, Any],
    weight: Any,
    bias: Any,
) -> Explanation:
    """As the loss of all logits, which are computed here."""
    y_true, hidden, sample_weight, mask = arguments
    try:
        head = _head(hidden, weight, bias)
    except (ValueError, TypeError) as error:
        return _unreadable(loss, "a head that does not fit", error)
    of_logits = SparseCategoricalCrossentropy(
        True, loss.ignore_class, loss.reduction, dtype=loss.dtype,
        label_smoothing=loss.label_smoothing, class_weight=loss.class_weight,
    )  # fmt: skip
    logits = _logits(head, _options_of(loss))
    found = _explained(of_logits, (y_true, logits, sample_weight, mask))
    parts = zip(("hidden", "weight", "bias"), head, strict=True)
    about = ", ".join(f"{name} {_kind(x)}" for name, x in parts if x is not None)
    product = "hidden @ weight.T" if head.bias is None else "hidden @ weight.T + bias"
    capped = "" if loss.logit_softcap is None else f", capped at {loss.logit_softcap:g}"
    findings = found.findings
    if type(loss).forward is not LinearSparseCategoricalCrossentropy.forward:
        findings = (*findings, _own_forward(loss, LinearSparseCategoricalCrossentropy))
    return dataclasses.replace(
        found,
        loss=loss,
        findings=findings,
        arguments=(f"{about}: y_pred is {product}{capped}", *found.arguments),
    )


def _explained(loss: Loss, arguments: tuple[Any, Any, Any, Any]) -> Explanation:
    plain = _plain(loss)
    batch = batch_of(plain, arguments)
    about = tuple(_in_words(batch)) if batch else ()
    found = tuple(findings(batch)) if batch else ()
    if type(loss).forward is not type(plain).forward:
        found = (*found, _own_forward(loss, type(plain)))
    nothing_wrong = not any(finding.is_wrong for finding in found)
    try:
        samples = plain._prepare(*arguments, plain.dtype)
        losses = plain._losses(samples)
    except (ValueError, TypeError) as error:
        if nothing_wrong:
            found = (Finding("arguments that do not fit", str(error), ""), *found)
        message = f"{type(error).__name__}: {error}"
        return Explanation(loss, error=message, findings=found, arguments=about)
    assert batch is not None  # the loss has read it
    given = (losses, samples.weight, samples.mask, loss.reduction)
    value = plain._reduced(samples).to(loss.dtype)
    values = weighted(*given).double()
    numerator = denominator = None
    if loss.reduction not in ("none", None):
        numerator, count = values.sum().item(), numerator_and_denominator(*given)[1]
        denominator = float(count)
    contributions = _contributions(values, denominator, loss.reduction)
    words = _steps_in_words(*given)
    if nothing_wrong and not value.isfinite().all():
        found = (_not_finite(~contributions.isfinite()), *found)
    elif nothing_wrong and denominator == 0 and losses.numel() > 0:
        found = (_divided_by_0(words[1]), *found)
    table = _table(batch, losses, samples.weight, samples.mask, contributions)
    return Explanation(
        loss, value, "", table, numerator, denominator, found, about, *words, batch.classes
    )


def _contributions(values: Tensor, denominator: float | None, reduction: str | None) -> Tensor:
    """What each position adds to the value; `reduce` has the rule for a division by 0."""
    if denominator == 0:
        return torch.zeros_like(values) if reduction not in MEANS else values * 0
    return values / (denominator or 1.0)


def _plain(loss: Loss) -> Loss:
    """A loss with the same options, where `loss` may be of a subclass that has others."""
    ours = loss.class_of_ours()
    return ours(**ours.get_config(loss) | {"process_group": None})


def _own_forward(loss: nn.Module, plain: type) -> Finding:
    return Finding(
        "an overridden forward",
        f"{type(loss).__name__} overrides forward: its value may differ from the one shown, "
        f"which is that of {plain.__name__}.",
        "Look at what its forward changes.",
        is_wrong=False,
    )


def _divided_by_0(denominator: str) -> Finding:
    return Finding(
        "a denominator of 0",
        f"{denominator} is 0, and a division by 0 gives 0: there is no gradient.",
        'Look where it comes from; reduction="sum_over_batch_size" divides by the number of '
        "positions.",
    )


def _not_finite(lost: Tensor) -> Finding:
    where = f", the first at position {in_words(lost.nonzero()[0].tolist())}" if lost.any() else ""
    return Finding(
        "a value that is not finite",
        f"{int(lost.sum())} of {lost.numel()} positions are NaN or infinite{where}.",
        "An infinite loss times a target or a weight of 0 is NaN.",
    )


def _steps_in_words(
    losses: Tensor, weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> tuple[str, str]:
    """What is summed, and what it is divided by."""
    whole = mask is None or bool(((mask == 0) | (mask == 1)).all())
    counts_entries = reduction in MEANS or whole
    names = [] if weight is None else ["weight"]
    names += [] if counts_entries else ["mask"]
    added = " * ".join([*names, "loss"]) if names else "the losses"
    added += " over the positions that count" if mask is not None and counts_entries else ""
    if reduction == "sum":
        return added, "a sum is not divided"
    by_weights = reduction == "mean_with_sample_weight" and not (weight is None and mask is None)
    if reduction in ("none", None) or (by_weights and is_scalar(losses, weight, mask)):
        return added, "a single position is not divided"
    if reduction == "mean_with_sample_weight" and weight is not None:
        given = max(weight.numel(), 0 if mask is None else mask.numel())
        early = ", as they were given: before they broadcast" if given < losses.numel() else ""
        return added, f"the sum of the weights{'' if mask is None else ' that count'}{early}"
    if mask is None:
        return added, "the number of positions" if losses.numel() else "there are no positions"
    if not whole:
        return added, "the sum of the mask"
    aside = "" if weight is None else ", not the sum of their weights"
    return added, f"the number of positions that count{aside}"


def _in_words(batch: Batch) -> Iterator[str]:
    """What each argument is, and how it is treated."""
    axis, low = batch.axis, CLIP[batch.loss.dtype][0]
    steps = [f"clipped to [{low:.3g}, 1 - {low:.3g}]", f"divided by their sum over axis {axis}"]
    smoothing, class_weight = batch.loss.label_smoothing, batch.loss.class_weight
    if isinstance(batch.loss, CategoricalCrossentropy) or smoothing:
        steps.reverse()
    treated = f"probabilities; {', then '.join(steps)}"
    if batch.loss.from_logits:
        treated = f"logits; a softmax over axis {axis} makes them probabilities"
    yield f"y_pred {_kind(batch.y_pred)}: treated as {treated}"
    total, n = batch.counted.numel(), len(batch.rows)
    reasons = f" ({batch.left_out_by})" if batch.left_out_by else ""
    fits = batch.all_labels is not None or batch.targets is not None
    positions = "1 position" if total == 1 else f"{total} positions"
    counts = f"{positions}, {n} of them count{reasons}" if fits else "does not fit y_pred"
    yield f"y_true {_kind(batch.y_true)}: {counts}"
    if smoothing:
        yield f"label_smoothing {smoothing:g}: spread over the {batch.classes} classes evenly"
    if class_weight is not None:
        yield "class_weight: a position's weight is multiplied by that of its class"
    for name, value in zip(("sample_weight", "mask"), batch.arguments[2:], strict=True):
        if value is not None:
            with suppress(ValueError, TypeError):
                yield f"{name} {_kind(to_tensor(name, value))}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _require_loss(loss: Any) -> None:
    if isinstance(loss, (*get_args(Loss), LinearSparseCategoricalCrossentropy)):
        return
    kind = loss if isinstance(loss, type) else type(loss)
    got = f"{kind.__module__}.{kind.__qualname__}"
    hint = ", the class itself: make one" if isinstance(loss, type) else ""
    if isinstance(getattr(loss, "loss", None), Loss):
        hint = ": pass its .loss"
    if isinstance(loss, WithOptions):
        hint = ", which has the rules of Keras 2"
    raise TypeError(
        "loss must be a torch_sce.SparseCategoricalCrossentropy, CategoricalCrossentropy or "
        f"LinearSparseCategoricalCrossentropy, got {got}{hint}"
    )


def _require_weight(loss: Any, weight: Any, bias: Any) -> None:
    if isinstance(loss, LinearSparseCategoricalCrossentropy):
        if weight is None:
            raise TypeError(
                "weight must be that of the head, given by name: explain(loss, y_true, hidden, "
                "weight=head.weight, bias=head.bias)"
            )
    elif weight is not None or bias is not None:
        raise TypeError(
            f"weight and bias are those of a linear head, which a {type(loss).__name__} does not "
            "have: pass the weights of positions as sample_weight"
        )


def _on_host(name: str, value: Any) -> Any:
    """A tensor on the host, without its graph; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    own = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    if own or value.is_meta:
        kind = "a meta tensor" if value.is_meta else f"a {type(value).__name__}"
        hint = ""
        if hasattr(value, "full_tensor"):
            hint = f": pass {name}.full_tensor(), on every rank, or this rank's {name}.to_local()"
        raise TypeError(f"{name} must be a tensor whose values can be read, got {kind}{hint}")
    return value.detach().cpu()


def _table(
    batch: Batch, losses: Tensor, weight: Tensor | None, mask: Tensor | None, contributions: Tensor
) -> dict[str, np.ndarray]:
    counted, shape = batch.counted, losses.shape

    def spread(values: Tensor) -> np.ndarray:
        whole = torch.full(shape, torch.nan, dtype=torch.float64)
        whole[counted] = values.double()
        return whole.numpy()

    def everywhere(values: Tensor | None) -> np.ndarray:
        return (torch.ones(()) if values is None else values).double().expand(shape).numpy()

    if batch.targets is None:
        assert batch.all_labels is not None
        label = batch.all_labels.double().numpy()
        y = class_numbers(batch.all_labels[counted])
    else:
        y = batch.targets.argmax(1)
        label = spread(y)
    if batch.targets is None and not batch.loss.label_smoothing:
        probability = torch.exp(-losses[counted].double())
    elif batch.loss.from_logits:
        probability = torch.exp(-sparse_categorical_crossentropy(y, batch.rows, True))
    else:
        share = batch.rows.gather(1, y[:, None])[:, 0] / batch.rows.sum(1)
        probability = share.clamp(*CLIP[batch.loss.dtype])
    at_label = batch.rows.gather(1, y[:, None])
    rank = 1 + (batch.rows > at_label).sum(1).double()
    rank[at_label[:, 0].isnan()] = torch.nan
    return {
        "label": label, "probability": spread(probability), "rank": spread(rank),
        "loss": spread(losses[counted]), "weight": everywhere(weight), "mask": everywhere(mask),
        "contribution": contributions.expand(shape).numpy(),
    }  # fmt: skip
