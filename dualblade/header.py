"""The block at offset 0 of a store's device, and of each member of a striped one: whose it is, and
how it is laid out."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dualblade._core import checksum
from dualblade.errors import CorruptionError, DeviceRefusedError, UnsupportedError

HEADER_BYTES = 4096
VERSION_SINGLE = 1
VERSION_STRIPED = 2
"""Another one, so that what reads version 1 alone does not take a member for a whole store."""
DATA_OFFSET = 1 << 20
"""Where extents begin: a boundary that flash pages, RAID stripes and huge pages all divide."""

_BLOCK_BYTES = 4096  # extents are laid out in these, so a logical block may not be larger
_MAGIC = b"DUALBLAD"
# magic, version, header bytes, store id, size, lba, chunk, data offset, created; zeros to the
# checksum in the last eight bytes.  Magic and version stay where they are in every version.
_LAYOUT = struct.Struct("<8sII16sQIIQQ")
# In version 2, behind these: which member, of how many, the stripe unit, the member's own size.
_STRIPED_LAYOUT = struct.Struct("<IIQQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKED_BYTES = HEADER_BYTES - _CHECKSUM.size


@dataclass(frozen=True)
class Header:
    """A store's identity and geometry."""

    store_id: str
    """32 hexadecimal digits, drawn anew at each format."""
    size_bytes: int
    lba_bytes: int
    """Logical block of the device at the time of the format."""
    chunk_bytes: int
    """What one checksum covers."""
    data_offset: int
    """The first byte for extents."""
    created_unix: int
    """Seconds since 1970."""
    member: int = 0
    """Of a striped store: which of its members this is, from 0."""
    members: int = 1
    stripe_bytes: int = 0
    """What lies side by side on one member; 0 where there is only one."""
    member_bytes: int = 0
    """Size of this member at the time of the format; 0 where there is only one."""

    @staticmethod
    def new_store_id() -> str:
        """An id that no other store has."""
        return uuid.uuid4().hex

    def pack(self) -> bytes:
        """The block, HEADER_BYTES long."""
        fields = _LAYOUT.pack(
            _MAGIC,
            VERSION_STRIPED if self.members > 1 else VERSION_SINGLE,
            HEADER_BYTES,
            bytes.fromhex(self.store_id),
            self.size_bytes,
            self.lba_bytes,
            self.chunk_bytes,
            self.data_offset,
            self.created_unix,
        )
        if self.members > 1:
            fields += _STRIPED_LAYOUT.pack(
                self.member, self.members, self.stripe_bytes, self.member_bytes
            )
        body = fields.ljust(_CHECKED_BYTES, b"\0")
        return body + _CHECKSUM.pack(checksum(body))

    @classmethod
    def find(
        cls,
        block: Any,
        target: str | os.PathLike[str] = "the device",
        members: Sequence[str] = (),
    ) -> Header | None:
        """The header in a device's first block; None if there is no sign of one.

        members: all that the target was given with, for a message's advice.
        Raises UnsupportedError for a header of another version, CorruptionError for a damaged one.
        """
        if bytes(memoryview(block)[: len(_MAGIC)]) != _MAGIC:
            return None
        return cls.unpack(block, target=target, members=members)

    @classmethod
    def unpack(
        cls,
        block: Any,
        target: str | os.PathLike[str] = "the device",
        members: Sequence[str] = (),
    ) -> Header:
        """The header in a device's first HEADER_BYTES. members: as in `find`.

        Raises UnsupportedError for a header of another version, CorruptionError for one that is
        damaged, cut off or not there.
        """
        block = bytes(memoryview(block)[:HEADER_BYTES])
        target = os.fspath(target)
        anew = f"start anew with `dualblade format {' '.join(members or [target])}`"
        if block[: len(_MAGIC)] != _MAGIC:
            raise CorruptionError(
                f"{target} has no store header; if there was a store, its first block was "
                f"overwritten: restore it from a backup, or {anew}"
            )
        if len(block) < HEADER_BYTES:
            raise CorruptionError(
                f"the store header of {target} is cut off after {len(block)} bytes: restore the "
                f"store from a backup, or {anew}"
            )
        _, version, _, store_id, size, lba, chunk, data_offset, created = _LAYOUT.unpack_from(block)
        if version not in (VERSION_SINGLE, VERSION_STRIPED):
            raise UnsupportedError(
                f"the store on {target} was written in format version {version}; this release "
                f"reads version {VERSION_SINGLE} and {VERSION_STRIPED}: use the one that wrote it, "
                f"or {anew}, which loses what is stored"
            )
        (expected,) = _CHECKSUM.unpack_from(block, _CHECKED_BYTES)
        if checksum(block[:_CHECKED_BYTES]) != expected:
            raise CorruptionError(
                f"the store header of {target} does not match its checksum: it was damaged or "
                f"overwritten in part; restore it from a backup, or {anew}"
            )
        striped = (
            _STRIPED_LAYOUT.unpack_from(block, _LAYOUT.size) if version == VERSION_STRIPED else ()
        )
        return cls(store_id.hex(), size, lba, chunk, data_offset, created, *striped)

    def check_device(
        self,
        size_bytes: int,
        lba_bytes: int,
        target: str | os.PathLike[str],
        members: Sequence[str] = (),
    ) -> None:
        """Whether a device of this size and logical block can hold the store. members: as in
        `find`.

        Raises DeviceRefusedError. A larger device, or one whose logical block changed, is fine:
        everything is laid out in blocks of 4096 bytes.
        """
        target = os.fspath(target)
        if size_bytes < self.size_bytes:
            raise DeviceRefusedError(
                f"{target} has {size_bytes} bytes, but the store on it was made with "
                f"{self.size_bytes}: it was truncated, or copied in part to a smaller device; "
                "restore it to its full size, or start anew with "
                f"`dualblade format {' '.join(members or [target])}`"
            )
        if lba_bytes > _BLOCK_BYTES:
            raise DeviceRefusedError(
                f"{target} has logical blocks of {lba_bytes} bytes; a store needs {_BLOCK_BYTES} "
                "or less: use another device or reformat its namespace (nvme format --lbaf)"
            )
