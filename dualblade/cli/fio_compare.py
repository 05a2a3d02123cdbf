"""Beside fio: the same job in turn, medians with their spread, and the ratios."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dualblade._core import nvme_character_node
from dualblade.cli import fio_report
from dualblade.cli.fio_jobs import Job
from dualblade.cli.fio_options import Options
from dualblade.cli.fio_progress import Progress
from dualblade.cli.fio_target import WORKERS_MAX, open_device, prepare
from dualblade.errors import DualbladeError

_ENGINES = {
    "nvme": "io_uring_cmd",
    "uring": "io_uring",
    "aio": "libaio",
    "pylibaio": "libaio",
    "threads": "psync",
}
# fio's buffers go into huge pages as ours do: in 4 KiB pages large blocks are split into more
# requests where a drive takes few segments in one. glibc has an option for it, fio has none.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class FioError(DualbladeError):
    """fio is missing, or did not run the job."""


def measure(options: Options) -> tuple[int, str]:
    """Exit status and report of --compare."""
    program = shutil.which("fio")
    if program is None:
        raise FioError("fio is not installed: apt install fio")
    region = prepare(options)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    interrupted = False
    with Progress() as progress:
        for number in range(1, options.rounds + 1):
            with open_device(options, region) as device:
                title = f"round {number} of {options.rounds}, dualblade"
                progress.restart()
                result = Job(options, region, device).run(_reporter(progress, title))
            region = replace(region, layout_from=None)  # what is read is there from now on
            interrupted = result.interrupted
            if interrupted:
                break
            ours.append(fio_report.job(options, result))
            try:
                command = fio_command(options, program, result.engine, region.size_bytes)
                progress.say(f"round {number} of {options.rounds}, fio")
                theirs.append(run_fio(command, options.bs))
            except KeyboardInterrupt:
                interrupted = True
                break
    if not theirs:
        raise KeyboardInterrupt
    ours = ours[: len(theirs)]
    summary = summarise(ours, theirs)
    if options.output_format == "normal":
        engines = (result.engine, _ENGINES[result.engine])
        return int(interrupted), _text(options, engines, summary, command, len(ours), interrupted)
    whole = fio_report.document(options, ours, time.time())
    whole["fio"] = theirs
    whole["compare"] = {"command": command, "interrupted": interrupted, "summary": summary}
    return int(interrupted), json.dumps(whole, indent=2) + "\n"


def _reporter(progress: Progress, title: str) -> Callable[[Job, float], None]:
    return lambda job, elapsed_s: progress.moved(title, elapsed_s, job.moved_bytes())


# ---- fio -----------------------------------------------------------------------------------------


def fio_command(options: Options, program: str, engine: str, size_bytes: int) -> list[str]:
    """fio's command line for the same job."""
    jobs, size, io_size = options.numjobs, size_bytes, options.io_size or size_bytes
    filename = options.filename
    if engine == "nvme":  # fio takes the character device alone
        filename = nvme_character_node(filename) or filename
    filename = filename.replace(":", "\\:")  # a bare one separates the names of two files
    command = [program, f"--name={options.name}", "--group_reporting", "--scramble_buffers=0"]
    command += [f"--filename={filename}", f"--rw={options.rw}", f"--bs={options.bs}"]
    command.append(f"--ioengine={_ENGINES[engine]}")
    if engine != "nvme":  # there is no page cache to go past, and O_DIRECT is refused
        command.append(f"--direct={int(options.direct)}")
    if engine == "threads":
        # psync has one request in flight: as many processes as Device has threads, each with its
        # own part of the file, so that together they do the same work.
        blocks = size // options.bs
        threads = min(jobs * options.iodepth, WORKERS_MAX, blocks)
        size = blocks // threads * options.bs
        io_size = max(options.bs, io_size * jobs // threads)
        jobs = threads
        command.append(f"--offset_increment={size}")
    else:
        command.append(f"--iodepth={options.iodepth}")
        if "iodepth_batch" in options.given:
            command.append(f"--iodepth_batch={options.iodepth_batch}")
    command += [f"--numjobs={jobs}", f"--size={size}", f"--io_size={io_size}"]
    if options.runtime is not None:
        command.append(f"--runtime={round(options.runtime * 1000)}ms")
    if options.time_based:
        command.append("--time_based")
    if len(options.directions) == 2:
        command.append(f"--rwmixread={options.rwmixread}")
    if engine == "nvme":
        command.append("--cmd_type=nvme")
    if engine in ("nvme", "uring"):
        command.append("--registerfiles")  # as Device does
        flags = ("fixedbufs", "hipri", "sqthread_poll")
        command += [f"--{name}=1" for name in flags if getattr(options, name)]
    if options.end_fsync:
        command.append("--end_fsync=1")
    percentiles = ":".join(f"{p:g}" for p in options.percentiles[:20])
    command += [f"--percentile_list={percentiles}", f"--randseed={options.randseed}"]
    return [*command, "--output-format=json"]


def run_fio(command: list[str], block_bytes: int) -> dict[str, Any]:
    """The one job of fio's report, with the CPU time that it took. Raises FioError.

    fio's own count leaves out the kernel's workers that serve io_uring, and ours has them; so the
    whole of its processes is taken, less what the same job of one block takes to start and end.
    """
    program, *rest = command
    shortest = [word for word in rest if word != "--time_based"] + [f"--io_size={block_bytes}"]
    _, start_s = _run([program, *shortest])
    job, whole_s = _run(command)
    job["dualblade"] = {"cpu_seconds": max(0.0, whole_s - start_s), "start_cpu_seconds": start_s}
    return job


def _run(command: list[str]) -> tuple[dict[str, Any], float]:
    """fio's job, and the CPU time of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env={**os.environ, **_ENVIRONMENT},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        # fio puts notes in front of its JSON.
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    except (ValueError, LookupError):
        job = {"error": done.returncode or -1}
    if done.returncode or job["error"]:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise FioError(f"fio failed with status {done.returncode}: {words[-1]} ({command})")
    return job, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# ---- figures -------------------------------------------------------------------------------------


def figures(job: dict[str, Any]) -> dict[str, float]:
    """What is compared, of a job of fio's JSON; ours and fio's are read alike."""
    found: dict[str, float] = {}
    moved = 0
    for name in ("read", "write"):
        part = job[name]
        if part["total_ios"] == 0:
            continue
        moved += part["io_bytes"]
        found[f"{name} MB/s"] = part["bw_bytes"] / 1e6
        found[f"{name} IOPS"] = part["iops"]
        found[f"{name} clat mean us"] = part["clat_ns"]["mean"] / 1000
        percentiles = part["clat_ns"]["percentile"]
        for percent in ("50.000000", "99.000000"):
            if percent in percentiles:
                label = f"{name} clat p{float(percent):g} us"
                found[label] = percentiles[percent] / 1000
    if moved:
        found["CPU-s per GB"] = job["dualblade"]["cpu_seconds"] / (moved / 1e9)
    return found


def summarise(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Median, least and greatest of each figure of both, and the ratio of the medians."""
    our_figures = [figures(job) for job in ours]
    their_figures = [figures(job) for job in theirs]
    summary = {}
    for name in our_figures[0]:
        row: dict[str, Any] = {}
        for who, rounds in (("dualblade", our_figures), ("fio", their_figures)):
            values = [one[name] for one in rounds if name in one]
            if values:
                row[who] = {
                    "median": statistics.median(values),
                    "min": min(values),
                    "max": max(values),
                }
        if len(row) == 2:
            median = row["fio"]["median"]
            row["ratio"] = row["dualblade"]["median"] / median if median else None
            summary[name] = row
    return summary


def _text(
    options: Options,
    engines: tuple[str, str],
    summary: dict[str, dict[str, Any]],
    command: list[str],
    rounds: int,
    interrupted: bool,
) -> str:
    titles = (f"dualblade-fio, {engines[0]}", f"fio, {engines[1]}")
    lines = [
        f"{options.name}: rw={options.rw}, bs={options.bs}, iodepth={options.iodepth} in batches "
        f"of {options.iodepth_batch}, numjobs={options.numjobs}; median of {rounds} rounds "
        "(least - greatest)",
        f"  fio: {' '.join(command[1:])}",
        f"  {'':22}{titles[0]:>32}{titles[1]:>32}{'ratio':>8}",
    ]
    for name, row in summary.items():
        cells = [_cell(row[who]) for who in ("dualblade", "fio")]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "-"
        lines.append(f"  {name:22}{cells[0]:>32}{cells[1]:>32}{ratio:>8}")
    if interrupted:
        lines.append("  interrupted: these are the rounds until then")
    return "\n".join(lines) + "\n"


def _cell(values: dict[str, float]) -> str:
    return " ".join(
        (_number(values["median"]), f"({_number(values['min'])} - {_number(values['max'])})")
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
