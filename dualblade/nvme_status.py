"""What an NVMe status means: the names of the specification, and what to do."""

from __future__ import annotations

from typing import NamedTuple

_CONTROLLER = "Look at the kernel log (dmesg) and the drive's health (nvme smart-log)."
_MEDIUM = (
    "The data at this place is lost: delete the tensor or write it again, and look at the drive's "
    "health (nvme smart-log)."
)
_REPORT = "The command did not suit this drive: try engine='uring', and please report this."
_AGAIN = "It was tried several times: try again later, and look at the kernel log (dmesg)."
_GONE = "Check that the drive is attached and answers (nvme list), then open the store again."
_PROTECTED = "Remove the drive's write protection (nvme get-feature -f 0x84), or use another drive."
_RESERVED = "Another host holds a reservation on the namespace (nvme resv-report): release it."
_FULL = "Delete tensors and discard them: the drive has no room of its own left."

# (status code type, status code): (the name in the specification, what to do).
_KNOWN: dict[tuple[int, int], tuple[str, str]] = {
    (0, 0x01): ("Invalid Command Opcode", _REPORT),
    (0, 0x02): ("Invalid Field in Command", _REPORT),
    (0, 0x04): ("Data Transfer Error", _CONTROLLER),
    (0, 0x05): ("Commands Aborted due to Power Loss Notification", _GONE),
    (0, 0x06): ("Internal Error", _CONTROLLER),
    (0, 0x07): ("Command Abort Requested", _AGAIN),
    (0, 0x08): ("Command Aborted due to SQ Deletion", _GONE),
    (0, 0x0B): ("Invalid Namespace or Format", _GONE),
    (0, 0x13): ("PRP Offset Invalid", _REPORT),
    (0, 0x15): ("Operation Denied", _PROTECTED),
    (0, 0x1C): ("Sanitize Failed", _CONTROLLER),
    (0, 0x1D): ("Sanitize In Progress", "Wait until it is done (nvme sanitize-log)."),
    (0, 0x20): ("Namespace is Write Protected", _PROTECTED),
    (0, 0x21): ("Command Interrupted", _AGAIN),
    (0, 0x22): ("Transient Transport Error", _AGAIN),
    (0, 0x24): ("Admin Command Media Not Ready", _AGAIN),
    (0, 0x80): (
        "LBA Out of Range",
        "The namespace is smaller than it was: check its size (nvme id-ns), then open it again.",
    ),
    (0, 0x81): ("Capacity Exceeded", _FULL),
    (0, 0x82): ("Namespace Not Ready", _AGAIN),
    (0, 0x83): ("Reservation Conflict", _RESERVED),
    (0, 0x84): ("Format In Progress", "Wait until it is done, then format the store anew."),
    (1, 0x80): ("Conflicting Attributes", _REPORT),
    (1, 0x81): ("Invalid Protection Information", _REPORT),
    (1, 0x82): ("Attempted Write to Read Only Range", _PROTECTED),
    (1, 0x83): ("Command Size Limit Exceeded", _REPORT),
    (2, 0x80): ("Write Fault", "Write it again; if it fails again, replace the drive."),
    (2, 0x81): ("Unrecovered Read Error", _MEDIUM),
    (2, 0x82): ("End-to-end Guard Check Error", _MEDIUM),
    (2, 0x83): ("End-to-end Application Tag Check Error", _MEDIUM),
    (2, 0x84): ("End-to-end Reference Tag Check Error", _MEDIUM),
    (2, 0x85): ("Compare Failure", _REPORT),
    (2, 0x86): ("Access Denied", "Unlock the drive (sedutil, nvme security-send)."),
    (2, 0x87): ("Deallocated or Unwritten Logical Block", _MEDIUM),
    (3, 0x00): ("Internal Path Error", _GONE),
    (3, 0x01): ("Asymmetric Access Persistent Loss", _GONE),
    (3, 0x02): ("Asymmetric Access Inaccessible", _AGAIN),
    (3, 0x03): ("Asymmetric Access Transition", _AGAIN),
    (3, 0x60): ("Controller Pathing Error", _GONE),
    (3, 0x70): ("Host Pathing Error", _GONE),
    (3, 0x71): ("Command Aborted By Host", _GONE),
}
_TYPES = {
    0: ("generic status", _REPORT),
    1: ("command specific status", _REPORT),
    2: ("media and data integrity error", _MEDIUM),
    3: ("path related status", _GONE),
    7: ("vendor specific status", _CONTROLLER),
}


class Status(NamedTuple):
    """A status as the drive gave it, decoded."""

    sct: int
    """Status code type."""
    sc: int
    """Status code."""
    dnr: bool
    """Do not retry: the same command would fail again."""
    name: str
    advice: str


def decode(status: int) -> Status:
    """A completion's status field, without its phase bit."""
    sct, sc, dnr = status >> 8 & 7, status & 0xFF, bool(status >> 14 & 1)
    name, advice = _KNOWN.get((sct, sc)) or _TYPES.get(sct, ("reserved status", _CONTROLLER))
    return Status(sct, sc, dnr, name, advice)
