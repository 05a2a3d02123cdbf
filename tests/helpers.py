"""What many tests share: bytes to store, damage to them, and waiting for what others do."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
UNTIL_TIMEOUT_S = 120


def noise(size: int, seed: int = 0) -> np.ndarray:
    """Bytes, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def until(condition: Callable[[], bool], what: str) -> None:
    """Returns once the condition holds, which another thread sees to; fails with `what` if not."""
    deadline = time.monotonic() + UNTIL_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def overwrite(path: str | os.PathLike[str], offset: int, data: bytes) -> None:
    """Writes these bytes behind the back of whoever has the file or device."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flip(path: str | os.PathLike[str], offset: int, bits: int = 1) -> None:
    """Flips these bits of one byte."""
    with open(path, "rb") as file:
        file.seek(offset)
        byte = file.read(1)[0]
    overwrite(path, offset, bytes([byte ^ bits]))
