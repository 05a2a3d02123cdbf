"""The drives that tools/nvme-vm --test has: each controller is known by its serial number."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.devices import Unavailable, open_exclusively
from tests.helpers import until

if TYPE_CHECKING:
    from collections.abc import Iterator

BLKGETSIZE64, BLKSSZGET, BLKFLSBUF, BLKDISCARD = 0x80081272, 0x1268, 0x1261, 0x1277
NVME_IOCTL_ID, NVME_IOCTL_ADMIN_CMD, NVME_IOCTL_IO_CMD = 0x4E40, 0xC0484E41, 0xC0484E43
GET_LOG_PAGE, SMART_LOG, MANAGEMENT_RECEIVE, HANDLE_STATUS = 0x02, 0x02, 0x12, 1


@dataclass(frozen=True)
class Namespace:
    """One namespace: the paths of its nodes. Usable wherever the path of its block device is."""

    block: str
    character: str

    def __fspath__(self) -> str:
        return self.block

    @property
    def controller(self) -> Path:
        """The controller's directory in sysfs; of a drive that several ways lead to, of the one."""
        parent = Path("/sys/block", Path(self.block).name, "device").resolve()
        ways = [way.resolve() for way in parent.glob("nvme*") if way.is_symlink()]
        (controller,) = ways or [parent]
        return controller

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

    def command_counts(self) -> tuple[int, int]:
        """How many read and write commands the drive has had, as its own log has it."""
        answer = self._run(NVME_IOCTL_ADMIN_CMD, GET_LOG_PAGE, 0xFFFFFFFF, SMART_LOG, 512)
        return int.from_bytes(answer[64:80], "little"), int.from_bytes(answer[80:96], "little")

    def room(self) -> list[int]:
        """Of each placement handle, how many blocks the reclaim unit that it fills still takes."""
        head = self._run(NVME_IOCTL_IO_CMD, MANAGEMENT_RECEIVE, self._nsid(), HANDLE_STATUS, 16)
        (count,) = struct.unpack_from("<H", head, 14)
        length = 16 + 32 * count  # some refuse to give less than they are asked for
        answer = self._run(
            NVME_IOCTL_IO_CMD, MANAGEMENT_RECEIVE, self._nsid(), HANDLE_STATUS, length
        )
        return [struct.unpack_from("<Q", answer, 16 + 32 * i + 8)[0] for i in range(count)]

    def _nsid(self) -> int:
        with open(self.character, "rb") as file:
            return fcntl.ioctl(file, NVME_IOCTL_ID)

    def _run(self, call: int, opcode: int, nsid: int, what: int, length: int) -> bytes:
        """The answer to a command that brings data."""
        answer = ctypes.create_string_buffer(length)
        dwords = length // 4 - 1
        if call == NVME_IOCTL_ADMIN_CMD:
            what, dwords = what | dwords << 16, 0
        head = struct.pack("<BBHIII", opcode, 0, 0, nsid, 0, 0)
        data = struct.pack("<QQII", 0, ctypes.addressof(answer), 0, length)
        command = head + data + struct.pack("<8I", what, dwords, 0, 0, 0, 0, 0, 0)
        with open(self.character, "rb") as file:
            status = fcntl.ioctl(file, call, bytearray(command))
        assert status == 0, f"NVMe status {status:#x}"
        return answer.raw

    def blank(self) -> None:
        """Discards all of it, which reads as zeros on these drives."""
        with open_exclusively(self.block) as file:
            fcntl.ioctl(file, BLKDISCARD, struct.pack("QQ", 0, self.size_bytes))

    def medium(self, offset: int, length: int) -> bytes:
        """What is on the drive, read by the kernel's block layer and not from the page cache."""
        with open(self.block, "rb", buffering=0) as file:
            fcntl.ioctl(file, BLKFLSBUF)
            return os.pread(file.fileno(), length, offset)


def find(serial: str, nsid: int = 1) -> Namespace:
    """The namespace of a controller. Names say nothing: Linux numbers in the order of its scan."""
    for directory in sorted(Path("/sys/block").glob("nvme*")):
        if not Path("/dev", directory.name).exists():
            continue  # one way of several to a namespace, which has a name of its own
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


@contextlib.contextmanager
def kernel_target(below: Namespace, serial: str) -> Iterator[Namespace]:
    """A namespace that the kernel's own NVMe target serves from another. Raises Unavailable."""
    modules = ["modprobe", "-d", os.environ["NVME_VM_MODULES"], "nvme-loop"]
    loaded = subprocess.run(modules, capture_output=True, text=True, check=False)
    if loaded.returncode:
        raise Unavailable(f"this kernel has no NVMe target: {loaded.stderr.strip()}")
    config = Path("/sys/kernel/config")
    if not (config / "nvmet").exists():
        subprocess.run(["mount", "-t", "configfs", "configfs", config], check=True)
    subsystem, port = config / "nvmet/subsystems" / serial, config / "nvmet/ports/1"
    namespace = subsystem / "namespaces/1"
    for folder in (subsystem, namespace, port):
        folder.mkdir()
    (subsystem / "attr_allow_any_host").write_text("1")
    (subsystem / "attr_serial").write_text(serial)
    (namespace / "device_path").write_text(below.block)
    (namespace / "enable").write_text("1")
    (port / "addr_trtype").write_text("loop")
    link = port / "subsystems" / serial
    link.symlink_to(subsystem)
    with open("/dev/nvme-fabrics", "r+b", buffering=0) as file:
        file.write(f"transport=loop,nqn={serial}".encode())
    try:
        until(lambda: is_there(serial), "the target's namespace")
        yield find(serial)
    finally:
        for controller in Path("/sys/class/nvme").iterdir():
            if (controller / "serial").read_text().strip() == serial:
                (controller / "delete_controller").write_text("1")
        link.unlink()
        for folder in (port, namespace, subsystem):
            folder.rmdir()


def is_there(serial: str) -> bool:
    """Whether a drive can be found."""
    try:
        find(serial)
    except (LookupError, OSError):
        return False
    return True
