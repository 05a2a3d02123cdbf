"""Measures how far a pipeline hides storage, copies and kernels behind each other."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import engine
import lockstep
import machine
import numpy as np
import report
from kernels import Attention, Timed
from policies import SHAPES

import dualblade
from dualblade.gpu import HostDevice, open_device
from dualblade.memory import format_size, parse_size
from dualblade.pipeline import Pipeline

DESCRIPTION = """\
The keys and values of a model, layer by layer, from a store to a device, and a kernel on each:
storage alone, copies alone, kernels alone, and all of it together, as a pipeline does. Efficiency
is the longest of the three alone over together: 1 is all hidden. For several parts of the layers in
the page cache, with the pipeline choosing chunk size, depth and mode, and with fixed ones.
"""
EXAMPLES = """\
examples:
  python bench/overlap.py                        256 MiB on a new file here, on the host
  python bench/overlap.py --device cuda --file /mnt/nvme/kv.img --json overlap.json
  python bench/overlap.py --ratios 0.5 --fixed 1MiBx8,4MiBx4 --rounds 9
  python bench/overlap.py --check                exits 1 where a target is missed
  python bench/overlap.py --quick                does it run? Its figures mean little

On the host copies go by a thread at a set bandwidth, and a kernel takes a set time and no
processor: --copy and --compute say how long they take, as parts of the storage's time. The bytes
are really copied, by the processors that serve the drive as well, so with few of them the drive is
slower beside the copies: "side by side, unconnected" shows what is left of it. On a GPU copies
take what they take, and a kernel is the attention of one new token, as often as it takes.
"""
RATIOS = "0.3,0.5,0.7"
"""Bytes in the page cache to bytes on the drive: the paper's DRAM:SSD."""
FIXED = "1MiBx4,1MiBx16,2MiBx8,4MiBx4,8MiBx2"
EFFICIENCY_MIN = 0.95
ADAPTIVE_MIN = 0.97
SETTLE_STEPS_MAX = 400
COPY_BYTES = 32 << 20
COPY_CHUNK_BYTES = 4 << 20
TURNS = 8
STORAGE_ONLY = {"chunk_bytes": 4 << 20, "depth": 4, "mode": "cross"}
ALONE = ("storage", "copy", "compute")
BESIDE = "side_by_side"


# ---- what runs on the device ---------------------------------------------------------------------


class StorageOnly(HostDevice):
    """The host, with staging but without the copies out of it."""

    def __init__(self) -> None:
        super().__init__(copy_bytes_per_s=1e15)

    def stream(self) -> Any:
        """A stream that copies nothing."""
        stream = super().stream()
        stream.copy_to_device = lambda dst, src: None  # noqa: ARG005
        return stream


# ---- a model's keys and values -------------------------------------------------------------------


class Model:
    """What a store has of a model, layer by layer."""

    def __init__(self, store: dualblade.TensorStore, options: argparse.Namespace) -> None:
        shape = SHAPES[options.shape]
        tokens = max(1, options.kv // (2 * options.layers * shape.row_bytes))
        self.store = store
        self.turns = options.turns
        self.groups = [[f"{layer}/k", f"{layer}/v"] for layer in range(options.layers)]
        self.nbytes = 2 * options.layers * tokens * shape.row_bytes
        rng = np.random.default_rng(0)
        for layer, keys in enumerate(self.groups):
            report.progress(f"storing layer {layer + 1} of {options.layers}")
            each = (tokens, shape.batch, shape.kv_heads, shape.head_dim)
            arrays = {key: rng.random(each, np.float32).astype(np.float16) for key in keys}
            store.put_many(arrays, group=str(layer))

    def set_ratio(self, ratio: float) -> int:
        """Has so many bytes page-cached for each on the drive, the layers spread evenly, and read
        once. How many layers that are."""
        count = len(self.groups)
        cached = round(count * ratio / (1 + ratio))
        for layer, keys in enumerate(self.groups):
            is_cached = (layer + 1) * cached // count > layer * cached // count
            self.store.set_path(str(layer), "pagecache" if is_cached else "direct")
            self.store.get_many(keys)
        return cached


def through(model: Model, pipe: Pipeline, kernel: Any = None) -> float:
    """Seconds for all layers by a pipeline, with a kernel on each; going round a few times, as a
    decoder does."""
    groups = model.groups * model.turns
    begin = time.perf_counter()
    if kernel is None:
        stream = pipe.device.current_stream()
        for _ in pipe.stream(groups):
            pass
    else:
        stream = kernel.stream
        with stream:
            for arrays in pipe.stream(groups):
                kernel.launch(arrays)
    stream.record().wait()
    return (time.perf_counter() - begin) / model.turns


class Alone:
    """Each of the three by itself, for all layers."""

    def __init__(self, model: Model, pipe: Pipeline, device: Any, kernel: Any) -> None:
        self.model = model
        self.kernel = kernel
        self.pipe = pipe
        self.stream = device.stream()
        self.arena = device.arena(COPY_BYTES)
        self.target = device.bytes_of(device.empty(COPY_BYTES, "uint8", stream=self.stream))
        # As the pipeline's arrays: kernels on them are timed.
        self.layer = [self._of_layer(device, key) for key in model.groups[0]]

    def _of_layer(self, device: Any, key: str) -> Any:
        content = self.model.store.get(key)
        array = device.empty(content.shape, content.dtype, stream=self.stream)
        self.stream.copy_to_device(device.bytes_of(array), content.reshape(-1).view(np.uint8))
        self.stream.record().wait()
        return array

    def storage(self) -> float:
        """Seconds of reading into staging memory."""
        return through(self.model, self.pipe)

    def copy(self) -> float:
        """Seconds of copying as many bytes out of staging memory."""
        begin = time.perf_counter()
        self._copy()
        self.stream.record().wait()
        return (time.perf_counter() - begin) / self.model.turns

    def _copy(self) -> None:
        left = self.model.nbytes * self.model.turns
        while left:
            for start in range(0, min(left, COPY_BYTES), COPY_CHUNK_BYTES):
                size = min(left, COPY_CHUNK_BYTES)
                part = slice(start, start + size)
                self.stream.copy_to_device(self.target[part], self.arena.array[part])
                left -= size

    def compute(self) -> float:
        """Seconds of a kernel for each layer."""
        begin = time.perf_counter()
        self._compute()
        self.kernel.stream.record().wait()
        return (time.perf_counter() - begin) / self.model.turns

    def _compute(self) -> None:
        with self.kernel.stream:
            for _ in range(self.model.turns * len(self.model.groups)):
                self.kernel.launch(self.layer)

    def side_by_side(self) -> float:
        """Seconds of all three at once, none waiting for another: what this machine can do."""
        begin = time.perf_counter()
        self._copy()
        self._compute()
        through(self.model, self.pipe)
        self.stream.record().wait()
        self.kernel.stream.record().wait()
        return (time.perf_counter() - begin) / self.model.turns

    def close(self) -> None:
        """Lets go of what it has."""
        self.stream.close()
        self.arena.close()


def measure(model: Model, options: argparse.Namespace, ratio: float) -> dict[str, Any]:
    """All about one part of the layers in the page cache."""
    report.progress(f"DRAM:SSD {ratio}: how fast is the storage?")
    cached = model.set_ratio(ratio)
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(
            model.store.pipeline(StorageOnly(), staging=options.staging, **STORAGE_ONLY)
        )
        storage_s = statistics.median(through(model, storage) for _ in range(3))
        if options.device == "cpu":
            device = HostDevice(copy_bytes_per_s=model.nbytes / (storage_s * options.copy))
            kernel: Any = Timed(device)
        else:
            device = open_device(options.device)
            kernel = Attention(device)
        stack.callback(kernel.stream.close)
        alone = Alone(model, storage, device, kernel)
        stack.callback(alone.close)
        kernel.calibrate(alone.layer, storage_s * options.compute / len(model.groups))
        pipes = {
            "adaptive": stack.enter_context(model.store.pipeline(device, staging=options.staging))
        }
        for name, given in options.fixed.items():
            pipes[name] = stack.enter_context(
                model.store.pipeline(device, staging=options.staging, **given)
            )
        settled = settle(model, pipes["adaptive"], kernel, options)
        runs = [one_round(model, pipes, kernel, alone, options, ratio, n)
                for n in range(options.rounds)]  # fmt: skip
        found = {
            "ratio": ratio,
            "cached_layers": cached,
            "device": device.describe(),
            "settled": settled,
            **summary(runs, model.nbytes),
            "stats": pipes["adaptive"].stats(),
            "runs": runs,
        }
    report.progress("")
    return found


def settle(
    model: Model, pipe: Pipeline, kernel: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Steps until the pipeline has chosen, and what they took."""
    begin = time.perf_counter()
    times = []
    for number in range(options.settle):
        stats = pipe.stats()
        lanes = [
            stats[lane] for lane in ("direct", "pagecache") if number == 0 or stats[lane]["bytes"]
        ]
        if number and all(lane["settled"] for lane in lanes):
            break
        report.progress(f"step {number + 1} of choosing")
        times.append(through(model, pipe, kernel))
    return {
        "steps": len(times),
        "seconds": time.perf_counter() - begin,
        "step_s": report.spread(times),
    }


def one_round(
    model: Model,
    pipes: dict[str, Pipeline],
    kernel: Any,
    alone: Alone,
    options: argparse.Namespace,
    ratio: float,
    number: int,
) -> dict[str, float]:
    """Seconds of everything, once each, in another order each time."""
    report.progress(f"DRAM:SSD {ratio}: round {number + 1} of {options.rounds}")
    todo: list[tuple[str, Callable[[], float]]] = [
        (name, getattr(alone, name)) for name in (*ALONE, BESIDE)
    ]
    todo += [(name, partial(through, model, pipe, kernel)) for name, pipe in pipes.items()]
    random.Random(number).shuffle(todo)
    return {name: run() for name, run in todo}


def summary(runs: Sequence[dict[str, float]], nbytes: int) -> dict[str, Any]:
    """Figures over the rounds; ratios are taken round by round."""
    names = [name for name in runs[0] if name not in ALONE]  # side by side, and together
    # What storage, copies and kernels take alone does not change from round to round; what the
    # machine does beside does.
    longest = [max(run[name] for name in ALONE) for run in runs]
    efficiency = {
        name: report.spread([most / run[name] for most, run in zip(longest, runs, strict=True)])
        for name in names
    }
    fixed = [name for name in names if name not in ("adaptive", BESIDE)]
    to_fixed = {
        name: report.spread([run[name] / run["adaptive"] for run in runs]) for name in fixed
    }
    return {
        "nbytes": nbytes,
        "seconds": {name: report.spread([run[name] for run in runs]) for name in runs[0]},
        "efficiency": efficiency,
        "adaptive_to_fixed": to_fixed,
    }


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/overlap.py", DESCRIPTION, EXAMPLES)
    parser.add_argument("--device", default="cpu", help='"cpu", the stand-in, or "cuda"')
    parser.add_argument(
        "--file", default="dualblade-bench.img", help="a new file, or with --overwrite any"
    )
    parser.add_argument("--overwrite", action="store_true", help="the file's content may go")
    parser.add_argument(
        "--kv", type=parse_size, help="keys and values of all layers (256MiB, on a GPU 1GiB)"
    )
    parser.add_argument("--layers", type=report.positive, help="of the model (32)")
    parser.add_argument("--shape", default="llama", choices=list(SHAPES), help="of the model")
    parser.add_argument(
        "--turns", type=report.positive, help=f"through all layers in one go ({TURNS})"
    )
    parser.add_argument("--ratios", help="bytes page-cached to bytes not (0.3,0.5,0.7)")
    parser.add_argument("--fixed", help=f"chunk size x depth, to compare with ({FIXED})")
    parser.add_argument("--staging", default="64MiB", type=parse_size, help="of each pipeline")
    parser.add_argument("--copy", type=float, default=1.6, help="of the storage's time (1.6)")
    parser.add_argument("--compute", type=float, default=1.3, help="of the storage's time (1.3)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    report.add_options(parser, rounds=7)
    options = parser.parse_args(arguments)
    quick = options.quick
    # The host copies as a GPU's engine would, but with the processors that serve the drive.
    usual = (256 << 20) if options.device == "cpu" else (1 << 30)
    options.kv = options.kv or (48 << 20 if quick else usual)
    options.layers = options.layers or (6 if quick else 32)
    options.rounds = 1 if quick else options.rounds
    options.turns = options.turns or (2 if quick else TURNS)
    options.settle = 2 if quick else SETTLE_STEPS_MAX
    options.size = options.kv * 5 // 4 + (64 << 20)
    try:
        text = options.ratios or ("0.5" if quick else RATIOS)
        options.ratios = [float(word) for word in text.split(",")]
        fixed = options.fixed or ("1MiBx4" if quick else FIXED)
        options.fixed = dict(fixed_of(word) for word in fixed.split(","))
    except ValueError as error:
        parser.error(str(error))
    if options.plot and (problem := report.plot_error()):
        parser.error(problem)
    return options


def fixed_of(word: str) -> tuple[str, dict[str, int]]:
    """A pipeline's options from "4MiBx8"."""
    chunk, _, depth = word.partition("x")
    return word, {"chunk_bytes": parse_size(chunk), "depth": int(depth)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    with engine.target(options) as path, tempfile.TemporaryDirectory() as state:
        os.environ["DUALBLADE_STATE_DIR"] = state  # where a store on a device keeps its index
        where = machine.describe(path)
        # The layers' paths are set, whatever memory is free.
        with dualblade.open(path, format=True, memory=options.size, live=False) as store:
            model = Model(store, options)
            rows = [measure(model, options, ratio) for ratio in options.ratios]
        lockstep.forget_catalog(path)
    found = targets(rows)
    document = {
        "benchmark": "overlap",
        "dualblade": dualblade.__version__,
        "machine": where,
        "device": options.device,
        "kv_bytes": options.kv,
        "layers": options.layers,
        "shape": options.shape,
        "turns": options.turns,
        "rounds": options.rounds,
        "rows": rows,
        "targets": found,
    }
    print(render(document, machine.summary(where)))
    report.write_json(options.json, document)
    if options.plot:
        draw(options.plot, machine.summary(where), rows)
    return int(options.check and not all(target["holds"] for target in found))


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised, and whether it holds here."""
    found = []
    for row in rows:
        alone = [row["seconds"][name]["median"] for name in ALONE]
        where = f"DRAM:SSD {row['ratio']:g}"
        if max(alone) <= 2 * min(alone):
            best = row["efficiency"]["adaptive"]["median"]
            found.append(target(where, "efficiency, adaptive", best, EFFICIENCY_MIN))
        least = min(figures["median"] for figures in row["adaptive_to_fixed"].values())
        found.append(target(where, "adaptive over the best fixed", least, ADAPTIVE_MIN))
    return found


def target(where: str, what: str, value: float, least: float) -> dict[str, Any]:
    """A figure with a lower bound."""
    return {"where": where, "what": what, "value": value, "at_least": least,
            "holds": value >= least}  # fmt: skip


def render(document: dict[str, Any], head: str) -> str:
    """Everything as text."""
    device = "the host in a GPU's place: copies at a set bandwidth, kernels of a set time"
    if document["device"] != "cpu":
        device = document["rows"][0]["device"]["model"]
    lines = [
        head,
        f"KV {format_size(document['kv_bytes'])} in {document['layers']} layers of "
        f"{document['shape']}, medians of {document['rounds']} round(s) of {document['turns']} "
        f"turns; {device}",
    ]
    for row in document["rows"]:
        lines += ["", title(row)]
        cells = []
        for name, figures in row["seconds"].items():
            rates = report.spread([row["nbytes"] / 1e6 / each for each in figures["values"]])
            cells.append([
                label(name),
                report.shown(report.spread([each * 1e3 for each in figures["values"]]), 0),
                report.shown(rates, 0),
                report.shown(row["efficiency"].get(name), 3),
                report.shown(row["adaptive_to_fixed"].get(name), 3),
                "",
            ])  # fmt: skip
        heads = ["", "ms/step", "MB/s", "efficiency", "adaptive is faster", ""]
        lines.append(report.table(heads, cells))
        for lane in ("direct", "pagecache"):
            if row["stats"][lane]["bytes"]:
                lines.append(f"{lane}: {chosen(row['stats'][lane])}")
    lines.append("")
    for each in document["targets"]:
        verdict = "holds " if each["holds"] else "MISSED"
        words = f"{each['what']} {each['value']:.3f}, >= {each['at_least']:g}"
        lines.append(f"{verdict} {each['where']}: {words}")
    return "\n".join(lines)


def title(row: dict[str, Any]) -> str:
    """The head of a table."""
    settled = row["settled"]
    return (
        f"DRAM:SSD {row['ratio']:g}: {row['cached_layers']} layers in the page cache; chosen after "
        f"{settled['steps']} steps, {settled['seconds']:.1f} s"
    )


def label(name: str) -> str:
    """As tables show it."""
    if name == BESIDE:
        return "side by side, unconnected"
    return f"{name} alone" if name in ALONE else name


def chosen(lane: dict[str, Any]) -> str:
    """What a lane came to use, and why."""
    if "chunk_bytes" not in lane:
        return f"{lane['mode']}: {lane['why']}"
    size = format_size(lane["chunk_bytes"])
    return f"{lane['depth']} x {size}, {lane['mode']}: {lane['why']}"


def draw(path: str, text: str, rows: Sequence[dict[str, Any]]) -> None:
    """Times alone and together, and efficiency."""
    times = report.Panel("All layers", "ms")
    efficiency = report.Panel("Longest alone over together", "efficiency")
    for row in rows:
        group = f"DRAM:SSD {row['ratio']:g}"
        for name, figures in row["seconds"].items():
            times.add(group, label(name), report.spread([each * 1e3 for each in figures["values"]]))
        for name, figures in row["efficiency"].items():
            efficiency.add(group, label(name), figures)
    report.plot(path, text, [times, efficiency])


if __name__ == "__main__":
    sys.exit(main())
