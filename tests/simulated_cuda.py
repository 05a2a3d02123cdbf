"""As much of CuPy as dualblade uses, over the host's memory: where there is no GPU, its code runs.

Strict where CUDA is: copies from memory that is pinned are done later, from other memory at once;
pinned memory is pinned and unpinned once, and not while a copy uses it; streams and events that
were destroyed are refused. The memory pool gives a freed block to the next who asks on its stream,
as CuPy's does. What it can't show is what a real GPU does: tests/gpu on one shows that.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import threading
import types
from collections import defaultdict

import numpy as np

from dualblade import _core
from dualblade.gpu_schedule import End, HostEvent, Record, Schedule, Wait, Work

ATTRIBUTES = {
    "Integrated": 18,
    "AsyncEngineCount": 40,
    "PageableMemoryAccessUsesHostPageTables": 100,
}
NOT_READY = 600


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, words):
        super().__init__(f"{words} ({status})")
        self.status = status


class Simulation:
    """The GPUs, and what is pinned, open and under way on them."""

    def __init__(self, devices=2, attributes=None, pin_status=0):
        self.devices = devices
        self.attributes = {"AsyncEngineCount": 2} | (attributes or {})
        self.pin_status = pin_status
        self.schedule = Schedule(None, None)
        self.pinned = {}
        self.copies = defaultdict(int)
        self.streams = {}
        self.events = {}
        self.free = defaultdict(list)
        self.allocations = []
        self.handles = itertools.count(0x1000, 16)
        self.thread = threading.local()
        self.lock = threading.RLock()
        self.streams[0] = self.schedule.line()
        self.module = make_module(self)

    def close(self):
        self.destroy(0)
        assert not self.pinned, "memory is still pinned"
        assert not self.streams, "streams are still open"

    # ---- devices

    def device(self):
        return getattr(self.thread, "device", 0)

    def stack(self):
        if not hasattr(self.thread, "streams"):
            self.thread.streams = []
        return self.thread.streams

    def stream(self, ptr):
        if ptr not in self.streams:
            raise CUDARuntimeError(400, "cudaErrorInvalidResourceHandle")
        return self.streams[ptr]

    def submit(self, ptr, operation):
        with self.schedule.lock:
            self.schedule.submit(self.stream(ptr), operation)

    def destroy(self, ptr):
        line = self.stream(ptr)
        self.submit(ptr, End())
        del self.streams[ptr]
        self.schedule.join(line)

    def event(self, ptr):
        if ptr not in self.events:
            raise CUDARuntimeError(400, "cudaErrorInvalidResourceHandle")
        return self.events[ptr]

    # ---- memory

    def run_of(self, address, size):
        for start, length in self.pinned.items():
            if start <= address and address + size <= start + length:
                return start
        return None

    def copy(self, dst, src, size, kind, stream_ptr):
        assert kind in (1, 2)
        host = src if kind == 1 else dst
        with self.lock:
            run = self.run_of(host, size)
            self.copies[run] += 1

        def move():
            ctypes.memmove(dst, src, size)
            with self.lock:
                self.copies[run] -= 1

        direction = "to_device" if kind == 1 else "to_host"
        engine = self.schedule._engines[direction]
        self.submit(stream_ptr, Work(engine, move))
        if run is None:  # pageable memory: CUDA has read or written it when it returns
            self.after(stream_ptr).wait()

    def after(self, stream_ptr):
        event = HostEvent(self.schedule)
        self.submit(stream_ptr, Record(event))
        return event

    def pin(self, address, size, flags):
        assert flags == 3, "portable and mapped"
        if self.pin_status:
            raise CUDARuntimeError(self.pin_status, "cudaErrorMemoryAllocation")
        if self.run_of(address, 1) is not None:
            raise CUDARuntimeError(712, "cudaErrorHostMemoryAlreadyRegistered")
        self.pinned[address] = size

    def unpin(self, address):
        if address not in self.pinned:
            raise CUDARuntimeError(713, "cudaErrorHostMemoryNotRegistered")
        assert self.copies[address] == 0, "unpinned under a copy"
        del self.pinned[address]

    def take(self, size):
        """A block of the pool of the current stream."""
        stream = self.stack()[-1].ptr if self.stack() else 0
        blocks = self.free[self.device(), stream, size]
        block = blocks.pop() if blocks else _core.Buffer(max(size, 1))
        return Block(self, block, (self.device(), stream, size))


class Block:
    """Memory of the pool, which goes back to it."""

    def __init__(self, simulation, buffer, place):
        self.simulation = simulation
        self.buffer = buffer
        self.place = place
        self.device_id = place[0]
        self.ptr = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]

    def __del__(self):
        self.simulation.free[self.place].append(self.buffer)


class UnownedMemory:
    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, mem, offset):
        self.mem = mem
        self.ptr = mem.ptr + offset
        self.device_id = mem.device_id


def make_ndarray(simulation):
    class Ndarray:
        """Shape, dtype and a place in memory; its elements are the GPU's to see."""

        def __init__(self, shape, dtype=float, memptr=None, strides=None):
            self.shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
            self.dtype = np.dtype(dtype)
            self.nbytes = math.prod(self.shape) * self.dtype.itemsize
            self.ndim = len(self.shape)
            self.data = memptr or MemoryPointer(simulation.take(self.nbytes), 0)
            self.flags = types.SimpleNamespace(c_contiguous=strides is None)

        def reshape(self, *shape):
            assert shape == (-1,)
            return Ndarray(math.prod(self.shape), self.dtype, self.data)

        def view(self, dtype):
            assert self.ndim == 1
            size = np.dtype(dtype).itemsize
            return Ndarray(self.nbytes // size, dtype, self.data)

        def __getitem__(self, key):
            if isinstance(key, tuple):  # as good as any array that is not contiguous
                return Ndarray(self.shape[:1], self.dtype, self.data, strides=(1,))
            start, stop, step = key.indices(self.shape[0])
            row = self.nbytes // self.shape[0]
            shape = (stop - start, *self.shape[1:])
            at = MemoryPointer(self.data, start * row)
            return Ndarray(shape, self.dtype, at, None if step == 1 else (step,))

    return Ndarray


def make_events(simulation):
    class Event:
        def __init__(self, block=False, disable_timing=False):
            assert block, "or waiting for it burns a core"
            assert disable_timing
            self.ptr = next(simulation.handles)
            self.device = simulation.device()
            simulation.events[self.ptr] = None

        def synchronize(self):
            happened = simulation.event(self.ptr)
            if happened is not None:
                happened.wait()

        def __del__(self):
            simulation.events.pop(self.ptr, None)

    return Event


def make_streams(simulation):
    class Stream:
        def __init__(self, non_blocking=False):
            assert non_blocking, "a blocking stream waits for the default one"
            self.ptr = next(simulation.handles)
            self.device_id = simulation.device()
            self.is_ours = True
            simulation.streams[self.ptr] = simulation.schedule.line()

        @classmethod
        def from_external(cls, obj):
            stream = cls.__new__(cls)
            _, stream.ptr = obj.__cuda_stream__()
            stream.device_id = simulation.device()
            stream.is_ours = False
            return stream

        def __enter__(self):
            simulation.stack().append(self)
            return self

        def __exit__(self, *error):
            assert simulation.stack().pop() is self

        def __del__(self):
            if self.is_ours:
                simulation.destroy(self.ptr)

    return Stream


def make_runtime(simulation):
    runtime = types.ModuleType("cupy.cuda.runtime")
    runtime.CUDARuntimeError = CUDARuntimeError
    runtime.is_hip = False
    runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost = 1, 2
    for name, number in ATTRIBUTES.items():
        setattr(runtime, f"cudaDevAttr{name}", number)
    numbers = {number: name for name, number in ATTRIBUTES.items()}

    def getDeviceCount():  # noqa: N802, the names are CuPy's
        if simulation.devices == 0:
            raise CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
        return simulation.devices

    def eventRecord(event, stream):  # noqa: N802
        simulation.event(event)
        simulation.events[event] = simulation.after(stream)

    def eventQuery(event):  # noqa: N802
        happened = simulation.event(event)
        return 0 if happened is None or happened.done else NOT_READY

    def streamWaitEvent(stream, event):  # noqa: N802
        happened = simulation.event(event)
        if happened is not None:
            simulation.submit(stream, Wait(happened))

    def launchHostFunc(stream, callback, arg):  # noqa: N802
        line = simulation.stream(stream)
        simulation.submit(stream, Work(line.worker, lambda: callback(arg)))

    def getDeviceProperties(index):  # noqa: N802
        return {"name": b"Simulated", "major": 9, "minor": 0, "totalGlobalMem": 1 << 30}

    runtime.getDeviceCount = getDeviceCount
    runtime.getDevice = simulation.device
    runtime.deviceGetAttribute = lambda n, _: simulation.attributes.get(numbers[n], 0)
    runtime.getDeviceProperties = getDeviceProperties
    runtime.driverGetVersion = runtime.runtimeGetVersion = lambda: 12090
    runtime.memcpyAsync = simulation.copy
    runtime.hostRegister, runtime.hostUnregister = simulation.pin, simulation.unpin
    runtime.pointerGetAttributes = lambda ptr: types.SimpleNamespace(devicePointer=ptr)
    runtime.eventRecord, runtime.eventQuery = eventRecord, eventQuery
    runtime.streamWaitEvent, runtime.launchHostFunc = streamWaitEvent, launchHostFunc
    return runtime


def make_module(simulation):
    """What `import cupy` gives."""
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy.__version__ = "14.2.0"
    cupy.cuda, cuda.runtime = cuda, make_runtime(simulation)
    cupy.ndarray = make_ndarray(simulation)
    cuda.UnownedMemory, cuda.MemoryPointer = UnownedMemory, MemoryPointer
    cuda.Event, cuda.Stream = make_events(simulation), make_streams(simulation)
    null = types.SimpleNamespace(ptr=0, device_id=-1)

    @contextlib.contextmanager
    def device(index):
        before = simulation.device()
        simulation.thread.device = index
        try:
            yield
        finally:
            simulation.thread.device = before

    cuda.Device = device
    cuda.get_current_stream = lambda _=-1: simulation.stack()[-1] if simulation.stack() else null
    return cupy
