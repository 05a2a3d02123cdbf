"""The host in a GPU's place: the same interface over ordinary memory, threads and a settable bus.

Everything that moves tensors to a GPU runs and is tested without one, and how well storage, copies
and computation overlap can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dualblade._core import aligned_empty
from dualblade.gpu_arena import Arena
from dualblade.gpu_host_streams import CallingThread, CurrentStreams, HostStream, Schedule
from dualblade.tensor import describe, dtype_tag, from_bytes, numpy_dtype, to_torch

Array = np.ndarray[Any, Any]


class HostDevice:
    """numpy arrays as a device's memory, and two threads as its copy engines, one a direction."""

    kind = "host"

    def __init__(
        self,
        *,
        copy_bytes_per_s: float | None = None,
        unified: bool = False,
        before_copy: Callable[[str, int], object] | None = None,
    ) -> None:
        """A copy of n bytes takes n / copy_bytes_per_s seconds in each direction; None is as long
        as it takes. `unified` stands for a GPU that works in the host's memory. `before_copy` is
        called with "to_device" or "to_host" and the size in bytes, in the copy engine's thread;
        what it raises is the copy's error: for tests of what happens then. Raises ValueError.
        """
        if copy_bytes_per_s is not None and not copy_bytes_per_s > 0:
            raise ValueError(
                f"copy_bytes_per_s={copy_bytes_per_s} is no bandwidth; give a number above 0, or "
                "None for as fast as it goes"
            )
        self.name = "cpu"
        self.unified = unified
        self.copy_bytes_per_s = copy_bytes_per_s
        self._schedule = Schedule(copy_bytes_per_s, before_copy)
        self._current = CurrentStreams()
        self._calling_thread = CallingThread(self._schedule, self._current)

    def __repr__(self) -> str:
        return f"<HostDevice {self.name!r}>"

    def describe(self) -> dict[str, object]:
        """What it is, for stats()."""
        return {
            "name": self.name,
            "kind": self.kind,
            "unified": self.unified,
            "copy_bytes_per_s": self.copy_bytes_per_s,
        }

    # ---- memory

    def arena(self, size_bytes: int) -> Arena:
        """One run of staging memory. Raises ValueError, MemoryError."""
        return Arena(size_bytes)

    def empty(
        self,
        shape: int | tuple[int, ...],
        dtype: Any,
        *,
        stream: Any = None,  # noqa: ARG002
    ) -> Array:
        """An array of the device's memory; its content is arbitrary.

        dtype is what numpy or ml_dtypes has, a name or a torch dtype. On a GPU memory comes with
        the order of a stream; here there is nothing to order, and `stream` is only taken.
        """
        return aligned_empty(shape, numpy_dtype(dtype_tag(dtype)))

    def as_array(self, array: Any) -> Array:
        """What a caller has as an array of this device, on the same memory.

        Takes numpy arrays, torch tensors in host memory, and what has DLPack or the buffer
        protocol. Raises UnsupportedError for another device's memory, ValueError for an array that
        is not contiguous in C order, TypeError for what is no array.
        """
        if type(array) is np.ndarray and array.flags.c_contiguous:
            return array
        found = describe(array)
        if found.copied:
            raise ValueError(
                "this array is not contiguous in C order; pass a contiguous one, such as "
                "numpy.ascontiguousarray(x) or tensor.contiguous()"
            )
        return from_bytes(found.data, found.shape, found.dtype)

    def bytes_of(self, array: Any) -> Array:
        """The memory of an array as uint8 [nbytes]. Raises what as_array does."""
        return self.as_array(array).reshape(-1).view(np.uint8)

    def span_of(self, array: Any) -> tuple[int, int]:
        """The addresses of its memory: the first, and the one after the last."""
        flat = self.bytes_of(array)
        first = flat.__array_interface__["data"][0]
        return first, first + flat.nbytes

    def host_bytes_of(self, array: Any) -> Array:
        """The same, as memory that the drive may read into: where `unified` says so."""
        return self.bytes_of(array)

    def to_torch(self, array: Array) -> Any:
        """An array as a torch tensor on the same memory.

        Raises UnsupportedError if torch has no such dtype, ValueError if the memory is read-only.
        """
        return to_torch(array)

    def array_over(self, memory: Array, shape: tuple[int, ...], dtype: str) -> Array:
        """An array of this shape and dtype tag over uint8 [nbytes] of the device's memory."""
        return from_bytes(memory, shape, dtype)

    # ---- order

    def stream(self) -> HostStream:
        """A new stream. To be closed."""
        return HostStream(self._schedule, self._current)

    def current_stream(
        self,
        array: Any = None,  # noqa: ARG002
    ) -> HostStream | CallingThread:
        """The stream in whose order the caller works: the innermost `with stream:` of this thread,
        else the thread itself."""
        return self._current.top() or self._calling_thread
