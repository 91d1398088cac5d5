"""Tensors in memory whose every byte is watched."""

import ctypes
import mmap

import torch
from torch import Tensor

CANARY = 0xA5
SYSTEM = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """A copy of a tensor, with its strides, next to a page that cannot be accessed.

    The tensor ends directly before such a page, or with `first` begins directly behind one. The
    bytes that are not its own, also those between its elements, hold canaries.
    """

    def __init__(self, x: Tensor, first: bool) -> None:
        strides = [step if n > 1 else 0 for n, step in zip(x.shape, x.stride(), strict=True)]
        elements = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
        span = elements * x.element_size()
        size = -(-span // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (begin, begin + mmap.PAGESIZE + size):
            assert SYSTEM.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=mmap.PAGESIZE, count=size)
        self.bytes.fill_(CANARY)
        self.like, self.begin = x, 0 if first else size - span
        self.tensor = self.elements(self.bytes).copy_(x)
        self.before = self.bytes.clone()

    def elements(self, memory: Tensor) -> Tensor:
        """Those of the tensor, in these bytes."""
        return (
            memory[self.begin :]
            .view(self.like.dtype)
            .as_strided(self.like.shape, self.like.stride())
        )

    def require_unchanged(self) -> None:
        """For what is only read."""
        assert torch.equal(self.bytes, self.before), "an input was written to"

    def require_canaries(self) -> None:
        """For what is written."""
        after = self.bytes.clone()
        self.elements(after).copy_(self.elements(self.before))
        assert torch.equal(after, self.before), "memory outside of a result was written to"
