"""The drives that tools/nvme-vm --test has: each controller is known by its serial number."""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

BLKGETSIZE64, BLKSSZGET, BLKFLSBUF = 0x80081272, 0x1268, 0x1261
NVME_IOCTL_ID = 0x4E40


@dataclass(frozen=True)
class Namespace:
    """One namespace: the paths of its nodes. Usable wherever the path of its block device is."""

    block: str
    character: str

    def __fspath__(self) -> str:
        return self.block

    @property
    def controller(self) -> Path:
        """The controller's directory in sysfs."""
        return Path("/sys/block", Path(self.block).name, "device").resolve()

    @property
    def queue(self) -> Path:
        """What the block layer says of it, in sysfs."""
        return Path("/sys/block", Path(self.block).name, "queue")

    @property
    def size_bytes(self) -> int:
        return struct.unpack("Q", self._ask(BLKGETSIZE64, 8))[0]

    @property
    def lba_bytes(self) -> int:
        return struct.unpack("i", self._ask(BLKSSZGET, 4))[0]

    def _ask(self, request: int, length: int) -> bytes:
        with open(self.block, "rb") as file:
            return fcntl.ioctl(file, request, bytes(length))

    def medium(self, offset: int, length: int) -> bytes:
        """What is on the drive, read by the kernel's block layer and not from the page cache."""
        with open(self.block, "rb", buffering=0) as file:
            fcntl.ioctl(file, BLKFLSBUF)
            return os.pread(file.fileno(), length, offset)


def find(serial: str, nsid: int = 1) -> Namespace:
    """The namespace of a controller. Names say nothing: Linux numbers in the order of its scan."""
    for directory in sorted(Path("/sys/block").glob("nvme*")):
        found = (directory / "device/serial").read_text().strip()
        with open(f"/dev/{directory.name}", "rb") as file:
            if found == serial and fcntl.ioctl(file, NVME_IOCTL_ID) == nsid:
                return Namespace(f"/dev/{directory.name}", character_node(directory, nsid))
    raise LookupError(f"no namespace {nsid} of a controller with serial number {serial}")


def character_node(directory: Path, nsid: int) -> str:
    """Of the character devices of the same controller the one with this NSID."""
    for entry in directory.resolve().parent.glob("ng*n*"):
        with open(f"/dev/{entry.name}", "rb") as file:
            if fcntl.ioctl(file, NVME_IOCTL_ID) == nsid:
                return f"/dev/{entry.name}"
    raise LookupError(f"{directory.name} has no character device")
