"""What every benchmark shares: its common options, medians with their spread, table, JSON, plot."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Spread = dict[str, Any]
"""{"median", "min", "max", "values"} of the rounds, in the unit that its name in a row says."""

FEW_VALUES = 12


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="how often; figures are medians"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny: does it run? Figures mean little"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.add_argument(
        "--plot",
        type=plot_path,
        metavar="FILE.png",
        help="draw it: .png, .svg or .pdf (needs matplotlib)",
    )


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of both texts."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def plot_path(text: str) -> str:
    """A file to draw into, for argparse."""
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .svg or .pdf")
    return text


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def spread(values: Iterable[float]) -> Spread:
    """The median of some figures and how far they lie apart."""
    figures = list(values)
    return {
        "median": statistics.median(figures),
        "min": min(figures),
        "max": max(figures),
        "values": figures,
    }


def shown(figures: Spread | None, digits: int) -> str:
    """A spread as a table shows it: "1890 [1802-1911]"."""
    if figures is None:
        return "-"
    median, low, high = (f"{figures[name]:.{digits}f}" for name in ("median", "min", "max"))
    return median if len(figures["values"]) == 1 else f"{median} [{low}-{high}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their content. The first `left` and the last are aligned to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in [heads, *rows]:
        cells = [
            cell.ljust(width) if i < left or i == len(row) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def progress(text: str) -> None:
    """Says on a terminal what is being measured; the next line takes its place."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def write_json(path: str | None, document: Mapping[str, Any]) -> None:
    """Writes the document where one was asked for."""
    if path is not None:
        Path(path).write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def write_brief(path: str | None, document: Mapping[str, Any]) -> None:
    """Writes what a reader needs where one was asked for: a line for each row, floats of five
    digits, and of a spread the values where they are few, and the median where it is of one."""
    if path is None:
        return
    lines = []
    for name, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(_compact(each) for each in value) + "\n ]"
        else:
            text = _compact(value)
        lines.append(f" {json.dumps(name)}: {text}")
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _compact(value: Any) -> str:
    return json.dumps(_short(value), separators=(",", ":"))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        short = float(f"{value:.5g}")
        return int(short) if short.is_integer() else short
    if isinstance(value, list):
        return [_short(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"median", "min", "max", "values"}:
        count = len(value["values"])
        names = ("median",) if count == 1 else ("median", "min", "max", "values")
        value = {name: value[name] for name in names[: 4 if count <= FEW_VALUES else 3]}
    return {name: _short(each) for name, each in value.items()}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of the same names as a list for each name."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


class Panel:
    """One bar chart: for each group (a workload) a bar for each series (a contender)."""

    def __init__(self, title: str, unit: str, *, logarithmic: bool = False) -> None:
        self.title = title
        self.unit = unit
        self.logarithmic = logarithmic
        self.bars: dict[str, dict[str, Spread]] = {}

    def add(self, group: str, series: str, figures: Spread | None) -> None:
        """A bar, unless there are no figures for it."""
        if figures is not None:
            self.bars.setdefault(group, {})[series] = figures


def plot_error() -> str | None:
    """Why plots can't be drawn, or None."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        return f"--plot needs matplotlib ({error}): pip install matplotlib"
    return None


def plot(path: str, title: str, panels: Sequence[Panel]) -> None:
    """Draws the panels below each other; whiskers are the least and the most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4 * len(panels) + 1), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        groups = list(panel.bars)
        names = list(dict.fromkeys(series for bars in panel.bars.values() for series in bars))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            found = [(g, panel.bars[group][name]) for g, group in enumerate(groups)
                     if name in panel.bars[group]]  # fmt: skip
            medians = [figures["median"] for _, figures in found]
            whiskers = [
                [figures["median"] - figures["min"] for _, figures in found],
                [figures["max"] - figures["median"] for _, figures in found],
            ]
            places = [g + (i - (len(names) - 1) / 2) * width for g, _ in found]
            axis.bar(places, medians, width, yerr=whiskers, label=name, error_kw={"lw": 0.8})
        axis.set_xticks(range(len(groups)), groups)
        axis.set_ylabel(panel.unit)
        axis.set_title(panel.title)
        axis.grid(axis="y", alpha=0.3)
        if panel.logarithmic:
            axis.set_yscale("log")
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)


class Lines:
    """One chart of lines: for each series (a contender) its figures over a number."""

    def __init__(self, title: str, over: str, unit: str) -> None:
        self.title = title
        self.over = over
        self.unit = unit
        self.series: dict[str, dict[float, Spread]] = {}
        self.styles: dict[str, str] = {}

    def add(self, series: str, at: float, figures: Spread, *, style: str = "o-") -> None:
        """A point of a line, whose style is as matplotlib writes it: "k--"."""
        self.series.setdefault(series, {})[at] = figures
        self.styles[series] = style


def plot_lines(path: str, title: str, panels: Sequence[Lines]) -> None:
    """Draws the charts, two in a row; whiskers are the least and the most."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(15, 5.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        for name, points in panel.series.items():
            places = sorted(points)
            medians = [points[at]["median"] for at in places]
            whiskers = [
                [points[at]["median"] - points[at]["min"] for at in places],
                [points[at]["max"] - points[at]["median"] for at in places],
            ]
            style = panel.styles[name]
            axis.errorbar(places, medians, whiskers, fmt=style, label=name, ms=4, elinewidth=0.8)
        axis.set_xlabel(panel.over)
        axis.set_ylabel(panel.unit)
        axis.set_title(panel.title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=110)
