"""Where a job reads and writes next: block after block, or each block once in random order."""

from __future__ import annotations

import numpy as np

_CHUNK_BLOCKS = 1024  # made at a time: little enough that no request waits for it noticeably
_ROUNDS = 4
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Offsets:
    """Byte offsets of `blocks` blocks, pass after pass without an end.

    A pass visits every block once: in order, or in an order that the seed decides. The random order
    is a Feistel permutation, so it takes no memory however large the device is.
    """

    def __init__(self, blocks: int, block_bytes: int, *, random: bool, seed: int) -> None:
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._random = random
        self._rng = np.random.default_rng(seed)
        self._half_bits = max(1, ((blocks - 1).bit_length() + 1) // 2)
        self._next_index = 0
        self._index_end = 1 << 2 * self._half_bits if random else blocks
        self._keys = self._new_keys()
        self._ready: list[int] = []
        self._position = 0

    def take(self, count: int) -> list[int]:
        """The next `count` offsets."""
        end = self._position + count
        while end > len(self._ready):
            self._ready = self._ready[self._position :] + self._make()
            self._position, end = 0, count
        found = self._ready[self._position : end]
        self._position = end
        return found

    def _make(self) -> list[int]:
        first = self._next_index
        end = min(first + _CHUNK_BLOCKS, self._index_end)
        indexes = np.arange(first, end, dtype=np.uint64)
        if self._random:
            indexes = self._permuted(indexes)
        self._next_index = end
        if end == self._index_end:
            self._next_index = 0
            self._keys = self._new_keys()
        return (indexes.astype(np.int64) * self._block_bytes).tolist()

    def _permuted(self, indexes: np.ndarray) -> np.ndarray:
        """A Feistel network over twice half_bits; what falls behind the last block is left out."""
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = indexes >> bits, indexes & mask
        for key in self._keys:
            mixed = (right + key) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ ((mixed * _MULTIPLIER >> np.uint64(40)) & mask)
        found = left << bits | right
        return found[found < self._blocks]

    def _new_keys(self) -> np.ndarray:
        return self._rng.integers(0, 1 << 63, _ROUNDS, dtype=np.uint64)


class Directions:
    """Which of a mixed job's batches are reads: `percent_read` of them, as the seed decides."""

    def __init__(self, percent_read: int, seed: int) -> None:
        self._share = percent_read / 100
        self._rng = np.random.default_rng(seed)
        self._ready: list[bool] = []

    def next_is_read(self) -> bool:
        """Whether the next batch reads."""
        if not self._ready:
            self._ready = (self._rng.random(_CHUNK_BLOCKS) < self._share).tolist()
        return self._ready.pop()
