"""Runs a policy's decoding in a memory cgroup of its own, one command and one answer at a time."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from decode import fields, number_in
from policies import Job

from dualblade.cli.memory_cgroup import memory_group, set_limit
from dualblade.errors import UnsupportedError

JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
"""A shell that is in the group before Python starts: all that the interpreter takes is counted."""


class PolicyError(Exception):
    """A policy that did not get through; says what happened."""


class Decode:
    """A process that decodes in a group with a limit."""

    def __init__(self, job: Job, program: str) -> None:
        self.job = job
        self.group = Path(job.group)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        command = [sys.executable, str(Path(__file__).with_name(program)), json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            ["sh", "-c", JOIN, job.group, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.interpreter_bytes = int(self._answer()["interpreter_bytes"])

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer. Raises PolicyError."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"do": what, **details}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said last tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._why_it_ended()}
        if "error" in answer:
            raise PolicyError(answer["error"])
        return answer

    def _why_it_ended(self) -> str:
        status = self.process.wait()
        if status == -signal.SIGKILL:
            return "killed by the kernel: out of memory"
        self.errors.seek(0)
        words = self.errors.read().strip().splitlines()[-1:] or [f"it ended with status {status}"]
        return words[0][:300]

    def group_counts(self) -> dict[str, float]:
        """What the group has counted since it was made."""
        v1 = (self.group / "memory.failcnt").exists()
        peak = self.group / ("memory.max_usage_in_bytes" if v1 else "memory.peak")
        oom = fields(self.group / ("memory.oom_control" if v1 else "memory.events"))
        return {
            "peak_bytes": number_in(peak) if peak.exists() else 0,
            "oom_kills": oom.get("oom_kill", 0),
        }

    def close(self) -> None:
        """Ends the process, if it has not."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@contextlib.contextmanager
def decoding(job: Job, program: str = "decode.py") -> Iterator[Decode]:
    """A new group with the job's limit, and in it the process, which runs a program beside this.
    Raises PolicyError, and UnsupportedError where no group can be made."""
    forget_cached(job.path)  # what is cached stays charged to whom it was
    with memory_group(job.limit_bytes, name="dualblade-bench") as group:
        process = Decode(replace(job, group=str(group)), program)
        try:
            yield process
        finally:
            process.close()
            forget_catalog(job.path)


def percent_of(kv_bytes: int, percent: int) -> int:
    """A limit, in bytes: so much of the KV."""
    return whole_pages(kv_bytes * percent // 100)


def whole_pages(size_bytes: int) -> int:
    """A limit as the kernel keeps it."""
    return size_bytes // mmap.PAGESIZE * mmap.PAGESIZE


def no_group() -> str | None:
    """Why no memory cgroup can be made here, or None."""
    try:
        with memory_group(1 << 30, name="dualblade-bench"):
            return None
    except UnsupportedError as error:
        return str(error)


def limit_to(group: Path, limit_bytes: int) -> None:
    """Changes the limit. Where the kernel can't reclaim enough at once it is asked again: dirty
    pages have to be written first."""
    for _ in range(100):
        try:
            set_limit(group, limit_bytes)
        except OSError:  # EBUSY
            continue
        return
    raise PolicyError(f"the kernel could not lower the limit of {group} to {limit_bytes}")


def forget_cached(path: str) -> None:
    """Writes the file's dirty pages out and drops all of them from the page cache."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def forget_catalog(path: str) -> None:
    """What a store has beside its file."""
    for left in Path(path).parent.glob(Path(path).name + ".catalog*"):
        left.unlink()
