"""What many tests share: bytes to store, damage to them, and waiting for what others do."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from dualblade.memory import MemorySample

if TYPE_CHECKING:
    from collections.abc import Callable

    import dualblade

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


class Memory:
    """What is free, as the test says: in place of MemoryWatch."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.error: Exception | None = None
        self.is_closed = False

    def sample(self, views_bytes: int = 0) -> MemorySample:
        if self.error is not None:
            raise self.error
        return MemorySample(self.free_bytes - views_bytes, 1 << 30, 0, 0, 0, {"test": "this"})

    def close(self) -> None:
        self.is_closed = True


def residency(store: dualblade.TensorStore) -> dict[str, Any]:
    """How the store follows the memory."""
    return store.stats()["residency"]


class Gate:
    """A function for a stream that does not return before it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, _: object = None) -> None:
        self.reached.set()
        assert self.opened.wait(60)


def bytes_on(device: Any, array: Any) -> np.ndarray[Any, Any]:
    """The bytes of an array of a computing device, copied to the host."""
    flat = device.bytes_of(array)
    out = np.zeros(flat.nbytes, np.uint8)
    stream = device.stream()
    stream.copy_to_host(out, flat)
    stream.record().wait(60)
    stream.close()
    return out
