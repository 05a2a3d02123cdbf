"""The places that tests run on are what they say they are, and are gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.devices import LoopDevice, MemoryCgroup, Unavailable
from tests.helpers import MIB


def blockdev(question: str, path: str) -> int:
    return int(subprocess.run(["blockdev", question, path], capture_output=True, check=True).stdout)


def test_a_target_has_the_size_and_the_blocks_that_it_names(target):
    if target.is_block_device:
        assert blockdev("--getsize64", target.path) == target.size_bytes
        assert blockdev("--getss", target.path) == target.lba_bytes
    else:
        assert os.stat(target).st_size == target.size_bytes
    with open(target, "r+b", buffering=0) as file:
        file.seek(target.size_bytes - 4096)
        assert file.write(b"x" * 4096) == 4096


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_loop_device_is_detached_also_when_the_test_fails(tmp_path, block_bytes):
    try:
        loop = LoopDevice(tmp_path, MIB, block_bytes)
    except Unavailable as error:
        pytest.skip(str(error))
    with pytest.raises(ZeroDivisionError), loop:
        assert attached(loop)
        _ = 1 / 0
    assert not attached(loop)
    assert list(tmp_path.iterdir()) == []
    loop.close()


def attached(loop: LoopDevice) -> bool:
    listed = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
    return str(loop.image) in listed.stdout


def test_a_cgroup_kills_who_takes_more_than_its_limit(memory_cgroup):
    group = memory_cgroup(64 * MIB)
    modest = group.run_python("print(open('/proc/self/cgroup').read(), len(bytearray(8 << 20)))")
    assert modest.returncode == 0
    assert group.path.name in modest.stdout
    assert group.out_of_memory_kills == 0
    greedy = group.run_python("x = bytearray(200 << 20); x[::4096] = b'x' * (len(x) // 4096)")
    assert greedy.returncode == -signal.SIGKILL
    assert group.out_of_memory_kills == 1
    assert group.peak_bytes is None or 8 * MIB < group.peak_bytes <= 64 * MIB


def test_a_cgroup_ends_with_what_still_runs_in_it(memory_cgroup):
    group: MemoryCgroup = memory_cgroup(64 * MIB)
    with group.start(["sleep", "1000"]) as process:
        group.set_limit(32 * MIB)
        group.close()
        assert process.wait() == -signal.SIGKILL
    assert not group.path.exists()
    group.close()
