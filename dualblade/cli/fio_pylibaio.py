"""An engine that is not ours under the same jobs: Linux AIO by the PyPI package libaio.

It opens the target and drives it by itself: of dualblade's C core it has the aligned memory of the
job's buffers and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from dualblade.errors import device_error

INSTALL = 'pip install "dualblade[pylibaio]", and libaio.so.1 from the system (libaio1 or libaio)'


def load() -> ModuleType:
    """The package. Raises ImportError."""
    try:
        import libaio
    except OSError as error:  # the package is there, the system's library is not
        raise ImportError(str(error)) from error
    return libaio


class Info(NamedTuple):
    """What a job asks of Device.info."""

    engine: str
    direct: bool


class Batch:
    """What was started together; wait() belongs to the thread that started it."""

    def __init__(self, device: PylibaioDevice, left: int, operation: str) -> None:
        self._device = device
        self._operation = operation
        self.left = left
        self.error: OSError | None = None

    def completed(self, block: Any, result: int, _: int) -> None:
        """What the package calls for each request, with the bytes it moved or -errno."""
        self.left -= 1
        self._device.completed(self._operation, result)
        length = len(block.buffer_list[0])
        if result != length and self.error is None:
            # Short ones count as failed: nothing here would go on where they ended.
            self.error = device_error(
                -result if result < 0 else errno.EIO,
                device=self._device.path,
                operation=self._operation,
                offset=block.offset,
                length=length,
            )

    def wait(self) -> None:
        """Returns when all is done. Raises DeviceError."""
        self._device.reap(self)
        if self.error is not None:
            raise self.error


class PylibaioDevice:
    """What of Device a job uses, on an AIO context of its own for each thread."""

    info = Info("pylibaio", direct=True)

    def __init__(self, path: str, depth: int, *, read_only: bool) -> None:
        self.path = path
        self._depth = depth
        self._libaio = load()
        self._threads = threading.local()
        self._contexts: list[Any] = []
        self._lock = threading.Lock()
        self._stats = {"read_bytes": 0, "write_bytes": 0}
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC
        if stat.S_ISBLK(os.stat(path).st_mode):
            flags |= os.O_EXCL
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            raise device_error(error.errno or errno.EIO, device=path, operation="open") from error

    def read(self, requests: Iterable[tuple[int, memoryview]], *, path: str) -> Batch:
        """Starts reading, as Device.read does on the direct path."""
        return self._start("read", self._libaio.AIOBLOCK_MODE_READ, requests, path)

    def write(self, requests: Iterable[tuple[int, memoryview]], *, path: str) -> Batch:
        """Starts writing, as Device.write does on the direct path."""
        return self._start("write", self._libaio.AIOBLOCK_MODE_WRITE, requests, path)

    def _start(
        self, operation: str, mode: object, requests: Iterable[tuple[int, memoryview]], path: str
    ) -> Batch:
        assert path == "direct"
        context, known = self._own()
        requests = list(requests)
        batch = Batch(self, len(requests), operation)
        blocks = []
        for offset, view in requests:
            block = known.get(id(view))
            if block is None or block.buffer_list[0] is not view:
                block = self._libaio.AIOBlock(mode, self._fd, [view])
                known[id(view)] = block  # it holds the view, so the id stays its own
            block.mode = mode
            block.offset = offset
            block.onCompletion = batch.completed
            blocks.append(block)
        while blocks:
            try:
                count = context.submit(blocks)
            except OSError as error:
                batch.left -= len(blocks)
                self.reap(batch)
                raise device_error(
                    error.errno or errno.EIO, device=self.path, operation=operation
                ) from error
            blocks = blocks[count:]
            if blocks:
                context.getEvents()
        return batch

    def _own(self) -> tuple[Any, dict[int, Any]]:
        """This thread's context and the requests that it has made before."""
        found = getattr(self._threads, "own", None)
        if found is None:
            try:
                context = self._libaio.AIOContext(self._depth)
            except OSError as error:  # EAGAIN: fs.aio-max-nr
                raise device_error(
                    errno.EUSERS if error.errno == errno.EAGAIN else error.errno or errno.EIO,
                    device=self.path,
                    operation="open",
                ) from error
            found = self._threads.own = (context, {})
            with self._lock:
                self._contexts.append(context)
        return found

    def completed(self, operation: str, result: int) -> None:
        """Counts what a request moved."""
        with self._lock:
            self._stats[f"{operation}_bytes"] += max(result, 0)

    def reap(self, batch: Batch) -> None:
        """Takes completions, of other batches of this thread too, until the batch has all."""
        context, _ = self._own()
        while batch.left:
            with contextlib.suppress(InterruptedError):
                context.getEvents(min_nr=1)

    def register(self, buffers: Iterable[Any]) -> int:  # noqa: ARG002 - Device's signature
        """Linux AIO has no registered memory."""
        return 0

    def stats(self) -> dict[str, dict[str, int]]:
        """Bytes moved so far, in the places of Device.stats()."""
        with self._lock:
            return {"direct": dict(self._stats), "pagecache": {"read_bytes": 0, "write_bytes": 0}}

    def flush(self) -> None:
        """What was written reaches the medium."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise device_error(
                error.errno or errno.EIO, device=self.path, operation="flush"
            ) from error

    def close(self) -> None:
        """Nothing is in flight any more when a job calls this."""
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        os.close(self._fd)

    def __enter__(self) -> PylibaioDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
