"""dualblade: a tensor store for key/value caches that do not fit in memory."""

from dualblade._core import Completion, Device, DeviceInfo, aligned_empty
from dualblade.entry import TensorInfo
from dualblade.errors import (
    AlignmentError,
    ClosedError,
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
    DualbladeError,
    DualbladeWarning,
    KeyNotFoundError,
    LiveViewError,
    NoSpaceError,
    NvmeError,
    UnsupportedError,
)
from dualblade.kvcache import KVCache
from dualblade.opening import open_store as open
from dualblade.store import TensorStore
from dualblade.ticket import Ticket

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "ClosedError",
    "Completion",
    "CorruptionError",
    "Device",
    "DeviceError",
    "DeviceInfo",
    "DeviceRefusedError",
    "DualbladeError",
    "DualbladeWarning",
    "KVCache",
    "KeyNotFoundError",
    "LiveViewError",
    "NoSpaceError",
    "NvmeError",
    "TensorInfo",
    "TensorStore",
    "Ticket",
    "UnsupportedError",
    "aligned_empty",
    "open",
]
