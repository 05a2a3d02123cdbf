"""dualblade info --memory: what memory page-cached tensors may take, its parts and sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dualblade._core import CacheState, cache_state_of
from dualblade.errors import UnsupportedError
from dualblade.memory import MemoryReport, format_size, limits

_WORDS = {
    "anon": "anonymous",
    "shmem": "shared",
    "kernel": "the kernel's",
    "file": "page cache",
    "mapped": "mapped",
    "locked": "locked",
    "pinned": "pinned",
    "dirty": "dirty",
    "writeback": "being written",
    "resident": "in the page cache",
    "evicted": "reclaimed",
    "recently_evicted": "reclaimed in use",
}


class MemoryInfo(NamedTuple):
    """What a process started here may have, and what the page cache holds of some targets."""

    report: MemoryReport
    targets: dict[str, CacheState | None]
    """None where the kernel does not say."""


def collect(targets: Sequence[str]) -> MemoryInfo:
    """Looks at the memory and at targets, which may be in use and need not be stores.

    Raises DeviceError for a target that can't be opened."""
    return MemoryInfo(limits(), {target: _cache_state(target) for target in targets})


def _cache_state(target: str) -> CacheState | None:
    try:
        return cache_state_of(target)
    except UnsupportedError:
        return None


def as_json(info: MemoryInfo) -> dict[str, Any]:
    """Everything, in bytes; what is not known is null."""
    report = info.report
    return {
        "budget_bytes": report.budget_bytes,
        "bounded_by": _bounded_by(report),
        "ceiling_bytes": report.ceiling_bytes,
        "bounds": [
            {**bound._asdict(), "free_bytes": bound.free_bytes} for bound in report.bounds()
        ],
        "machine": report.machine._asdict(),
        "cgroup_version": report.cgroup_version,
        "cgroups": [level._asdict() for level in report.levels],
        "process": report.process._asdict(),
        "pressure": report.pressure._asdict(),
        "targets": {
            name: None if state is None else state._asdict() for name, state in info.targets.items()
        },
        "sources": report.sources,
    }


def _bounded_by(report: MemoryReport) -> str:
    return min(report.bounds(), key=lambda bound: bound.free_bytes).name


def as_text(info: MemoryInfo) -> str:
    """The same for people."""
    report = info.report
    bound = _bounded_by(report)
    lines = [
        f"page-cached tensors may take {format_size(report.budget_bytes)} of the "
        f"{format_size(report.ceiling_bytes)} that a process may have here; "
        f"{'the machine' if bound == 'machine' else bound} has no more",
        *_machine_lines(report),
        *_cgroup_lines(report),
        *_process_lines(report),
        *_pressure_lines(report),
    ]
    for name, state in info.targets.items():
        lines.append(f"{name}:")
        if state is None:
            lines.append(_line("in the page cache", "not known: the kernel does not say"))
        else:
            lines += _sizes(state._asdict())
    return "\n".join(lines)


def _machine_lines(report: MemoryReport) -> Iterator[str]:
    machine = report.machine._asdict()
    total, available = machine.pop("total_bytes"), machine.pop("available_bytes")
    yield f"machine, {_source(report.sources['machine'])}:"
    yield _line("available", f"{format_size(available)} of {format_size(total)}")
    yield from _sizes(machine)
    yield _line("leaves", format_size(report.bounds()[0].free_bytes))


def _cgroup_lines(report: MemoryReport) -> Iterator[str]:
    if not report.levels:
        yield f"cgroup: {report.sources['cgroup']}"
    leaves = {bound.name: bound.free_bytes for bound in report.bounds()}
    for level in report.levels:
        yield f"cgroup (version {report.cgroup_version}) {level.path}:"
        limit = "none"
        if level.limit_bytes is not None:
            limit = f"{format_size(level.limit_bytes)}, from {level.limit_source}"
        yield _line("limit", limit)
        yield _line("in use", format_size(level.usage_bytes))
        parts = {name: value for name, value in level._asdict().items() if name in _LEVEL_PARTS}
        yield from _sizes(parts)
        if level.path in leaves:
            yield _line("leaves", format_size(leaves[level.path]))
    for name, source in report.sources.items():
        if name.startswith("cgroup "):
            yield f"  {source}"


_LEVEL_PARTS = tuple(
    f"{part}_bytes" for part in ("anon", "shmem", "kernel", "file", "mapped", "dirty", "writeback")
)


def _process_lines(report: MemoryReport) -> Iterator[str]:
    yield f"this process, {_source(report.sources['process'])}:"
    process = report.process._asdict()
    yield _line("libraries", format_size(process.pop("file_bytes")))
    yield from _sizes(process)


def _pressure_lines(report: MemoryReport) -> Iterator[str]:
    pressure, sources = report.pressure, report.sources
    yield "pressure, so far:"
    refault_bytes, stall_us = pressure.refault_bytes, pressure.stall_us
    refaults = (
        "not known" if refault_bytes is None else f"{format_size(refault_bytes)} after reclaim"
    )
    stalls = "not known" if stall_us is None else f"{stall_us / 1e6:.1f} s"
    events = sum(pressure.reclaim_events.values())
    yield _line("read again", f"{refaults}, {_source(sources['refaults'])}")
    yield _line("limits run into", f"{events} times, {_source(sources['reclaims'])}")
    yield _line("waited for memory", f"{stalls}, {_source(sources['stalls'])}")


def _source(source: str) -> str:
    return source if source.startswith("missing") else f"from {source}"


def _sizes(sizes: dict[str, int | None]) -> Iterator[str]:
    for name, size_bytes in sizes.items():
        if size_bytes is not None:
            yield _line(_WORDS[name.removesuffix("_bytes")], format_size(size_bytes))


def _line(name: str, value: str) -> str:
    return f"  {name:<20} {value}"
