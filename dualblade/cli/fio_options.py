"""The options of dualblade-fio: those of fio that apply, their units, and what goes together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import dualblade

DIRECTIONS = {
    "read": ("read",),
    "write": ("write",),
    "randread": ("read",),
    "randwrite": ("write",),
    "rw": ("read", "write"),
    "randrw": ("read", "write"),
}
# What fio calls the same thing.
ENGINES = {
    "auto": "auto",
    "nvme": "nvme",
    "io_uring_cmd": "nvme",
    "uring": "uring",
    "io_uring": "uring",
    "aio": "aio",
    "libaio": "aio",
    "threads": "threads",
    "psync": "threads",
    "pylibaio": "pylibaio",
}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
BLOCK_BYTES = 4096  # what offsets on the direct path are multiples of
DEPTH_MAX = 4096
BATCHES_IN_FLIGHT = 4
BATCH_BYTES = 256 << 10
REQUEST_BYTES = 256 << 10

_FLAGS = {"--time-based", "--fixedbufs", "--hipri", "--sqthread-poll", "--end-fsync"}  # fio's
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

EPILOG = """\
sizes are fio's: 4k, 1m, 2g are powers of 1024; times are in seconds, or 500ms, 10s, 2m

how latency is measured:
  The depth is kept in flight as several batches; the oldest is waited for while the others run.
  slat is the time that handing a batch over took, clat from there until its completion was seen,
  lat both. Each counts once for every request of the batch, so with batches of more than one
  request clat is that of the batch's slowest, and it is seen when the batches before it are done.
  With --iodepth 1 it is exact for each request; --iodepth-batch 1 comes close at any depth.

examples:
  dualblade-fio --filename /mnt/nvme/f --size 4g --rw randread --bs 4k --iodepth 64 --runtime 10
  dualblade-fio --filename f --size 1g --rw write --bs 1m --iodepth 8 --fixedbufs --direct 1
  dualblade-fio --filename f --size 1g --rw randrw --rwmixread 70 --bs 64k --iodepth 32 \\
                --time-based --runtime 30 --output-format json --output result.json
  dualblade-fio --filename f --size 256m --rw randwrite --bs 16k --iodepth 16 --verify
  dualblade-fio --filename f --size 4g --rw randread --bs 64k --iodepth 16 --compare --rounds 5
  dualblade-fio --filename f --size 1g --rw randread --iodepth 64 --engine pylibaio
  dualblade-fio --filename /dev/nvme1n1 --rw randread --bs 4k --iodepth 16 --runtime 10 \\
                --time-based --hipri --sqthread-poll --fixedbufs
  dualblade-fio --filename /dev/ng1n1 --rw randread --bs 4k --iodepth 32 --runtime 10 --time-based \
                --engine nvme --fixedbufs --compare
  dualblade-fio --filename kv.img --workload kv-decode --layers 32 --kv-heads 8 --head-dim 128 \\
                --tokens 4096 --gen 32 --path dual --memory-limit 1g
  dualblade-fio --filename /dev/nvme1n1 --rw randwrite --bs 4k --runtime 10 --time-based \\
                --allow-device-write

exit status: 0 done, 1 failed, interrupted or wrong data found, 2 wrong usage
"""


@dataclass(frozen=True)
class Options:
    """A checked command line. Sizes are in bytes, times in seconds."""

    filename: str
    name: str
    rw: str
    rwmixread: int
    bs: int
    iodepth: int
    iodepth_batch: int
    numjobs: int
    size: int | None
    io_size: int | None
    runtime: float | None
    time_based: bool
    direct: bool
    engine: str
    fixedbufs: bool
    hipri: bool
    sqthread_poll: bool
    request_bytes: int | None
    end_fsync: bool
    verify: bool
    randseed: int
    allow_device_write: bool
    percentiles: tuple[float, ...]
    output: str | None
    output_format: str
    plot: str | None
    memory_limit: int | None
    compare: bool
    rounds: int
    workload: str | None
    layers: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    gen: int
    path: str
    given: dict[str, str] = field(default_factory=dict, hash=False)
    """The options of the job in fio's spelling, for "job options" of the JSON."""

    @property
    def directions(self) -> tuple[str, ...]:
        """What the job does: "read", "write", or both."""
        return DIRECTIONS[self.rw]

    @property
    def is_random(self) -> bool:
        """Whether offsets come in random order."""
        return self.rw.startswith("rand")

    @property
    def writes(self) -> bool:
        """Whether anything is written to the target."""
        return self.workload is not None or "write" in self.directions

    @property
    def access_path(self) -> str:
        """Device's name for where --direct leads."""
        return "direct" if self.direct else "pagecache"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if flag := re.fullmatch("argument (.*): ignored explicit argument .*", message, re.DOTALL):
            message = f"{flag[1]} takes no value: give it alone"
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse(arguments: Sequence[str]) -> Options:
    """Options from a command line; wrong ones end the program with one line and status 2."""
    parser = _parser()
    dashed = [_dashed(argument) for argument in arguments]
    values = parser.parse_args([word for word in dashed if word])
    try:
        if values.workload is not None:
            _check_workload(values, parser)
        return _checked(values)
    except ValueError as error:
        parser.error(str(error))


def _dashed(argument: str) -> str:
    """fio writes options with underscores, and those that take no value with =1 or =0; both are
    understood. "" for an option that is set to 0."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    if name in _FLAGS and value in {"0", "1"}:
        return name if value == "1" else ""
    return name + equals + value


# ---- units ---------------------------------------------------------------------------------------


def size(text: str) -> int:
    """Bytes of a size as fio writes it: 4096, 4k, 1m, 1.5g; always powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtp]?)(?:i?b)?", text.strip().lower(), re.ASCII)
    count = float(match[1]) * 1024 ** _UNITS[match[2]] if match else 0
    if count < 1 or count != int(count) or count >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 4096, 4k, 1m or 2g")
    return int(count)


def duration(text: str) -> float:
    """Seconds of a time as fio writes it: 10, 500ms, 2m."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", text.strip().lower(), re.ASCII)
    if match is None or match[2] not in _SECONDS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 10, 500ms or 2m")
    return float(match[1]) * _SECONDS[match[2]]


def percentile_list(text: str) -> tuple[float, ...]:
    """Percentiles separated by colons, as in fio, or by commas."""
    try:
        found = sorted({float(word) for word in re.split("[:,]", text)})
    except ValueError:
        found = []
    if not found or not 0 < found[0] <= found[-1] <= 100:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of percentiles: write 50:99:99.9, each above 0 and at most 100"
        )
    return tuple(found)


def plot_path(text: str) -> str:
    """A file to draw into, of a kind that can be drawn."""
    if not text.lower().endswith(PLOT_SUFFIXES):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a kind of picture that can be drawn: its name must end in "
            f"{', '.join(PLOT_SUFFIXES)}"
        )
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _percent(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 100")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2**63 - 1")
    return int(text)


# ---- the parser ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dualblade-fio",
        description="Measure a file or drive as fio does, through dualblade's Device, or a\n"
        "key/value cache on it through TensorStore.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=dualblade.__version__)
    _add_job(parser)
    _add_io(parser)
    _add_report(parser)
    _add_compare(parser)
    _add_workload(parser)
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is done")
    add = group.add_argument
    add("--filename", required=True, help="a file, made if missing, or a block device")
    add("--name", default="dualblade", help="of the job, for the report")
    add(
        "--rw",
        "--readwrite",
        choices=list(DIRECTIONS),
        default="read",
        metavar="RW",
        help="read, write, randread, randwrite, rw or randrw; default read",
    )
    add("--rwmixread", type=_percent, metavar="N", help="percent of reads of a mix; default 50")
    add("--bs", type=size, default=4096, metavar="SIZE", help="of a request; default 4k")
    add("--size", type=size, metavar="SIZE", help="of what is used; default: all of it")
    add("--io-size", type=size, metavar="SIZE", help="bytes that each job moves; default --size")
    add("--runtime", type=duration, metavar="TIME", help="stop after this long")
    add("--time-based", action="store_true", help="go round and round until --runtime is over")
    add("--numjobs", type=_count, default=1, metavar="N", help="threads doing the same job")
    add("--randseed", type=_seed, default=1, metavar="N", help="of random offsets; default 1")
    add(
        "--verify",
        action="store_true",
        help="write blocks that carry a checksum and read all of them back; with --rw read or "
        "randread, check what an earlier --verify wrote",
    )
    add(
        "--allow-device-write",
        action="store_true",
        help="let a raw block device be overwritten; one that is mounted, in use, or bears a "
        "filesystem or partition table is refused all the same",
    )


def _add_io(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is done")
    add = group.add_argument
    add(
        *("--engine", "--ioengine"),
        choices=list(ENGINES),
        default="auto",
        metavar="NAME",
        help="auto, nvme, uring, aio or threads; fio's io_uring_cmd, io_uring, libaio and psync "
        "mean these too. "
        "pylibaio: the PyPI package libaio instead of Device",
    )
    add("--iodepth", type=_count, default=1, metavar="N", help="requests in flight of each job")
    add(
        "--iodepth-batch",
        type=_count,
        metavar="N",
        help="requests handed over at once; default: a quarter of the depth, at most 256k",
    )
    add("--direct", choices=("0", "1"), default="1", help="0: through the page cache; default 1")
    add("--fixedbufs", action="store_true", help="register the buffers with the kernel")
    add(
        "--hipri",
        action="store_true",
        help="poll for completions instead of waiting for interrupts: uring, on a device whose "
        "driver has polling queues",
    )
    add(
        "--sqthread-poll",
        action="store_true",
        help="a kernel thread takes the requests, without system calls: uring",
    )
    add(
        "--request-bytes",
        type=size,
        metavar="SIZE",
        help="where Device splits a larger block; default: where it measures that to be best",
    )
    add("--end-fsync", action="store_true", help="flush within the measured time")
    add(
        "--memory-limit",
        type=size,
        metavar="SIZE",
        help="put this process into a memory cgroup with this limit, page cache included",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the report")
    add = group.add_argument
    add("--output-format", choices=("normal", "json", "json+"), default="normal")
    add("--output", metavar="FILE", help="write the report there, not to standard output")
    add(
        "--percentile-list",
        type=percentile_list,
        default=tuple(map(float, PERCENTILES)),
        metavar="LIST",
        help="of clat: 50:99:99.9",
    )
    add(
        "--plot",
        type=plot_path,
        metavar="FILE.png",
        help="latency distribution, throughput over time; .png, .svg or .pdf",
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beside fio")
    add = group.add_argument
    add(
        "--compare",
        action="store_true",
        help="run fio with the same job in turn and print medians and their ratio; CPU is that "
        "of all processes and of the kernel's threads for them, without starting fio",
    )
    add("--rounds", type=_count, default=5, metavar="N", help="of --compare; default 5")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a key/value cache (--workload kv-decode)",
        "Prefill writes --tokens tokens into each layer of a KVCache of float16 on a store.\n"
        "Then --gen steps: every layer is read whole, and one token is appended to it.",
    )
    add = group.add_argument
    add("--workload", choices=("kv-decode",))
    add("--layers", type=_count, metavar="N", help="default 32")
    add("--kv-heads", type=_count, metavar="N", help="default 8")
    add("--head-dim", type=_count, metavar="N", help="default 128")
    add("--batch", type=_count, metavar="N", help="sequences; default 1")
    add("--tokens", type=_count, metavar="N", help="of the prompt; default 1024")
    add("--gen", type=_count, metavar="N", help="tokens that are decoded; default 32")
    add("--path", choices=("direct", "pagecache", "dual"), help="policy of the store; default dual")


# ---- what goes together --------------------------------------------------------------------------

_WORKLOAD_DEFAULTS = {
    "layers": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "batch": 1,
    "tokens": 1024,
    "gen": 32,
    "path": "dual",
}
_BLOCK_JOB_ONLY = (
    *("rw", "rwmixread", "bs", "io_size", "runtime", "time_based", "numjobs", "randseed"),
    *("iodepth", "iodepth_batch", "direct", "fixedbufs", "hipri", "sqthread_poll"),
    *("request_bytes", "end_fsync"),
    *("compare", "plot"),
)


def _checked(values: argparse.Namespace) -> Options:
    named = vars(values)
    for name, default in _WORKLOAD_DEFAULTS.items():
        if named[name] is None:
            named[name] = default
        elif values.workload is None:
            hint = "; for a block job use --direct 0 or 1" if name == "path" else ""
            raise ValueError(f"--{name.replace('_', '-')} is for --workload kv-decode{hint}")
    given = _fio_spelling(values)  # before defaults that depend on other options
    values.engine = ENGINES[values.engine]
    values.direct = values.direct == "1"
    _check_mix(values)
    _check_amounts(values)
    _check_depth(values)
    _check_engine(values)
    if values.rounds != 5 and not values.compare:
        raise ValueError("--rounds is for --compare")
    if values.compare and (values.plot or values.verify):
        raise ValueError("--compare measures: run it without --plot and --verify")
    values.percentiles = values.percentile_list
    del values.percentile_list
    return Options(**vars(values), given=given)


def _check_workload(values: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name in _BLOCK_JOB_ONLY:
        if getattr(values, name) != parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for block jobs, not for --workload kv-decode"
            )


def _check_mix(values: argparse.Namespace) -> None:
    if values.rwmixread is None:
        values.rwmixread = 50
    elif len(DIRECTIONS[values.rw]) == 1:
        raise ValueError(f"--rwmixread is for --rw rw and randrw, not {values.rw}")


def _check_amounts(values: argparse.Namespace) -> None:
    if values.direct and values.bs % BLOCK_BYTES:
        raise ValueError(
            f"--bs {values.bs} is not a multiple of {BLOCK_BYTES}, which --direct 1 needs: "
            "choose another, or --direct 0"
        )
    if values.verify and values.bs % 512 and not values.workload:
        raise ValueError(f"--bs {values.bs} is not a multiple of 512, which --verify needs")
    if values.bs > 1 << 30:
        raise ValueError(f"--bs {values.bs} is more than 1g")
    for name in ("size", "io_size"):
        given = getattr(values, name)
        if given is not None and given < values.bs and not values.workload:
            raise ValueError(f"--{name.replace('_', '-')} {given} is less than --bs {values.bs}")
    if values.time_based and values.runtime is None:
        raise ValueError("--time-based needs --runtime")
    if values.fixedbufs and not values.direct:
        raise ValueError("--fixedbufs is for --direct 1: the page cache copies anyway")


def _check_engine(values: argparse.Namespace) -> None:
    for name in ("hipri", "sqthread_poll"):
        if not getattr(values, name):
            continue
        option = f"--{name.replace('_', '-')}"
        if values.engine not in ("auto", "nvme", "uring"):
            raise ValueError(f"{option} is io_uring's: use --engine uring, not {values.engine}")
        if not values.direct:
            raise ValueError(f"{option} is for --direct 1: the page cache has no queue to poll")
    if values.engine != "pylibaio":
        return
    if values.workload is not None:
        raise ValueError("--engine pylibaio is for block jobs: a store has engines of its own")
    if not values.direct:
        raise ValueError("--engine pylibaio is for --direct 1: else Linux AIO waits in submitting")
    if values.fixedbufs:
        raise ValueError("--fixedbufs is not for --engine pylibaio: it registers no memory")


def _check_depth(values: argparse.Namespace) -> None:
    split = values.request_bytes
    if split is not None and (split < REQUEST_BYTES or split & (split - 1) or split > 1 << 30):
        raise ValueError(f"--request-bytes {split} is not a power of two from 256k to 1g")
    depth = values.iodepth * values.numjobs
    if depth > DEPTH_MAX:
        raise ValueError(
            f"--iodepth {values.iodepth} of {values.numjobs} jobs is {depth} requests in flight: "
            f"at most {DEPTH_MAX}"
        )
    if values.iodepth_batch is None:
        most = max(1, BATCH_BYTES // values.bs)
        values.iodepth_batch = max(1, min(values.iodepth // BATCHES_IN_FLIGHT, most))
    elif values.iodepth_batch > values.iodepth:
        raise ValueError(
            f"--iodepth-batch {values.iodepth_batch} is more than --iodepth {values.iodepth}"
        )


def _fio_spelling(values: argparse.Namespace) -> dict[str, str]:
    if values.workload is not None:
        names = ("name", "filename", "workload", *_WORKLOAD_DEFAULTS)
        return {name: str(getattr(values, name)) for name in names}
    given = {
        "name": values.name,
        "filename": values.filename,
        "rw": values.rw,
        "bs": str(values.bs),
        "iodepth": str(values.iodepth),
        "numjobs": str(values.numjobs),
        "direct": values.direct,
        "ioengine": ENGINES[values.engine],
        "randseed": str(values.randseed),
    }
    for name in ("size", "io_size", "iodepth_batch"):
        if getattr(values, name) is not None:
            given[name] = str(getattr(values, name))
    if values.runtime is not None:
        given["runtime"] = f"{values.runtime:g}"
    if values.rwmixread is not None:
        given["rwmixread"] = str(values.rwmixread)
    for name in ("time_based", "fixedbufs", "hipri", "sqthread_poll", "end_fsync"):
        if getattr(values, name):
            given[name] = "1"
    return given
