"""A storage device that fails on demand: one regular file, served by a process over /dev/fuse.

The kernel sees real errors, short transfers and delays, whatever the caller uses to reach the
file. The server is a process of its own: in the caller's process it could never answer an I/O
that is waited for with the GIL held. FaultDevice starts and controls it:

    with FaultDevice(folder, size_bytes=16 << 20) as device:
        device.add_rule("write", "EIO", nth=3)
        ...  # the third write to device.path fails

A rule says which operation ("read", "write", "fsync", "trim", "open", "open_direct") on which
bytes [lo, hi), counted from when it is added, from the nth match on, at most `times` times, does
what:

    "EIO", "ENOSPC" or any other errno name: the operation fails with it
    {"short": n}   a read or write moves n bytes only
    {"torn": n}    only the first n bytes of a write reach the device, all are acknowledged
    "drop"         a write (or fsync) is acknowledged and does nothing
    "flip"         a read returns one wrong bit
    {"delay": s}   the operation takes s seconds longer
    "hold"         the operation waits for release()

What was written sits in a volatile cache until fsync; crash() loses a random part of it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SECTOR_BYTES = 512  # what a power cut leaves whole
MAX_TRANSFER_BYTES = 1 << 20
SERVER_THREADS = 16  # more than the operations that a test holds at once
OPERATIONS = ("read", "write", "fsync", "trim", "open", "open_direct")
ACTIONS = ("drop", "flip", "hold")
ACTIONS_WITH_VALUE = ("short", "torn", "delay")
ANSWER_TIMEOUT_S = 60

_libc = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2


class FaultDevice:
    """A served file and the connection to its server. Needs root and /dev/fuse.

    path is the file to do I/O on; the medium behind it is folder/medium.img.
    """

    def __init__(self, folder: str | os.PathLike[str], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.path = Path(folder) / "faulty.img"
        self.medium = Path(folder) / "medium.img"
        self._lock = threading.Lock()
        command = [sys.executable, "-IS", os.path.abspath(__file__)]
        self._server = subprocess.Popen(
            [*command, str(self.medium), str(size_bytes), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def add_rule(
        self,
        op: str,
        do: str | dict[str, float],
        *,
        lo: int = 0,
        hi: int | None = None,
        nth: int = 1,
        times: int | None = None,
    ) -> None:
        """From now on, the nth match and those after it (times of them; None: all) do this.

        Raises ValueError when the rule makes no sense.
        """
        rule = {"op": op, "do": do, "lo": lo, "hi": hi, "nth": nth, "times": times}
        self._ask("rule", rule)

    def fail_nth(self, op: str, do: str | dict[str, float], nth: int) -> None:
        """The nth such operation from now on fails, the ones before and after it do not."""
        self.add_rule(op, do, nth=nth, times=1)

    def clear(self) -> None:
        """Forgets every rule, lets go of what is held, and counts from zero again."""
        self._ask("clear")

    def release(self) -> None:
        """Lets the operations go on that are held now. The rule that held them is forgotten."""
        self._ask("release")

    def wait_held(self, count: int, timeout_s: float = 30) -> None:
        """Returns when count operations are held. Raises TimeoutError."""
        self._ask("wait_held", [count, timeout_s])

    def crash(self, seed: int) -> None:
        """Power is lost: of the sectors written since the last fsync a random half survives."""
        self._ask("crash", seed)

    def stats(self) -> dict[str, int]:
        """Operations of each kind since the start or the last clear(); "fired": what rules hit."""
        return self._ask("stats")

    def close(self) -> None:
        """Unmounts the file and ends the server. May be called again."""
        if self._server.stdin and not self._server.stdin.closed:
            self._server.stdin.close()  # the server unmounts and leaves when its input ends
        try:
            self._server.wait(ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        _libc.umount2(os.fsencode(self.path), MNT_DETACH)  # if the server was killed
        if self._server.stdout:
            self._server.stdout.close()

    def __enter__(self) -> FaultDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, command: str, argument: Any = None) -> Any:
        with self._lock:
            self._server.stdin.write(json.dumps([command, argument]) + "\n")
            self._server.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {self.path} ended with {self._server.wait()}")
        kind, value = json.loads(line)
        if kind == "ok":
            return value
        errors = {"OSError": OSError, "ValueError": ValueError, "TimeoutError": TimeoutError}
        raise errors[kind](*value)


def unavailable() -> str | None:
    """Why there can be no fault device here, or None when there can."""
    if os.geteuid() != 0:
        return "a fault device needs root to mount"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    return None


# ---- the server ----------------------------------------------------------------------------------


@dataclass
class Rule:
    """What happens to which operations, and how often it has."""

    op: str
    do: str | dict[str, float]
    lo: int = 0
    hi: int | None = None
    nth: int = 1
    times: int | None = None
    matched: int = 0

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS:
            raise ValueError(f"op {self.op!r} is none of {', '.join(OPERATIONS)}")
        if isinstance(self.do, dict):
            known = len(self.do) == 1 and set(self.do) <= set(ACTIONS_WITH_VALUE)
        else:
            known = self.do in ACTIONS or self.do in errno.errorcode.values()
        if not known:
            raise ValueError(f"do {self.do!r} is neither an errno name nor a known action")
        if self.nth < 1:
            raise ValueError(f"nth {self.nth!r} counts from 1")

    def fires(self, op: str, offset: int, length: int) -> bool:
        if op != self.op or offset + length <= self.lo:
            return False
        if self.hi is not None and offset >= self.hi:
            return False
        self.matched += 1
        past = self.matched - self.nth
        return past >= 0 and (self.times is None or past < self.times)

    def value(self, name: str, default: int) -> int:
        return int(self.do.get(name, default)) if isinstance(self.do, dict) else default


class Medium:
    """The image file, and before it a volatile cache of the sectors not yet flushed."""

    def __init__(self, path: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size_bytes)
        self._sectors: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytearray:
        with self._lock:
            return self._read(offset, length)

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            first = offset // SECTOR_BYTES * SECTOR_BYTES
            end = -(-(offset + len(data)) // SECTOR_BYTES) * SECTOR_BYTES
            if (first, end) != (offset, offset + len(data)):  # a buffered write of odd bytes
                whole = self._read(first, end - first)
                whole[offset - first : offset - first + len(data)] = data
                data = memoryview(whole)
            for start in range(0, end - first, SECTOR_BYTES):
                self._sectors[first + start] = bytes(data[start : start + SECTOR_BYTES])

    def flush(self) -> None:
        self._empty(lambda: True)

    def crash(self, seed: int) -> None:
        coin = random.Random(seed)
        self._empty(lambda: coin.random() < 0.5)

    def _empty(self, survives: Callable[[], bool]) -> None:
        with self._lock:
            for offset, data in sorted(self._sectors.items()):  # the same half for a seed
                if survives():
                    os.pwrite(self._fd, data[: self.size_bytes - offset], offset)
            self._sectors.clear()

    def punch(self, offset: int, length: int) -> None:
        with self._lock:
            for start in [s for s in self._sectors if offset <= s < offset + length]:
                del self._sectors[start]
            keep_size_and_punch = 3
            if _libc.fallocate(
                self._fd, keep_size_and_punch, ctypes.c_long(offset), ctypes.c_long(length)
            ):
                raise OSError(ctypes.get_errno(), "fallocate")

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(os.pread(self._fd, length, offset))
        data.extend(bytes(length - len(data)))
        if self._sectors:
            first = offset // SECTOR_BYTES * SECTOR_BYTES
            for start in range(first, offset + length, SECTOR_BYTES):
                if start in self._sectors:
                    low, high = max(start, offset), min(start + SECTOR_BYTES, offset + length)
                    data[low - offset : high - offset] = self._sectors[start][
                        low - start : high - start
                    ]
        return data


class Faults:
    """The rules, applied to each operation before it is carried out."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._changed = threading.Condition()
        self._seen = dict.fromkeys((*OPERATIONS, "fired"), 0)
        self._held = 0
        self._released = 0

    def add(self, rule: Rule) -> None:
        with self._changed:
            self._rules.append(rule)

    def clear(self) -> None:
        with self._changed:
            self._rules.clear()
            self._seen = dict.fromkeys(self._seen, 0)
            self._release()

    def release(self) -> None:
        with self._changed:
            self._rules = [rule for rule in self._rules if rule.do != "hold"]
            self._release()

    def wait_held(self, count: int, timeout_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._held >= count, timeout_s):
                raise TimeoutError(f"{self._held} operations are held after {timeout_s} s")

    def stats(self) -> dict[str, int]:
        with self._changed:
            return dict(self._seen)

    def apply(self, op: str, offset: int, length: int) -> Rule | None:
        """Waits, or fails with the errno, as a rule has it. Returns the rule for the rest."""
        with self._changed:
            self._seen[op] += 1
            # Every rule counts every match, also those that another rule decides.
            firing = [rule for rule in self._rules if rule.fires(op, offset, length)]
            if not firing:
                return None
            self._seen["fired"] += 1
            rule = firing[0]
            if rule.do == "hold":
                self._hold()
        if isinstance(rule.do, dict) and "delay" in rule.do:
            time.sleep(rule.do["delay"])
        if isinstance(rule.do, str) and rule.do not in ACTIONS:
            raise OSError(getattr(errno, rule.do), "injected")
        return rule

    def _hold(self) -> None:
        released = self._released
        self._held += 1
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._released != released)
        self._held -= 1

    def _release(self) -> None:
        self._released += 1
        self._changed.notify_all()


class FuseServer:
    """Speaks the kernel's FUSE protocol for a mount whose root is one regular file."""

    HEADER = struct.Struct("<IIQQIIIHH")
    PROTOCOL = (7, 31)
    ASYNC_READ, BIG_WRITES, ASYNC_DIO, MAX_PAGES = 1, 1 << 5, 1 << 15, 1 << 22
    OPEN_DIRECT_IO, OPEN_PARALLEL_DIRECT_WRITES = 1, 1 << 6
    FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42  # the kernel wants no answer
    PUNCH_HOLE = 2

    def __init__(self, medium: Medium, faults: Faults, mount_point: str) -> None:
        self.medium = medium
        self.faults = faults
        self._mount_point = os.fsencode(mount_point)
        self._handlers = {
            3: self._attributes,  # GETATTR
            4: self._attributes,  # SETATTR
            14: self._open,
            15: self._read,
            16: self._write,
            17: self._statfs,
            18: lambda _: b"",  # RELEASE
            20: self._fsync,
            25: lambda _: b"",  # FLUSH, which is close(2)
            26: self._init,
            34: lambda _: b"",  # ACCESS
            38: lambda _: b"",  # DESTROY
            43: self._fallocate,
        }
        Path(mount_point).touch(mode=0o600)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = (
            f"fd={self._fd},rootmode=100000,user_id={os.getuid()},group_id={os.getgid()},"
            f"allow_other,max_read={MAX_TRANSFER_BYTES}"
        )
        flags = MS_NOSUID | MS_NODEV
        if _libc.mount(b"faultdev", self._mount_point, b"fuse", flags, options.encode()):
            raise OSError(ctypes.get_errno(), "mount", mount_point)
        for _ in range(SERVER_THREADS):
            threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.faults.clear()
        _libc.umount2(self._mount_point, MNT_DETACH)
        self.medium.flush()

    def _serve(self) -> None:
        while True:
            try:
                message = os.read(self._fd, MAX_TRANSFER_BYTES + 8192)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return  # ENODEV: unmounted
            length, opcode, unique, *_ = self.HEADER.unpack_from(message)
            if opcode in (self.FORGET, self.INTERRUPT, self.BATCH_FORGET):
                continue
            body, code = b"", 0
            try:
                if opcode not in self._handlers:
                    raise OSError(errno.ENOSYS, "not served")
                body = self._handlers[opcode](memoryview(message)[self.HEADER.size : length])
            except OSError as error:
                code = -error.errno
            try:
                os.writev(self._fd, [struct.pack("<IiQ", 16 + len(body), code, unique), body])
            except OSError as error:
                if error.errno != errno.ENOENT:  # ENOENT: the caller was killed meanwhile
                    return

    def _init(self, message: memoryview) -> bytes:
        _, _, _, offered = struct.unpack_from("<IIII", message)
        flags = offered & (self.ASYNC_READ | self.BIG_WRITES | self.ASYNC_DIO | self.MAX_PAGES)
        limits = (64, 48, MAX_TRANSFER_BYTES, 1, MAX_TRANSFER_BYTES // 4096, 0, 0)
        return struct.pack("<IIIIHHIIHHI28x", *self.PROTOCOL, 0, flags, *limits)

    def _attributes(self, _: memoryview) -> bytes:
        size = self.medium.size_bytes
        one_hour = struct.pack("<QII", 3600, 0, 0)
        times = (0, 0, 0, 0, 0, 0)
        identity = (0o100600, 1, os.getuid(), os.getgid(), 0, 4096, 0)
        return one_hour + struct.pack(
            "<QQQQQQIIIIIIIIII", 1, size, size // SECTOR_BYTES, *times, *identity
        )

    def _open(self, message: memoryview) -> bytes:
        (flags,) = struct.unpack_from("<I", message)
        self.faults.apply("open_direct" if flags & os.O_DIRECT else "open", 0, 1)
        # Every read and write comes here, none is answered from the page cache.
        return struct.pack("<QIi", 0, self.OPEN_DIRECT_IO | self.OPEN_PARALLEL_DIRECT_WRITES, 0)

    def _read(self, message: memoryview) -> bytes:
        _, offset, length = struct.unpack_from("<QQI", message)
        rule = self.faults.apply("read", offset, length)
        if rule:
            length = min(length, rule.value("short", length))
        data = self.medium.read(offset, max(0, min(length, self.medium.size_bytes - offset)))
        if rule and rule.do == "flip" and data:
            data[len(data) // 2] ^= 1
        return data

    def _write(self, message: memoryview) -> bytes:
        _, offset, length = struct.unpack_from("<QQI", message)
        data = message[40 : 40 + length]
        rule = self.faults.apply("write", offset, length)
        if offset + length > self.medium.size_bytes:
            raise OSError(errno.ENOSPC, "past the end")
        if rule:
            length = min(length, rule.value("short", length))
            data = data[: rule.value("torn", length)][:length]
        if not (rule and rule.do == "drop"):
            self.medium.write(offset, data)
        return struct.pack("<II", length, 0)

    def _fsync(self, _: memoryview) -> bytes:
        rule = self.faults.apply("fsync", 0, self.medium.size_bytes)
        if not (rule and rule.do == "drop"):
            self.medium.flush()
        return b""

    def _fallocate(self, message: memoryview) -> bytes:
        _, offset, length, mode, _ = struct.unpack_from("<QQQII", message)
        if mode & self.PUNCH_HOLE:
            self.faults.apply("trim", offset, length)
            self.medium.punch(offset, length)
        return b""

    def _statfs(self, _: memoryview) -> bytes:
        blocks = self.medium.size_bytes // 4096
        return struct.pack("<QQQQQIIII24x", blocks, 0, 0, 1, 0, 4096, 255, 4096, 0)


def main() -> None:
    """Serves MEDIUM (of SIZE bytes) as MOUNT_POINT until standard input ends."""
    path, size_bytes, mount_point = sys.argv[1:]
    faults = Faults()
    try:
        medium = Medium(path, int(size_bytes))
        server = FuseServer(medium, faults, mount_point)
    except OSError as error:
        print(json.dumps(["OSError", [error.errno, str(error)]]), flush=True)
        return
    print(json.dumps(["ok", None]), flush=True)
    commands = {
        "rule": lambda rule: faults.add(Rule(**rule)),
        "clear": lambda _: faults.clear(),
        "release": lambda _: faults.release(),
        "wait_held": lambda arguments: faults.wait_held(*arguments),
        "crash": medium.crash,
        "stats": lambda _: faults.stats(),
    }
    for line in sys.stdin:
        command, argument = json.loads(line)
        try:
            answer = ["ok", commands[command](argument)]
        except (ValueError, TimeoutError) as error:
            answer = [type(error).__name__, [str(error)]]
        print(json.dumps(answer), flush=True)
    server.close()


if __name__ == "__main__":
    main()
