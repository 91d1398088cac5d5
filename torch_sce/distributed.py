"""Means over the processes of a group of `torch.distributed`.

Ranks have different numbers of positions that count, so the mean of their means is not the mean.
With n_r and d_r the numerator and denominator of rank r, and R ranks, every rank returns

    value     = sum_r n_r / sum_r d_r
    gradient  = R * dn_r / sum_r d_r

so that the average of the ranks' gradients, which DDP and FSDP take, is the gradient of the value.
This takes one all-reduce of three numbers.

A rank that raises an error takes part in the all-reduce before it does, so that no other waits for
it: on the CPU they raise an error, too, elsewhere their value is NaN.
"""

import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from .arrays import ArrayLike, float64_on, to_tensor
from .kernels import is_dtensor, require_first_derivative
from .kernels.shards import Slice, allow_graphs, find_slice
from .options import NoArguments, WithOptions
from .reduction import numerator_and_denominator, ratio, reduce
from .samples import Samples, values_can_be_read

Unreduced = tuple[Tensor, Tensor | None, Tensor | None]  # losses, weight and mask
_NUMBERS = itertools.count()  # of losses
_OF_GROUPS = ("_found", "_number", "_compared")  # attributes that are found for a group
Group = Any  # a ProcessGroup, which PyTorch builds without distributed do not have


def parse_group(name: str, group: Any) -> Group | bool | None:
    if group is None or isinstance(group, bool):
        return group or None
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return group
    raise TypeError(
        f"{name} must be True for all processes, a group of torch.distributed, or None, got "
        f"{group!r}"
    )


def parse_class_group(value: Any) -> Group | bool | None:
    group = parse_group("class_group", value)
    if group is not None:
        allow_graphs()
    return group


def group_of(process_group: Group | bool | None) -> Group | None:
    """The group; None for one process, as where torch.distributed is not initialised."""
    if process_group is not True:
        return process_group
    is_ready = dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if is_ready else None


def reduced(
    loss: WithOptions,
    compute: Callable[[], Unreduced],
    y_pred: Any,
    denominator: ArrayLike | None,
) -> Tensor:
    """The value of a loss, over its group if it has one. `compute` may raise."""
    reduction, group = loss.reduction, reducing_group(loss)
    device = device_of(y_pred)
    with shared_errors(group, device):
        given = parse_denominator(denominator, device, reduction)
        losses, weight, mask = compute()
        if group is None:
            return reduce(losses, weight, mask, reduction, given).to(loss.dtype)
        parts = numerator_and_denominator(losses, weight, mask, reduction)
        total, count = map(on_every_rank, parts)
    return group_mean(total, count, group, given, reduction).to(loss.dtype)


def reducing_group(loss: WithOptions) -> Group | None:
    """The group that a loss takes its value over."""
    group = None if loss.reduction in ("none", None) else group_of(loss.process_group)
    if group is not None:
        require_same_options(loss, "process_group", group)
    return group


def require_same_options(loss: WithOptions, name: str, group: Group, **others: int) -> None:
    """Raises on all ranks if theirs differ, in the first call if PyTorch's debug level is DETAIL.

    `others`: what else has to be the same.
    """
    if torch.compiler.is_compiling() or not _compares_ranks():
        return
    if loss.__dict__.setdefault("_compared", {}).get(name) is group:
        return
    loss.__dict__["_compared"][name] = group
    groups = ("process_group", "class_group", "name")
    mine = {k: v for k, v in loss.get_config().items() if k not in groups} | others
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group)
    for option, value in mine.items():
        values = [each.get(option) for each in every]
        if any(each != value for each in values):
            raise ValueError(f"{option} must be the same on all ranks of {name}, got {values}")


@contextmanager
def shared_errors(group: Group | None, device: torch.device) -> Generator[None]:
    """What may raise on this rank, before `group_mean`, in which the others wait for it."""
    try:
        yield
    except Exception:
        if group is not None:
            parts = torch.tensor([torch.nan, 0, 1], dtype=float64_on(device), device=device)
            _all_reduce(parts, group)
        raise


def group_mean(
    total: Tensor, count: Tensor, group: Group, denominator: Tensor | None, reduction: str | None
) -> Tensor:
    """The quotient of the sums over a group of `total` and `count`; for a sum that of `total`.

    `denominator` takes the place of the sum of `count`.
    """
    n, d = _sums(total, count, group)
    has_count = reduction != "sum" and denominator is None
    if reduction == "sum":
        d = torch.ones_like(d)
    elif denominator is not None:
        d = torch.where(d.isnan(), d, denominator.to(d.dtype))
    return _GroupMean.apply(total, count, n, d, dist.get_world_size(group), has_count)


def _sums(total: Tensor, count: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Both, added up over a group; NaN, or an error on the CPU, if a rank had an error."""
    wide = float64_on(total.device)
    parts = torch.stack((total.detach(), count.detach(), torch.zeros_like(total))).to(wide)
    *sums, errors = _all_reduce(parts, group).unbind()
    if values_can_be_read(errors) and errors.item():
        raise RuntimeError(
            f"an error was raised on other ranks of the process group ({int(errors.item())}): see "
            "theirs"
        )
    n, d = (torch.where(errors > 0, torch.nan, x) for x in sums)
    return n, d


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
    if values_can_be_read(tensor) and not tensor.item() >= 0:
        raise ValueError(f"denominator must not be negative or NaN, got {tensor.item()}")
    return tensor.detach().reshape(())  # a constant


def denominator_of(loss: WithOptions, prepared: Callable[[], Samples], y_pred: Any) -> Tensor:
    """What the mean over these samples divides by, or over those of the loss's group."""
    if loss.reduction in ("none", None):
        raise ValueError('a loss with reduction="none" has no denominator')
    group = reducing_group(loss)
    with shared_errors(group, device_of(y_pred)):
        samples = prepared()
        z = samples.z
        zeros = z.new_zeros(z.shape[:-1], dtype=float64_on(z.device))
        parts = (zeros, samples.weight, samples.mask, loss.reduction)
        total, count = (on_every_rank(x.detach()) for x in numerator_and_denominator(*parts))
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
        self, name: str, x: ArrayLike, classes_of: Callable[[Tensor], int]
    ) -> Slice | None:
        """Which classes this rank has, found in the first call; None: all of them."""
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
            require_same_options(self, "class_group", group, **{f"{name}.numel() / C": positions})
            self._found = find_slice(size, x.device, group, self._number)
        if self._found.size != size:  # only this rank knows, so it must not ask the others again
            raise ValueError(
                f"{name} must always have as many classes with class_group, {self._found.size} on "
                f"this rank, got {size}: make another loss on all ranks"
            )
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in _OF_GROUPS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = next(_NUMBERS)


def device_of(x: Any) -> torch.device:
    """That of a tensor; anything else is moved to the CPU."""
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def on_every_rank(x: Tensor) -> Tensor:
    """x as a plain tensor, also if it is a DTensor."""
    return x.full_tensor() if is_dtensor(x) else x  # pyright: ignore[reportAttributeAccessIssue]


def of_shape(x: Any, like: ArrayLike) -> ArrayLike:
    """x, or a tensor of this shape that has no memory, on the device of `like`."""
    if not isinstance(x, tuple):
        return x
    device = like.device if isinstance(like, Tensor) else None
    return torch.empty((), device=device).expand(list(x))


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


class _GroupMean(torch.autograd.Function):
    """n / d, with gradients for this rank's part in each, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, count: Tensor, n: Tensor, d: Tensor, ranks: int, is_summed: bool
    ) -> Tensor:
        ctx.save_for_backward(n, d)
        ctx.ranks, ctx.is_summed, ctx.dtype = ranks, is_summed, total.dtype
        return ratio(n, d).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivative("a loss with process_group", "leave the group out")
        (g,), (n, d) = upstream, ctx.saved_tensors
        slope = ratio(g.to(d.dtype) * ctx.ranks, d)
        of_count = ratio(-slope * n, d).to(ctx.dtype) if ctx.is_summed else None
        return slope.to(ctx.dtype), of_count, None, None, None, None
