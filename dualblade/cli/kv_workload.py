"""The kv-decode workload: a decoder's key/value cache on a store, prefilled and then read whole."""

from __future__ import annotations

import json
import math
import resource
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from os import stat as file_status
from typing import Any

import numpy as np

import dualblade
from dualblade import KVCache, TensorStore
from dualblade.cli import fio_report
from dualblade.cli.fio_jobs import Result, account
from dualblade.cli.fio_latency import Recorder
from dualblade.cli.fio_options import Options
from dualblade.cli.fio_progress import Progress
from dualblade.cli.fio_target import check_writable
from dualblade.cli.fio_verify import WrongDataError
from dualblade.header import HEADER_BYTES, Header
from dualblade.memory import format_size

_DTYPE = np.float16
_PREFILL_TOKENS = 512  # appended to a layer at a time
_MARGIN_BYTES = 16 << 20  # of a store that is made: header, rounding of each tensor
_HOW_MEASURED = (
    "a request of prefill is one append of up to 512 tokens to a layer; of decode, a read is one "
    "fetch of a whole layer (layers ahead of it are being read meanwhile) and a write the append "
    "of one token"
)


def measure(options: Options) -> tuple[int, str]:
    """Exit status and report of --workload kv-decode."""
    run = _Run(options)
    with ExitStack() as stack:
        store = stack.enter_context(_open_store(options))
        cache = stack.enter_context(
            KVCache(
                store,
                options.layers,
                options.kv_heads,
                options.head_dim,
                _DTYPE,
                options.batch,
                options.tokens + options.gen,
            )
        )
        run.store = store
        progress = stack.enter_context(Progress())
        try:
            run.prefill(cache, progress)
            run.decode(cache, progress)
        except KeyboardInterrupt:
            run.interrupted = True
        run.note_store()
    if options.output_format == "normal":
        return int(run.interrupted), run.text()
    return int(run.interrupted), json.dumps(run.document(), indent=2) + "\n"


def _open_store(options: Options) -> TensorStore:
    """A store that is there is used as it is, and has nothing more in it afterwards."""
    row = options.batch * options.kv_heads * options.head_dim * np.dtype(_DTYPE).itemsize
    tokens = options.tokens + options.gen
    needed = 2 * options.layers * (math.ceil(row * tokens / 4096) + 1) * 4096 + _MARGIN_BYTES
    is_blank_device = False
    try:
        status = file_status(options.filename)
    except OSError:
        is_block = False  # what is wrong, if it is not merely missing, opening it says
    else:
        is_block = stat.S_ISBLK(status.st_mode)
    if is_block:
        with open(options.filename, "rb") as device:
            header = Header.find(device.read(HEADER_BYTES), target=options.filename)
        if header is None or not options.allow_device_write:
            check_writable(options.filename, is_block=True, allowed=options.allow_device_write)
            is_blank_device = True
    return dualblade.open(
        options.filename,
        size=None if is_block or _exists(options.filename) else (options.size or needed),
        format=is_blank_device,
        policy=options.path,
        engine=options.engine,
    )


def _exists(path: str) -> bool:
    try:
        file_status(path)
    except FileNotFoundError:
        return False
    return True


class _Phase:
    """Figures of prefill or of decode."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.result = Result({"read": Recorder(), "write": Recorder()})
        self.moved: dict[str, int] = {}
        """Bytes so far, by direction."""
        self._started_ns = 0
        self._usage: Any = None

    def start(self) -> None:
        self.result.started_unix = time.time()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._started_ns = time.perf_counter_ns()

    def note(self, direction: str, started_ns: int, moved_bytes: int) -> None:
        """An operation that has just ended."""
        now = time.perf_counter_ns()
        recorder = self.result.recorders[direction]
        self.moved[direction] = self.moved.get(direction, 0) + moved_bytes
        if recorder.record(1, moved_bytes, 0, now - started_ns, now - self._started_ns):
            recorder.fold()

    @property
    def elapsed_s(self) -> float:
        return (time.perf_counter_ns() - self._started_ns) / 1e9

    def end(self) -> None:
        for recorder in self.result.recorders.values():
            recorder.fold()
        self.result.wall_s = self.elapsed_s
        account(self.result, self._usage, resource.getrusage(resource.RUSAGE_SELF))


class _Run:
    def __init__(self, options: Options) -> None:
        self._options = replace(options, numjobs=1)
        self.store: TensorStore | None = None
        self.interrupted = False
        self._prefill = _Phase("prefill")
        self._decode = _Phase("decode")
        self._steps_s: list[float] = []
        self._about_store: dict[str, Any] = {}
        row = (options.batch, options.kv_heads, options.head_dim)
        self._row_shape = row
        self._row_bytes = math.prod(row) * np.dtype(_DTYPE).itemsize

    def prefill(self, cache: KVCache, progress: Progress) -> None:
        """Writes the prompt, a part of it into each layer at a time."""
        phase, options = self._prefill, self._options
        phase.start()
        try:
            for first in range(0, options.tokens, _PREFILL_TOKENS):
                count = min(_PREFILL_TOKENS, options.tokens - first)
                for layer in range(options.layers):
                    k, v = self._rows(layer, first, count)
                    started = time.perf_counter_ns()
                    cache.append(layer, k, v)
                    phase.note("write", started, 2 * count * self._row_bytes)
                    progress.moved("prefill", phase.elapsed_s, phase.moved)
        finally:
            phase.end()

    def decode(self, cache: KVCache, progress: Progress) -> None:
        """Step after step, reads every layer whole and appends a token to it."""
        phase, options = self._decode, self._options
        phase.start()
        try:
            for step in range(options.gen):
                step_started = time.perf_counter_ns()
                tokens = options.tokens + step
                for layer in range(options.layers):
                    row = self._rows(layer, tokens, 1)
                    started = time.perf_counter_ns()
                    fetched = cache.fetch(layer)
                    phase.note("read", started, 2 * tokens * self._row_bytes)
                    if options.verify:
                        self._check(fetched, layer, tokens)
                    del fetched  # its memory serves the next layers
                    started = time.perf_counter_ns()
                    cache.append(layer, *row)
                    phase.note("write", started, 2 * self._row_bytes)
                self._steps_s.append((time.perf_counter_ns() - step_started) / 1e9)
                progress.moved(f"decode {step + 1}/{options.gen}", phase.elapsed_s, phase.moved)
        finally:
            phase.end()

    def _rows(self, layer: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of some tokens: each token's rows have a value of their own."""
        values = _token_values(layer, first, count)
        return tuple(  # type: ignore[return-value]
            np.ascontiguousarray(
                np.broadcast_to((values + which)[:, None, None, None], (count, *self._row_shape))
            ).view(_DTYPE)
            for which in (0, 1)
        )

    def _check(self, fetched: tuple[np.ndarray, np.ndarray], layer: int, tokens: int) -> None:
        expected = _token_values(layer, 0, tokens)
        for which, array in enumerate(fetched):
            found = array.view(np.uint16).reshape(tokens, -1)
            if array.shape[0] != tokens or (found != (expected + which)[:, None]).any():
                raise WrongDataError(
                    f"the {'kv'[which]} of layer {layer} at {tokens} tokens is not what was "
                    "appended to it"
                )

    def note_store(self) -> None:
        """What the store says of itself, while it still holds the cache."""
        assert self.store is not None
        stats = self.store.stats()
        groups = stats.pop("groups").values()
        paths = [group["path"] for group in groups]
        stats["groups_direct"] = paths.count("direct")
        stats["groups_pagecache"] = paths.count("pagecache")
        self._about_store = stats
        for phase in self._phases():
            phase.result.engine = stats["engine"]
            phase.result.interrupted = self.interrupted

    def _phases(self) -> Iterator[_Phase]:
        yield self._prefill
        if self._decode.result.wall_s:
            yield self._decode

    # ---- the report ------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """fio's JSON, with prefill and decode as two jobs, and what is the workload's own."""
        jobs = []
        for phase in self._phases():
            options = replace(self._options, name=phase.name, iodepth=1, iodepth_batch=1)
            job = fio_report.job(options, phase.result)
            job["dualblade"] |= {"path": options.path, "latency_measured": _HOW_MEASURED}
            jobs.append(job)
        started = self._prefill.result.started_unix
        whole = fio_report.document(self._options, jobs, started)
        whole["kv_decode"] = self._summary()
        return whole

    def _summary(self) -> dict[str, Any]:
        options = self._options
        summary: dict[str, Any] = {
            name: getattr(options, name)
            for name in ("layers", "kv_heads", "head_dim", "batch", "tokens", "gen", "path")
        }
        steps = np.array(self._steps_s)
        layer_bytes = 2 * self._row_bytes * options.tokens
        prefill_s = self._prefill.result.wall_s
        summary |= {
            "memory_limit_bytes": options.memory_limit,
            "cache_bytes": layer_bytes * options.layers,
            "prefill_seconds": prefill_s,
            "steps": len(steps),
            "verified": options.verify,
            "store": self._about_store,
        }
        if len(steps):
            summary |= {
                "tokens_per_second": options.batch * len(steps) / float(steps.sum()),
                "step_ms": {
                    "mean": float(steps.mean()) * 1000,
                    "min": float(steps.min()) * 1000,
                    "max": float(steps.max()) * 1000,
                    "percentile": {
                        f"{p:.6f}": float(np.percentile(steps, p)) * 1000
                        for p in options.percentiles
                    },
                },
            }
        return summary

    def text(self) -> str:
        """The report for people."""
        options, summary = self._options, self._summary()
        store = self._about_store
        lines = [
            f"kv-decode: {options.layers} layers x {options.kv_heads} heads x {options.head_dim}, "
            f"batch {options.batch}, {options.tokens} + {options.gen} tokens of float16, "
            f"{format_size(summary['cache_bytes'])} after prefill",
            f"  store        : policy={options.path}, engine={store['engine']}, "
            f"page cache budget {format_size(store['memory_budget_bytes'])}; layers direct "
            f"{store['groups_direct']}, page-cached {store['groups_pagecache']}",
        ]
        for phase in self._phases():
            result = phase.result
            per_gb = fio_report.cpu_seconds_per_gb(result)
            lines.append(
                f"  {phase.name:13}: {result.wall_s:.3f} s, {result.cpu_s:.3f} CPU-s"
                + (f", {per_gb:.3f} CPU-s/GB" if per_gb is not None else "")
            )
            for name, recorder in result.recorders.items():
                if recorder.requests:
                    lines.append(_line(name, recorder))
        if self._steps_s:
            step = summary["step_ms"]
            lines.append(
                f"  steps        : {summary['tokens_per_second']:.1f} tokens/s; a step takes "
                f"{step['mean']:.2f} ms (least {step['min']:.2f}, greatest {step['max']:.2f})"
            )
        if options.verify and self._steps_s:
            lines.append("  verify       : every layer of every step as appended")
        if self.interrupted:
            lines.append("  interrupted  : these are the figures until then")
        return "\n".join(lines) + "\n"


def _line(name: str, recorder: Recorder) -> str:
    rate = recorder.io_bytes / (recorder.last_ns / 1e9)
    p50, p99 = (recorder.percentile(p) / 1000 for p in (50, 99))
    return (
        f"    {name:5} {format_size(recorder.io_bytes)} in {recorder.requests} calls, "
        f"{rate / 1e6:.0f} MB/s; each p50 {p50:.0f} us, p99 {p99:.0f} us"
    )


def _token_values(layer: int, first: int, count: int) -> np.ndarray:
    """uint16 of each token: small enough to be an ordinary float16."""
    tokens = np.arange(first, first + count, dtype=np.uint64)
    return ((tokens * 31 + layer * 1009) & 0x3FFE).astype(np.uint16)
