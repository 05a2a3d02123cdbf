"""CUDA devices over a simulated CuPy: discovery, what is missing, pinning, unified memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dualblade
from dualblade import gpu
from dualblade.errors import DualbladeWarning
from tests.helpers import Gate, bytes_on
from tests.simulated_cuda import CUDARuntimeError, Simulation

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def simulate(monkeypatch):
    """A function (options of Simulation) -> Simulation, which `import cupy` then finds."""
    made = []

    def simulate(**options):
        simulation = Simulation(**options)
        made.append(simulation)
        monkeypatch.setitem(sys.modules, "cupy", simulation.module)
        return simulation

    yield simulate
    gc.collect()
    for simulation in made:
        simulation.close()
        simulation.free.clear()


def random_bytes(size):
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def round_trip(device, array, data):
    """What comes back of the bytes that are copied to an array."""
    out = np.zeros_like(data)
    stream = device.stream()
    stream.copy_to_device(device.bytes_of(array), data)
    stream.copy_to_host(out, device.bytes_of(array))
    stream.record().wait(60)
    stream.close()
    return out


# ---- what is missing -----------------------------------------------------------------------------


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(dualblade.UnsupportedError, match=rf"'{name}'.*dualblade\[gpu\]"):
            gpu.open_device(name)


def test_a_cupy_that_does_not_load_says_why(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    with pytest.raises(dualblade.UnsupportedError, match=r"libcudart.*dualblade\[gpu\]"):
        gpu.open_device("cuda")
    (tmp_path / "cupy.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(dualblade.UnsupportedError, match=r"a_module_that_is_not_there"):
        gpu.open_device("cuda")


def test_dualblade_and_its_host_device_never_import_cupy():
    program = (
        "import sys, dualblade\n"
        "from dualblade import gpu\n"
        "stream = gpu.open_device('cpu').stream()\n"
        "stream.record().wait()\n"
        "stream.close()\n"
        "sys.exit('cupy' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_what_install_says_is_in_pyproject():
    extras = (ROOT / "pyproject.toml").read_text()
    assert "\ngpu = [" in extras
    assert "\ngpu-cuda13 = [" in extras


def test_no_gpu_a_gpu_too_few_and_rocm_are_told_apart(simulate):
    simulate(devices=0)
    with pytest.raises(dualblade.UnsupportedError, match=r"NoDevice.*nvidia-smi"):
        gpu.open_device("cuda")
    simulation = simulate(devices=2)
    with pytest.raises(dualblade.UnsupportedError, match=r"no cuda:2; 2 CUDA"):
        gpu.open_device("cuda:2")
    simulation.module.cuda.runtime.is_hip = True
    with pytest.raises(dualblade.UnsupportedError, match="ROCm"):
        gpu.open_device("cuda")


# ---- devices -------------------------------------------------------------------------------------


def test_cuda_is_cupys_current_device(simulate):
    simulation = simulate()
    assert gpu.open_device("cuda").name == "cuda:0"
    assert gpu.open_device("cuda:1").name == "cuda:1"
    with simulation.module.cuda.Device(1):
        assert gpu.open_device("cuda").name == "cuda:1"


def test_it_says_what_it_is(simulate):
    simulate()
    told = gpu.open_device("cuda:1").describe()
    assert told["model"] == "Simulated"
    assert told["copy_engines"] == 2
    assert told["compute_capability"] == "9.0"
    assert {"cupy", "cuda", "cuda_driver", "memory_bytes"} <= told.keys()


def test_work_is_on_the_device_that_was_asked_for(simulate):
    simulation = simulate()
    device = gpu.open_device("cuda:1")
    array = device.empty(8, np.uint8)
    assert array.data.device_id == 1
    assert round_trip(device, array, random_bytes(8)).tolist() == random_bytes(8).tolist()
    other = gpu.open_device("cuda:0")
    with pytest.raises(dualblade.UnsupportedError, match=r"on cuda:1 is not on cuda:0"):
        other.as_array(array)
    stream = other.stream()
    with pytest.raises(ValueError, match=r"cuda:1, not cuda:0"):
        stream.copy_to_device(array, np.zeros(8, np.uint8))
    stream.close()
    assert simulation.device() == 0


def test_a_thread_of_its_own_uses_the_device_too(simulate):
    simulate()
    device = gpu.open_device("cuda:1")
    seen = []

    def work():
        array = device.empty(8, np.uint8)
        seen.append((array.data.device_id, round_trip(device, array, random_bytes(8))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert seen[0][0] == 1
    assert np.array_equal(seen[0][1], random_bytes(8))


def test_what_cuda_says_becomes_a_device_error(simulate):
    simulation = simulate()
    device = gpu.open_device("cuda")
    stream = device.stream()

    def fails(*_):
        raise CUDARuntimeError(700, "cudaErrorIllegalAddress")

    simulation.module.cuda.runtime.memcpyAsync = fails
    with pytest.raises(dualblade.DeviceError, match=r"copy on cuda:0 .*IllegalAddress") as caught:
        stream.copy_to_device(device.empty(4, np.uint8), np.zeros(4, np.uint8))
    assert caught.value.device == "cuda:0"
    stream.close()


def test_memory_comes_from_the_pool_of_the_stream_that_is_named(simulate):
    simulation = simulate()
    device = gpu.open_device("cuda")
    stream = device.stream()
    device.empty(100, np.uint8)
    device.empty(200, np.uint8, stream=stream)
    with stream:
        device.empty(300, np.uint8)
    assert set(simulation.free) == {(0, 0, 100), (0, stream.ptr, 200), (0, stream.ptr, 300)}
    stream.close()


def test_an_older_cupy_without_a_dtype_says_so(simulate, monkeypatch):
    simulation = simulate()
    device = gpu.open_device("cuda")

    def refuses(*_, **__):
        raise TypeError("Unsupported dtype")

    monkeypatch.setattr(simulation.module, "ndarray", refuses)
    with pytest.raises(dualblade.UnsupportedError, match=r"bfloat16.*CuPy 14"):
        device.empty(4, "bfloat16")


# ---- pinned memory -------------------------------------------------------------------------------


def test_an_arena_is_pinned_as_long_as_it_is_open(simulate):
    simulation = simulate()
    device = gpu.open_device("cuda")
    arena = device.arena(MIB)
    assert simulation.pinned == {arena.array.ctypes.data: MIB}
    arena.close()
    assert simulation.pinned == {}
    arena = device.arena(MIB)
    del arena
    assert simulation.pinned == {}


def test_where_pinning_is_refused_it_says_so_and_copies_all_the_same(simulate):
    simulate(pin_status=2)
    device = gpu.open_device("cuda")
    with pytest.warns(DualbladeWarning, match=r"not pinned.*ulimit -l"):
        arena = device.arena(MIB)
    assert not arena.pinned
    arena.array[:] = random_bytes(MIB)
    array = device.empty(MIB, np.uint8)
    assert np.array_equal(round_trip(device, array, arena.array), random_bytes(MIB))
    arena.close()


# ---- unified memory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "unified", "pins"),
    [
        ({}, False, False),
        ({"Integrated": 1}, True, True),
        ({"PageableMemoryAccessUsesHostPageTables": 1}, True, False),
    ],
)
def test_memory_that_host_and_gpu_share_is_found(simulate, attributes, unified, pins):
    simulation = simulate(attributes=attributes)
    device = gpu.open_device("cuda")
    assert device.unified is unified
    array = device.empty((3, 1000), "float16")
    if unified:
        host = device.host_bytes_of(array[1:2])
        assert host.nbytes == 2000
        assert device.host_bytes_of(array).ctypes.data % 4096 == 0
        host[:] = wanted = random_bytes(2000)
        assert np.array_equal(bytes_on(device, array[1:2]), wanted)
    else:
        with pytest.raises(dualblade.UnsupportedError, match="alone"):
            device.host_bytes_of(array)
    assert bool(simulation.pinned) is pins
    del array
    gc.collect()
    assert simulation.pinned == {}


def test_memory_that_is_shared_goes_after_what_works_with_it(simulate):
    simulation = simulate(attributes={"Integrated": 1})
    device = gpu.open_device("cuda")
    gate = Gate()
    stream = device.stream()
    with stream:
        array = device.empty(MIB, np.uint8)
    simulation.module.cuda.runtime.launchHostFunc(stream.ptr, gate, 0)
    del array
    gc.collect()
    assert len(simulation.pinned) == 1
    gate.opened.set()
    stream.close()
    assert simulation.pinned == {}


def test_unified_can_be_asked_for(simulate):
    simulate()
    device = gpu.open_device("cuda", unified=True)
    assert device.unified
    assert device.host_bytes_of(device.empty(16, np.uint8)).nbytes == 16
    assert device.empty((0, 4), np.uint8).shape == (0, 4)


# ---- forks ---------------------------------------------------------------------------------------


def test_the_child_of_a_fork_is_told_so(simulate):
    simulate()
    device = gpu.open_device("cuda")
    stream = device.stream()
    arena = device.arena(MIB)
    event = stream.record()
    event.wait(60)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = in_the_child(device, stream, arena, event)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    arena.close()
    stream.close()


def in_the_child(device, stream, arena, event):
    uses = (device.stream, stream.record, event.wait, lambda: device.empty(4, np.uint8))
    for use in uses:
        try:
            use()
        except dualblade.ClosedError:
            continue
        return 2
    arena.close()
    stream.close()
    return 0
