"""Blocks that can be told right from wrong: each says where it belongs and has a checksum."""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import numpy as np

# magic, offset on the target, which run wrote it, its length, CRC-32 of all but this field
_HEADER = struct.Struct("<8sQQII")
_MAGIC = b"dbfioblk"
_MULTIPLIER, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1
_CHECKSUM_AT = _HEADER.size - 4


class WrongDataError(Exception):
    """A block that was read is not the block that was written there."""


class Pattern:
    """Fills and checks blocks of one run.

    The content of a block depends on its offset and on the run, so that what an earlier run left
    there, or what belongs elsewhere, is not taken for it.
    """

    def __init__(self, block_bytes: int) -> None:
        self.run = int.from_bytes(os.urandom(8), "little")
        self._noise = np.random.default_rng(self.run).integers(
            0, 1 << 64, block_bytes // 8, dtype=np.uint64
        )

    def fill(self, block: memoryview, offset: int) -> None:
        """Makes the block that belongs at this offset."""
        key = (offset * _MULTIPLIER ^ self.run) & _WORD
        key = (key ^ key >> 32) * _MULTIPLIER & _WORD
        np.bitwise_xor(self._noise, np.uint64(key), out=np.frombuffer(block, np.uint64))
        _HEADER.pack_into(block, 0, _MAGIC, offset, self.run, len(block), 0)
        struct.pack_into("<I", block, _CHECKSUM_AT, _checksum(block))

    def check(self, block: Any, offset: int) -> None:
        """Raises WrongDataError unless this run wrote the block, to this offset."""
        run = check_block(block, offset)
        if run != self.run:
            raise WrongDataError(
                f"the block at byte {offset} is an older one: what this run wrote there is lost"
            )


def check_block(block: Any, offset: int) -> int:
    """The run that wrote a block to this offset. Raises WrongDataError."""
    magic, found_at, run, length, checksum = _HEADER.unpack_from(block, 0)
    if magic != _MAGIC:
        raise WrongDataError(f"the block at byte {offset} was not written with --verify")
    if checksum != _checksum(block):
        raise WrongDataError(f"the block at byte {offset} does not match its checksum")
    if length != len(block):
        raise WrongDataError(f"the block at byte {offset} was written with --bs {length}")
    if found_at != offset:
        raise WrongDataError(f"the block at byte {offset} was written to byte {found_at}")
    return run


def _checksum(block: Any) -> int:
    return zlib.crc32(block[_HEADER.size :], zlib.crc32(block[:_CHECKSUM_AT]))
