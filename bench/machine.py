"""Describes the machine that figures were measured on: nothing that names or locates it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """CPU, cores, memory, kernel and load, and the filesystem and device below `path`, which
    exists. What the system does not say is None."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **_below(os.stat(path)),
    }


def summary(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    memory = machine["memory_bytes"] / 2**30
    return (
        f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores, {memory:.0f} GiB memory, "
        f"Linux {machine['kernel']}, {machine['filesystem'] or 'no filesystem'} on "
        f"{machine['device'] or 'no device'}, load average {machine['load_average']:.1f}"
    )


def _field(path: str, name: str) -> str | None:
    try:
        text = Path(path).read_text("utf-8")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _below(status: os.stat_result) -> dict[str, Any]:
    is_device = bool(status.st_rdev)
    number = status.st_rdev if is_device else status.st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    return {"filesystem": None if is_device else _filesystem(name), "device": _device(name)}


def _filesystem(number: str) -> str | None:
    for line in Path("/proc/self/mountinfo").read_text("utf-8").splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return None


def _device(number: str) -> str | None:
    """What sysfs knows of the drive: its name, model and I/O scheduler."""
    folder = Path("/sys/dev/block", number)
    if not folder.exists():
        return None  # tmpfs, overlay, network: there is no block device below
    folder = folder.resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    words = [folder.name, _word(folder / "device/model"), _scheduler(folder)]
    return " ".join(word for word in words if word)


def _word(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip() or None
    except OSError:
        return None


def _scheduler(folder: Path) -> str | None:
    line = _word(folder / "queue/scheduler") or ""
    chosen = line.partition("[")[2].partition("]")[0]
    return f"(scheduler {chosen})" if chosen else None
