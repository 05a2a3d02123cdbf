"""Where tensors are computed with: a GPU, or the host in its place, with one interface.

    open_device("cpu")       HostDevice: numpy arrays, threads as copy engines
    open_device("cuda")      CudaDevice: CuPy arrays, CUDA streams; "cuda:1" is the second GPU

CuPy is imported when a CUDA device is opened and never before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dualblade.gpu_arena import Arena, counters
from dualblade.gpu_host import HostDevice
from dualblade.gpu_host_streams import HostStream
from dualblade.gpu_schedule import HostEvent

__all__ = [
    "Arena",
    "Device",
    "Event",
    "HostDevice",
    "HostEvent",
    "HostStream",
    "Stream",
    "counters",
    "open_device",
]


class Event(Protocol):
    """A point in a stream."""

    @property
    def done(self) -> bool:
        """Whether everything before it has ended. Never blocks."""

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything before it is done; the GIL is free meanwhile.

        Raises TimeoutError, and what went wrong before it.
        """


class Stream(Protocol):
    """Work of the device that is done in order. `with stream:` makes it the current one."""

    @property
    def closed(self) -> bool:
        """Whether close() was called."""

    def copy_to_device(self, dst: Any, src: Any) -> None:
        """Puts a copy of host memory `src` to device memory `dst` here, both uint8 [size]."""

    def copy_to_host(self, dst: Any, src: Any) -> None:
        """Puts a copy of device memory `src` to host memory `dst` here, both uint8 [size]."""

    def record(self) -> Event:
        """An event that is done when everything put here so far is."""

    def wait(self, event: Event) -> None:
        """What is put here from now on runs after the event."""

    def launch(self, fn: Callable[[], object]) -> None:
        """Has fn's work done in this stream's order."""

    def close(self) -> None:
        """Finishes what is under way, then ends; twice is fine."""


class Device(Protocol):
    """What computes, and its memory."""

    name: str
    kind: str
    """ "host" or "cuda"."""
    unified: bool
    """Whether the drive may read straight into its memory (host_bytes_of)."""

    def describe(self) -> dict[str, object]:
        """What it is, for stats()."""

    def arena(self, size_bytes: int) -> Arena:
        """One run of staging memory that the device copies from at full speed. To be closed."""

    def empty(self, shape: int | tuple[int, ...], dtype: Any, *, stream: Any = None) -> Any:
        """An array of the device's memory; its content is arbitrary."""

    def as_array(self, array: Any) -> Any:
        """What a caller has as an array of this device, on the same memory."""

    def bytes_of(self, array: Any) -> Any:
        """The memory of an array of this device as uint8 [nbytes]."""

    def span_of(self, array: Any) -> tuple[int, int]:
        """The addresses of its memory: the first, and the one after the last."""

    def array_over(self, memory: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """An array of this shape and dtype tag over uint8 [nbytes] of the device's memory."""

    def host_bytes_of(self, array: Any) -> Any:
        """The same as a numpy array, where `unified`."""

    def to_torch(self, array: Any) -> Any:
        """An array of this device as a torch tensor on the same memory."""

    def stream(self) -> Stream:
        """A new stream. To be closed."""

    def current_stream(self, array: Any = None) -> Stream:
        """The stream in whose order the caller works; of torch's, where the array is torch's."""


def open_device(name: str = "cpu", **options: Any) -> Device:
    """The device of this name: "cpu", "cuda" (CuPy's current one) or "cuda:N".

    Options are those of HostDevice or CudaDevice. Raises UnsupportedError where CuPy or the GPU is
    missing, with what to install; ValueError for another name.
    """
    if name == "cpu":
        return HostDevice(**options)
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":"):
        raise ValueError(f"device {name!r} is not known; give 'cpu', 'cuda' or 'cuda:N'")
    from dualblade.gpu_cuda import CudaDevice

    return CudaDevice(int(number) if number else None, **options)
