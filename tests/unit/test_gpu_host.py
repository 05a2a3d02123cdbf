"""The host in a GPU's place: order, events, bandwidth, errors, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import ml_dtypes
import numpy as np
import pytest

import dualblade
from dualblade import _core, gpu
from tests.helpers import Gate

MIB = 1 << 20


@pytest.fixture
def device():
    return gpu.open_device("cpu")


@pytest.fixture
def stream(device):
    stream = device.stream()
    yield stream
    stream.close()


def held(stream):
    """A gate at which the stream now stands."""
    gate = Gate()
    stream.launch(gate)
    assert gate.reached.wait(60)
    return gate


class Boom(Exception):
    pass


def boom():
    raise Boom


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def zeros(device, size):
    array = device.empty(size, np.uint8)
    array[:] = 0
    return array


# ---- the device ----------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    for name in ("gpu", "", "cpu:1", "cuda:x", "cuda:-1", "rocm"):
        with pytest.raises(ValueError, match="cpu"):
            gpu.open_device(name)


def test_it_says_what_it_is():
    device = gpu.open_device("cpu", copy_bytes_per_s=2e9)
    assert (device.name, device.kind, device.unified) == ("cpu", "host", False)
    assert device.describe() == {
        "name": "cpu",
        "kind": "host",
        "unified": False,
        "copy_bytes_per_s": 2e9,
    }
    assert gpu.open_device("cpu", unified=True).unified


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan")])
def test_a_bandwidth_is_above_zero(bandwidth):
    with pytest.raises(ValueError, match="bandwidth"):
        gpu.open_device("cpu", copy_bytes_per_s=bandwidth)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", np.int64, "bfloat16", ml_dtypes.float8_e4m3fn])
def test_empty_arrays_are_aligned_and_of_any_dtype(device, dtype):
    array = device.empty((3, 5), dtype)
    assert array.shape == (3, 5)
    assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    assert array.ctypes.data % 4096 == 0
    assert device.bytes_of(array).nbytes == array.nbytes


def test_arrays_come_in_without_a_copy(device):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert device.as_array(array) is array
    flat = device.bytes_of(array)
    assert (flat.dtype, flat.shape) == (np.uint8, (48,))
    flat[:4] = 0xFF
    assert np.isnan(array[0, 0])
    assert np.shares_memory(device.host_bytes_of(array), array)


def test_what_would_have_to_be_copied_is_refused(device):
    for array in (np.zeros((4, 4))[:, 1], np.zeros((4, 4)).T):
        with pytest.raises(ValueError, match="not contiguous"):
            device.bytes_of(array)
    with pytest.raises(TypeError):
        device.as_array([1, 2])


# ---- copies and order ----------------------------------------------------------------------------


def test_a_stream_keeps_its_order(device, stream):
    seen = []
    gate = held(stream)
    array, host = zeros(device, 8), np.full(8, 5, np.uint8)
    stream.launch(lambda: seen.append(int(array[0])))
    stream.copy_to_device(array, host)
    stream.launch(lambda: seen.append(int(array[0])))
    done = stream.record()
    assert not done.done
    assert seen == []
    gate.opened.set()
    done.wait(60)
    assert done.done
    assert seen == [0, 5]


def test_streams_run_beside_each_other_and_wait_for_events(device, stream):
    other = device.stream()
    array, host = zeros(device, 8), np.full(8, 9, np.uint8)
    gate = held(stream)
    stream.copy_to_device(array, host)
    copied = stream.record()
    before, after = [], []
    other.launch(lambda: before.append(int(array[0])))
    ran = other.record()
    other.wait(copied)
    other.launch(lambda: after.append(int(array[0])))
    read = other.record()
    ran.wait(60)  # the other stream does not stand
    assert before == [0]
    assert not read.done
    gate.opened.set()
    read.wait(60)
    assert after == [9]
    other.close()


def test_one_event_wakes_everybody(device, stream):
    gate = held(stream)
    event = stream.record()
    others = [device.stream() for _ in range(3)]
    seen = []
    for i, other in enumerate(others):
        other.wait(event)
        other.launch(lambda i=i: seen.append(i))
    waiting = [threading.Thread(target=event.wait, args=(60,)) for _ in range(3)]
    for thread in waiting:
        thread.start()
    gate.opened.set()
    for thread in waiting:
        thread.join(60)
        assert not thread.is_alive()
    for other in others:
        other.close()
    assert sorted(seen) == [0, 1, 2]


def test_an_event_of_another_device_is_refused(device, stream):
    other = gpu.open_device("cpu").current_stream().record()
    for waiting in (stream, device.current_stream()):
        with pytest.raises(TypeError, match="no event of this device"):
            waiting.wait(other)


def test_the_calling_thread_is_a_stream(device, stream):
    mine = device.current_stream()
    array, host = zeros(device, 4), np.full(4, 3, np.uint8)
    mine.copy_to_device(array, host)
    assert array[0] == 3
    assert mine.record().done
    gate = held(stream)
    event = stream.record()
    threading.Timer(0.01, gate.opened.set).start()
    mine.wait(event)
    assert event.done
    seen = []
    mine.launch(lambda: seen.append(threading.current_thread()))
    assert seen == [threading.current_thread()]
    mine.close()
    mine.record().wait()


def test_a_current_stream_is_a_threads_own(device, stream):
    mine = device.current_stream()
    seen = []
    with stream:
        assert device.current_stream() is stream
        with mine:
            assert device.current_stream() is mine
        thread = threading.Thread(target=lambda: seen.append(device.current_stream()))
        thread.start()
        thread.join()
    assert device.current_stream() is mine
    assert seen == [mine]
    assert not stream.closed


# ---- bandwidth -----------------------------------------------------------------------------------


def seconds(fn):
    start = time.monotonic()
    fn()
    return time.monotonic() - start


def test_copies_take_as_long_as_the_bus_says():
    device = gpu.open_device("cpu", copy_bytes_per_s=100e6)
    stream = device.stream()
    size = MIB // 16
    array, host = zeros(device, size), random_bytes(size)

    def copy(times):
        for _ in range(times):
            stream.copy_to_device(array, host)
        stream.record().wait(60)

    assert seconds(lambda: copy(1)) >= size / 100e6
    # What one sleeps too long is not lost: all of them end when they should.
    took = [seconds(lambda: copy(200)) / (200 * size / 100e6) for _ in range(5)]
    assert min(took) >= 1.0
    assert min(took) < 1.03
    stream.close()


def test_copies_of_two_streams_share_a_direction_and_directions_run_at_once():
    device = gpu.open_device("cpu", copy_bytes_per_s=100e6)
    streams = [device.stream() for _ in range(3)]
    array, host, back = zeros(device, MIB), random_bytes(MIB), random_bytes(MIB, 1)
    one = 8 * MIB / 100e6

    def run(*copies):
        for _ in range(8):
            for copy, dst, src in copies:
                copy(dst, src)
        for stream in streams:
            stream.record().wait(60)

    up = (streams[0].copy_to_device, array, host)
    up_too = (streams[1].copy_to_device, array, host)
    down = (streams[2].copy_to_host, back, array)
    assert min(seconds(lambda: run(up, up_too)) for _ in range(2)) >= 2 * one
    assert min(seconds(lambda: run(up, down)) for _ in range(3)) < 1.5 * one
    for stream in streams:
        stream.close()


def test_a_waiting_copy_begins_when_the_event_is_and_not_before():
    device = gpu.open_device("cpu", copy_bytes_per_s=50e6)
    first, second = device.stream(), device.stream()
    array, host = zeros(device, MIB), random_bytes(MIB)
    gate = held(first)
    event = first.record()
    second.wait(event)
    second.copy_to_device(array, host)
    done = second.record()
    time.sleep(0.03)  # longer than the copy takes
    took = seconds(lambda: (gate.opened.set(), done.wait(60)))
    assert took >= MIB / 50e6
    first.close()
    second.close()


def test_waiting_costs_no_processor_time():
    device = gpu.open_device("cpu", copy_bytes_per_s=10e6)
    stream = device.stream()
    array, host = zeros(device, MIB), random_bytes(MIB)
    busy = time.process_time()
    for _ in range(3):
        stream.copy_to_device(array, host)
    stream.record().wait(60)
    assert time.process_time() - busy < 0.1  # of 0.31 s
    stream.close()


def test_the_gil_is_free_while_bytes_move(device, stream):
    host = random_bytes(256 * MIB)
    array = device.empty(256 * MIB, np.uint8)
    turns = 0
    stream.copy_to_device(array, host)
    done = stream.record()
    while not done.done:
        turns += 1
    assert turns > 1000
    assert np.array_equal(array[-MIB:], host[-MIB:])


# ---- errors --------------------------------------------------------------------------------------


def test_an_error_is_raised_where_it_is_waited_for(stream):
    stream.launch(boom)
    event = stream.record()
    with pytest.raises(Boom):
        event.wait(60)
    assert event.done
    with pytest.raises(Boom):
        event.wait(60)


def test_an_error_says_where_it_came_from(stream):
    stream.launch(boom)
    with pytest.raises(Boom) as caught:
        stream.record().wait(60)
    assert "boom" in [entry.name for entry in caught.traceback]


def test_what_follows_an_error_is_left_out_until_it_was_raised(stream):
    seen = []
    gate = held(stream)
    stream.launch(boom)
    stream.launch(lambda: seen.append("unseen"))
    first = stream.record()
    stream.launch(lambda: seen.append("unseen"))
    second = stream.record()
    gate.opened.set()
    with pytest.raises(Boom):
        first.wait(60)
    stream.launch(lambda: seen.append("after"))
    third = stream.record()
    third.wait(60)
    with pytest.raises(Boom):
        second.wait(60)
    assert seen == ["after"]


def test_an_error_goes_to_the_streams_that_wait(device, stream):
    seen = []
    other = device.stream()
    stream.launch(boom)
    other.wait(stream.record())
    other.launch(lambda: seen.append("unseen"))
    with pytest.raises(Boom):
        other.record().wait(60)
    other.launch(lambda: seen.append("after"))
    other.record().wait(60)
    stream.record().wait(60)  # it was raised: this stream goes on as well
    assert seen == ["after"]
    with pytest.raises(Boom):
        stream.launch(boom)
        device.current_stream().wait(stream.record())
    other.close()


def test_a_copy_can_be_made_to_fail():
    copies = []

    def third_fails(direction, size):
        copies.append((direction, size))
        if len(copies) == 3:
            raise OSError(5, "bus")

    device = gpu.open_device("cpu", before_copy=third_fails)
    stream = device.stream()
    array, host = zeros(device, 8), np.ones(8, np.uint8)
    events = []
    for i in range(4):
        stream.copy_to_device(array[i : i + 1], host[:1])
        events.append(stream.record())
    events[1].wait(60)
    for event in events[2:]:
        with pytest.raises(OSError, match="bus"):
            event.wait(60)
    stream.copy_to_host(host[:2], array[2:4])
    stream.record().wait(60)
    assert copies == [("to_device", 1)] * 3 + [("to_host", 2)]
    assert array[:4].tolist() == [1, 1, 0, 0]
    assert host[:2].tolist() == [0, 0]
    stream.close()


# ---- interrupts ----------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupt_soon():
    """A function (seconds): a signal handler raises in this thread then."""

    def handler(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda after: signal.setitimer(signal.ITIMER_REAL, after)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# The interpreter's own callbacks are interrupted as well, which pytest reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_lose_nothing_that_was_put_into_a_stream(device, interrupt_soon):
    streams = [device.stream() for _ in range(2)]
    host, array = np.ones(300, np.uint8), zeros(device, 300)
    for stream in streams:  # Python's own start of a thread must not be interrupted
        stream.launch(lambda: None)
        stream.copy_to_device(array[:1], host[:1])
        stream.record().wait(60)
    events, interrupts = [], 0
    for turn in range(300):
        try:
            interrupt_soon(1e-6 * (1 + turn % 60))
            first, second = streams[turn % 2], streams[1 - turn % 2]
            first.launch(lambda: None)
            first.copy_to_device(array[turn : turn + 1], host[turn : turn + 1])
            copied = first.record()
            second.wait(copied)
            event = second.record()
            events.append((turn, event))
            event.wait(60)
            interrupt_soon(0)
        except Interrupted:
            interrupts += 1
    interrupt_soon(0)
    assert interrupts > 30
    for turn, event in events:
        event.wait(60)
        assert array[turn] == 1
    for stream in streams:
        stream.close()
    assert not ours()


# The interpreter's own callbacks are interrupted as well, which pytest reports.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_close_that_was_interrupted_can_be_called_again(device, interrupt_soon):
    for turn in range(100):
        stream = device.stream()
        stream.launch(lambda: None)
        stream.record().wait(60)
        try:
            interrupt_soon(1e-6 * (1 + turn))
            stream.close()
            interrupt_soon(0)
        except Interrupted:
            pass
        interrupt_soon(0)
        stream.close()
        assert not ours()
    assert gpu.counters()["gpu_streams"] == 0


# ---- the end -------------------------------------------------------------------------------------


def ours():
    return {t for t in threading.enumerate() if t.name.startswith("dualblade-")}


def test_close_finishes_what_is_under_way_and_leaves_no_thread(device):
    before = ours()
    streams = [device.stream() for _ in range(3)]
    assert gpu.counters()["gpu_streams"] == 3
    array, host = zeros(device, MIB), random_bytes(MIB)
    seen = []
    for stream in streams:
        stream.copy_to_device(array, host)
        stream.copy_to_host(host, array)
        stream.launch(lambda: seen.append(1))
    assert ours() > before
    for stream in streams:
        stream.close()
        stream.close()
        with pytest.raises(dualblade.ClosedError):
            stream.record()
        with pytest.raises(dualblade.ClosedError):
            stream.copy_to_device(array, host)
    assert len(seen) == 3
    assert ours() == before
    assert gpu.counters()["gpu_streams"] == 0


def test_a_device_goes_on_after_its_last_stream(device):
    for _ in range(3):
        stream = device.stream()
        array = zeros(device, 4)
        stream.copy_to_device(array, np.full(4, 2, np.uint8))
        stream.close()
        assert array[3] == 2


def test_close_may_be_called_by_many_threads_at_once(device):
    for _ in range(20):
        stream = device.stream()
        array, host = zeros(device, MIB), random_bytes(MIB)
        for _ in range(4):
            stream.copy_to_device(array, host)
        stream.launch(lambda: None)
        threads = [threading.Thread(target=stream.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not ours()


def test_a_function_may_close_its_own_stream(device):
    stream = device.stream()
    called = threading.Event()
    stream.launch(lambda: (stream.close(), called.set()))
    assert called.wait(60)
    stream.close()
    assert not ours()


def test_an_idle_stream_keeps_nothing_alive(device, stream):
    arena = device.arena(MIB)
    buffers = _core.counters()["buffers"]
    out = zeros(device, MIB)
    stream.copy_to_device(out, arena.array)
    stream.launch(lambda array=out: array)
    stream.record().wait(60)
    arena.close()
    del out
    assert _core.counters()["buffers"] == buffers - 1


def test_after_a_fork_a_new_device_works_and_the_old_one_says_so(device, stream):
    gate = held(stream)
    event = stream.record()
    pid = os.fork()
    if pid == 0:
        try:
            code = in_the_child(device, stream, event)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.opened.set()
    event.wait(60)


def in_the_child(device, stream, event):
    for use in (device.stream, stream.record, event.wait):
        try:
            use()
        except dualblade.ClosedError:
            continue
        return 1
    stream.close()
    fresh = gpu.open_device("cpu")
    array = fresh.empty(4, np.uint8)
    fresh.current_stream().copy_to_device(array, np.full(4, 6, np.uint8))
    return 0 if array.tolist() == [6] * 4 else 2
