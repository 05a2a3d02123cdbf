"""One policy's prefill and decode in a process of its own, step by step as its parent says.

Run by bench/lockstep.py: the first argument is the job as JSON, each line of standard input is a
command as JSON, and each answer is a line of JSON on standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from policies import POLICIES, Array, Job, Policy

CHECKED_LAYERS = 4
CHECKED_ROWS = 16


class Rows:
    """What each token's keys and values are: told from the layer, the token and which of the two,
    so that any of them can be checked."""

    def __init__(self, job: Job) -> None:
        words = job.of.row_bytes // 8
        self.base = np.frombuffer(random.Random(1).randbytes(words * 8), np.uint64)
        self.memory = np.zeros((2, job.of.piece_tokens, words), np.uint64)

    def make(self, layer: int, first: int, count: int) -> tuple[Array, Array]:
        """New tokens' keys and values, [tokens, row_bytes] of uint8, until the next call."""
        for which in (0, 1):
            out = self.memory[which, :count]
            np.add(self.base, self._seeds(layer, which, np.arange(first, first + count)), out=out)
        keys, values = self.memory[:, :count].view(np.uint8)
        return keys, values

    def check(self, layer: int, pair: tuple[Array, Array], tokens: int) -> None:
        """Raises ValueError if a token is missing, or a sample of rows is not what was made."""
        count = min(CHECKED_ROWS, tokens)
        # The newest always: it is the one that a cache of old pages would miss.
        numbers = np.array([tokens - 1, *random.sample(range(tokens), count - 1)])
        for which, array in enumerate(pair):
            expected = self.base + self._seeds(layer, which, numbers)
            if len(array) != tokens or (array[numbers].view(np.uint64) != expected).any():
                raise ValueError(
                    f"the {('keys', 'values')[which]} of layer {layer} at {tokens} tokens are not "
                    "what was appended"
                )

    @staticmethod
    def _seeds(layer: int, which: int, tokens: Array) -> Array:
        seeds = (tokens.astype(np.uint64) * 2 + which) * 4096 + layer
        return (seeds * np.uint64(0x9E3779B97F4A7C15))[:, None]


class Counters:
    """What the kernel counts for the process, its memory cgroup and the drive below its file."""

    def __init__(self, job: Job) -> None:
        self.group = Path(job.group)
        self.is_v1 = (self.group / "memory.limit_in_bytes").exists()
        status = os.stat(job.path)
        number = status.st_rdev or status.st_dev
        self.drive = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")

    def sample(self) -> dict[str, float]:
        """Counts that only grow; what this kernel does not count is left out."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        found: dict[str, float] = {
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "major_faults": usage.ru_majflt,
            "read_bytes": fields("/proc/self/io").get("read_bytes", 0),
        }
        stat = fields(self.group / "memory.stat")
        if self.is_v1:
            found["limit_hits"] = number_in(self.group / "memory.failcnt")
        else:
            found["limit_hits"] = fields(self.group / "memory.events")["max"]
            found["direct_reclaim_pages"] = stat.get("pgscan_direct", 0)
        if "workingset_refault_file" in stat:
            found["refault_pages"] = stat["workingset_refault_file"]
        pressure = self.group / "memory.pressure"
        for path in (pressure, Path("/proc/pressure/memory")):
            if path.exists():
                first = path.read_text().splitlines()[0]
                found["stall_ms"] = int(first.rpartition("total=")[2]) / 1000
                break
        if self.drive.exists():
            drive = self.drive.read_text().split()
            found["drive_read_bytes"] = int(drive[2]) * 512
            found["drive_busy_ms"] = int(drive[9])
        return found

    def unreclaimable_bytes(self) -> int:
        """What the group has that is neither page cache nor can be dropped."""
        stat = fields(self.group / "memory.stat")
        if self.is_v1:
            kernel = self.group / "memory.kmem.usage_in_bytes"
            return stat["rss"] + stat["shmem"] + (number_in(kernel) if kernel.exists() else 0)
        return stat["anon"] + stat["shmem"] + stat.get("kernel", stat.get("slab", 0))


def fields(path: str | os.PathLike[str]) -> dict[str, int]:
    """Lines "name 123" or "name: 123" as numbers."""
    pairs = (line.replace(":", " ").split()[:2] for line in Path(path).read_text().splitlines())
    return {name: int(value) for name, value in pairs}


def number_in(path: Path) -> int:
    """The number that a file holds."""
    return int(path.read_text())


class Decoder:
    """Prefill and decode as a model does them, on one policy."""

    def __init__(self, job: Job, policy: Policy) -> None:
        self.job = job
        self.policy = policy
        self.rows = Rows(job)
        self.counters = Counters(job)

    def ready(self) -> dict[str, Any]:
        """What the interpreter takes, before anything is opened."""
        return {"interpreter_bytes": self.counters.unreclaimable_bytes()}

    def prefill(self, room_bytes: int) -> dict[str, Any]:
        """A piece of the prompt after the other, through all layers. Making it is not timed."""
        job = self.job
        begin = time.perf_counter()
        self.policy.open(room_bytes)
        open_s = time.perf_counter() - begin
        before = self.counters.sample()
        appends: list[float] = []
        pieces: list[float] = []
        for first in range(0, job.prompt, job.of.piece_tokens):
            count = min(job.of.piece_tokens, job.prompt - first)
            for layer in range(job.layers):
                rows = self.rows.make(layer, first, count)
                begin = time.perf_counter()
                self.policy.append(layer, *rows)
                appends.append(time.perf_counter() - begin)
            if count == job.of.piece_tokens:  # a shorter one is not compared with the others
                pieces.append(sum(appends[-job.layers :]))
        after = self.counters.sample()
        begin = time.perf_counter()
        self.policy.flush()
        return {
            "open_s": open_s,
            "seconds": sum(appends),
            "flush_s": time.perf_counter() - begin,
            "append_ms": {"median": statistics.median(appends) * 1e3, "max": max(appends) * 1e3},
            "piece_ms": [seconds * 1e3 for seconds in pieces],
            "counts": difference(after, before),
            "stats": self.policy.stats(),
        }

    def step(self) -> dict[str, Any]:
        """Every layer's keys and values, and one more token for it. Checking is not timed."""
        job, policy = self.job, self.policy
        tokens = self.tokens
        checked = set(random.sample(range(job.layers), min(CHECKED_LAYERS, job.layers)))
        before = self.counters.sample()
        started = time.monotonic()
        untimed = 0.0
        for layer in range(job.layers):
            pair = policy.fetch(layer)
            begin = time.perf_counter()
            if layer in checked:
                self.rows.check(layer, pair, tokens)
            del pair  # a consumer has one layer at a time
            rows = self.rows.make(layer, tokens, 1)
            untimed += time.perf_counter() - begin
            policy.append(layer, *rows)
        ended = time.monotonic()
        after = self.counters.sample()
        self.tokens += 1
        return {
            "ms": (ended - started - untimed) * 1e3,
            "started": started,
            "ended": ended,
            "kv_bytes": 2 * job.layers * tokens * job.of.row_bytes,
            "counts": difference(after, before),
        }

    def run(self) -> None:
        """Answers commands until there are no more."""
        say(self.ready())
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "prefill":
                self.tokens = self.job.prompt
                say(self.prefill(command["room_bytes"]))
            elif command["do"] == "step":
                say(self.step())
            elif command["do"] == "settle":
                self.policy.settle()
                say({})
            else:
                say({"stats": self.policy.stats()})
                self.policy.close()


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """What was counted in between."""
    return {name: after[name] - before[name] for name in after}


def say(answer: dict[str, Any]) -> None:
    """One line to the parent."""
    print(json.dumps(answer), flush=True)


def main() -> None:
    """The process. An error is its last answer."""
    die_with_parent()
    job = Job(**json.loads(sys.argv[1]))
    try:
        Decoder(job, POLICIES[job.policy](job)).run()
    except Exception as error:  # noqa: BLE001  whatever it is, the parent has a row for it
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        sys.exit(1)


def die_with_parent() -> None:
    """A killed benchmark leaves no process behind that holds the file."""
    pr_set_pdeathsig, sigkill = 1, 9
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, sigkill)


if __name__ == "__main__":
    main()
