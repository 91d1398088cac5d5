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
        offset = mmap.PAGESIZE
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=size)
        self.bytes.fill_(CANARY)
        offset += 0 if first else size - span
        own = torch.frombuffer(memory, dtype=x.dtype, offset=offset, count=elements)
        self.tensor = own.as_strided(x.shape, x.stride()).copy_(x)
        self.before = self.bytes.clone()

    def require_unchanged(self) -> None:
        """For what is only read."""
        assert torch.equal(self.bytes, self.before), "an input was written to"

    def require_canaries(self) -> None:
        """For what is written: all that is not an element of the tensor is as it was."""
        found = self.tensor.clone()
        self.tensor.fill_(0)
        rest = self.bytes.clone()
        self.bytes.copy_(self.before)
        self.tensor.fill_(0)
        assert torch.equal(rest, self.bytes), "memory outside of a result was written to"
        self.tensor.copy_(found)
