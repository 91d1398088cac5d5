"""Means over the processes of a group of `torch.distributed`.

Ranks have different numbers of positions that count, so the mean of their means is not the mean.
With n_r and d_r the numerator and denominator of rank r, and R ranks, every rank returns

    value     = sum_r n_r / sum_r d_r
    gradient  = R * dn_r / sum_r d_r

so that the average of the ranks' gradients, which DDP and FSDP take, is the gradient of the value.
This takes one all-reduce of four numbers.

A rank that raises an error takes part in the all-reduce before it does, so that no other waits for
it: on the CPU they raise an error, too, elsewhere their value is NaN.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from .arrays import ArrayLike, float64_on, to_tensor
from .kernels import is_dtensor, modes, require_first_derivative
from .kernels.shards import Slice, find_slice
from .options import NoArguments, WithOptions
from .reduction import numerator_and_denominator, quotient, ratio, reduce
from .samples import Samples, values_can_be_read

# Losses, weight and mask, and what gives a reduced value its gradients.
Unreduced = tuple[Tensor, Tensor | None, Tensor | None, Callable[[Tensor], Tensor]]
_NUMBERS = itertools.count()  # of losses
Group = Any  # a ProcessGroup, which PyTorch builds without distributed do not have


def unchanged(x: Tensor) -> Tensor:
    return x


def parse_group(name: str, group: Any) -> Group | bool | None:
    if group is None or isinstance(group, bool):
        return group or None
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return group
    rule = f"{name} must be True for all processes, a group of torch.distributed, or None"
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"{rule}, got a group that this rank is not in: it has no use of the loss")
    hint = ": pass mesh.get_group(), of one of its axes" if hasattr(group, "get_group") else ""
    raise TypeError(f"{rule}, got {group!r}{hint}")


def group_of(process_group: Group | bool | None) -> Group | None:
    """The group; None for one process, as where torch.distributed is not initialised."""
    if process_group is not True:
        return process_group
    is_ready = dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if is_ready else None


def reduced(
    loss: WithOptions,
    compute: Callable[[Tensor | None], Unreduced],
    y_pred: Any,
    denominator: ArrayLike | None,
) -> Tensor:
    """The value of a loss, over its group if it has one.

    `compute` may raise. It gets what the loss divides by before the ranks are added up, None for
    its own denominator.
    """
    reduction, group = loss.reduction, reducing_group(loss)
    device = device_of(y_pred)
    with SharedErrors(group, device):
        given = parse_denominator(denominator, device, reduction)
        divisor = given if group is None else torch.ones((), device=device)
        losses, weight, mask, attached = compute(divisor)
        if group is None:
            return attached(reduce(losses, weight, mask, reduction, given).to(loss.dtype))
        total, count = _summands(losses, weight, mask, reduction, given)
        total = attached(total)
    return _group_mean(total, count, group, given, reduction).to(loss.dtype)


def reducing_group(loss: WithOptions) -> Group | None:
    """The group that a loss takes its value over."""
    group = group_of(loss.process_group)
    if group is None:
        return None
    require_same_options(loss, "process_group", group)
    if loss.reduction in ("none", None):
        return None
    if modes.transforms_active():
        raise RuntimeError(
            "a loss with process_group has no transforms of torch.func: leave the group out"
        )
    return group


def require_same_options(loss: WithOptions, name: str, group: Group, **others: Any) -> None:
    """Raises on all ranks if theirs differ, in the first call if PyTorch's debug level is DETAIL.

    `others`: what else has to be the same.
    """
    if torch.compiler.is_compiling() or not _compares_ranks():
        return
    compared = loss.__dict__.setdefault("_compared", {})
    if compared.get(name) is group:
        return
    groups = ("process_group", "class_group", "name")
    config = {k: repr(v) for k, v in loss.get_config().items() if k not in groups}
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, config | {k: repr(v) for k, v in others.items()}, group)
    for option in dict.fromkeys(option for each in every for option in each):
        values = [each.get(option, "None") for each in every]
        if len(set(values)) > 1:
            found = ", ".join(values)
            raise ValueError(
                f"{option} must be the same on all ranks of {name}, got {found}, by rank"
            )
    compared[name] = group


class SharedErrors:
    """What may raise on this rank, before `_sums`, in which the others wait for it.

    Not by `contextlib`, which PyTorch 2.6 does not compile.
    """

    def __init__(self, group: Group | None, device: torch.device) -> None:
        self.group, self.device = group, device

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> None:
        if self.group is not None and kind is not None and issubclass(kind, Exception):
            dtype = float64_on(self.device)
            _all_reduce(
                torch.tensor([torch.nan, 0, 1, 0], dtype=dtype, device=self.device), self.group
            )


def _summands(
    losses: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str | None,
    denominator: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The numerator and denominator of a part of a batch, of which the others have theirs.

    `denominator`: that of the whole, if it is known.
    """
    if reduction == "mean_with_sample_weight" and denominator is None and losses.ndim:
        for name, given in (("sample_weight", weight), ("mask", mask)):
            if given is None or (given.ndim == losses.ndim and len(given) == len(losses)):
                continue
            raise ValueError(
                f"{name} must have the losses' first axis, of {len(losses)}, got the shape "
                f'{tuple(given.shape)}: with "mean_with_sample_weight" one weight for a whole '
                "batch is divided by itself, so that the parts of a batch do not add up"
            )
    total, count = numerator_and_denominator(losses, weight, mask, reduction)
    return on_every_rank(total), on_every_rank(count)


def _group_mean(
    total: Tensor, count: Tensor, group: Group, denominator: Tensor | None, reduction: str | None
) -> Tensor:
    """The quotient of the sums over a group of `total` and `count`; for a sum that of `total`.

    `denominator` takes the place of the sum of `count`.
    """
    n, d = _sums(total, count, group, denominator)
    has_count = reduction != "sum" and denominator is None
    d = torch.ones_like(d) if reduction == "sum" else d
    rule = reduction if denominator is None else None
    return _GroupMean.apply(total, count, n, d, dist.get_world_size(group), has_count, rule)


def _sums(
    total: Tensor, count: Tensor, group: Group, denominator: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both, added up over a group; NaN, or an error on the CPU, if a rank had an error.

    With a `denominator` it is the second, and all ranks must have the same.
    """
    wide, is_given = float64_on(total.device), denominator is not None
    divisor = count.detach() if denominator is None else denominator
    numbers = (total.detach(), divisor, torch.zeros_like(total), torch.full_like(total, is_given))
    n, d, errors, given = _all_reduce(torch.stack([x.to(wide) for x in numbers]), group).unbind()
    ranks = dist.get_world_size(group)
    if values_can_be_read(errors):
        if errors.item():
            raise RuntimeError(
                f"an error was raised on other ranks of the process group ({int(errors.item())}): "
                "see theirs"
            )
        differs = is_given and abs(d.item() / ranks - divisor.item()) > 1e-9 * abs(divisor.item())
        if given.item() not in (0, ranks) or differs:
            raise ValueError(
                "denominator must be given on all ranks of process_group, and the same, got "
                f"{divisor.item() if is_given else None} on this rank, with {int(given.item())} of "
                f"{ranks} ranks that have one: a loss with the same process_group adds it up"
            )
    d = d / ranks if is_given else d
    return torch.where(errors > 0, torch.nan, n), torch.where(errors > 0, torch.nan, d)


def _compares_ranks() -> bool:
    level, detail = dist.get_debug_level(), dist.DebugLevel.DETAIL  # pyright: ignore
    return level == detail


def parse_denominator(
    value: ArrayLike | None, device: torch.device, reduction: str | None
) -> Tensor | None:
    if value is None:
        return None
    if reduction in ("sum", "none", None):
        raise ValueError(
            f"denominator is what a mean divides by, got one with reduction={reduction!r}"
        )
    tensor = to_tensor("denominator", value, torch.empty(0, device=device))
    if tensor.numel() != 1:
        raise ValueError(f"denominator must be one number, got the shape {tuple(tensor.shape)}")
    if values_can_be_read(tensor) and math.isnan(tensor.item()):
        raise ValueError("denominator must be a number, got NaN")
    return tensor.detach().reshape(())  # a constant


def denominator_of(loss: WithOptions, prepared: Callable[[], Samples], *given: Any) -> Tensor:
    """What the mean over these samples divides by, or over those of the loss's group.

    `given`: predictions or their shape, labels.
    """
    if loss.reduction in ("none", None):
        raise ValueError('a loss with reduction="none" has no denominator')
    group = reducing_group(loss)
    with SharedErrors(group, device_of(*given)):
        samples = prepared()
        z = samples.z
        zeros = z.new_zeros(z.shape[:-1], dtype=float64_on(z.device))
        total, count = _summands(zeros, samples.weight, samples.mask, loss.reduction)
        total, count = total.detach(), count.detach()
    return count if group is None or loss.reduction == "sum" else _sums(total, count, group)[1]


class WithSlices(WithOptions):
    """A loss whose classes may be divided among the ranks of `class_group`."""

    class_group: Any = None
    label_smoothing: float = 0.0
    _found: Slice | None = None

    def __init__(self, **others: Unpack[NoArguments]) -> None:
        super().__init__(**others)
        self._number = next(_NUMBERS)

    def _slice_of(
        self, name: str, x: ArrayLike, classes_of: Callable[[Tensor], int], **others: Any
    ) -> Slice | None:
        """Which classes this rank has, found in the first call; None: all of them.

        `others`: what has to be the same on all ranks, too.
        """
        group = None if self.class_group is None else group_of(self.class_group)
        if group is None:
            return None
        if self.label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0 with class_group, got {self.label_smoothing}: gather "
                "the predictions"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor with class_group, got {type(x).__name__}")
        if is_dtensor(x):
            raise TypeError(
                f"{name} must be a plain tensor with class_group, got a DTensor, which says itself "
                "how its classes are divided: leave class_group out"
            )
        size = classes_of(x)
        if self._found is not None and self._found.group is not group:
            self._found, self._number = None, next(_NUMBERS)
        if self._found is None:
            positions = x.numel() // max(size, 1)
            others = {f"{name}.numel() / C": positions, **others}
            require_same_options(self, "class_group", group, **others)
            self._found = find_slice(size, x.device, group, self._number)
        if self._found.size != size:  # only this rank knows, so it must not ask the others again
            raise ValueError(
                f"{name} must always have as many classes with class_group, {self._found.size} on "
                f"this rank, got {size}: make another loss on all ranks"
            )
        return self._found

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = next(_NUMBERS)


def device_of(*given: Any) -> torch.device:
    """That of the first tensor, also in a list; anything else gets the default device."""
    for x in given:
        while isinstance(x, (list, tuple)) and x:
            x = x[0]
        if isinstance(x, Tensor):
            return x.device
    return torch.empty(0).device


def on_every_rank(x: Tensor) -> Tensor:
    """x as a plain tensor, also if it is a DTensor."""
    return x.full_tensor() if is_dtensor(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def of_shape(name: str, x: Any, like: ArrayLike) -> ArrayLike:
    """x, or a tensor of this shape that has no memory, on the device of `like`."""
    if not isinstance(x, tuple) or not all(isinstance(n, (int, torch.SymInt)) for n in x):
        return x
    if isinstance(like, Tensor) and like.is_nested:
        raise ValueError(f"{name} must be a nested tensor, too, got a shape, which has no lengths")
    if any(n < 0 for n in x):
        raise ValueError(f"{name} must be a tensor or a shape, of sizes from 0 on, got {x}")
    shaped = torch.empty((), device=device_of(like)).expand(list(x))
    if isinstance(like, Tensor) and is_dtensor(like):
        return to_tensor(name, shaped, like)
    return shaped


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


class _GroupMean(torch.autograd.Function):
    """n / d, with gradients for this rank's part in each, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        count: Tensor,
        n: Tensor,
        d: Tensor,
        ranks: int,
        is_summed: bool,
        reduction: str | None,
    ) -> Tensor:
        ctx.save_for_backward(n, d)
        ctx.ranks, ctx.is_summed, ctx.dtype = ranks, is_summed, total.dtype
        return quotient(n, d, reduction).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative("a loss with process_group", "leave the group out")
        (g,), (n, d) = upstream, ctx.saved_tensors
        slope = ratio(g.to(d.dtype) * ctx.ranks, d)
        of_count = ratio(-slope * n, d).to(ctx.dtype) if ctx.is_summed else None
        return slope.to(ctx.dtype), of_count, None, None, None, None, None
