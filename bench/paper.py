"""The paper's experiment on a device: OPT-6.7B's shape, its policies, with and without pipeline."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import budget
import floor
import lockstep
import machine
import report
from paper_decode import DeviceJob
from policies import POLICIES, SHAPES

import dualblade
from dualblade.memory import format_size

DESCRIPTION = """\
Prefill and decode latency of OPT-6.7B's shape (32 layers, 32 heads x 128, batch 32) under memory
limits, with the paper's four policies: the page cache alone (memmap), the page cache with eviction
over a budget (fadvise), the drive alone (direct), and both (static), and dualblade as it comes
(live-spread). Every layer is brought to the device, where a kernel runs on it; with the pipeline,
and without: by a copy when it has been read.
"""
EXAMPLES = """\
examples:
  sudo python bench/paper.py                              2 GiB on a new file in this directory
  sudo python bench/paper.py --device cuda --kv 8704MiB --file /mnt/nvme/kv.img --plot paper.png
  sudo python bench/paper.py --budgets 50 --steps 8
  sudo python bench/paper.py --quick                      does it run? Its figures mean little

The paper's 8.6 GB of keys and values are scaled to --kv, its limits of 2 to 11 GB with them. On the
host in a GPU's place copies and kernels go at set rates, and the limit is raised by the memory that
stands for the GPU's own. A control group with the memory controller
is needed: root, or a delegated one.
"""
BUDGETS = (25, 50, 75, 125)
VARIANTS = (
    ("memmap", False),
    ("fadvise", False),
    ("direct", False),
    ("static", False),
    ("direct", True),
    ("static", True),
    ("live-spread", False),
    ("live-spread", True),
)
COPIED_LAYERS = 2
PIPED_LAYERS = 7
PAPERS = (
    ("prefill latency, at most less than the page cache alone", "33.1 %", "25.4 %"),
    ("decode latency, less than the page cache alone", "8.2-42.4 %", "11.7-57.8 %"),
    ("decode latency, less with the adaptive pipeline", "7-9 %", "3-5 %"),
)
"""What the paper says of its own system on its SSDs A and B: arXiv 2604.26557, by its abstract and
a secondary reading of its body."""


def measure(job: DeviceJob, options: argparse.Namespace) -> dict[str, Any]:
    """One policy under one limit; an error is part of it."""
    row: dict[str, Any] = {"error": None}
    try:
        with lockstep.decoding(job, "paper_decode.py") as child:
            without = replace(job, limit_bytes=job.limit_bytes - device_bytes(job))
            room_bytes = floor.paper_room(without, child.interpreter_bytes)
            prefill = child.ask("prefill", room_bytes=room_bytes)
            row["prefill_s"] = prefill["seconds"]
            for _ in range(options.warmup):
                child.ask("step")
            if not options.quick:
                row["choosing_steps"] = child.ask("choose")["steps"]
            child.ask("settle")
            child.ask("step")  # what was read ahead meanwhile would flatter the first
            row["step_ms"] = [child.ask("step")["ms"] for _ in range(options.steps)]
            row["stats"] = child.ask("end")["stats"]
            row["group"] = child.group_counts()
    except (lockstep.PolicyError, OSError) as error:
        row["error"] = str(error)
    return row


def device_bytes(job: DeviceJob) -> int:
    """What of the group's memory stands for a GPU's own: two layers for copies, for a pipeline the
    layer in use and those ahead of it. A GPU's memory is not charged to a group."""
    if job.device != "cpu":
        return 0
    return (PIPED_LAYERS if job.is_piped else COPIED_LAYERS) * job.layer_bytes


def run(path: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each variant in turn, under each limit, in each round."""
    shape = SHAPES["opt"]
    tokens = options.kv // (2 * options.layers * shape.row_bytes)
    steps = options.warmup + options.steps + 1
    plan = [
        (number, percent, policy, is_piped)
        for number in range(options.rounds)
        for percent in options.budgets
        for policy, is_piped in VARIANTS[:: -1 if number % 2 else 1]  # a drive drifts
        if policy in options.policies
    ]
    rows = []
    begin = time.monotonic()
    for done, (number, percent, policy, is_piped) in enumerate(plan):
        minutes = (time.monotonic() - begin) / 60
        name = POLICIES[policy].label + (", pipeline" if is_piped else "")
        report.progress(f"{done + 1}/{len(plan)}: {percent} %, {name}; {minutes:.1f} min")
        job = DeviceJob(
            policy,
            path,
            "opt",
            options.layers,
            tokens + steps,
            tokens,
            lockstep.percent_of(options.kv, percent),
            "",
            options.device,
            is_piped,
            options.copy_rate * 1e9,
            options.kernel_rate * 1e9,
        )
        job = replace(job, limit_bytes=job.limit_bytes + device_bytes(job))
        about = {"percent": percent, "policy": policy, "is_piped": is_piped, "round": number}
        rows.append(
            {**about, "limit_bytes": job.limit_bytes - device_bytes(job), **measure(job, options)}
        )
    report.progress("")
    return rows


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each limit and variant, with what it takes less than the page cache alone, and
    than itself without the pipeline."""
    grouped: dict[tuple[int, str, bool], list[dict[str, Any]]] = {}
    for each in runs:
        key = (each["percent"], each["policy"], each["is_piped"])
        grouped.setdefault(key, []).append(each)
    rows = {key: summary(found) for key, found in grouped.items()}
    for (percent, policy, is_piped), row in rows.items():
        cached = rows.get((percent, "memmap", False))
        plain = rows.get((percent, policy, False)) if is_piped else None
        row["prefill_less"] = less(row, cached, "prefill_s")
        row["decode_less"] = less(row, cached, "step_ms")
        row["pipeline_less"] = less(row, plain, "step_ms")
    return list(rows.values())


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the same variant under the same limit, round after round."""
    first = runs[0]
    row = {name: first[name] for name in ("percent", "policy", "is_piped", "limit_bytes")}
    row["label"] = POLICIES[first["policy"]].label
    row["error"] = next((each["error"] for each in runs if each["error"]), None)
    if row["error"] is None:
        row["prefill_s"] = report.spread([each["prefill_s"] for each in runs])
        row["step_ms"] = report.spread([ms for each in runs for ms in each["step_ms"]])
        row["peak_bytes"] = max(each["group"]["peak_bytes"] for each in runs)
    return row


def less(row: dict[str, Any], other: dict[str, Any] | None, name: str) -> float | None:
    """Which part less it takes than another: 0.25 is three quarters of the time."""
    if other is None or row["error"] or other["error"] or other is row:
        return None
    return 1 - row[name]["median"] / other[name]["median"]


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/paper.py", DESCRIPTION, EXAMPLES)
    budget.add_workload_options(parser)
    names = dict.fromkeys(policy for policy, _ in VARIANTS)
    parser.add_argument("--device", default="cpu", help='"cpu", the stand-in, or "cuda"')
    parser.add_argument(
        "--budgets", help=f"percent of the KV ({','.join(map(str, BUDGETS))})", metavar="N,N"
    )
    parser.add_argument("--policies", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--steps", type=report.positive, help="measured in each process (5)")
    parser.add_argument("--copy-rate", type=float, default=4.0, help="on the host: GB/s (4)")
    parser.add_argument("--kernel-rate", type=float, default=8.0, help="on the host: GB/s (8)")
    report.add_options(parser, rounds=1)
    options = parser.parse_args(arguments)
    quick = options.quick
    options.kv = options.kv or (512 << 20 if quick else 2 << 30)
    options.layers = options.layers or (8 if quick else 32)
    options.steps = options.steps or (2 if quick else 5)
    options.warmup = options.warmup or (1 if quick else 4)
    options.policies = options.policies.split(",")
    if unknown := [name for name in options.policies if name not in names]:
        parser.error(f"--policies: {unknown[0]!r} is unknown; there are {', '.join(names)}")
    text = options.budgets or ("90" if quick else ",".join(map(str, BUDGETS)))
    options.budgets = budget.numbers(parser, text)
    budget.finish_workload_options(parser, options, ["opt"], options.steps + 2)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    if problem := lockstep.no_group():
        print(f"bench/paper.py: {problem}", file=sys.stderr)
        return 1
    with budget.workplace(options) as (path, _):
        where = machine.describe(path)
        runs = run(path, options)
        lockstep.forget_catalog(path)
    rows = summarise(runs)
    document = {
        "benchmark": "paper",
        "dualblade": dualblade.__version__,
        "machine": where,
        "device": options.device,
        "copy_gb_per_s": options.copy_rate if options.device == "cpu" else None,
        "kernel_gb_per_s": options.kernel_rate if options.device == "cpu" else None,
        "kv_bytes": options.kv,
        "layers": options.layers,
        "measured_steps": options.steps,
        "rounds": options.rounds,
        "rows": rows,
        "papers_own": [
            {"figure": name, "ssd_a": ssd_a, "ssd_b": ssd_b} for name, ssd_a, ssd_b in PAPERS
        ],
        "runs": runs,
    }
    print(render(document, machine.summary(where)))
    report.write_json(options.json, document)
    if options.plot:
        draw(options.plot, machine.summary(where), rows)
    return 0


def render(document: dict[str, Any], head: str) -> str:
    """Everything as text."""
    device = document["device"]
    if device == "cpu":
        device = (
            f"the host in a GPU's place, copies at {document['copy_gb_per_s']:g} GB/s, kernels at "
            f"{document['kernel_gb_per_s']:g} GB/s"
        )
    lines = [
        head,
        f"OPT-6.7B's shape, KV {format_size(document['kv_bytes'])} in {document['layers']} layers; "
        f"medians of {document['measured_steps']} steps, {document['rounds']} round(s); {device}",
    ]
    heads = ["", "", "prefill s", "less", "ms/step", "less", "by the pipeline", "peak MiB", ""]
    for percent in dict.fromkeys(row["percent"] for row in document["rows"]):
        found = [row for row in document["rows"] if row["percent"] == percent]
        limit = format_size(found[0]["limit_bytes"])
        lines += ["", f"{percent} % of the KV: {limit}"]
        lines.append(report.table(heads, [cells(row) for row in found], left=2))
    lines += [
        "",
        "The paper's own figures (arXiv 2604.26557; Core Ultra 7 265K, RTX 5060 Ti, 2-11 GB for "
        "8.6-9.1 GB of KV), of its system:",
        report.table(["", "SSD A", "SSD B", ""], [[*each, ""] for each in PAPERS]),
    ]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    """One line of a table."""
    names = [row["label"], "pipeline" if row["is_piped"] else "copies"]
    if row["error"]:
        return [*names, *["-"] * 6, row["error"]]
    return [
        *names,
        report.shown(row["prefill_s"], 2),
        part(row["prefill_less"]),
        report.shown(row["step_ms"], 0),
        part(row["decode_less"]),
        part(row["pipeline_less"]),
        f"{row['peak_bytes'] / 2**20:.0f}",
        "",
    ]


def part(share: float | None) -> str:
    """A share as percent."""
    return "-" if share is None else f"{share * 100:.0f} %"


def draw(path: str, text: str, rows: Sequence[dict[str, Any]]) -> None:
    """Decode and prefill over the limits."""
    decode = report.Lines("Decode", "memory limit, % of the KV", "ms per step")
    prefill = report.Lines("Prefill", "memory limit, % of the KV", "s")
    for row in rows:
        if row["error"]:
            continue
        name = row["label"] + (", pipeline" if row["is_piped"] else "")
        style = "o-" if row["is_piped"] else "o--"
        decode.add(name, row["percent"], row["step_ms"], style=style)
        prefill.add(name, row["percent"], row["prefill_s"], style=style)
    report.plot_lines(path, text, [decode, prefill])


if __name__ == "__main__":
    sys.exit(main())
