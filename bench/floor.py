"""The floor of a decode step: what the drive and the memory of this machine allow, measured.

max((KV - X) / B, X / C): of X bytes in the page cache and the rest on the drive, both streams at
full speed at once. B is fio's bandwidth, C that of copying from the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import rivals
from policies import Job, read_all

import dualblade

IN_FLIGHT_BYTES = 64 << 20
FIO_BLOCKS = (256 << 10, 1 << 20, 4 << 20)
COPY_BLOCK = 4 << 20
STAGING_MIN_BYTES = 32 << 20
PINNED_BYTES = 72 << 20
"""Staging that the static policy has to leave room for: layers read ahead, and bounce buffers."""


def room(job: Job, interpreter_bytes: int, kv_bytes: int) -> int:
    """X: what could be page cache of the limit, at most all."""
    staging = max(STAGING_MIN_BYTES, job.limit_bytes // 20)
    left = job.limit_bytes - interpreter_bytes - job.consumer_bytes - staging
    return min(max(0, left), kv_bytes)


def paper_room(job: Job, interpreter_bytes: int) -> int:
    """What the paper's formula gives at the start: the limit less anonymous and shared memory less
    pinned memory less a safety, for which 1/64 of the limit is taken, 16 MiB at least."""
    safety = max(16 << 20, job.limit_bytes // 64)
    left = job.limit_bytes - interpreter_bytes - job.consumer_bytes - PINNED_BYTES - safety
    return max(0, left)


def step_ms(kv_bytes: int, room_bytes: int, drive: float | None, copy: float) -> float | None:
    """The floor. `drive` and `copy`: bytes a second; None without fio."""
    if drive is None:
        return None
    return max((kv_bytes - room_bytes) / drive, room_bytes / copy) * 1e3


class Drive:
    """B: fio reading the file past the page cache, io_uring with fixed buffers in huge pages."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.missing = None if shutil.which("fio") else "fio is not installed (apt install fio)"
        self.block_bytes = FIO_BLOCKS[-1]
        self.by_block: dict[int, float] = {}

    def calibrate(self) -> None:
        """Finds the block size that gives most."""
        if self.missing is None:
            self.by_block = {block: self._run(block) for block in FIO_BLOCKS}
            self.block_bytes = max(self.by_block, key=lambda block: self.by_block[block])

    def probe(self) -> float | None:
        """Bytes a second, now."""
        return None if self.missing else self._run(self.block_bytes)

    def _run(self, block_bytes: int) -> float:
        command = [
            "fio",
            "--name=floor",
            "--readonly",
            "--ioengine=io_uring",
            "--fixedbufs=1",
            "--registerfiles=1",
            "--direct=1",
            "--invalidate=0",
            "--allow_file_create=0",
            "--output-format=json",
            f"--filename={self.path.replace(':', chr(92) + ':')}",
            "--rw=read",
            f"--bs={block_bytes}",
            f"--iodepth={max(1, min(IN_FLIGHT_BYTES, self.size_bytes) // block_bytes)}",
            f"--size={self.size_bytes // block_bytes * block_bytes}",
        ]
        environment = {**os.environ, **rivals.Fio.environment}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise OSError(f"fio: {(done.stderr + done.stdout).strip()[:300]}")
        read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
        return float(read["bw_bytes"])


class Copy:
    """C: preadv from the warm page cache into warm memory, by as many threads as are fastest."""

    def __init__(self, path: str, size_bytes: int, layer_bytes: int) -> None:
        self.size_bytes = size_bytes // COPY_BLOCK * COPY_BLOCK
        cores = len(os.sched_getaffinity(0))
        self.threads = sorted({1, 2, cores})
        self.pool = ThreadPoolExecutor(max(self.threads))
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        # As large as what a consumer reads into: a smaller one would stay in the processor's cache.
        length = max(COPY_BLOCK, layer_bytes // COPY_BLOCK * COPY_BLOCK)
        self.memory = dualblade.aligned_empty(length, np.uint8)
        self.memory[:] = 1
        for offset in range(0, self.size_bytes, COPY_BLOCK):
            os.pwrite(self.fd, self.memory[:COPY_BLOCK], offset)
        os.fsync(self.fd)
        self.probe()  # the first is of memory that nobody had touched

    def probe(self) -> float:
        """Bytes a second, now: the number of threads with the best median of three."""
        return max(statistics.median(self._run(count) for _ in range(3)) for count in self.threads)

    def _run(self, threads: int) -> float:
        def work(number: int) -> None:
            for offset in range(number * COPY_BLOCK, self.size_bytes, threads * COPY_BLOCK):
                place = offset % len(self.memory)
                read_all(self.fd, self.memory[place : place + COPY_BLOCK], offset)

        begin = time.perf_counter()
        list(self.pool.map(work, range(threads)))
        return self.size_bytes / (time.perf_counter() - begin)

    def close(self) -> None:
        """Lets go of the memory and the threads; the file is the caller's to remove."""
        self.pool.shutdown()
        os.close(self.fd)


def bandwidths(drive: Drive, probes: list[float], copy: list[float]) -> dict[str, Any]:
    """What was measured through the run, for the JSON."""
    return {
        "drive_bytes_per_s": probes,
        "drive_by_block": {str(block): rate for block, rate in drive.by_block.items()},
        "copy_bytes_per_s": copy,
        "missing": drive.missing,
    }
