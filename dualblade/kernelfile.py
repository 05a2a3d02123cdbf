"""Files of /proc and /sys that are read again and again, and the numbers in them."""

from __future__ import annotations

import os
from pathlib import Path

_READ_BYTES = 16 << 10  # the largest, /proc/vmstat, has a third of that


class KernelFile:
    """One such file, kept open: to read it again takes one system call and no path look-up.

    A file that is not there, or that this process may not read, reads as empty; `missing` says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.missing = ""
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.pread(self._descriptor, 1, 0)  # some open and say EOPNOTSUPP, EINVAL or EIO only now
        except OSError as error:
            self.missing = os.strerror(error.errno) if error.errno else str(error)
            self.close()

    def read(self) -> bytes:
        """What it says now, after a newline, so that each of its lines begins behind one."""
        if self._descriptor < 0:
            return b""
        try:
            return b"\n" + os.pread(self._descriptor, _READ_BYTES, 0)
        except OSError:  # ENODEV: its cgroup is gone
            return b""

    def number(self) -> int | None:
        """The number that it consists of; None where it says "max", or is not there."""
        text = self.read().strip()
        return int(text) if text.isdigit() else None

    @property
    def source(self) -> str:
        """The path for people, with the reason why it can't be used."""
        return f"missing: {self.path} ({self.missing})" if self.missing else self.path

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def field(text: bytes, label: bytes) -> int | None:
    """The number behind a label such as b"\nMemTotal:" or b" total=", in bytes where it is in kB;
    None where there is none. `text` is what KernelFile.read gave."""
    at = text.find(label)
    if at < 0:
        return None
    words = text[at + len(label) : at + len(label) + 40].split(None, 2)
    if not words or not words[0].isdigit():
        return None
    return int(words[0]) * (1024 if words[1:2] == [b"kB"] else 1)


class Fields:
    """A text of lines "name 123", as in memory.stat and /proc/vmstat."""

    def __init__(self, text: bytes) -> None:
        words = text.split()
        self._values = dict(zip(words[::2], words[1::2], strict=False))

    def first(self, *names: bytes) -> int | None:
        """The number of the first of these names that is there: kernels have renamed some."""
        for name in names:
            value = self._values.get(name, b"")
            if value.isdigit():
                return int(value)
        return None

    def get(self, name: bytes) -> int:
        """The number of that name, 0 if it is not there."""
        return self.first(name) or 0
