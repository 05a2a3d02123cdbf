"""The C core as Python sees it: bytes, offsets and checksums; no tensors and no policy."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from typing_extensions import Buffer as BufferProtocol

Path = Literal["direct", "pagecache"]
EngineName = Literal["auto", "nvme", "uring", "aio", "threads"]

BLOCK_BYTES: int

class DeviceInfo(NamedTuple):
    target: str
    targets: tuple[str, ...]
    member_sizes: tuple[int, ...]
    stripe_bytes: int
    size: int
    lba_size: int
    physical_block_size: int
    memory_align: int
    max_transfer: int
    placement: bool
    block_device: bool
    direct: bool
    discard: bool
    engine: str
    pagecache_engine: str
    queue_depth: int
    chunk_bytes: int
    engines_refused: dict[str, str]

    def place(self, offset: int) -> tuple[str, int]:
        """Where a byte of the device lies: the member's target, and the offset there."""

class CacheState(NamedTuple):
    """What the page cache holds of a range, in bytes; before Linux 6.5 only what is resident."""

    resident_bytes: int
    dirty_bytes: int | None
    writeback_bytes: int | None
    evicted_bytes: int | None
    recently_evicted_bytes: int | None

def cache_state_of(path: str | os.PathLike[str]) -> CacheState:
    """What the page cache holds of all of a file or block device, whoever uses it."""

class Completion:
    """One submitted batch. It holds every buffer of the batch until the last byte has moved."""

    def wait(self, timeout: float | None = None) -> None:
        """Returns when every byte has moved. Raises what went wrong, or TimeoutError."""
    def done(self) -> bool: ...

class Device:
    info: DeviceInfo
    closed: bool

    @staticmethod
    def open(
        target: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        engine: EngineName = "auto",
        queue_depth: int = 256,
        *,
        threads: int = 4,
        chunk_bytes: int = 262144,
        request_bytes: int | None = None,
        staging_bytes: int = 8388608,
        stripe_bytes: int = 1048576,
        read_only: bool = False,
        sqpoll: bool = False,
        iopoll: bool = False,
    ) -> Device: ...
    def read(
        self,
        requests: Iterable[tuple[int, BufferProtocol]],
        *,
        path: Path = "direct",
        checksums: Sequence[np.ndarray | None] | BufferProtocol | None = None,
        ahead: bool = False,
    ) -> Completion: ...
    def write(
        self,
        requests: Iterable[tuple[int, BufferProtocol]],
        *,
        path: Path = "direct",
        checksums: Sequence[np.ndarray | None] | BufferProtocol | None = None,
        tail: bool = False,
    ) -> Completion: ...
    def register(self, buffers: Iterable[BufferProtocol]) -> int:
        """Registers memory for direct I/O; returns how many bytes of it could be."""
    def unregister(self, buffers: Iterable[BufferProtocol]) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_back(self, offset: int, length: int, wait: bool = False) -> None:
        """Starts to write a range's dirty pages back; with `wait` returns when they are."""
    def drop_cached(self, offset: int, length: int, failures: int | None = None) -> None: ...
    def write_back_failures(self) -> int: ...
    def cached_bytes(self, offset: int, length: int) -> tuple[int, int | None]:
        """Bytes of the range that the page cache holds, and of these the dirty ones."""
    def cache_state(self, offset: int, length: int) -> CacheState: ...
    def map(self, offset: int, length: int) -> Mapping:
        """The page cache's own pages of a range, as read-only memory."""
    def stats(self) -> dict[str, dict[str, int]]:
        """Counters of each path: {"direct": {"reads": ...}, "pagecache": {...}}."""
    def close(self) -> None: ...
    def __enter__(self) -> Device: ...
    def __exit__(self, *exc: object) -> None: ...

class Buffer:
    """Page-aligned memory of its own; a writable buffer of bytes."""

    def __init__(self, size: int) -> None: ...
    def __len__(self) -> int: ...

class Mapping:
    """A part of a device as memory, from `Device.map`: a read-only buffer of bytes."""

    when_gone: Callable[[], object] | None
    """Called once it is unmapped, in whatever thread lets go of it last."""

    def __len__(self) -> int: ...

class Bracket:
    """Calls `end` for certain once `begin` has been; twice, if it is cut short by an interrupt."""

    def __init__(self, begin: Callable[[], Any], end: Callable[[], Any]) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: object) -> None: ...

class ExtentMap:
    total_bytes: int
    free_bytes: int
    largest_free_bytes: int
    free_extents: int
    fragmentation: float
    """1 - largest free run / free bytes: 0 when all free space is one run."""

    def __init__(self, size_bytes: int, unit_bytes: int = 4096) -> None: ...
    def allocate(self, length: int, align: int = 0) -> int:
        """Offset of a free run. Raises NoSpaceError, ValueError."""
    def reserve(self, offset: int, length: int) -> None: ...
    def free(self, offset: int, length: int) -> None: ...
    def free_runs(self) -> Iterable[tuple[int, int]]: ...
    def verify(self) -> None: ...

class TailWrite(NamedTuple):
    requests: list[tuple[int, Any]]
    first_chunk: int
    digests: np.ndarray

class Tail:
    """The end of a growing run: bytes held back until they fill a block, and its checksum."""

    stored: int
    held: int
    digest: int

    def __init__(self, chunk_bytes: int) -> None: ...
    def reset(self, stored: int, chunk: BufferProtocol) -> None: ...
    def append(self, data: BufferProtocol, copy: BufferProtocol | None = None) -> TailWrite:
        """Takes data in; says what is to be written now. Offsets are relative to the run. With
        `copy`, memory of the same length, data is copied there and requests are of the copy."""
    def block(self) -> memoryview:
        """The bytes held back, padded with zeros to a block."""

def aligned_empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array in page-aligned memory: direct I/O uses it in place."""

def checksum(data: BufferProtocol) -> int: ...
def checksum_chunks(data: BufferProtocol, chunk_bytes: int) -> np.ndarray: ...
def find_signature(path: str | os.PathLike[str]) -> str: ...
def nvme_block_node(path: str | os.PathLike[str]) -> str | None: ...
def nvme_character_node(path: str | os.PathLike[str]) -> str | None: ...
def counters() -> dict[str, int]: ...
def window_bytes() -> int: ...
