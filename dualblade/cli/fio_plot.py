"""The picture of a run: how latencies are distributed, and throughput over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dualblade.cli.fio_jobs import Result
from dualblade.cli.fio_latency import INTERVAL_MS, Recorder
from dualblade.cli.fio_options import Options
from dualblade.errors import UnsupportedError


def plotter(path: str) -> Callable[[Options, Result], None]:
    """A function that draws into `path`. Raises UnsupportedError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "--plot needs matplotlib: pip install 'dualblade[plot]', or leave --plot out"
        ) from None

    def save(options: Options, result: Result) -> None:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for name, recorder in result.recorders.items():
            if recorder.requests:
                _draw_latency(left, name, recorder)
                _draw_throughput(right, name, recorder)
        left.set(xscale="log", xlabel="clat, microseconds", ylabel="share of requests, %")
        left.set_title("requests completed within")
        right.set(xlabel="seconds", ylabel="MB/s", ylim=(0, None))
        right.set_title(f"throughput, each {INTERVAL_MS} ms")
        for axes in (left, right):
            axes.grid(visible=True, alpha=0.3)
            if axes.lines:
                axes.legend()
        figure.suptitle(
            f"{options.rw}, bs {options.bs}, iodepth {options.iodepth} x {options.numjobs}, "
            f"{result.engine}, {options.access_path}"
        )
        figure.savefig(path, dpi=110, format=path.lower().rpartition(".")[2])

    return save


def _draw_latency(axes: Any, name: str, recorder: Recorder) -> None:
    bins = recorder.bins()
    counts = np.cumsum(list(bins.values()))
    axes.step(
        np.array(list(bins)) / 1000,
        counts / counts[-1] * 100,
        where="post",
        label=f"{name}: p50 {recorder.percentile(50) / 1000:.0f} us, "
        f"p99 {recorder.percentile(99) / 1000:.0f} us",
    )


def _draw_throughput(axes: Any, name: str, recorder: Recorder) -> None:
    """The last interval is left out when it is not a whole one."""
    count = max(1, recorder.last_ns // (INTERVAL_MS * 1_000_000))
    rates = [recorder.bytes_in_interval[i] / (INTERVAL_MS / 1000) / 1e6 for i in range(count)]
    axes.plot(np.arange(count) * INTERVAL_MS / 1000, rates, label=name, marker=".")
