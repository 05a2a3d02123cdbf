"""Measures decoding under memory limits: dualblade beside the paper, page cache and O_DIRECT."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import budget_report
import engine
import floor
import lockstep
import machine
import report
from policies import POLICIES, SHAPES, Job

import dualblade
from dualblade.memory import format_size, parse_size

DESCRIPTION = """\
Prefill, and milliseconds per decode step, under memory limits from 25 % to 150 % of the keys and
values: np.memmap, posix_fadvise, buffered pread, O_DIRECT, the paper's static split, dualblade.
Each step reads every layer whole and appends a token. Each policy runs in a process and a memory
cgroup of its own, in turn on one file, beside the floor: max((KV - X) / B, X / C).
"""
EXAMPLES = """\
examples:
  sudo python bench/budget.py                              2 GiB on a new file in this directory
  sudo python bench/budget.py --file /mnt/nvme/kv.img --json budget.json --plot budget.png
  sudo python bench/budget.py --budgets 87 --policies memmap,live-spread --rounds 3
  sudo python bench/budget.py --shape both --check         exits 1 where a target is missed
  sudo python bench/budget.py --quick                      does it run? Its figures mean little

A control group with the memory controller is needed, of version 1 or 2: root, or a delegated one.
fio gives the floor (apt install fio). bench/README.md says what is measured, and how.
"""
BUDGETS = (25, 37, 62, 87, 112, 137)
COPY_BYTES = 2 << 30
SPARE_BYTES = 32 << 20
"""Of the file: what a store keeps for itself."""


# ---- one policy under one limit ------------------------------------------------------------------


class Bench:
    """The file, what is measured on it between the policies, and the options."""

    def __init__(self, path: str, options: argparse.Namespace, state: str) -> None:
        self.path = path
        self.options = options
        self.drive = floor.Drive(path, options.kv // 2)
        layer_bytes = options.kv // options.layers
        size = min(COPY_BYTES, options.kv)
        self.copy = floor.Copy(os.path.join(state, "copy"), size, layer_bytes)
        self.drive_rates: list[float] = []
        self.copy_rates: list[float] = []
        report.progress("fio: which block size reads fastest")
        self.drive.calibrate()

    def job(self, shape: str, percent: int, policy: str) -> Job:
        """So many tokens that the KV has its size in the middle of the measured steps."""
        options = self.options
        row_bytes = SHAPES[shape].row_bytes
        tokens = options.kv // (2 * options.layers * row_bytes)
        steps = options.warmup + options.steps + 2  # two run in again after a probe
        prompt = max(1, tokens - steps + options.steps // 2)
        limit_bytes = lockstep.percent_of(options.kv, percent)
        return Job(
            policy, self.path, shape, options.layers, prompt + steps, prompt, limit_bytes, ""
        )

    def measure(self, job: Job) -> dict[str, Any]:
        """All about one policy under one limit; an error is part of it."""
        row: dict[str, Any] = {"error": None}
        try:
            with lockstep.decoding(job) as child:
                row["interpreter_bytes"] = child.interpreter_bytes
                row["consumer_bytes"] = job.consumer_bytes
                self._decode(job, child, row)
                row["group"] = child.group_counts()
        except (lockstep.PolicyError, OSError) as error:
            row["error"] = str(error)
        return row

    def _decode(self, job: Job, child: lockstep.Decode, row: dict[str, Any]) -> None:
        paper_bytes = floor.paper_room(job, child.interpreter_bytes)
        row["prefills"] = [child.ask("prefill", room_bytes=paper_bytes)]
        for _ in range(self.options.warmup):
            child.ask("step")
        child.ask("settle")
        probes = [self._probe()]
        steps: list[dict[str, Any]] = []
        half = 0 if self.options.quick else self.options.steps // 2
        for count in (half, self.options.steps - half) if half else (self.options.steps,):
            child.ask("step")  # what was read ahead during the probe would flatter the first
            steps += [child.ask("step") for _ in range(count)]
            probes.append(self._probe())
        row["steps"] = steps
        row["stats"] = child.ask("end")["stats"]
        rates = [rate for rate, _ in probes if rate is not None]
        self.drive_rates += rates
        copies = [rate for _, rate in probes]
        self.copy_rates += copies
        kv_bytes = statistics.median(step["kv_bytes"] for step in steps)
        room_bytes = floor.room(job, child.interpreter_bytes, kv_bytes)
        row |= {
            "kv_bytes": kv_bytes,
            "room_bytes": room_bytes,
            "drive_bytes_per_s": statistics.median(rates) if rates else None,
            "copy_bytes_per_s": statistics.median(copies),
        }
        row["floor_ms"] = floor.step_ms(
            kv_bytes, room_bytes, row["drive_bytes_per_s"], row["copy_bytes_per_s"]
        )

    def _probe(self) -> tuple[float | None, float]:
        """B and C, now: between the steps, since what other machines on the same host do to the
        memory changes from minute to minute by more than what is to be told apart."""
        return self.drive.probe(), self.copy.probe()

    def run(self) -> list[dict[str, Any]]:
        """Each policy in turn, under each limit, in each round."""
        options = self.options
        rows: list[dict[str, Any]] = []
        begin = time.monotonic()
        plan = [
            (number, shape, percent)
            for number in range(options.rounds)
            for shape in options.shapes
            for percent in options.budgets
        ]
        for done, (number, shape, percent) in enumerate(plan):
            minutes = (time.monotonic() - begin) / 60
            left = f", {minutes / done * (len(plan) - done):.0f} min left" if done else ""
            where = f"{done + 1}/{len(plan)}: {shape}, {percent} %, round {number + 1}"
            pace = f"{minutes:.1f} min{left}"
            found = []
            for policy in options.policies:
                report.progress(f"{where}, {POLICIES[policy].label}; {pace}")
                job = self.job(shape, percent, policy)
                about = {
                    "shape": shape,
                    "percent": percent,
                    "policy": policy,
                    "round": number,
                    "limit_bytes": job.limit_bytes,
                }
                found.append(about | self.measure(job))
            for again in range(2, options.prefills + 1):
                report.progress(f"{where}, prefill {again} of {options.prefills}; {pace}")
                for row in rivals_in_prefill(found):
                    self._prefill_again(self.job(shape, percent, row["policy"]), row)
            rows += found
        report.progress("")
        return rows

    def _prefill_again(self, job: Job, row: dict[str, Any]) -> None:
        """Once more, in a process of its own: it takes so little that one alone says little."""
        try:
            with lockstep.decoding(job) as child:
                room_bytes = floor.paper_room(job, child.interpreter_bytes)
                row["prefills"].append(child.ask("prefill", room_bytes=room_bytes))
                child.ask("end")
        except (lockstep.PolicyError, OSError) as error:
            row["error"] = str(error)


def rivals_in_prefill(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that may be the fastest after all: at most twice as slow as the one that is so far."""
    found = [row for row in rows if not row["error"]]
    fastest_s = min((row["prefills"][0]["seconds"] for row in found), default=0.0)
    return [row for row in found if row["prefills"][0]["seconds"] <= 2 * fastest_s]


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/budget.py", DESCRIPTION, EXAMPLES)
    add_workload_options(parser)
    parser.add_argument("--shape", default="llama", choices=[*SHAPES, "both"], help="of the model")
    parser.add_argument(
        "--budgets", help=f"percent of the KV ({','.join(map(str, BUDGETS))})", metavar="N,N"
    )
    parser.add_argument("--policies", default="all", help="all, or names: " + ", ".join(POLICIES))
    parser.add_argument("--steps", type=report.positive, help="measured in each process (6)")
    parser.add_argument(
        "--prefills", type=report.positive, help="in a round, of those that are fast (5)"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    report.add_options(parser, rounds=1)
    options = parser.parse_args(arguments)
    options.shapes = list(SHAPES) if options.shape == "both" else [options.shape]
    quick = options.quick
    options.budgets = numbers(parser, options.budgets or ("90" if quick else None))
    options.steps = options.steps or (2 if quick else 6)
    options.prefills = options.prefills or (2 if quick else 5)
    finish_workload_options(parser, options, options.shapes, options.steps + 2)
    wanted = list(POLICIES) if options.policies == "all" else options.policies.split(",")
    if unknown := [name for name in wanted if name not in POLICIES]:
        parser.error(f"--policies: {unknown[0]!r} is unknown; there are {', '.join(POLICIES)}")
    options.policies = wanted
    return options


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Of every benchmark that decodes on a file."""
    parser.add_argument(
        "--file", default="dualblade-bench.img", help="a new file, or with --overwrite any"
    )
    parser.add_argument("--overwrite", action="store_true", help="the file's content may go")
    parser.add_argument("--kv", type=parse_size, help="keys and values of all layers (2GiB)")
    parser.add_argument("--layers", type=report.positive, help="of the model (32)")
    parser.add_argument("--warmup", type=report.positive, help="steps before the measured ones (4)")


def finish_workload_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace, shapes: Sequence[str], steps: int
) -> None:
    """Their defaults, and what makes no sense."""
    quick = options.quick
    if options.kv is None:
        options.kv = 256 << 20 if quick else 2 << 30
    options.layers = options.layers or (8 if quick else 32)
    options.warmup = options.warmup or (2 if quick else 4)
    options.rounds = 1 if quick else options.rounds
    options.size = (options.kv * 3 // 2 + SPARE_BYTES) // 4096 * 4096
    if options.kv < 64 << 20:
        parser.error("--kv is 64MiB or more: an interpreter alone takes half of that")
    for shape in shapes:
        grown = (options.warmup + steps) * 2 * options.layers * SHAPES[shape].row_bytes
        if grown > options.kv // 2:
            text = f"--kv {format_size(options.kv)} is too little for {shape}"
            parser.error(f"{text}: these steps add {format_size(grown)}")
    if options.plot and (problem := report.plot_error()):
        parser.error(problem)


def numbers(parser: argparse.ArgumentParser, text: str | None) -> list[int]:
    """Percentages, each once, from small to large."""
    if text is None:
        return list(BUDGETS)
    words = text.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= 1000 for word in words):
        parser.error(f"--budgets: {text!r} is no list of percentages such as 37,62,87")
    return sorted({int(word) for word in words})


@contextlib.contextmanager
def workplace(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """What is measured on, and a directory for what lies beside it."""
    with (
        engine.target(options) as path,
        tempfile.TemporaryDirectory(
            dir=Path(path).parent if Path(path).is_file() else None
        ) as state,
    ):
        os.environ["DUALBLADE_STATE_DIR"] = state  # where a store on a device keeps its index
        yield path, state


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    if problem := lockstep.no_group():
        print(f"bench/budget.py: {problem}", file=sys.stderr)
        return 1
    with workplace(options) as (path, state):
        where = machine.describe(path)
        bench = Bench(path, options, state)
        try:
            rows = bench.run()
        finally:
            bench.copy.close()
            lockstep.forget_catalog(path)
    found = budget_report.summarise(rows)
    targets = budget_report.targets(found, live_policy())
    document = {
        "benchmark": "budget",
        "dualblade": dualblade.__version__,
        "machine": where,
        "kv_bytes": options.kv,
        "layers": options.layers,
        "warmup_steps": options.warmup,
        "measured_steps": options.steps,
        "rounds": options.rounds,
        "prefills": options.prefills,
        "bandwidth": floor.bandwidths(bench.drive, bench.drive_rates, bench.copy_rates),
        "rows": found,
        "targets": targets,
    }
    heads = [
        machine.summary(where),
        f"KV {format_size(options.kv)} in {options.layers} layers; medians of {options.steps} "
        f"steps after {options.warmup}, of {options.prefills} prefills; {options.rounds} round(s)",
    ]
    print(budget_report.render(document, heads))
    report.write_brief(options.json, budget_report.brief_document(document))
    if options.plot:
        budget_report.draw(options.plot, machine.summary(where), found)
    return int(options.check and not all(target["holds"] for target in targets))


def live_policy() -> str:
    """The row that dualblade.open's defaults are."""
    return f"live-{inspect.signature(dualblade.open).parameters['binding'].default}"


if __name__ == "__main__":
    sys.exit(main())
