"""The parts of dualblade-fio that figures depend on: offsets, latencies, patterns, units."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.cli.fio_latency import FOLD_BATCHES, Recorder
from dualblade.cli.fio_offsets import Directions, Offsets
from dualblade.cli.fio_options import duration, parse, percentile_list, size
from dualblade.cli.fio_verify import Pattern, WrongDataError, check_block
from dualblade.cli.memory_cgroup import limited
from dualblade.errors import UnsupportedError
from tests.devices import MemoryCgroup, Unavailable


@given(
    blocks=st.integers(1, 5000),
    random=st.booleans(),
    seed=st.integers(0, 1 << 63),
    batch=st.integers(1, 70),
)
def test_a_pass_visits_every_block_once(blocks, random, seed, batch):
    offsets = Offsets(blocks, 4096, random=random, seed=seed)
    taken = []
    while len(taken) < 2 * blocks:
        taken += offsets.take(batch)
    everything = list(range(0, blocks * 4096, 4096))
    for part in (taken[:blocks], taken[blocks : 2 * blocks]):
        assert sorted(part) == everything
        if not random:
            assert part == everything


def test_random_offsets_are_spread_and_differ_from_pass_to_pass():
    offsets = Offsets(10_000, 1, random=True, seed=1)
    first, second = offsets.take(10_000), offsets.take(10_000)
    assert first != second
    # Neither runs nor drift: neighbours are as far apart as they are by chance, a third.
    assert abs(np.abs(np.diff(first)).mean() / 10_000 - 1 / 3) < 0.02
    assert abs(np.mean(first[:1000]) / 10_000 - 1 / 2) < 0.05


def test_a_terabyte_of_random_offsets_takes_no_memory():
    blocks = (16 << 40) // 4096
    taken = Offsets(blocks, 4096, random=True, seed=3).take(5000)
    assert len(set(taken)) == 5000
    assert 0 <= min(taken) < max(taken) < 16 << 40


@pytest.mark.parametrize("percent", [0, 30, 100])
def test_the_mix(percent):
    mix = Directions(percent, seed=5)
    reads = sum(mix.next_is_read() for _ in range(10_000))
    assert abs(reads / 10_000 - percent / 100) < 0.02


latencies = st.lists(
    st.tuples(st.integers(1, 16), st.integers(0, 1 << 20), st.integers(0, 1 << 40)),
    min_size=1,
    max_size=300,
)


@given(batches=latencies, split=st.integers(0, 300), percent=st.floats(0.01, 100))
def test_latencies_against_numpy(batches, split, percent):
    recorders = [Recorder(), Recorder()]
    for i, (requests, slat, clat) in enumerate(batches):
        recorders[i >= split].record(requests, requests * 512, slat, clat, i * 1000)
    whole = Recorder()
    for recorder in recorders:
        recorder.fold()
        whole.merge(recorder)
    clats = np.repeat([b[2] for b in batches], [b[0] for b in batches]).astype(float)
    lats = clats + np.repeat([b[1] for b in batches], [b[0] for b in batches])
    assert whole.requests == len(clats)
    assert whole.io_bytes == len(clats) * 512
    assert whole.clat.least == clats.min()
    assert whole.clat.greatest == clats.max()
    assert whole.clat.mean == pytest.approx(clats.mean())
    assert whole.lat.deviation == pytest.approx(lats.std(), rel=1e-3, abs=lats.max() * 1e-6 + 1)
    expected = np.percentile(clats, percent, method="inverted_cdf")
    assert whole.percentile(percent) == pytest.approx(expected, rel=0.01, abs=1)
    assert sum(whole.bins().values()) == len(clats)


def test_a_recorder_says_when_it_is_full():
    recorder = Recorder()
    full = [recorder.record(1, 4096, 10, 100, i) for i in range(FOLD_BATCHES)]
    assert full.index(True) == FOLD_BATCHES - 1


def test_throughput_over_time_adds_up():
    recorder = Recorder()
    for millisecond in range(0, 2000, 10):
        recorder.record(1, 1 << 20, 0, 1, millisecond * 1_000_000)
    recorder.fold()
    assert sum(recorder.bytes_in_interval.values()) == recorder.io_bytes == 200 << 20
    assert recorder.bytes_per_second() == [100 << 20] * 3  # the fourth half second is not whole


def test_each_block_knows_its_place_and_its_run():
    pattern, other = Pattern(4096), Pattern(4096)
    block = bytearray(4096)
    pattern.fill(memoryview(block), 8192)
    assert check_block(block, 8192) == pattern.run
    with pytest.raises(WrongDataError, match="byte 4096 was written to byte 8192"):
        check_block(block, 4096)
    with pytest.raises(WrongDataError, match="older"):
        other.check(block, 8192)
    with pytest.raises(WrongDataError, match="not written with --verify"):
        check_block(bytes(4096), 0)
    second = bytearray(4096)
    pattern.fill(memoryview(second), 12288)
    words, others = np.frombuffer(block, np.uint64), np.frombuffer(second, np.uint64)
    assert (words == others).sum() <= 2  # what both headers begin with


@given(position=st.integers(0, 1023), bit=st.integers(0, 7))
def test_every_flipped_bit_is_seen(position, bit):
    pattern = Pattern(1024)
    block = bytearray(1024)
    pattern.fill(memoryview(block), 0)
    block[position] ^= 1 << bit
    with pytest.raises(WrongDataError):
        pattern.check(block, 0)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("4K", 4096),
        ("1.5m", 3 << 19),
        ("2GiB", 2 << 30),
        ("1t", 1 << 40),
    ],
)
def test_sizes_are_fios(text, count):
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-4k", "4x", "1.0001", "9999p", "4 k"])
def test_wrong_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        size(text)


def test_times_and_percentiles():
    assert [duration(text) for text in ("10", "500ms", "2m", "1.5s")] == [10, 0.5, 120, 1.5]
    assert percentile_list("99.9:50") == (50, 99.9)


def test_fios_spelling_is_understood():
    options = parse(["--filename=x", "--time_based", "--ioengine=libaio", "--runtime=1"])
    assert options.engine == "aio"
    assert options.time_based
    flags = parse(["--filename=x", "--fixedbufs=1", "--end_fsync=0", "--sqthread_poll=1"])
    assert (flags.fixedbufs, flags.end_fsync, flags.sqthread_poll) == (True, False, True)


@pytest.mark.parametrize(("depth", "bs", "batch"), [(1, "4k", 1), (64, "4k", 16), (64, "1m", 1)])
def test_the_depth_is_split_into_batches(depth, bs, batch):
    assert parse(["--filename=x", f"--iodepth={depth}", f"--bs={bs}"]).iodepth_batch == batch


JOINS = """
import os
from pathlib import Path
from dualblade.cli.memory_cgroup import limited
from dualblade.memory import limits

before = limits()
with limited(200 << 20) as group:
    inside = limits()
    assert inside.cgroup_limit_bytes == 200 << 20, inside
    assert inside.cgroup_path == str(group), inside
    assert str(os.getpid()) in (group / "cgroup.procs").read_text().split()
after = limits()
assert after.cgroup_path == before.cgroup_path, after
assert not group.exists()
"""


def test_a_process_joins_a_memory_cgroup_and_leaves_it():
    try:
        MemoryCgroup(64 << 20).close()
    except Unavailable as error:
        pytest.skip(str(error))
    subprocess.run([sys.executable, "-c", JOINS], check=True, timeout=60)


def test_without_a_cgroup_it_says_what_to_do(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 500 kB\n")
    with pytest.raises(UnsupportedError, match="systemd-run"), limited(64 << 20, root=tmp_path):
        pass


def fake_v2(root, path):
    """The files of a version 2 hierarchy in which this process is in `path`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 500 kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{path}\n")
    own = root / "sys/fs/cgroup" / path.lstrip("/")
    own.mkdir(parents=True)
    for directory in (own, *own.parents):
        for name in ("cgroup.procs", "cgroup.subtree_control", "memory.stat"):
            (directory / name).write_text("")
        if directory == root / "sys/fs/cgroup":
            break
        (directory / "memory.max").write_text("max")
    return own


@pytest.mark.parametrize(("path", "place"), [("/user/shell", "user"), ("/", "")])
def test_where_a_version_2_group_is_made(tmp_path, path, place):
    """Beside the group that has the process, or under the root, which may have both."""
    own = fake_v2(tmp_path, path)
    root = tmp_path / "sys/fs/cgroup"
    with limited(64 << 20, root=tmp_path) as group:
        assert group.parent == root / place
        assert (group / "memory.max").read_text() == str(64 << 20)
        assert (group / "cgroup.procs").read_text() == str(os.getpid())
        enabled = (group.parent / "cgroup.subtree_control").read_text()
        assert enabled == "+memory"
        for file in group.iterdir():  # the kernel does not count its own files
            file.unlink()
    assert not group.exists()
    assert (own / "cgroup.procs").read_text() == str(os.getpid())
