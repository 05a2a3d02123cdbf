"""What dualblade is measured against: fio, two libraries, plain Python threads, np.memmap.

A rival is a Contender: unavailable() says why it can't be had here, open() takes it to a file, and
run() moves a list of blocks and says how long and how much CPU that took.
"""

from __future__ import annotations

import abc
import importlib
import json
import os
import resource
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

BATCHES_IN_FLIGHT = 8
"""The bytes in flight are submitted in so many batches: when one is done the next is submitted."""

Handle = TypeVar("Handle")


@dataclass(frozen=True)
class Job:
    """One workload: `blocks` blocks of `block_bytes`, `depth` of them in flight."""

    path: str
    block_bytes: int
    is_random: bool
    blocks: int
    arena: np.ndarray[Any, Any]
    """Page-aligned bytes, touched before; as many blocks as are in flight."""

    @property
    def depth(self) -> int:
        """Blocks in flight."""
        return len(self.arena) // self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that one run moves."""
        return self.blocks * self.block_bytes

    def slot(self, number: int) -> np.ndarray[Any, Any]:
        """The memory of the number-th block of a run."""
        start = number % self.depth * self.block_bytes
        return self.arena[start : start + self.block_bytes]

    def batches(self, offsets: Sequence[int], size: int) -> Iterator[list[tuple[int, Any]]]:
        """Lists of `size` blocks as pairs (offset, slot)."""
        for first in range(0, len(offsets), size):
            yield [
                (offset, self.slot(number))
                for number, offset in enumerate(offsets[first : first + size], first)
            ]

    @property
    def batch_blocks(self) -> int:
        """Blocks of a batch where BATCHES_IN_FLIGHT of them are in flight."""
        return max(1, self.depth // BATCHES_IN_FLIGHT)


class Sample(NamedTuple):
    """What one run took."""

    seconds: float
    cpu_seconds: float
    """User and system time of all threads."""


class Contender(abc.ABC):
    """Something that reads and writes blocks of a file; open() to close() is one job."""

    name = ""  # as --rivals takes it
    label = ""  # as tables show it
    note = ""
    reads_into_slots = True  # the last block that was read can be compared with the file

    def unavailable(self) -> str | None:
        """Why it can't be used here, or None."""
        return None

    @abc.abstractmethod
    def open(self, job: Job) -> None:
        """Gets ready: outside of what is timed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of what open() took, also after an error in it."""

    @abc.abstractmethod
    def run(self, direction: str, offsets: Sequence[int]) -> Sample:
        """Writes or reads the blocks at these offsets, timed."""


class Timed(Contender):
    """A contender in this process."""

    @abc.abstractmethod
    def write(self, offsets: Sequence[int]) -> Callable[[], None]:
        """What writes the blocks at these offsets; what it only has to build is built here."""

    @abc.abstractmethod
    def read(self, offsets: Sequence[int]) -> Callable[[], None]:
        """What reads them."""

    def run(self, direction: str, offsets: Sequence[int]) -> Sample:
        """See Contender."""
        transfer = self.write(offsets) if direction == "write" else self.read(offsets)
        cpu = cpu_seconds()
        start = time.perf_counter()
        transfer()
        seconds = time.perf_counter() - start
        return Sample(seconds, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """User and system time that this process has used, its threads and the kernel's for it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Pipelined(Timed, Generic[Handle]):
    """A contender with batches: submits one whenever the oldest of those in flight is done."""

    job: Job

    @abc.abstractmethod
    def start(self, direction: str, batch: Any) -> Handle:
        """Submits a batch, as prepare() made it."""

    @abc.abstractmethod
    def finish(self, handle: Handle) -> None:
        """Waits for a batch. Raises if not all of it was moved."""

    @abc.abstractmethod
    def prepare(self, batch: list[tuple[int, Any]]) -> Any:
        """What start() takes, from pairs (offset, slot)."""

    def write(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        return self._plan("write", offsets)

    def read(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        return self._plan("read", offsets)

    def _plan(self, direction: str, offsets: Sequence[int]) -> Callable[[], None]:
        size = self.job.batch_blocks
        batches = [self.prepare(batch) for batch in self.job.batches(offsets, size)]
        limit = self.job.depth // size

        def transfer() -> None:
            pending: deque[Handle] = deque()
            for batch in batches:
                if len(pending) == limit:
                    self.finish(pending.popleft())
                pending.append(self.start(direction, batch))
            while pending:
                self.finish(pending.popleft())

        return transfer


# ---- fio -----------------------------------------------------------------------------------------


class Fio(Contender):
    """fio's io_uring engine with registered buffers and files: what the drive gives.

    In huge pages, as everybody's memory here is: a block of 4 KiB pages is split into more requests
    where a drive takes few segments in one. fio has no option for it; its C library has (glibc
    2.35 and later).
    """

    name = "fio"
    label = "fio io_uring, fixed buffers"
    note = "huge pages; its own count of CPU, without starting up"
    environment: Mapping[str, str] = MappingProxyType(
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # asks for transparent huge pages
    )
    reads_into_slots = False

    def unavailable(self) -> str | None:
        """See Contender."""
        return None if shutil.which("fio") else "fio is not installed (apt install fio)"

    def open(self, job: Job) -> None:
        """See Contender."""
        self.job = job

    def close(self) -> None:
        """See Contender."""

    def run(self, direction: str, offsets: Sequence[int]) -> Sample:
        """See Contender: as many blocks, each once, in fio's own order."""
        job = self.job
        command = [
            "fio",
            "--name=job",
            "--ioengine=io_uring",
            "--fixedbufs=1",
            "--registerfiles=1",
            "--direct=1",
            "--allow_file_create=0",
            "--scramble_buffers=0",
            "--output-format=json",
            f"--filename={job.path.replace(':', chr(92) + ':')}",
            f"--rw={'rand' if job.is_random else ''}{direction}",
            f"--bs={job.block_bytes}",
            f"--iodepth={job.depth}",
            f"--size={len(offsets) * job.block_bytes}",
            f"--randseed={offsets[0] + 1}",
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **self.environment},
        )
        if done.returncode:
            reason = (done.stderr + done.stdout).partition("{")[0]  # the JSON follows
            raise OSError(" ".join(reason.split()) or f"fio ended with {done.returncode}")
        # Warnings come before the document.
        found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        moved = found[direction]
        if moved["io_bytes"] != len(offsets) * job.block_bytes:
            raise OSError(f"fio moved {moved['io_bytes']} bytes of {job.nbytes}")
        cpu = (found["usr_cpu"] + found["sys_cpu"]) / 100 * found["job_runtime"] / 1000
        return Sample(moved["io_bytes"] / moved["bw_bytes"], cpu)


class FioAsItComes(Fio):
    """The same without huge pages."""

    name = "fio-plain"
    label = "fio as it comes"
    note = "4 KiB pages unless the machine gives all memory huge ones"
    environment: Mapping[str, str] = MappingProxyType({})


# ---- LMCache -------------------------------------------------------------------------------------


class LMCacheRawBlock(Pipelined[int]):
    """LMCache's raw block device in Rust, over io_uring with fixed buffers."""

    name = "lmcache"
    label = "LMCache raw block io_uring"
    note = "no checksums"

    def unavailable(self) -> str | None:
        """See Contender."""
        return _import_error("lmcache_rust_raw_block_io", "lmcache-rust-raw-block-io")

    def open(self, job: Job) -> None:
        """See Contender."""
        module = importlib.import_module("lmcache_rust_raw_block_io")
        self.job = job
        self.device = module.RawBlockDevice(
            job.path,
            True,
            use_odirect=True,
            use_iouring=True,
            iouring_queue_depth=max(256, job.depth),
        )
        # It knows a fixed buffer by its first byte only, so each slot is one.
        slots = [job.slot(number) for number in range(job.depth)]
        self.device.register_fixed_buffers(
            [slot.ctypes.data for slot in slots], [len(slot) for slot in slots]
        )

    def close(self) -> None:
        """See Contender."""
        if device := self.__dict__.pop("device", None):
            device.close()

    def prepare(self, batch: list[tuple[int, Any]]) -> Any:
        """See Pipelined."""
        offsets, slots = zip(*batch, strict=True)
        return list(offsets), [memoryview(slot) for slot in slots], [len(slot) for slot in slots]

    def start(self, direction: str, batch: Any) -> int:
        """See Pipelined."""
        device = self.device
        return (device.batched_write if direction == "write" else device.batched_read)(*batch)

    def finish(self, handle: int) -> None:
        """See Pipelined."""
        succeeded, errors = self.device.wait_iouring(handle)
        if errors or not all(succeeded):
            raise OSError(f"LMCache raw block: {errors}")


# ---- NIXL ----------------------------------------------------------------------------------------


class NixlPosix(Pipelined[Any]):
    """NIXL's POSIX backend over io_uring; its state is polled, as its users do."""

    name = "nixl"
    label = "NIXL POSIX io_uring"
    note = "no checksums; polled every 100 us"
    fd = -1

    def unavailable(self) -> str | None:
        """See Contender."""
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        return _import_error("nixl_cu13", "nixl-cu13")

    def open(self, job: Job) -> None:
        """See Contender."""
        api = importlib.import_module("nixl_cu13")
        self.job = job
        self.agent = api.nixl_agent("bench", api.nixl_agent_config(backends=[]))
        self.agent.create_backend("POSIX", {"use_uring": "true", "use_aio": "false"})
        self.fd = os.open(job.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        size = os.lseek(self.fd, 0, os.SEEK_END)
        address = job.arena.ctypes.data
        self.registered = [
            self.agent.register_memory([(address, len(job.arena), 0, "")], "DRAM"),
            self.agent.register_memory([(0, size, self.fd, "")], "FILE"),
        ]

    def close(self) -> None:
        """See Contender."""
        for registered in self.__dict__.pop("registered", []):
            self.agent.deregister_memory(registered)
        self.__dict__.pop("agent", None)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def prepare(self, batch: list[tuple[int, Any]]) -> Any:
        """See Pipelined."""
        memory = [(slot.ctypes.data, len(slot), 0) for _, slot in batch]
        return memory, [(offset, len(slot), self.fd) for offset, slot in batch]

    def start(self, direction: str, batch: Any) -> Any:
        """See Pipelined."""
        memory = self.agent.get_xfer_descs(batch[0], "DRAM")
        file = self.agent.get_xfer_descs(batch[1], "FILE")
        handle = self.agent.initialize_xfer(direction.upper(), memory, file, "bench")
        if self.agent.transfer(handle) == "ERR":
            raise OSError("NIXL: a transfer could not be started")
        return handle

    def finish(self, handle: Any) -> None:
        """See Pipelined."""
        while (state := self.agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise OSError("NIXL: a transfer failed")
            time.sleep(0.0001)
        self.agent.release_xfer_handle(handle)


# ---- plain Python --------------------------------------------------------------------------------


class Threads(Timed):
    """Threads of O_DIRECT preadv and pwritev, one block at a time each."""

    name = "threads"
    threads = 4
    label = "4 Python threads, O_DIRECT"
    note = "4 blocks in flight; no checksums"
    fd = -1

    def open(self, job: Job) -> None:
        """See Contender."""
        self.job = job
        self.fd = os.open(job.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def close(self) -> None:
        """See Contender."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def write(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        return self._plan(os.pwritev, offsets)

    def read(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        return self._plan(os.preadv, offsets)

    def _plan(self, call: Callable[..., int], offsets: Sequence[int]) -> Callable[[], None]:
        blocks = [
            ([memoryview(self.job.slot(number))], offset) for number, offset in enumerate(offsets)
        ]
        errors: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for buffers, offset in blocks[first :: self.threads]:
                    if call(self.fd, buffers, offset) != self.job.block_bytes:
                        raise OSError(f"a short transfer at {offset}")
            except OSError as error:
                errors.append(error)

        def transfer() -> None:
            workers = [threading.Thread(target=work, args=(i,)) for i in range(self.threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if errors:
                raise errors[0]

        return transfer


class Memmap(Timed):
    """np.memmap: copies through the page cache, and msync after writing."""

    name = "memmap"
    label = "np.memmap and msync"
    note = "through the page cache, which is empty before; no checksums"

    def open(self, job: Job) -> None:
        """See Contender."""
        self.job = job

    def close(self) -> None:
        """See Contender."""
        self.__dict__.pop("map", None)

    def run(self, direction: str, offsets: Sequence[int]) -> Sample:
        """See Contender."""
        # Mapped anew for each run: what is mapped can't be dropped from the page cache.
        self.map = np.memmap(self.job.path, np.uint8, "r+", shape=(self.job.nbytes,))
        try:
            return super().run(direction, offsets)
        finally:
            self.close()

    def write(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        size = self.job.block_bytes
        mapped = self.map

        def transfer() -> None:
            for number, offset in enumerate(offsets):
                mapped[offset : offset + size] = self.job.slot(number)
            mapped.flush()

        return transfer

    def read(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        size = self.job.block_bytes
        mapped = self.map

        def transfer() -> None:
            for number, offset in enumerate(offsets):
                self.job.slot(number)[:] = mapped[offset : offset + size]

        return transfer


RIVALS: tuple[type[Contender], ...] = (
    Fio,
    FioAsItComes,
    LMCacheRawBlock,
    NixlPosix,
    Threads,
    Memmap,
)


def _import_error(module: str, package: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  a broken package raises anything
        reason = " ".join(str(error).split())[:200]
        return f"pip install {package}: {type(error).__name__}: {reason}"
    return None
