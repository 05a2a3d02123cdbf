"""Measures decoding while the memory limit falls and rises again, step by step."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import budget
import engine
import lockstep
import machine
import report
from decode import fields, number_in
from floor import paper_room
from lockstep import percent_of, whole_pages
from policies import LIVE, POLICIES, SHAPES, Job

import dualblade
from dualblade.memory import format_size

DESCRIPTION = """\
Milliseconds per decode step while the memory limit falls from 140 % to 40 % of the keys and values,
in a few quick steps in the middle of a decode step, and rises again: dualblade live, beside the
static split and np.memmap. Was it killed, how slow was the worst step, when had it settled?
"""
EXAMPLES = """\
examples:
  sudo python bench/shrink.py                         2 GiB on a new file in this directory
  sudo python bench/shrink.py --policies live-spread --falls 1 --plot shrink.png
  sudo python bench/shrink.py --check                 exits 1 where a target is missed
  sudo python bench/shrink.py --quick                 does it run? Its figures mean little

A control group with the memory controller is needed, of version 1 or 2: root, or a delegated one.
"""
WORST_MAX = 2.0
SETTLED_MAX = 3
NEAR = 1.25
"""A step is a settled one if it takes at most so much of the steady time, as do the next two."""
SAMPLE_S = 0.02
SAMPLED = ("limit_bytes", "cached_bytes")
CHANGED = 0.01
"""A sample is kept in the file if one of its figures is so much other than in the last one kept."""
PAUSE_S = 0.05
INTO_STEP = 0.3
PHASES = ("before", "low", "after")


class Watch(threading.Thread):
    """Samples a group's limit and what it has in the page cache, until stopped."""

    def __init__(self, group: Path) -> None:
        super().__init__(daemon=True)
        self.is_v1 = (group / "memory.limit_in_bytes").exists()
        self.limit = group / ("memory.limit_in_bytes" if self.is_v1 else "memory.max")
        self.stat = group / "memory.stat"
        self.ended = threading.Event()
        self.samples: list[dict[str, float]] = []

    def run(self) -> None:
        """The thread."""
        while not self.ended.wait(SAMPLE_S):
            stat = fields(self.stat)
            self.samples.append(
                {
                    "at": time.monotonic(),
                    "limit_bytes": number_in(self.limit),
                    "cached_bytes": stat["cache" if self.is_v1 else "file"] - stat["shmem"],
                }
            )

    def stop(self) -> None:
        """Ends it."""
        self.ended.set()
        self.join()


class Change(threading.Thread):
    """Moves a group's limit in a few quick steps, starting so many seconds from now."""

    def __init__(self, group: Path, limits: Sequence[int], delay_s: float) -> None:
        super().__init__(daemon=True)
        self.group = group
        self.limits = limits
        self.delay_s = delay_s
        self.error: Exception | None = None
        self.took_s = 0.0

    def run(self) -> None:
        """The thread."""
        time.sleep(self.delay_s)
        begin = time.monotonic()
        try:
            for number, limit_bytes in enumerate(self.limits):
                time.sleep(PAUSE_S if number else 0)
                lockstep.limit_to(self.group, limit_bytes)
        except (lockstep.PolicyError, OSError) as error:
            self.error = error
        self.took_s = time.monotonic() - begin


def measure(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """One policy through all three phases."""
    row: dict[str, Any] = {"policy": job.policy, "label": POLICIES[job.policy].label, "error": None}
    high, low = job.limit_bytes, percent_of(options.kv, options.low)
    falling = [
        whole_pages(high - (high - low) * n // options.falls) for n in range(1, options.falls + 1)
    ]
    rising = [*falling[-2::-1], high]
    try:
        with lockstep.decoding(job) as child:
            child.ask("prefill", room_bytes=paper_room(job, child.interpreter_bytes))
            for _ in range(options.warmup):
                child.ask("step")
            child.ask("settle")
            watch = Watch(child.group)
            watch.start()
            try:
                row["steps"] = steps = {}
                for phase, limits in zip(PHASES, ([], falling, rising), strict=True):
                    steps[phase] = decode(child, limits, options.steps, steps, row)
                row["stats"] = child.ask("end")["stats"]
            finally:
                watch.stop()
                row["samples"] = watch.samples
            row["group"] = child.group_counts()
    except (lockstep.PolicyError, OSError) as error:
        row["error"] = str(error)
        return row
    return row | analyse(row["steps"])


def decode(
    child: lockstep.Decode,
    limits: Sequence[int],
    count: int,
    before: dict[str, list[dict[str, Any]]],
    row: dict[str, Any],
) -> list[dict[str, Any]]:
    """So many steps, the limit moving in the first of them."""
    change = None
    if limits:
        usual_ms = statistics.median(step["ms"] for step in list(before.values())[-1][-3:])
        change = Change(child.group, limits, usual_ms / 1e3 * INTO_STEP)
        change.start()
    steps = [child.ask("step") for _ in range(count)]
    if change:
        change.join()
        row.setdefault("changes_s", []).append(change.took_s)
        if change.error:
            raise change.error
    return steps


def analyse(steps: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Steady times, the worst step after each change, and when it had settled."""
    times = {phase: [step["ms"] for step in found] for phase, found in steps.items()}
    steady = {phase: statistics.median(ms[len(ms) // 2 :]) for phase, ms in times.items()}
    found: dict[str, Any] = {"steady_ms": steady}
    for name, (old, new) in {"fall": ("before", "low"), "rise": ("low", "after")}.items():
        worst = max(times[new])
        found[name] = {
            "worst_ms": worst,
            "worst_ratio": worst / max(steady[old], steady[new]),
            "settled_after_steps": settled(times[new], steady[new]),
        }
    return found


def settled(times: Sequence[float], steady: float) -> int:
    """Steps before the first of three in a row that are near the steady time; all if there are
    none."""
    near = [ms <= NEAR * steady for ms in times]
    return next((n for n in range(len(near)) if all(near[n : n + 3])), len(near))


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """As it is kept: steps and samples as columns, in seconds from the first step, and of the
    samples those in which something changed."""
    if row["error"]:
        return row
    begin = row["steps"][PHASES[0]][0]["started"]
    steps = {
        phase: report.columns(
            [{"at_s": step["started"] - begin, "ms": step["ms"], **step["counts"]} for step in each]
        )
        for phase, each in row["steps"].items()
    }
    samples = [
        {"at_s": each["at"] - begin, **{name: each[name] for name in SAMPLED}}
        for each in changing(row["samples"])
    ]
    residency = {
        name: said
        for name, said in (row["stats"].get("residency") or {}).items()
        if not isinstance(said, dict)
    }
    stats = {name: said for name, said in row["stats"].items() if not isinstance(said, dict)}
    return row | {
        "steps": steps,
        "samples": report.columns(samples),
        "stats": stats | {"residency": residency},
    }


def changing(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first, the last, and those between that differ from the one before them."""
    kept = list(samples[:1])
    for sample in samples[1:]:
        if any(abs(sample[name] - kept[-1][name]) > CHANGED * kept[-1][name] for name in SAMPLED):
            kept.append(sample)
    return kept if kept[-1:] == list(samples[-1:]) else [*kept, samples[-1]]


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of the live policies, and whether it holds here."""
    found = []
    for row in rows:
        if row["policy"] not in LIVE:
            continue
        lived = row["error"] is None
        found.append({"where": row["label"], "what": "ran to its end", "holds": lived})
        for name in ("fall", "rise") if lived else ():
            worst, count = row[name]["worst_ratio"], row[name]["settled_after_steps"]
            words = f"{name}: worst step {worst:.2f} of the larger steady time, <= {WORST_MAX:g}"
            found.append({"where": row["label"], "what": words, "holds": worst <= WORST_MAX})
            words = f"{name}: settled after {count} steps, <= {SETTLED_MAX}"
            found.append({"where": row["label"], "what": words, "holds": count <= SETTLED_MAX})
    return found


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/shrink.py", DESCRIPTION, EXAMPLES)
    budget.add_workload_options(parser)
    parser.add_argument("--shape", default="llama", choices=list(SHAPES), help="of the model")
    names = "live-spread,static,memmap"
    parser.add_argument("--policies", default=names, help=f"of {', '.join(POLICIES)} ({names})")
    parser.add_argument("--high", type=report.positive, default=140, help="percent of the KV (140)")
    parser.add_argument("--low", type=report.positive, help="percent of the KV (40)")
    parser.add_argument("--falls", type=report.positive, default=4, help="in so many steps (4)")
    parser.add_argument("--steps", type=report.positive, help="in each of three phases (12)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    report.add_options(parser, rounds=1)
    options = parser.parse_args(arguments)
    options.steps = options.steps or (4 if options.quick else 12)
    options.low = options.low or (70 if options.quick else 40)
    options.policies = options.policies.split(",")
    if unknown := [name for name in options.policies if name not in POLICIES]:
        parser.error(f"--policies: {unknown[0]!r} is unknown; there are {', '.join(POLICIES)}")
    if options.low >= options.high:
        parser.error("--low is less than --high")
    budget.finish_workload_options(parser, options, [options.shape], 3 * options.steps)
    return options


def run(path: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each policy in turn, in each round."""
    row_bytes = SHAPES[options.shape].row_bytes
    tokens = options.kv // (2 * options.layers * row_bytes)
    steps = options.warmup + 3 * options.steps
    prompt = tokens - steps // 2
    limit_bytes = percent_of(options.kv, options.high)
    rows = []
    for number in range(options.rounds):
        for policy in options.policies:
            report.progress(f"{POLICIES[policy].label}, round {number + 1}")
            job = Job(
                policy, path, options.shape, options.layers, prompt + steps, prompt, limit_bytes, ""
            )
            rows.append({"round": number, **measure(job, options)})
    report.progress("")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    if problem := lockstep.no_group():
        print(f"bench/shrink.py: {problem}", file=sys.stderr)
        return 1
    with engine.target(options) as path, tempfile.TemporaryDirectory() as state:
        os.environ["DUALBLADE_STATE_DIR"] = state
        where = machine.describe(path)
        rows = run(path, options)
    found = targets(rows)
    print(render(rows, found, where, options))
    report.write_brief(
        options.json,
        {
            "benchmark": "shrink",
            "dualblade": dualblade.__version__,
            "machine": where,
            "kv_bytes": options.kv,
            "layers": options.layers,
            "shape": options.shape,
            "percent": [options.high, options.low, options.high],
            "falls": options.falls,
            "rows": list(map(brief, rows)),
            "targets": found,
        },
    )
    if options.plot:
        draw(options.plot, machine.summary(where), rows)
    return int(options.check and not all(target["holds"] for target in found))


def render(
    rows: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
    where: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """The table."""
    heads = ["", "steady ms", "", "", "fall: worst", "ratio", "settled after"]
    heads += ["rise: worst", "ratio", "settled after", ""]
    cells = []
    for row in rows:
        if row["error"]:
            cells.append([row["label"], *["-"] * (len(heads) - 2), row["error"]])
            continue
        cells.append([row["label"], *(f"{row['steady_ms'][phase]:.0f}" for phase in PHASES)])
        for name in ("fall", "rise"):
            figures = row[name]
            cells[-1] += [f"{figures['worst_ms']:.0f}", f"{figures['worst_ratio']:.2f}"]
            cells[-1].append(f"{figures['settled_after_steps']} steps")
        cells[-1].append("")
    lines = [
        machine.summary(where),
        f"{options.shape}, KV {format_size(options.kv)} in {options.layers} layers; the limit goes "
        f"from {options.high} % to {options.low} % in {options.falls} and back, {options.steps} "
        "steps each",
        "",
        report.table(heads, cells),
        "",
        *(f"{'holds ' if each['holds'] else 'MISSED'} {each['where']}, {each['what']}"
          for each in found),
    ]  # fmt: skip
    return "\n".join(lines)


def draw(path: str, text: str, rows: Sequence[dict[str, Any]]) -> None:
    """For each policy the time of each step, and beside it the limit and what is resident."""
    panels = []
    for row in rows:
        if row["error"] or row["round"]:
            continue
        steps = [step for phase in PHASES for step in row["steps"][phase]]
        begin = steps[0]["started"]
        times = report.Lines(f"{row['label']}: time of a step", "s", "ms per step")
        for step in steps:
            for at in (step["started"], step["ended"]):
                times.add("decode step", at - begin, report.spread([step["ms"]]), style="-")
        memory = report.Lines(f"{row['label']}: memory", "s", "MiB")
        for sample in row["samples"]:
            for name, label, style in (
                ("limit_bytes", "limit", "k--"),
                ("cached_bytes", "page cache", "-"),
            ):
                figures = report.spread([sample[name] / 2**20])
                memory.add(label, sample["at"] - begin, figures, style=style)
        panels += [times, memory]
    if panels:
        report.plot_lines(path, text, panels)


if __name__ == "__main__":
    sys.exit(main())
