"""Registered memory: found by any part of it, held while it is, and never needed."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest

import dualblade
from tests.helpers import MIB


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "device.img"
    path.write_bytes(bytes(8 * MIB))
    return path


def registered(device):
    return device.stats()["direct"]["registered_bytes"]


def open_uring(target):
    device = dualblade.Device.open(target, engine="uring")
    if device.register([dualblade.aligned_empty(4096, np.uint8)]) == 0:
        device.close()
        pytest.skip("this kernel registers no memory")
    return device


def test_any_part_of_a_registered_buffer_reads_and_writes(target):
    rng = np.random.default_rng(7)
    with open_uring(target) as device:
        before = registered(device)
        arena = dualblade.aligned_empty(2 * MIB, np.uint8)
        assert device.register([arena]) == arena.nbytes
        assert registered(device) == before + arena.nbytes
        for _ in range(50):
            start = int(rng.integers(0, 256)) * 4096
            length = int(rng.integers(1, MIB))
            offset = int(rng.integers(0, 512)) * 4096
            part = arena[start : start + length]
            part[:] = rng.integers(0, 256, length, np.uint8)
            wanted = part.copy()
            device.write([(offset, part)]).wait()
            part[:] = 0
            device.read([(offset, part)]).wait()
            assert (part == wanted).all()
        device.unregister([arena])
        assert registered(device) == before
        device.read([(0, arena)]).wait()


def test_a_buffer_that_only_begins_in_registered_memory(target):
    with open_uring(target) as device:
        arena = dualblade.aligned_empty(2 * MIB, np.uint8)
        device.register([arena[: MIB // 2]])
        arena[:] = 5
        device.write([(0, arena)]).wait()
        arena[:] = 0
        device.read([(0, arena)]).wait()
        assert (arena == 5).all()


def test_registered_memory_lives_until_it_is_unregistered_or_the_device_closes(target):
    with open_uring(target) as device:
        first = dualblade.aligned_empty(MIB, np.uint8)
        second = dualblade.aligned_empty(MIB, np.uint8)
        device.register([first, second])
        of_first, of_second = weakref.ref(first), weakref.ref(second)
        device.unregister([first])
        del first, second
        gc.collect()
        assert of_first() is None
        assert of_second() is not None
    gc.collect()
    assert of_second() is None


def test_unregistering_while_it_is_read_and_written(target):
    with open_uring(target) as device:
        arena = dualblade.aligned_empty(4 * MIB, np.uint8)
        arena[:] = 9
        device.register([arena])
        writing = device.write([(0, arena)])
        device.unregister([arena])
        writing.wait()
        back = np.zeros(4 * MIB, np.uint8)
        device.read([(0, back)]).wait()
        assert (back == 9).all()


def test_read_only_memory_is_refused_and_nothing_is_registered(target):
    with open_uring(target) as device:
        before = registered(device)
        good = dualblade.aligned_empty(MIB, np.uint8)
        with pytest.raises(ValueError, match="buffer 1"):
            device.register([good, b"x" * 4096])
        assert registered(device) == before


@pytest.mark.parametrize("engine", ["aio", "threads"])
def test_engines_that_know_no_registration_say_so_by_zero(target, engine):
    with dualblade.Device.open(target, engine=engine) as device:
        arena = dualblade.aligned_empty(MIB, np.uint8)
        assert device.register([arena]) == 0
        arena[:] = 3
        device.write([(0, arena)]).wait()
        device.unregister([arena])


PROGRAM = """
import sys, numpy as np, dualblade
with dualblade.Device.open(sys.argv[1], engine="uring") as device:
    small = dualblade.aligned_empty(65536, np.uint8)
    large = dualblade.aligned_empty(64 << 20, np.uint8)
    large[:] = 1
    count = device.register([large, small])
    device.write([(0, large[: 4 << 20])]).wait()
    back = np.zeros(4 << 20, np.uint8)
    device.read([(0, back)]).wait()
    assert (back == 1).all()
    print(count)
"""


def test_the_limit_on_locked_memory_is_no_obstacle(target):
    limited = "setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock".split()
    try:
        subprocess.run([*limited, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"setpriv can't drop CAP_IPC_LOCK here: {error}")
    done = subprocess.run(
        [*limited, sys.executable, "-c", PROGRAM, target],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (0, (64 << 20) + 65536)  # 0 where the limit is below 64 MiB


def test_as_much_of_the_staging_as_may_be_locked_is_registered(tmp_path):
    image = tmp_path / "device.img"
    image.write_bytes(bytes(MIB))
    probe = (
        "import sys, dualblade\n"
        "with dualblade.Device.open(sys.argv[1], 'uring', staging_bytes=8 << 20) as device:\n"
        "    print(device.stats()['direct']['registered_bytes'])"
    )
    unprivileged = ["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]
    limit = f"--memlock={8 << 20}:{8 << 20}"
    done = subprocess.run(
        [*unprivileged, "prlimit", limit, sys.executable, "-c", probe, str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert int(done.stdout) in (4 << 20, 8 << 20)  # some kernels count the ring too
