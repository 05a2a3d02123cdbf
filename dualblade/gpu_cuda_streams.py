"""CUDA streams, events and pinned staging memory, by CuPy."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dualblade.errors import ClosedError, DeviceError, DualbladeWarning
from dualblade.gpu_arena import Arena, count_closed, count_opened

Array = np.ndarray[Any, Any]

_NOT_READY = 600  # cudaErrorNotReady: what eventQuery says of an event that is still to come
_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all CUDA contexts
_REGISTER_MAPPED = 2  # cudaHostRegisterMapped: in the device's address space


class Cuda:
    """CuPy and one GPU: what streams, events and memory of that GPU have in common."""

    def __init__(self, cupy: Any, index: int) -> None:
        self.cupy = cupy
        self.index = index
        self.name = f"cuda:{index}"
        self.runtime = cupy.cuda.runtime
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._arenas: weakref.WeakValueDictionary[int, CudaArena] = weakref.WeakValueDictionary()
        """By address."""
        self._held: dict[int, list[object]] = {}
        """By stream: arrays of copies after which no event was recorded yet."""
        self._recorded: deque[tuple[CudaEvent, list[object]]] = deque()
        """Arrays of copies that were under way when it was last looked, and the event after."""

    @property
    def is_forked(self) -> bool:
        """Whether this is the child of a fork: CUDA does not work there."""
        return os.getpid() != self._pid

    @contextlib.contextmanager
    def use(self, operation: str) -> Iterator[None]:
        """The GPU is the thread's current one; what CUDA says becomes a DeviceError."""
        if self.is_forked:
            raise ClosedError(
                f"{self.name} was opened before a fork, and this is the child process, where CUDA "
                "does not work; start workers with multiprocessing's 'spawn'"
            )
        try:
            with self.cupy.cuda.Device(self.index):
                yield
        except self.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"{operation} on {self.name} failed: {error}. Errors of earlier kernels show up "
                "here as well; run with CUDA_LAUNCH_BLOCKING=1 to see which",
                device=self.name,
                operation=operation,
            ) from error

    # ---- copies

    def copy(self, stream: CudaStream, dst: Any, src: Any, direction: str) -> None:
        """Puts a copy into a stream."""
        to_device = direction == "to_device"
        device, host = (dst, src) if to_device else (src, dst)
        self.check_copy(device, host, direction)
        address = host.__array_interface__["data"][0]
        pointers = (device.data.ptr, address) if to_device else (address, device.data.ptr)
        kind = self.runtime.memcpyHostToDevice if to_device else self.runtime.memcpyDeviceToHost
        arena = self.arena_of(address)
        if arena is not None:
            arena.used_by(stream)
        with self.use("a copy"):
            self.runtime.memcpyAsync(*pointers, host.nbytes, kind, stream.ptr)
        with self._lock:
            # CuPy's pool would give a device array that nobody has to the next who asks. An arena
            # waits for its copies itself.
            held = self._held.setdefault(stream.ptr, [])
            held += [device] if arena is not None else [device, host]

    def check_copy(self, device: Any, host: Any, direction: str) -> None:
        """Raises TypeError or ValueError if these can't be copied as they are."""
        if not isinstance(device, self.cupy.ndarray):
            raise TypeError(
                f"a copy {direction} takes a CuPy array, not {type(device).__name__}; "
                "device.bytes_of(array) makes one of any array of the device"
            )
        if not isinstance(host, np.ndarray):
            raise TypeError(f"a copy {direction} takes a numpy array, not {type(host).__name__}")
        for array in (device, host):
            if array.dtype != np.uint8 or array.ndim != 1:
                raise TypeError(
                    f"copies are of flat arrays of uint8, not of {array.dtype} and shape "
                    f"{array.shape}; device.bytes_of(array) makes one"
                )
            if not array.flags.c_contiguous:
                raise ValueError("an array of a copy is not contiguous")
        if device.nbytes != host.nbytes:
            raise ValueError(f"{device.nbytes} bytes of the device, {host.nbytes} of the host")
        if device.data.device_id != self.index:
            raise ValueError(f"this array is on cuda:{device.data.device_id}, not {self.name}")
        if direction == "to_host" and not host.flags.writeable:
            raise ValueError("dst of a copy is read-only")

    def record(self, stream: CudaStream) -> CudaEvent:
        """An event after everything in a stream."""
        with self.use("recording an event"), self._lock:
            event = CudaEvent(self, self.cupy.cuda.Event(block=True, disable_timing=True))
            self.runtime.eventRecord(event.ptr, stream.ptr)
            held = self._held.pop(stream.ptr, None)
            if held:
                self._recorded.append((event, held))
            self.let_go()
        return event

    def keep(self, held: object, stream: CudaStream) -> None:
        """Keeps it alive until everything in a stream has ended."""
        if self.is_forked or stream.closed:
            return
        with contextlib.suppress(DeviceError):  # of a GPU that does nothing any more
            event = self.record(stream)
            with self._lock:
                self._recorded.append((event, [held]))
            del held
            self.let_go()

    def let_go(self) -> None:
        """Of the arrays of copies that are done."""
        with self._lock:
            # Streams overtake each other: one that is not done keeps those behind it, for a while.
            while self._recorded:
                event, held = self._recorded.popleft()
                if not event.done:
                    self._recorded.appendleft((event, held))
                    return
                del event, held  # what goes with it may bring another thread's turn, or this one's

    def drain(self, streams: list[CudaStream]) -> None:
        """Returns when what is in these streams is done. Errors are for who waits for events."""
        for stream in streams:
            with contextlib.suppress(DeviceError):
                self.record(stream).wait()
        self.let_go()

    # ---- pinned memory

    def arena_of(self, address: int) -> CudaArena | None:
        """The arena that this memory is a part of."""
        for start, arena in list(self._arenas.items()):
            if start <= address < start + arena.size_bytes:
                return arena
        return None

    def pin(self, address: int, size_bytes: int) -> None:
        """Has CUDA pin memory of ours and map it for the GPU. Raises DeviceError."""
        with self.use(f"pinning {size_bytes} bytes of host memory"):
            self.runtime.hostRegister(address, size_bytes, _REGISTER_PORTABLE | _REGISTER_MAPPED)

    def unpin(self, address: int) -> None:
        """The opposite."""
        with contextlib.suppress(DeviceError), self.use("unpinning host memory"):
            self.runtime.hostUnregister(address)

    def add(self, arena: CudaArena, address: int) -> None:
        """An arena was opened."""
        with self._lock:
            self._arenas[address] = arena

    def remove(self, address: int) -> None:
        """It was closed."""
        with self._lock:
            self._arenas.pop(address, None)


class CudaEvent:
    """A point in a stream: done when everything before it is."""

    def __init__(self, cuda: Cuda, event: Any) -> None:
        self._cuda = cuda
        self._event = event

    @property
    def ptr(self) -> int:
        """CUDA's handle."""
        return self._event.ptr

    @property
    def done(self) -> bool:
        """Whether everything before it has ended, well or not. Never blocks."""
        if self._cuda.is_forked:
            return False
        return self._cuda.runtime.eventQuery(self.ptr) != _NOT_READY

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything before it is done; the thread sleeps and the GIL is free.

        Raises TimeoutError, and DeviceError if a copy or kernel before it has failed.
        """
        if timeout is not None:
            self._poll(timeout)
        with self._cuda.use("waiting for an event"):
            self._event.synchronize()

    def _poll(self, timeout: float) -> None:
        """CUDA can't wait for a while."""
        deadline = time.monotonic() + timeout
        pause_s = 20e-6
        while not self.done:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"the stream had not come to this event after {timeout} seconds")
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 1e-3)


class _Handle:
    """A stream of another library's, as CuPy takes one; keeps it alive."""

    def __init__(self, ptr: int, owner: object) -> None:
        self.ptr = ptr
        self.owner = owner

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr


class CudaStream:
    """Copies and kernels that run in the order in which they were put here.

    `with stream:` makes it CuPy's current one, and torch's if torch is there. All methods may be
    called from any thread.
    """

    def __init__(self, cuda: Cuda, stream: Any, *, owned: bool) -> None:
        """`stream` has CUDA's handle as .ptr; `owned` says that close() ends it."""
        self._cuda = cuda
        self._stream = stream
        self._is_owned = owned
        self._is_closed = False
        self._entered = threading.local()
        self.ptr: int = stream.ptr
        if owned:
            count_opened("gpu_streams", self)

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def copy_to_device(self, dst: Any, src: Array) -> None:
        """Copies the bytes of `src` (numpy) to `dst` (CuPy): flat uint8 of the same size.

        Both are kept alive until it is done, and have to be left alone until then. From memory
        that is not pinned it returns when CUDA has read it. Raises ValueError, TypeError,
        ClosedError, DeviceError.
        """
        self._check_open()
        self._cuda.copy(self, dst, src, "to_device")

    def copy_to_host(self, dst: Array, src: Any) -> None:
        """Copies the bytes of `src` (CuPy) to `dst` (numpy), as copy_to_device does."""
        self._check_open()
        self._cuda.copy(self, dst, src, "to_host")

    def record(self) -> CudaEvent:
        """An event that is done when everything put here so far is."""
        self._check_open()
        return self._cuda.record(self)

    def wait(self, event: CudaEvent) -> None:
        """What is put here from now on runs after the event. Returns at once."""
        self._check_open()
        if not isinstance(event, CudaEvent):
            raise TypeError(
                f"a CUDA stream waits for CUDA's events, not for a {type(event).__name__}; wait "
                "for it with event.wait()"
            )
        with self._cuda.use("waiting in a stream"):
            self._cuda.runtime.streamWaitEvent(self.ptr, event.ptr)

    def launch(self, fn: Callable[[], object]) -> None:
        """Calls fn() with this as the current stream: its kernels run in this one's order."""
        self._check_open()
        with self:
            fn()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this stream was closed; open another with device.stream()")

    def close(self) -> None:
        """Finishes what is under way, then ends; twice is fine. A caller's own stream stays."""
        if not self._is_owned:
            return
        if not self._is_closed and not self._cuda.is_forked:
            self._cuda.drain([self])
        self._is_closed = True
        self._stream = None  # with its last reference CuPy destroys it
        count_closed("gpu_streams", self)

    def __enter__(self) -> CudaStream:
        with contextlib.ExitStack() as stack:
            with self._cuda.use("entering a stream"):
                stack.enter_context(self._cuda.cupy.cuda.Device(self._cuda.index))
                stack.enter_context(self._cupy_stream())
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_available():
                stack.enter_context(torch.cuda.stream(self._torch_stream(torch)))
            self._stack().append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:  # noqa: PYI036, as ExitStack has it
        self._stack().pop().__exit__(*error)

    def _stack(self) -> list[contextlib.ExitStack]:
        if not hasattr(self._entered, "stack"):
            self._entered.stack = []
        return self._entered.stack

    def _cupy_stream(self) -> Any:
        """It as CuPy's own: what a `with` statement takes."""
        if not isinstance(self._stream, _Handle):
            return self._stream
        cupy = self._cuda.cupy
        if tuple(map(int, cupy.__version__.split(".")[:2])) >= (14, 2):
            return cupy.cuda.Stream.from_external(self._stream)
        return cupy.cuda.ExternalStream(self.ptr, self._cuda.index)

    def _torch_stream(self, torch: Any) -> Any:
        """It as torch's own."""
        if isinstance(self._stream, _Handle) and isinstance(self._stream.owner, torch.cuda.Stream):
            return self._stream.owner
        return torch.cuda.ExternalStream(self.ptr, device=self._cuda.index)

    def __del__(self) -> None:
        if getattr(self, "_is_closed", True) or not self._is_owned or sys.is_finalizing():
            return
        self.close()
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)


def foreign_stream(cuda: Cuda, ptr: int, owner: object) -> CudaStream:
    """A stream that another library made."""
    return CudaStream(cuda, _Handle(ptr, owner), owned=False)


class CudaArena(Arena):
    """Staging memory that CUDA has pinned as well: copies from it run beside everything else."""

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self._cuda = cuda
        self._users: dict[int, CudaStream] = {}
        self._address: int = self.array.__array_interface__["data"][0]
        try:
            cuda.pin(self._address, size_bytes)
            self.pinned = True
        except DeviceError as error:
            warnings.warn(
                f"{size_bytes} bytes of staging memory are not pinned, and copies to {cuda.name} "
                f"will be slow: {error}. Raise the locked-memory limit (ulimit -l), or stage less",
                DualbladeWarning,
                stacklevel=2,
            )
        cuda.add(self, self._address)

    def used_by(self, stream: CudaStream) -> None:
        """A copy from or to it was put into this stream."""
        self._users[stream.ptr] = stream

    def _let_go(self) -> None:
        cuda = self._cuda
        users, self._users = list(self._users.values()), {}
        if not cuda.is_forked and not sys.is_finalizing():
            cuda.drain([stream for stream in users if not stream.closed])
            if self.pinned:
                cuda.unpin(self._address)
        cuda.remove(self._address)


class Mapped:
    """Memory that the drive reads into and the GPU works in: pinned, page-aligned, mapped.

    It belongs to the order of a stream, as a pool's does: dropped, it goes after what is there.
    """

    def __init__(self, cuda: Cuda, array: Array, stream: CudaStream, *, is_shared: bool) -> None:
        """`array` is page-aligned uint8; `is_shared` says that the GPU sees all host memory."""
        self.array = array
        self._cuda = cuda
        self._stream = stream
        self._pinned = _Pinned(cuda, array, is_shared=is_shared)
        self.ptr = self._pinned.ptr
        """Where the GPU sees it."""

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "_pinned"):
            pinned, self._pinned = self._pinned, None
            self._cuda.keep(pinned, self._stream)


class _Pinned:
    """Memory that is mapped as long as this is there."""

    def __init__(self, cuda: Cuda, array: Array, *, is_shared: bool) -> None:
        self.array = array
        self._cuda = cuda
        self._address: int = array.__array_interface__["data"][0]
        self._is_pinned = False
        self.ptr = self._address
        """Where the GPU sees it."""
        if not is_shared:
            cuda.pin(self._address, array.nbytes)
            self._is_pinned = True
            with cuda.use("mapping host memory"):
                self.ptr = cuda.runtime.pointerGetAttributes(self._address).devicePointer

    def __del__(self) -> None:
        usable = not sys.is_finalizing() and getattr(self, "_is_pinned", False)
        if usable and not self._cuda.is_forked:
            self._cuda.unpin(self._address)
