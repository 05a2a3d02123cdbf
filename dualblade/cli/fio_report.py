"""What a job did, for people and in the fields of fio's JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import dualblade
from dualblade.cli.fio_jobs import Result
from dualblade.cli.fio_latency import Moments, Recorder
from dualblade.cli.fio_options import Options
from dualblade.memory import format_size

HOW_MEASURED = (
    "per batch of iodepth_batch requests: slat is the call that hands the batch over, clat from "
    "there until its completion is seen; the oldest batch is waited for first. Exact per request "
    "with iodepth 1"
)
# fio's classes of latency: the upper ends, in nanoseconds, by the unit they are shown in.
_CLASSES = {
    "latency_ns": (1, (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)),
    "latency_us": (1000, (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)),
    "latency_ms": (1_000_000, (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000, 2000)),
}
# Likewise of depths: how many are in flight when a request is handed over, by the lower ends; and
# how many go in one call, by the upper ends.
_LEVELS = (1, 2, 4, 8, 16, 32, 64)
_CALLS = (0, 4, 8, 16, 32, 64)


# ---- JSON ----------------------------------------------------------------------------------------


def document(options: Options, jobs: Sequence[dict[str, Any]], started: float) -> dict[str, Any]:
    """The whole of fio's JSON, around its jobs."""
    return {
        "fio version": f"dualblade-fio-{dualblade.__version__}",
        "timestamp": int(started),
        "timestamp_ms": int(started * 1000),
        "time": time.ctime(started),
        "global options": {"filename": options.filename},
        "jobs": list(jobs),
        "disk_util": [],
    }


def job(options: Options, result: Result) -> dict[str, Any]:
    """One element of "jobs": all threads together, as fio's --group_reporting gives them."""
    described = {
        name: direction(result.recorders.get(name, Recorder()), options)
        for name in ("read", "write", "trim")
    }
    return {
        "jobname": options.name,
        "groupid": 0,
        "error": 0,
        "eta": 0,
        "elapsed": max(1, round(result.wall_s)),
        "job options": options.given,
        **described,
        "sync": {"total_ios": 0, "lat_ns": _moments(Moments())},
        **usage(result, options.numjobs),
        **_depths(options, list(result.recorders.values())),
        **_latency_classes(list(result.recorders.values())),
        "latency_depth": options.iodepth,
        "latency_target": 0,
        "latency_percentile": 100.0,
        "latency_window": 0,
        "dualblade": _own_fields(options, result),
    }


def usage(result: Result, threads: int) -> dict[str, Any]:
    """CPU as fio counts it: percent of the run time of all threads together."""
    whole_s = max(result.wall_s * threads, 1e-9)
    return {
        "job_runtime": round(whole_s * 1000),
        "usr_cpu": result.user_s / whole_s * 100,
        "sys_cpu": result.system_s / whole_s * 100,
        "ctx": result.context_switches,
        "majf": result.major_faults,
        "minf": result.minor_faults,
    }


def direction(recorder: Recorder, options: Options) -> dict[str, Any]:
    """The "read", "write" or "trim" of a job."""
    seconds = recorder.last_ns / 1e9
    rate = recorder.io_bytes / seconds if seconds else 0.0
    clat = _moments(recorder.clat)
    if recorder.requests:
        clat["percentile"] = {f"{p:.6f}": recorder.percentile(p) for p in options.percentiles}
        if options.output_format == "json+":
            clat["bins"] = {str(middle): count for middle, count in recorder.bins().items()}
    return {
        "io_bytes": recorder.io_bytes,
        "io_kbytes": recorder.io_bytes // 1024,
        "bw_bytes": int(rate),
        "bw": int(rate / 1024),
        "iops": recorder.requests / seconds if seconds else 0.0,
        "runtime": round(seconds * 1000),
        "total_ios": recorder.requests,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": _moments(recorder.slat),
        "clat_ns": clat,
        "lat_ns": _moments(recorder.lat),
        **_samples(recorder),
    }


def _samples(recorder: Recorder) -> dict[str, Any]:
    rates = recorder.bytes_per_second()
    mean_bytes = recorder.io_bytes / max(1, recorder.requests)
    bandwidth, iops = Moments(), Moments()
    for rate in rates:
        bandwidth.add_one(int(rate / 1024))
        iops.add_one(int(rate / max(1, mean_bytes)))
    return {
        "bw_min": bandwidth.least,
        "bw_max": bandwidth.greatest,
        "bw_agg": 100.0 if rates else 0.0,
        "bw_mean": bandwidth.mean,
        "bw_dev": bandwidth.deviation,
        "bw_samples": len(rates),
        "iops_min": iops.least,
        "iops_max": iops.greatest,
        "iops_mean": iops.mean,
        "iops_stddev": iops.deviation,
        "iops_samples": len(rates),
    }


def _moments(moments: Moments) -> dict[str, Any]:
    return {
        "min": moments.least,
        "max": moments.greatest,
        "mean": moments.mean,
        "stddev": moments.deviation,
        "N": moments.count,
    }


def _latency_classes(recorders: list[Recorder]) -> dict[str, dict[str, float]]:
    bins = [item for recorder in recorders for item in recorder.bins().items()]
    total = sum(count for _, count in bins)
    classes: dict[str, dict[str, float]] = {}
    below = -1
    for unit, (scale, ends) in _CLASSES.items():
        classes[unit] = {}
        for end in ends:
            count = sum(count for value, count in bins if below < value <= end * scale)
            classes[unit][str(end)] = count / total * 100 if total else 0.0
            below = max(below, end * scale)
    rest = sum(count for value, count in bins if value > below)
    classes["latency_ms"][">=2000"] = rest / total * 100 if total else 0.0
    return classes


def _depths(options: Options, recorders: list[Recorder]) -> dict[str, dict[str, float]]:
    """Follows from how a job runs: each thread fills its depth once, and then keeps it full."""
    requests = sum(recorder.requests for recorder in recorders) / options.numjobs
    level = dict.fromkeys(_LEVELS, 0.0)
    for low, high in zip(_LEVELS, (*_LEVELS[1:], options.iodepth + 1), strict=True):
        if low <= options.iodepth < high:
            level[low] = max(0.0, requests - (low - 1))
        elif low <= options.iodepth:
            level[low] = max(0.0, min(requests, high - 1) - (low - 1))
    calls = dict.fromkeys((*_CALLS, 0xFFFFFFFF), 0)
    for recorder in recorders:
        for size, count in recorder.batches.items():
            calls[next(end for end in calls if size <= end)] += count
    per_call = _shares({str(end): calls[end] for end in _CALLS} | {">=64": calls[0xFFFFFFFF]})
    return {
        "iodepth_level": _shares({(">=64" if n == 64 else str(n)): level[n] for n in level}),
        "iodepth_submit": per_call,
        "iodepth_complete": per_call,
    }


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    """In percent of the sum."""
    total = sum(counts.values())
    return {name: count / total * 100 if total else 0.0 for name, count in counts.items()}


def _own_fields(options: Options, result: Result) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "engine": result.engine,
        "path": options.access_path,
        "latency_measured": HOW_MEASURED,
        "iodepth_batch": options.iodepth_batch,
        "request_bytes": options.request_bytes,
        "randseed": options.randseed,
        "buffer_bytes": result.buffer_bytes,
        "registered_buffer_bytes": result.registered_bytes,
        "cpu_seconds": result.cpu_s,
        "cpu_seconds_per_gb": cpu_seconds_per_gb(result),
        "interrupted": result.interrupted,
        "device": result.device_stats,
    }
    if options.verify:
        fields["verified_blocks"] = result.verified_blocks
    return fields


def cpu_seconds_per_gb(result: Result) -> float | None:
    """CPU time for 10**9 bytes; None if nothing was moved."""
    return result.cpu_s / (result.io_bytes / 1e9) if result.io_bytes else None


# ---- text ----------------------------------------------------------------------------------------


def text(options: Options, result: Result) -> str:
    """The report for people, laid out as fio's."""
    depth = f"iodepth={options.iodepth} in batches of {options.iodepth_batch}"
    lines = [
        f"{options.name}: rw={options.rw}, bs={_short_size(options.bs)}, engine={result.engine}, "
        f"path={options.access_path}, {depth}, numjobs={options.numjobs}, "
        f"randseed={options.randseed}"
    ]
    if options.fixedbufs:
        lines.append(
            f"  registered: {format_size(result.registered_bytes)} of "
            f"{format_size(result.buffer_bytes)} of buffers"
        )
    for name, recorder in result.recorders.items():
        lines += _direction_lines(name, recorder, options.percentiles)
    shown = usage(result, options.numjobs)
    per_gb = cpu_seconds_per_gb(result)
    lines.append(
        f"  cpu          : usr={shown['usr_cpu']:.2f}%, sys={shown['sys_cpu']:.2f}%, "
        f"ctx={shown['ctx']}, majf={shown['majf']}, minf={shown['minf']}"
        + (f", {per_gb:.3f} CPU-s/GB" if per_gb is not None else "")
    )
    if result.verified_blocks is not None:
        lines.append(f"  verify       : {result.verified_blocks} blocks compared, all as written")
    if result.interrupted:
        lines.append("  interrupted  : these are the figures until then")
    return "\n".join(lines) + "\n"


def _direction_lines(name: str, recorder: Recorder, percentiles: tuple[float, ...]) -> list[str]:
    seconds = recorder.last_ns / 1e9
    if recorder.requests == 0 or seconds == 0:
        return [f"  {name}: nothing"]
    rate = recorder.io_bytes / seconds
    lines = [
        f"  {name}: IOPS={_short_count(recorder.requests / seconds)}, "
        f"BW={rate / (1 << 20):.4g}MiB/s ({rate / 1e6:.4g}MB/s)"
        f"({format_size(recorder.io_bytes)}/{seconds * 1000:.0f}msec)"
    ]
    for title, moments in (
        ("slat", recorder.slat),
        ("clat", recorder.clat),
        (" lat", recorder.lat),
    ):
        unit, scale = _unit(moments.mean)
        lines.append(
            f"    {title} ({unit}): min={moments.least / scale:.4g}, "
            f"max={moments.greatest / scale:.4g}, avg={moments.mean / scale:.2f}, "
            f"stdev={moments.deviation / scale:.2f}"
        )
    unit, scale = _unit(recorder.clat.mean)
    lines.append(f"    clat percentiles ({unit}):")
    cells = [f"{p:5.2f}th=[{recorder.percentile(p) / scale:7.5g}]" for p in percentiles]
    lines += [f"     | {', '.join(cells[i : i + 4])}" for i in range(0, len(cells), 4)]
    return lines


def _unit(nanoseconds: float) -> tuple[str, int]:
    if nanoseconds < 10_000:
        return "nsec", 1
    return ("usec", 1000) if nanoseconds < 10_000_000 else ("msec", 1_000_000)


def _short_count(count: float) -> str:
    return f"{count / 1000:.1f}k" if count >= 10_000 else f"{count:.4g}"


def _short_size(size_bytes: int) -> str:
    for unit, scale in (("m", 1 << 20), ("k", 1 << 10)):
        if size_bytes % scale == 0:
            return f"{size_bytes // scale}{unit}"
    return str(size_bytes)
