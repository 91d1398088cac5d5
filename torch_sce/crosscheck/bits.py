"""Random numbers that are the same bits on every machine and with every NumPy.

NumPy guarantees the streams of its bit generators, but not the numbers that `Generator` derives
from them; and the last bit of its exp, log and power depends on the CPU's vector instructions.
This module uses only integers, whose sums are exact, and single operations that IEEE 754 rounds in
one way only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]


class Bits:
    """A stream of random numbers that depends only on its key."""

    def __init__(self, *key: int) -> None:
        self._raw = np.random.PCG64(key).random_raw

    def integers(self, low: int, high: int, shape: Shape) -> np.ndarray:
        """Integers from low to high - 1."""
        return low + (self._words(shape) % (high - low)).astype(np.int64).reshape(shape)

    def integer(self, low: int, high: int) -> int:
        return low + self._raw() % (high - low)

    def uniform(self, shape: Shape) -> np.ndarray:
        """Multiples of 2**-53 from 0 to 1, without 1."""
        return ((self._words(shape) >> 11) * 2.0**-53).reshape(shape)

    def normal(self, shape: Shape) -> np.ndarray:
        """About normal, with deviation 1: sums of twelve uniform numbers, from -6 to 6."""
        words = self._words((6, *shape)).reshape(6, -1)
        total = (words >> 32).sum(0) + (words % 2**32).sum(0)
        return ((total.astype(np.int64) - 6 * (2**32 - 1)) * 2.0**-32).reshape(shape)

    def shares(self, shape: Shape, span: int) -> np.ndarray:
        """Positive numbers that add up to 1 along the last axis, most 2**span apart or less."""
        words = self._words(shape)
        parts = ((2**10 + words % 2**10) << (words >> 10) % (span + 1)).reshape(shape)
        return parts / parts.sum(-1, keepdims=True)

    def flags(self, share: float, shape: Shape) -> np.ndarray:
        """Booleans, this share of them true."""
        return np.asarray(self.uniform(shape) < share)

    def chance(self, share: float) -> bool:
        return (self._raw() >> 11) * 2.0**-53 < share

    def choice(self, values: Sequence[Any]) -> Any:
        return values[self.integer(0, len(values))]

    def choices(self, values: Sequence[float], shape: Shape) -> np.ndarray:
        return np.asarray(values)[self.integers(0, len(values), shape)]

    def pick(self, odds: Mapping[Any, float]) -> Any:
        """A key of `odds`, with these odds."""
        left = (self._raw() >> 11) * 2.0**-53 * math.fsum(odds.values())
        for key, share in odds.items():
            left -= share
            if left < 0:
                return key
        return next(reversed(odds))

    def _words(self, shape: Shape) -> np.ndarray:
        """64 bits for each element, on one axis: NumPy 1 has other rules for scalars."""
        return self._raw(math.prod(shape))
