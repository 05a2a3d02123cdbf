"""What holds for every computing device: the host, simulated CUDA, and a GPU."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

import dualblade
from dualblade import gpu
from tests.helpers import bytes_on

MIB = 1 << 20


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def put(device, data):
    """An array of the device with these bytes."""
    array = device.empty(data.nbytes, np.uint8)
    stream = device.stream()
    stream.copy_to_device(array, data)
    stream.record().wait(60)
    stream.close()
    return array


@pytest.fixture
def arena(device):
    arena = device.arena(2 * MIB)
    yield arena
    arena.close()


# ---- memory --------------------------------------------------------------------------------------


def test_it_says_what_it_is(device):
    told = device.describe()
    assert (told["name"], told["kind"], told["unified"]) == (
        device.name,
        device.kind,
        device.unified,
    )
    assert device.name in repr(device)


def test_an_arena_is_aligned_memory_until_it_is_closed(device):
    arena = device.arena(3 * MIB + 5)
    assert (arena.array.dtype, arena.array.shape) == (np.uint8, (3 * MIB + 5,))
    assert arena.array.ctypes.data % 4096 == 0
    assert arena.pinned == (device.kind == "cuda")
    arena.array[:] = 7
    assert gpu.counters()["gpu_arenas"] == 1
    arena.close()
    arena.close()
    assert arena.closed
    assert gpu.counters()["gpu_arenas"] == 0
    with pytest.raises(dualblade.ClosedError, match="arena"):
        _ = arena.array


def test_an_arena_has_a_size(device):
    with pytest.raises(ValueError, match="holds nothing"):
        device.arena(0)


@pytest.mark.parametrize("dtype", ["float16", np.int64, "bfloat16", ml_dtypes.float8_e4m3fn])
def test_empty_arrays_are_of_any_shape_and_dtype(device, dtype):
    for shape in ((3, 5), (), (0, 4), 7):
        array = device.empty(shape, dtype)
        assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
        assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
        flat = device.bytes_of(array)
        assert (flat.dtype, flat.shape) == (np.uint8, (array.nbytes,))


def test_an_array_of_the_device_is_taken_as_it_is(device):
    array = device.empty((4, 4), "float32")
    assert device.as_array(array) is array
    with pytest.raises(ValueError, match="not contiguous"):
        device.as_array(array[:, 1])
    with pytest.raises(ValueError, match="not contiguous"):
        device.bytes_of(array[::2])
    with pytest.raises(TypeError):
        device.as_array([1, 2])


# ---- copies and order ----------------------------------------------------------------------------


@pytest.mark.parametrize("staged", [True, False])
def test_copies_go_both_ways(device, stream, arena, staged):
    wanted = random_bytes(2 * MIB)
    there = device.empty(2 * MIB, np.uint8)
    out = arena.array if staged else np.zeros(2 * MIB, np.uint8)
    out[:] = wanted
    stream.copy_to_device(there, out)
    stream.record().wait(60)
    out[:] = 0
    stream.copy_to_host(out[5 : MIB + 3], there[5 : MIB + 3])
    stream.record().wait(60)
    assert np.array_equal(out[5 : MIB + 3], wanted[5 : MIB + 3])
    assert not out[:5].any()
    assert not out[MIB + 3 :].any()


def test_a_copy_takes_flat_bytes_of_one_size(device, stream):
    flat, there = np.zeros(8, np.uint8), device.empty(8, np.uint8)
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    for dst, src, kind in [
        (there, flat[:4], ValueError),
        (device.empty((2, 4), np.uint8), flat, TypeError),
        (device.empty(8, np.int8), flat, TypeError),
        (there, bytes(8), TypeError),
        (device.empty(16, np.uint8)[::2], flat, ValueError),
    ]:
        with pytest.raises(kind):
            stream.copy_to_device(dst, src)
    for dst, src, kind in [
        (flat[:4], there, ValueError),
        (read_only, there, ValueError),
        (flat.reshape(2, 4), there, TypeError),
        (np.zeros(16, np.uint8)[::2], there, ValueError),
        (bytearray(8), there, TypeError),
    ]:
        with pytest.raises(kind):
            stream.copy_to_host(dst, src)


def test_a_stream_keeps_its_order(device, stream, arena, hold):
    there = put(device, np.zeros(8, np.uint8))
    arena.array[:8], arena.array[8:24] = 5, 1
    gate = hold(stream)
    stream.copy_to_host(arena.array[8:16], there)
    stream.copy_to_device(there, arena.array[:8])
    stream.copy_to_host(arena.array[16:24], there)
    done = stream.record()
    assert not done.done
    assert arena.array[8:24].tolist() == [1] * 16
    gate.opened.set()
    done.wait(60)
    assert done.done
    assert arena.array[8:24].tolist() == [0] * 8 + [5] * 8


@pytest.mark.parametrize("ordered", [True, False])
def test_streams_run_beside_each_other_and_wait_for_events(device, stream, arena, hold, ordered):
    # Without the event the reader must be seen to overtake: else this would show nothing.
    there = put(device, np.zeros(8, np.uint8))
    arena.array[:8], arena.array[8:16] = 9, 1
    reader = device.stream()
    gate = hold(stream)
    stream.copy_to_device(there, arena.array[:8])
    copied = stream.record()
    if ordered:
        reader.wait(copied)
    reader.copy_to_host(arena.array[8:16], there)
    read = reader.record()
    if ordered:
        with pytest.raises(TimeoutError):
            read.wait(0.02)
        assert not read.done
    else:
        read.wait(60)
    gate.opened.set()
    copied.wait(60)
    read.wait(60)
    assert arena.array[8:16].tolist() == [9 if ordered else 0] * 8
    reader.close()


def test_an_event_is_of_what_came_before_it(device, stream, hold):
    first = stream.record()
    first.wait(60)
    gate = hold(stream)
    assert first.done
    second = stream.record()
    with pytest.raises(TimeoutError):
        second.wait(0.001)
    assert not second.done
    gate.opened.set()
    second.wait(60)
    second.wait()
    assert second.done


def test_many_threads_may_wait_for_one_event(device, stream, hold):
    gate = hold(stream)
    event = stream.record()
    waiting = [threading.Thread(target=event.wait, args=(t,)) for t in (None, 60, None)]
    for thread in waiting:
        thread.start()
    waiting[0].join(0.01)
    assert waiting[0].is_alive()
    gate.opened.set()
    for thread in waiting:
        thread.join(60)
        assert not thread.is_alive()


def test_a_current_stream_is_a_threads_own(device, stream, arena):
    mine = device.current_stream()
    there = put(device, random_bytes(64))
    with stream:
        inner = device.current_stream()
        assert inner.record() is not None
        inner.copy_to_host(arena.array[:64], there)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(device.current_stream().record()))
        thread.start()
        thread.join()
        stream.record().wait(60)
        assert np.array_equal(arena.array[:64], random_bytes(64))
    mine.record().wait(60)
    seen[0].wait(60)
    mine.close()
    device.current_stream().record().wait(60)


def test_launch_runs_in_the_streams_order(device, stream, arena, hold):
    there = put(device, np.zeros(8, np.uint8))
    arena.array[:8] = 4
    gate = hold(stream)

    def work():
        if device.kind == "host":
            arena.array[8:16] = there
        else:
            device.current_stream().copy_to_host(arena.array[8:16], there)

    arena.array[8:16] = 1
    launching = threading.Thread(target=lambda: (copy(), stream.launch(work)))

    def copy():
        stream.copy_to_device(there, arena.array[:8])

    launching.start()
    launching.join(60)
    assert arena.array[8:16].tolist() == [1] * 8
    gate.opened.set()
    stream.record().wait(60)
    assert arena.array[8:16].tolist() == [4] * 8


# ---- lifetimes -----------------------------------------------------------------------------------


def test_an_array_that_nobody_has_is_kept_until_its_copy_is_done(device, stream, arena, hold):
    """Or the device's memory pool gives it to the next, and the copy goes there."""
    arena.array[:MIB], wanted = 0xAA, random_bytes(MIB)
    gate = hold(stream)
    lost = device.empty(MIB, np.uint8)
    stream.copy_to_device(lost, arena.array[:MIB])
    del lost
    done = stream.record()
    others = [put(device, wanted) for _ in range(3)]
    gate.opened.set()
    done.wait(60)
    for other in others:
        assert np.array_equal(bytes_on(device, other), wanted)


@pytest.mark.parametrize("direction", ["to_device", "to_host"])
def test_an_arena_is_closed_after_its_copies(device, stream, hold, direction):
    arena = device.arena(MIB)
    arena.array[:] = wanted = random_bytes(MIB)
    there = put(device, np.zeros(MIB, np.uint8))
    gate = hold(stream)
    if direction == "to_device":
        stream.copy_to_device(there, arena.array)
    else:
        stream.copy_to_host(arena.array, there)
    closing = threading.Thread(target=arena.close)
    closing.start()
    closing.join(0.02)
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()
    stream.record().wait(60)
    if direction == "to_device":
        assert np.array_equal(bytes_on(device, there), wanted)


def test_close_finishes_what_is_under_way(device, arena, hold):
    there = put(device, np.zeros(8, np.uint8))
    arena.array[:8] = 6
    stream = device.stream()
    gate = hold(stream)
    stream.copy_to_device(there, arena.array[:8])
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(0.02)
    assert closing.is_alive()
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()
    assert stream.closed
    assert bytes_on(device, there).tolist() == [6] * 8
    for use in (stream.record, lambda: stream.copy_to_device(there, arena.array[:8])):
        with pytest.raises(dualblade.ClosedError):
            use()
    stream.close()
    assert gpu.counters()["gpu_streams"] == 0


def test_a_stream_that_is_forgotten_says_so_and_ends(device):
    stream = device.stream()
    stream.record().wait(60)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del stream
    assert gpu.counters()["gpu_streams"] == 0


def test_another_kinds_event_is_refused(device, stream):
    other = gpu.open_device("cpu").current_stream().record()
    with pytest.raises(TypeError, match=r"event\.wait"):
        stream.wait(other)


# ---- torch ---------------------------------------------------------------------------------------


def torch_for(device):
    torch = pytest.importorskip("torch")
    if device.kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return torch


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_torch_tensors_go_in_and_out_on_the_same_memory(device, dtype):
    torch = torch_for(device)
    place = "cpu" if device.kind == "host" else device.name
    tensor = torch.zeros(4, 6, dtype=getattr(torch, dtype), device=place)
    if device.kind == "cuda":
        torch.cuda.current_stream().synchronize()
    array = device.as_array(tensor)
    assert array.shape == (4, 6)
    assert str(array.dtype) == dtype
    wanted = random_bytes(tensor.nbytes)
    stream = device.stream()
    stream.copy_to_device(device.bytes_of(tensor), wanted)
    stream.record().wait(60)
    stream.close()
    assert np.array_equal(tensor.view(torch.uint8).cpu().numpy().reshape(-1), wanted)
    back = device.to_torch(array)
    assert (back.dtype, back.shape, back.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert back.data_ptr() == tensor.data_ptr()


def test_what_is_elsewhere_is_refused(device):
    torch = pytest.importorskip("torch")
    wrong = [torch.zeros(3, device="meta")]
    if device.kind == "cuda":
        wrong += [torch.zeros(3), np.zeros(3)]
    for array in wrong:
        with pytest.raises(dualblade.UnsupportedError, match=r"cpu|meta|memory"):
            device.as_array(array)
    with pytest.raises(ValueError, match="not contiguous"):
        device.as_array(
            torch.zeros(4, 4, device="cpu" if device.kind == "host" else "cuda").t()
            if device.kind == "host" or torch.cuda.is_available()
            else device.empty((4, 4), np.uint8)[:, 1]
        )


# ---- the drive -----------------------------------------------------------------------------------


def test_the_drive_and_the_device_work_in_the_same_staging_memory(device, stream, tmp_path):
    """Registered with io_uring and pinned by CUDA at once: drive, staging, device, and back."""
    wanted = random_bytes(4 * MIB)
    path = tmp_path / "drive"
    path.write_bytes(bytes(8 * MIB))
    arena = device.arena(8 * MIB)
    with dualblade.Device.open(path) as drive:
        registered = drive.register([arena.array])
        assert registered in {0, 8 * MIB}
        drive.write([(0, wanted)]).wait()
        there = device.empty(4 * MIB, np.uint8)
        for at in range(0, 4 * MIB, MIB):
            piece = arena.array[at : at + MIB]
            drive.read([(at, piece)]).wait()
            stream.copy_to_device(there[at : at + MIB], piece)
        stream.copy_to_host(arena.array[4 * MIB :], there)
        stream.record().wait(60)
        drive.write([(4 * MIB, arena.array[4 * MIB :])]).wait()
        drive.unregister([arena.array])
    arena.close()
    assert path.read_bytes()[4 * MIB :] == wanted.tobytes()
