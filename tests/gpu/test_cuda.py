"""What only a real GPU shows: kernels, CuPy's and torch's streams, the speed of pinned copies."""

from __future__ import annotations

import statistics
import threading

import numpy as np
import pytest

from dualblade import gpu
from tests.gpu.test_device import put, random_bytes
from tests.helpers import bytes_on

MIB = 1 << 20

# It ends by itself after some seconds: a test that fails must not leave a GPU that hangs.
SPIN = r"""
extern "C" __global__ void spin(volatile int *open, long long cycles)
{
    long long start = clock64();
    while (!*open && clock64() - start < cycles) {
    }
}
"""


class Spin:
    """A kernel that runs until it is told to end."""

    def __init__(self, stream):
        import cupy

        # Memory of ours that the kernel sees: pinned and mapped.
        self.device = gpu.open_device("cuda", unified=True)
        self.flag = self.device.empty(1, np.int32)
        self.told = self.device.host_bytes_of(self.flag).view(np.int32)
        self.told[0] = 0
        kernel = cupy.RawKernel(SPIN, "spin")
        kernel.compile()
        stream.launch(lambda: kernel((1,), (1,), (self.flag, np.int64(10_000_000_000))))
        self.event = stream.record()

    def end(self):
        self.told[0] = 1
        self.event.wait(60)


@pytest.fixture
def spin():
    """A function (stream) -> Spin, a kernel that keeps the stream busy."""
    spins = []

    def start(stream):
        spins.append(Spin(stream))
        assert not spins[-1].event.done
        return spins[-1]

    yield start
    for one in spins:
        one.end()


def warm(stream, work):
    """Has the kernels loaded: the first launch of one may wait for all that run."""
    stream.launch(work)
    stream.record().wait(60)


@pytest.fixture
def streams(cuda):
    opened = [cuda.stream() for _ in range(3)]
    yield opened
    for stream in opened:
        stream.close()


@pytest.fixture
def arena(cuda):
    arena = cuda.arena(64 * MIB)
    assert arena.pinned
    yield arena
    arena.close()


@pytest.fixture
def torch(cuda):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return torch


# ---- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_a_kernel_sees_the_copy_if_it_waits_for_it(cuda, streams, arena, spin, ordered):
    copies, kernels, _ = streams
    there = put(cuda, np.zeros(MIB, np.uint8))
    seen = put(cuda, np.ones(MIB, np.uint8))
    arena.array[:MIB] = 7

    def work():
        seen[:] = there + 1

    warm(kernels, work)
    held = spin(copies)
    copies.copy_to_device(there, arena.array[:MIB])
    copied = copies.record()
    if ordered:
        kernels.wait(copied)
    kernels.launch(work)
    done = kernels.record()
    if not ordered:
        done.wait(60)
    assert done.done != ordered
    held.end()
    done.wait(60)
    copied.wait(60)
    assert set(bytes_on(cuda, seen).tolist()) == {8 if ordered else 1}


@pytest.mark.parametrize("ordered", [True, False])
def test_memory_is_written_again_only_after_the_kernel(cuda, streams, arena, spin, ordered):
    copies, kernels, _ = streams
    there = put(cuda, np.full(MIB, 3, np.uint8))
    seen = put(cuda, np.zeros(MIB, np.uint8))
    arena.array[:MIB] = 9

    def work():
        seen[:] = there + 0

    warm(kernels, work)
    held = spin(kernels)
    kernels.launch(work)
    used = kernels.record()
    if ordered:
        copies.wait(used)
    copies.copy_to_device(there, arena.array[:MIB])
    copied = copies.record()
    if not ordered:
        copied.wait(60)
    assert copied.done != ordered
    held.end()
    used.wait(60)
    copied.wait(60)
    assert set(bytes_on(cuda, seen).tolist()) == {3 if ordered else 9}


def test_nothing_waits_for_the_whole_device(cuda, streams, arena, spin):
    """A caller's kernel runs on while everything else that a pipeline does goes by."""
    import cupy

    copies, back, _ = streams
    theirs = cupy.cuda.Stream(non_blocking=True)
    with theirs:
        current = cuda.current_stream()
    warm = [cuda.empty(MIB, np.uint8, stream=copies) for _ in range(8)]
    del warm
    out = threading.Event()
    held = spin(current)

    def work():
        for turn in range(32):
            place = arena.array[(turn % 8) * MIB :][:MIB]
            place[:] = turn
            there = cuda.empty(MIB, np.uint8, stream=copies)
            copies.copy_to_device(cuda.bytes_of(there), place)
            back.wait(copies.record())
            back.copy_to_host(arena.array[(8 + turn % 8) * MIB :][:MIB], there)
            done = back.record()
            done.wait()
            copies.wait(done)
            assert arena.array[(8 + turn % 8) * MIB] == turn
        extra = cuda.stream()
        extra.record().wait()
        extra.close()
        out.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(4)  # the kernel ends by itself after that
    assert out.is_set()
    assert not held.event.done
    held.end()
    thread.join(60)


def test_chunks_flow_both_ways_as_in_a_sequence(cuda, streams, arena):
    up, kernels, down = streams
    rng = np.random.default_rng(5)
    data = rng.integers(0, 256, (24, 4 * MIB), np.uint8)
    results = np.zeros_like(data)
    slots = [(arena.array[i * 4 * MIB :][: 4 * MIB], put(cuda, data[0])) for i in range(4)]
    busy = [None] * 4
    for turn, chunk in enumerate(data):
        host, there = slots[turn % 4]
        if busy[turn % 4]:
            before, event = busy[turn % 4]
            event.wait()
            results[before] = host
        host[:] = chunk
        up.copy_to_device(there, host)
        kernels.wait(up.record())
        kernels.launch(lambda there=there: there.__iadd__(1))
        down.wait(kernels.record())
        down.copy_to_host(host, there)
        busy[turn % 4] = turn, down.record()
    for i, (turn, event) in enumerate(busy):
        event.wait()
        results[turn] = slots[i][0]
    assert np.array_equal(results, data + np.uint8(1))


# ---- CuPy and torch ------------------------------------------------------------------------------


def test_the_callers_stream_is_cupys_current_one(cuda):
    import cupy

    assert cuda.current_stream().ptr == cupy.cuda.get_current_stream().ptr
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert cuda.current_stream().ptr == stream.ptr
        assert cuda.empty(4, np.uint8).data.device_id == 0


def test_with_a_stream_cupy_and_torch_work_in_it(cuda, torch, streams):
    import cupy

    with streams[0]:
        assert cupy.cuda.get_current_stream().ptr == streams[0].ptr
        assert torch.cuda.current_stream().cuda_stream == streams[0].ptr
    assert torch.cuda.current_stream().cuda_stream != streams[0].ptr


def test_results_are_ordered_on_torchs_current_stream(cuda, torch, streams, arena, spin):
    copies = streams[0]
    there = torch.zeros(MIB, dtype=torch.uint8, device=cuda.name)
    torch.cuda.current_stream().synchronize()
    arena.array[:MIB] = 5
    theirs = torch.cuda.Stream()
    with torch.cuda.stream(theirs):
        _ = there * 2  # loads the kernel and the memory for it
    theirs.synchronize()
    held = spin(copies)
    with torch.cuda.stream(theirs):
        current = cuda.current_stream(there)
        assert current.ptr == theirs.cuda_stream
        copies.copy_to_device(cuda.bytes_of(there), arena.array[:MIB])
        current.wait(copies.record())
        doubled = there * 2
        done = torch.cuda.Event()
        done.record()
    assert not done.query()
    held.end()
    done.synchronize()
    assert doubled.unique().tolist() == [10]


def test_arrays_go_out_by_dlpack(cuda, torch):
    array = cuda.empty((3, 4), "float32")
    tensor = torch.from_dlpack(array)
    assert (tensor.data_ptr(), tuple(tensor.shape)) == (array.data.ptr, (3, 4))


def test_arrays_come_in_by_dlpack(cuda, torch):
    class Foreign:
        """An array of a library that dualblade does not know."""

        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    tensor = torch.arange(12, dtype=torch.float32, device=cuda.name).reshape(3, 4)
    array = cuda.as_array(Foreign(tensor))
    assert (array.data.ptr, array.shape) == (tensor.data_ptr(), (3, 4))
    with pytest.raises(ValueError, match="not contiguous"):
        cuda.as_array(Foreign(tensor.t()))


# ---- memory of host and GPU ----------------------------------------------------------------------


def test_kernels_work_in_mapped_memory(cuda):
    import cupy

    device = gpu.open_device("cuda", unified=True)
    array = device.empty(MIB, np.uint8)
    host = device.host_bytes_of(array)
    host[:] = wanted = random_bytes(MIB)
    stream = device.stream()
    total = device.empty(1, np.uint64)
    stream.launch(lambda: cupy.sum(array, dtype=np.uint64, out=total.reshape(())))
    stream.launch(lambda: array.__iadd__(1))
    stream.record().wait(60)
    stream.close()
    assert device.host_bytes_of(total).view(np.uint64)[0] == wanted.sum(dtype=np.uint64)
    assert np.array_equal(host, wanted + np.uint8(1))


# ---- speed ---------------------------------------------------------------------------------------


def seconds(cuda, stream, copy):
    """How long 8 copies take on the GPU."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    with stream:
        start.record()
        for _ in range(8):
            copy()
        end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3


@pytest.mark.parametrize("direction", ["to_device", "to_host"])
def test_copies_are_as_fast_as_from_cudas_own_pinned_memory(
    cuda, streams, arena, direction, record_property
):
    import cupyx

    stream = streams[0]
    theirs = cupyx.empty_pinned(arena.size_bytes, np.uint8)
    theirs[:] = arena.array[:] = random_bytes(arena.size_bytes)
    there = cuda.empty(arena.size_bytes, np.uint8)

    def copy(host):
        if direction == "to_device":
            stream.copy_to_device(there, host)
        else:
            stream.copy_to_host(host, there)

    pairs = [
        [seconds(cuda, stream, lambda host=host: copy(host)) for host in (arena.array, theirs)]
        for _ in range(9)
    ][2:]
    size = 8 * arena.size_bytes
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    ours, cudas = (size / median / 1e9 for median in medians)
    record_property("ours_gb_per_s", ours)
    record_property("cuda_gb_per_s", cudas)
    print(f"{direction}: {ours:.1f} GB/s from our staging, {cudas:.1f} from CUDA's pinned memory")
    assert ours >= 0.9 * cudas
