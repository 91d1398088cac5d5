"""Which of PyTorch's transforms and modes are active, and what it keeps of tensors and groups.

PyTorch has no public functions for this. Its private ones are used here and nowhere else; they are
the same from PyTorch 2.6 to 2.15.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def transforms_active() -> bool:
    """Whether a transform of `torch.func` is active: vmap, grad, jvp or another."""
    return torch._C._are_functorch_transforms_active()


def dispatch_modes_active() -> bool:
    """Whether a mode sees every operation, as under `FakeTensorMode`."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` records the operations."""
    return torch._C._is_tracing()


def has_memory(x: Tensor) -> bool:
    """Whether x has memory of its own: batches of gradients and functional tensors have none.

    A batch of gradients comes from `torch.autograd.grad(..., is_grads_batched=True)`.
    """
    return torch._C._has_storage(x) and not torch._is_functional_tensor(x)


def forward_derivatives_active() -> bool:
    """Whether forward-mode differentiation is active, of dual tensors or within `jvp`."""
    return forward_ad._current_level >= 0


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for calls without a transform, which it does not look for once more."""
    return super(torch.autograd.Function, function).apply  # pyright: ignore


def constant_in_graphs(function: Function) -> Function:
    """Lets a compiler call a function, whose result it takes for a constant.

    As `torch.compiler.assume_constant_result`, which loads the compiler.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def ragged_axis(x: Tensor) -> int:
    """Which axis of a jagged nested tensor has the different lengths."""
    return x._ragged_idx  # pyright: ignore[reportAttributeAccessIssue]


def group_called(name: str) -> Any:
    """The group of processes with this `group_name`, which operators are given."""
    from torch.distributed import distributed_c10d  # imported here: not every build has it

    resolve: Callable[[str], Any] = distributed_c10d._resolve_process_group  # pyright: ignore
    return resolve(name)
