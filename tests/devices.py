"""Real places to test on: loop devices, and control groups that limit memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Unavailable(Exception):
    """This machine does not give what was asked for; the text says why."""


@dataclass(frozen=True)
class Target:
    """What a store or device can be opened on. Usable wherever a path is."""

    path: str
    kind: str  # "file", "loop512", "loop4096", or "given": a device that was there before
    size_bytes: int
    lba_bytes: int | None  # logical block of the device; None for a file: its filesystem decides

    @property
    def is_block_device(self) -> bool:
        return self.kind != "file"

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Engine:
    """An engine and how it is opened: "uring", or with options after it, "uring-sqpoll"."""

    cell: str

    @property
    def name(self) -> str:
        return self.cell.partition("-")[0]

    @property
    def options(self) -> dict[str, bool]:
        """For Device.open and dualblade.open."""
        return dict.fromkeys(self.cell.split("-")[1:], True)


def attach(image: str | os.PathLike[str], *options: str) -> str:
    """The path of a loop device over a file or device, with losetup's options; detach() it.

    Raises Unavailable.
    """
    if os.geteuid() != 0:
        raise Unavailable("loop devices need root")
    command = ["losetup", "--find", "--show", *options, os.fspath(image)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable("losetup is not installed (package mount)") from None
    if done.returncode:
        raise Unavailable(f"no loop device: {done.stderr.strip()}")
    return done.stdout.strip()


def detach(path: str) -> None:
    """Gives a loop device back."""
    subprocess.run(["losetup", "--detach", path], check=True, capture_output=True)


class LoopDevice:
    """A block device of the kernel's, backed by a sparse file that it reads with direct I/O.

    Raises Unavailable.
    """

    def __init__(
        self, folder: str | os.PathLike[str], size_bytes: int, block_bytes: int = 512
    ) -> None:
        self.image = Path(folder) / f"loop{block_bytes}-{time.monotonic_ns()}.img"
        with self.image.open("xb") as file:
            file.truncate(size_bytes)
        try:
            self.path = attach(self.image, "--direct-io=on", f"--sector-size={block_bytes}")
        except Unavailable:
            self.image.unlink()
            raise

    def close(self) -> None:
        """Detaches the device and removes its image. May be called again."""
        if self.image.exists():
            detach(self.path)
            self.image.unlink()

    def __enter__(self) -> LoopDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def make_target(kind: str, folder: Path, size_bytes: int) -> tuple[Target, LoopDevice | None]:
    """A target of this kind, and the loop device to close after use. Raises Unavailable."""
    if kind == "file":
        path = folder / "target.img"
        with path.open("xb") as file:
            file.truncate(size_bytes)
        return Target(str(path), kind, size_bytes, None), None
    block_bytes = int(kind.removeprefix("loop"))
    loop = LoopDevice(folder, size_bytes, block_bytes)
    return Target(loop.path, kind, size_bytes, block_bytes), loop


# ---- a device that was there before ------------------------------------------------------------

BLKGETSIZE64, BLKSSZGET, BLKZEROOUT = 0x80081272, 0x1268, 0x127F
WIPED_BYTES = 64 << 20  # at either end: further in, no test reads what it did not write


def given_target(path: str) -> Target:
    """A block device with nothing on it. Raises Unavailable, for others' data is not ours."""
    from dualblade import _core

    with open_exclusively(path) as file:
        (size_bytes,) = struct.unpack("Q", fcntl.ioctl(file, BLKGETSIZE64, bytes(8)))
        (lba_bytes,) = struct.unpack("i", fcntl.ioctl(file, BLKSSZGET, bytes(4)))
        if file.read(1 << 20).strip(b"\0") or _core.find_signature(path):
            raise Unavailable(f"{path} is not blank; to lose what is on it: blkdiscard -z {path}")
    return Target(path, "given", size_bytes, lba_bytes)


def wipe(target: Target) -> None:
    """Writes zeros over both ends of a given device, and flushes."""
    length = min(target.size_bytes, WIPED_BYTES)
    with open_exclusively(target.path) as file:
        for start in {0, target.size_bytes - length}:
            fcntl.ioctl(file, BLKZEROOUT, struct.pack("QQ", start, length))
        os.fsync(file.fileno())


def open_exclusively(path: str) -> Any:
    """The device as a file. O_EXCL: the kernel refuses it while anybody has it mounted or held."""
    return open(os.open(path, os.O_RDWR | os.O_EXCL), "r+b", buffering=0)


# ---- control groups ------------------------------------------------------------------------------


def _memory_hierarchy() -> tuple[int, Path]:
    """The version, and the group under which a group with a memory limit can be made."""
    mounts = [line.split()[:4] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, mount_point, kind, options in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            own = next(path for _, names, path in groups if "memory" in names.split(","))
            root = Path(mount_point)
            # In a container the path can be one that only the host sees.
            return 1, root / own.lstrip("/") if (root / own.lstrip("/")).is_dir() else root
    for _, mount_point, kind, _ in mounts:
        root = Path(mount_point)
        if kind == "cgroup2" and "memory" in (root / "cgroup.controllers").read_text().split():
            # Below the root: a group that has processes cannot hand its controllers down.
            (root / "cgroup.subtree_control").write_text("+memory")
            return 2, root
    raise Unavailable("no control group hierarchy has the memory controller")


class MemoryCgroup:
    """A control group (version 1 or 2) whose processes share limit_bytes of memory, page cache
    included. Raises Unavailable."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        try:
            self.version, parent = _memory_hierarchy()
            self.path = parent / f"dualblade-test-{os.getpid()}-{time.monotonic_ns()}"
            self.path.mkdir()
        except OSError as error:
            raise Unavailable(f"no control group can be made: {error}") from error
        try:
            self._file("limit").write_text(str(limit_bytes))
            swap = self.path / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
        except OSError as error:
            self.close()
            raise Unavailable(f"the memory limit cannot be set: {error}") from error

    def set_limit(self, limit_bytes: int) -> None:
        """Changes the limit while processes run in the group."""
        self._file("limit").write_text(str(limit_bytes))
        self.limit_bytes = limit_bytes

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """subprocess.Popen of the command, which is in the group from its first instruction."""
        join = 'echo $$ > "$0" && exec "$@"'
        process = subprocess.Popen(["sh", "-c", join, str(self.processes), *command], **options)
        while process.poll() is None and not self._has(process.pid):
            time.sleep(0.001)
        return process

    def run(
        self, command: list[str], timeout_s: float = 240, **options: Any
    ) -> subprocess.CompletedProcess:
        """Runs the command in the group to its end; its output is captured as text."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        with self.start(command, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def run_python(self, program: str, *arguments: str, **options: Any) -> Any:
        """run() of this Python with a program's text."""
        return self.run([sys.executable, "-c", program, *arguments], **options)

    @property
    def processes(self) -> Path:
        return self.path / "cgroup.procs"

    @property
    def peak_bytes(self) -> int | None:
        """The most memory the group had, or None where the kernel does not say (before 5.19)."""
        file = self._file("peak")
        return int(file.read_text()) if file.exists() else None

    @property
    def out_of_memory_kills(self) -> int:
        for line in self._file("events").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0

    def close(self) -> None:
        """Ends what still runs in the group and removes it. May be called again."""
        deadline = time.monotonic() + 10
        while self.path.exists():
            for process in self.processes.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            try:
                self.path.rmdir()
            except OSError:  # EBUSY until the kernel has let go of the last process
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _has(self, pid: int) -> bool:
        return str(pid) in self.processes.read_text().split()

    def _file(self, role: str) -> Path:
        names = {
            "limit": ("memory.limit_in_bytes", "memory.max"),
            "peak": ("memory.max_usage_in_bytes", "memory.peak"),
            "events": ("memory.oom_control", "memory.events"),
        }
        return self.path / names[role][self.version - 1]

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
