"""What bench/budget.py prints: rows over rounds, tables, targets and whether they hold, plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import report
from policies import LIVE, POLICIES

from dualblade.memory import format_size

Row = dict[str, Any]
Target = dict[str, Any]

FLOOR_MAX = 1.15
TO_MEMMAP_MIN = 3.0
SLOWER_MAX = 1.05
TAIL_MAX = 1.5
STALL_MAX = 2.0
FLOOR_BUDGETS = (37, 62, 87, 137)
MEMMAP_BUDGET = 87
FAULTS_MAX = 8
REFAULTED_MAX = 0.01
"""Of the KV, in a step: what had been cached and had to be read again."""
STRANGE_MAX = 0.03
"""Of the KV, in a step: what is read from the drive by others before the table mentions it."""

COUNTS = (
    "cpu_s",
    "major_faults",
    "read_bytes",
    "limit_hits",
    "direct_reclaim_pages",
    "refault_pages",
    "stall_ms",
    "drive_read_bytes",
    "drive_busy_ms",
)


# ---- rows ----------------------------------------------------------------------------------------


def summarise(runs: Iterable[Row]) -> list[Row]:
    """A row for each shape, budget and policy: figures over its rounds."""
    grouped: dict[tuple[str, int, str], list[Row]] = {}
    for run in runs:
        grouped.setdefault((run["shape"], run["percent"], run["policy"]), []).append(run)
    return [summary(found) for found in grouped.values()]


def summary(runs: Sequence[Row]) -> Row:
    """Of the same policy under the same limit, round after round."""
    first = runs[0]
    row: Row = {
        **{name: first[name] for name in ("shape", "percent", "policy", "limit_bytes")},
        "label": POLICIES[first["policy"]].label,
        "note": POLICIES[first["policy"]].note,
        "error": next((run["error"] for run in runs if run["error"]), None),
    }
    if row["error"]:
        return row
    steps = [step for run in runs for step in run["steps"]]
    times = [step["ms"] for step in steps]
    medians = [statistics.median(step["ms"] for step in run["steps"]) for run in runs]
    floors = [run["floor_ms"] for run in runs]
    prefills = [prefill for run in runs for prefill in run["prefills"]]
    elapsed_ms = sum((step["ended"] - step["started"]) * 1e3 for step in steps)
    counts = {
        name: statistics.fmean(step["counts"][name] for step in steps)
        for name in COUNTS
        if name in steps[0]["counts"]
    }
    return row | {
        "step_ms": report.spread(times),
        "p99_ms": float(np.percentile(times, 99)),
        "round_ms": report.spread(medians),
        "floor_ms": None if None in floors else report.spread(floors),
        "to_floor": None
        if None in floors
        else report.spread([ms / floor for ms, floor in zip(medians, floors, strict=True)]),
        "prefill_s": report.spread([prefill["seconds"] for prefill in prefills]),
        "flush_s": report.spread([prefill["flush_s"] for prefill in prefills]),
        "stall": stall([prefill["piece_ms"] for prefill in prefills]),
        "append_max_ms": max(prefill["append_ms"]["max"] for prefill in prefills),
        "hit_rate": 1 - counts["read_bytes"] * len(steps) / sum(step["kv_bytes"] for step in steps),
        "busy": counts["drive_busy_ms"] * len(steps) / elapsed_ms
        if "drive_busy_ms" in counts
        else None,
        "per_step": counts,
        "prefill_counts": prefills[-1]["counts"],
        "peak_bytes": max(run["group"]["peak_bytes"] for run in runs),
        "oom_kills": max(run["group"]["oom_kills"] for run in runs),
        **{name: first[name] for name in ("kv_bytes", "room_bytes", "interpreter_bytes")},
        "consumer_bytes": first["consumer_bytes"],
        "drive_bytes_per_s": middle(run["drive_bytes_per_s"] for run in runs),
        "copy_bytes_per_s": middle(run["copy_bytes_per_s"] for run in runs),
        "stats": runs[-1]["stats"],
    }


def stall(pieces_ms: Iterable[Sequence[float]]) -> dict[str, Any] | None:
    """Of each prefill the longest piece over the median one."""
    ratios = [max(pieces) / statistics.median(pieces) for pieces in pieces_ms if pieces]
    return report.spread(ratios) if ratios else None


def brief_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """As it is kept."""
    bandwidth = {
        name: report.spread(found) if found and isinstance(found, list) else found
        for name, found in document["bandwidth"].items()
    }
    return {**document, "bandwidth": bandwidth, "rows": list(map(brief, document["rows"]))}


def brief(row: Row) -> Row:
    """As it is kept: of what the policy says of itself no more than a line."""
    kept = {name: value for name, value in row.items() if name != "note"}
    if row["error"]:
        return kept
    stats = {name: said for name, said in row["stats"].items() if not isinstance(said, dict)}
    return kept | {"stats": stats}


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are there."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


# ---- targets -------------------------------------------------------------------------------------


def targets(rows: Sequence[Row], live: str) -> list[Target]:
    """What was promised of the live policy, and whether it holds here."""
    found: list[Target] = []
    for shape, percent in places(rows):
        named = {
            row["policy"]: row
            for row in rows
            if (row["shape"], row["percent"]) == (shape, percent) and not row["error"]
        }
        if live in named:
            where = f"{shape}, {percent} %"
            found += [{"where": where, **each} for each in held(named, named[live], percent)]
    return found


def held(named: Mapping[str, Row], ours: Row, percent: int) -> Iterable[Target]:
    """The targets under one limit."""
    others = [row for name, row in named.items() if name not in LIVE]
    if percent in FLOOR_BUDGETS and ours["to_floor"]:
        yield at_most("step over the floor", ours["to_floor"]["median"], FLOOR_MAX)
    if percent == MEMMAP_BUDGET and "memmap" in named:
        ratio = named["memmap"]["step_ms"]["median"] / ours["step_ms"]["median"]
        yield at_least("np.memmap over ours", ratio, TO_MEMMAP_MIN)
    if others:
        best = min(others, key=pace)
        yield at_most(f"step over {best['label']}'s", pace(ours) / pace(best), SLOWER_MAX)
        first = min(others, key=lambda row: row["prefill_s"]["median"])
        ratio = ours["prefill_s"]["median"] / first["prefill_s"]["median"]
        yield at_most(f"prefill over {first['label']}'s", ratio, SLOWER_MAX)
    yield at_most("p99 over p50", ours["p99_ms"] / ours["step_ms"]["median"], TAIL_MAX)
    if ours["stall"]:
        yield at_most("longest over median piece of prefill", ours["stall"]["median"], STALL_MAX)
    if ours["peak_bytes"]:
        yield at_most("peak memory over the limit", ours["peak_bytes"] / ours["limit_bytes"], 1.0)
    counts = ours["per_step"]
    yield at_most("major faults a step", counts["major_faults"], FAULTS_MAX)
    if "refault_pages" in counts:
        refaulted = counts["refault_pages"] * 4096 / ours["kv_bytes"]
        yield at_most("evicted and read again, of the KV a step", refaulted, REFAULTED_MAX)


def pace(row: Row) -> float:
    """What policies are compared by: to the floor, so that a drive that has become slower in
    between, which the floor was measured with, does not decide."""
    figures = row["to_floor"] or row["step_ms"]
    return float(figures["median"])


def at_most(what: str, value: float, limit: float) -> Target:
    """A figure with an upper bound."""
    return {"what": what, "value": value, "at_most": limit, "holds": value <= limit}


def at_least(what: str, value: float, limit: float) -> Target:
    """A figure with a lower bound."""
    return {"what": what, "value": value, "at_least": limit, "holds": value >= limit}


def places(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Shapes and budgets, in their order."""
    return list(dict.fromkeys((row["shape"], row["percent"]) for row in rows))


# ---- tables --------------------------------------------------------------------------------------

HEADS = [
    "",
    "prefill s",
    "+flush",
    "worst/med",
    "ms/step",
    "p99",
    "to floor",
    "hit %",
    "MiB read",
    "busy %",
    "CPU s",
    "peak MiB",
    "limit hits",
    "refaults",
    "major",
    "",
]


def render(document: Mapping[str, Any], heads: Sequence[str]) -> str:
    """Everything as text."""
    rows, bandwidth = document["rows"], document["bandwidth"]
    lines = [*heads, bandwidth_line(bandwidth)]
    for shape, percent in places(rows):
        found = [row for row in rows if (row["shape"], row["percent"]) == (shape, percent)]
        lines += ["", title(found), report.table(HEADS, [cells(row) for row in found])]
    if document["targets"]:
        lines += ["", "Targets of dualblade live"]
        cells_of = [
            [
                target["where"],
                target["what"],
                f"{target['value']:.2f}",
                bound(target),
                "holds" if target["holds"] else "MISSED",
            ]
            for target in document["targets"]
        ]
        lines.append(report.table(["", "", "measured", "wanted", ""], cells_of, left=2))
    return "\n".join(lines)


def bound(target: Target) -> str:
    """What was wanted of a figure."""
    is_upper = "at_most" in target
    return f"<= {target['at_most']:g}" if is_upper else f">= {target['at_least']:g}"


def bandwidth_line(bandwidth: Mapping[str, Any]) -> str:
    """B and C, and how much they moved."""
    parts = []
    for name, words in (("drive_bytes_per_s", "B, fio's reads"), ("copy_bytes_per_s", "C, copies")):
        if bandwidth[name]:
            figures = report.spread([rate / 1e6 for rate in bandwidth[name]])
            parts.append(
                f"{words} {figures['median']:.0f} [{figures['min']:.0f}-{figures['max']:.0f}] MB/s"
            )
    return "; ".join([*parts, *([bandwidth["missing"]] if bandwidth["missing"] else [])])


def title(rows: Sequence[Row]) -> str:
    """The head of a table."""
    row = next((row for row in rows if not row["error"]), rows[0])
    text = f"{row['shape']}, {row['percent']} % of the KV: {format_size(row['limit_bytes'])}"
    if row["error"]:
        return text
    rooms = [each["room_bytes"] for each in rows if not each["error"]]
    floors = [each["floor_ms"]["median"] for each in rows if not each["error"] and each["floor_ms"]]
    text += f", X {format_size(int(statistics.median(rooms)))}"
    if floors:
        text += f", floor {statistics.median(floors):.0f} ms [{min(floors):.0f}-{max(floors):.0f}]"
    return text


def cells(row: Row) -> list[str]:
    """One line of a table."""
    if row["error"]:
        return [row["label"], *["-"] * (len(HEADS) - 2), row["error"]]
    counts = row["per_step"]
    return [
        row["label"],
        report.shown(row["prefill_s"], 2),
        f"{row['flush_s']['median']:.2f}",
        f"{row['stall']['median']:.1f}" if row["stall"] else "-",
        report.shown(row["step_ms"], 0),
        f"{row['p99_ms']:.0f}",
        report.shown(row["to_floor"], 2),
        f"{max(0.0, row['hit_rate']) * 100:.0f}",
        f"{counts['read_bytes'] / 2**20:.0f}",
        "-" if row["busy"] is None else f"{row['busy'] * 100:.0f}",
        f"{counts['cpu_s']:.2f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{counts['limit_hits']:.0f}",
        f"{counts['refault_pages']:.0f}" if "refault_pages" in counts else "-",
        f"{counts['major_faults']:.0f}",
        extra(row),
    ]


def extra(row: Row) -> str:
    """What the policy said of itself, in a few words, and whether somebody else used the drive."""
    stats = row["stats"]
    words = []
    if "threads" in stats:
        words.append(f"{stats['threads']} thread{'s' * (stats['threads'] > 1)}")
    if "layers_kept" in stats:
        words.append(f"{stats['layers_kept']} layers kept")
    if "groups_pagecache" in stats:
        cached, direct = stats["groups_pagecache"], stats["groups_direct"]
        words.append(f"{cached} layers cached, {direct} direct")
    counts = row["per_step"]
    strange = counts.get("drive_read_bytes", 0) - counts["read_bytes"]
    if strange > STRANGE_MAX * row["kv_bytes"]:
        words.append(f"others read {strange / 2**20:.0f} MiB a step")
    return "; ".join(words)


# ---- plots ---------------------------------------------------------------------------------------


def draw(path: str, text: str, rows: Sequence[Row]) -> None:
    """For each shape a panel of decoding with its floor, and one of prefill."""
    panels = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = [row for row in rows if row["shape"] == shape and not row["error"]]
        decode = report.Lines(f"Decode, {shape}", "memory limit, % of the KV", "ms per step")
        prefill = report.Lines(f"Prefill, {shape}", "memory limit, % of the KV", "s")
        for row in found:
            decode.add(row["label"], row["percent"], row["step_ms"])
            prefill.add(row["label"], row["percent"], row["prefill_s"])
        for percent in dict.fromkeys(row["percent"] for row in found):
            floors = [
                row["floor_ms"]["median"]
                for row in found
                if row["percent"] == percent and row["floor_ms"]
            ]
            if floors:
                decode.add("floor", percent, report.spread(floors), style="k--")
        panels += [decode, prefill]
    report.plot_lines(path, text, panels)
