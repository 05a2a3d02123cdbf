"""dualblade-fio, as a person runs it: every kind of job, its reports, its refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dualblade
from dualblade.cli.fio_options import DIRECTIONS
from dualblade.cli.fio_pylibaio import load
from dualblade.memory import limits
from tests.commands import Command
from tests.devices import MemoryCgroup, Unavailable
from tests.helpers import flip

COMMAND = [sys.executable, "-m", "dualblade.cli.fio"]
WITHOUT_PYLIBAIO = """
import sys
sys.modules["libaio"] = None  # as if it were not installed
from dualblade.cli.fio import main
sys.exit(main())
"""
needs_fio = pytest.mark.skipif(not shutil.which("fio"), reason="fio is not installed")


FIO = Command("dualblade.cli.fio")


@pytest.fixture(scope="module", autouse=True)
def forks_end():
    yield
    FIO.close()


def run(*arguments, **options):
    if not options:
        return FIO.run(*arguments)
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
        **options,
    )


def run_json(*arguments):
    done = run(*arguments, "--output-format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["uring", "aio", "threads", "pylibaio"])
def job_engine(request):
    """What --engine takes: Device's engines and another's."""
    if request.param != "pylibaio":
        refusal = request.getfixturevalue("engine_refusals").get(request.param)
        if refusal:
            pytest.skip(f"engine {request.param}: {refusal}")
        return request.param
    try:
        load()
    except ImportError as error:
        pytest.skip(f"engine pylibaio: {error}")
    return request.param


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "fio.img"
    path.write_bytes(os.urandom(2 << 20))
    return path


# ---- jobs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rw", list(DIRECTIONS))
def test_every_rw_on_every_engine(target, rw, job_engine):
    found = run_json(
        *("--filename", target, "--rw", rw, "--engine", job_engine),
        *("--bs", "16k", "--iodepth", 8, "--numjobs", 2),
    )
    job = found["jobs"][0]
    assert job["dualblade"]["engine"] == job_engine
    parts = {name: job[name] for name in ("read", "write")}
    assert [name for name in parts if parts[name]["total_ios"]] == list(DIRECTIONS[rw])
    # Two threads move all of the file each.
    assert sum(part["total_ios"] for part in parts.values()) == 2 * 128
    assert sum(part["io_bytes"] for part in parts.values()) == 2 * (2 << 20)
    moved = job["dualblade"]["device"]["direct"]
    assert moved["read_bytes"] == parts["read"]["io_bytes"]
    assert moved["write_bytes"] == parts["write"]["io_bytes"]


def test_the_page_cache_path_takes_any_block_size(target):
    job = run_json("--filename", target, "--direct", 0, "--bs", 5000, "--rw", "randread")["jobs"][0]
    assert job["read"]["total_ios"] == (2 << 20) // 5000
    assert job["dualblade"]["device"]["pagecache"]["read_bytes"] == job["read"]["io_bytes"]
    assert job["dualblade"]["device"]["direct"]["read_bytes"] == 0


def test_a_job_stops_at_its_runtime_and_not_before(target):
    options = ("--filename", target, "--bs", "4k", "--rw", "randread", "--runtime", "300ms")
    timed = run_json(*options, "--time_based", "--iodepth=4")["jobs"][0]["read"]
    assert 250 <= timed["runtime"] < 3000
    ended = run_json(*options, "--io-size", "64k")["jobs"][0]["read"]
    assert ended["total_ios"] == 16


def test_the_mix_is_as_asked(target):
    options = ("--filename", target, "--rw", "randrw", "--bs", "4k", "--io-size", "8m")
    job = run_json(*options, "--rwmixread", 80)["jobs"][0]
    share = job["read"]["total_ios"] / 2048
    assert 0.75 < share < 0.85


def test_a_missing_file_is_made_and_what_is_read_of_it_is_written(tmp_path):
    path = tmp_path / "new.img"
    job = run_json("--filename", path, "--size", "1m", "--rw", "read", "--bs", "64k")["jobs"][0]
    assert job["read"]["io_bytes"] == 1 << 20
    content = path.read_bytes()
    assert len(content) == 1 << 20
    assert content.count(0) < 1 << 16
    longer = run("--filename", path, "--size", "1540k", "--rw", "read", "--bs", "4k")
    assert longer.returncode == 0
    assert path.read_bytes()[: 1 << 20] == content
    assert path.read_bytes()[1 << 20 :].count(0) < 1 << 16


def test_registered_buffers_and_large_blocks(target):
    job = run_json("--filename", target, "--fixedbufs", "--bs", "1m", "--iodepth", 2)["jobs"][0]
    assert (
        job["dualblade"]["registered_buffer_bytes"] == job["dualblade"]["buffer_bytes"] == 2 << 20
    )
    assert job["read"]["total_ios"] == 2
    split = run_json("--filename", target, "--request-bytes", "512k", "--bs", "1m")["jobs"][0]
    assert split["dualblade"]["device"]["direct"]["reads"] == 4


def test_the_same_seed_gives_the_same_offsets(target, tmp_path):
    """Half of the file is written; with --verify it can be seen which half."""

    def written(seed):
        path = tmp_path / f"{seed}-{time.monotonic_ns()}"
        path.write_bytes(bytes(1 << 20))
        options = ("--filename", path, "--rw", "randwrite", "--io-size", "512k", "--verify")
        assert run(*options, "--randseed", seed).returncode == 0
        content = path.read_bytes()
        return [i for i in range(0, 1 << 20, 4096) if content[i : i + 4096].strip(b"\0")]

    first = written(7)
    assert len(first) == 128
    assert first != list(range(0, 512 << 10, 4096))
    assert written(7) == first
    assert written(8) != first


def test_polling(target, engine_refusals):
    """A thread of the kernel submits anywhere; completions are polled for where a driver can."""
    if "uring" in engine_refusals:
        pytest.skip(engine_refusals["uring"])
    options = ("--filename", target, "--rw", "randrw", "--bs", "4k", "--iodepth", 8)
    job = run_json(*options, "--sqthread_poll=1", "--verify")["jobs"][0]
    assert job["job options"]["sqthread_poll"] == "1"
    assert job["read"]["total_ios"] + job["write"]["total_ios"] == 512
    # A device that polls may have the file; one that does not is named with the reason.
    polled = run(*options, "--hipri", "--engine", "uring")
    assert polled.returncode == 0 or "can't be polled for" in polled.stderr, polled.stderr
    assert len(polled.stderr.splitlines()) <= 1


# ---- verify --------------------------------------------------------------------------------------


def test_every_engine_moves_the_bytes_to_where_they_belong(target, job_engine):
    """Checked by another engine: what one wrote, threads read."""
    options = ("--filename", target, "--bs", "12k", "--iodepth", 9, "--verify")
    done = run(*options, "--rw", "randwrite", "--engine", job_engine, "--numjobs", 2)
    assert done.returncode == 0, done.stderr
    again = run(*options, "--rw", "read", "--engine", "threads")
    assert again.returncode == 0, again.stderr
    theirs = run(*options, "--rw", "randread", "--engine", job_engine)
    assert theirs.returncode == 0, theirs.stderr


@pytest.mark.parametrize("direct", [0, 1])
def test_verify_reads_back_what_it_wrote(target, direct):
    options = ("--filename", target, "--bs", "8k", "--iodepth", 16, "--verify", "--direct", direct)
    done = run(*options, "--rw", "randwrite", "--numjobs", 2)
    assert done.returncode == 0, done.stderr
    assert "256 blocks compared" in done.stdout
    again = run(*options, "--rw", "randread")
    assert again.returncode == 0, again.stderr


def test_verify_catches_a_flipped_bit(target):
    options = ("--filename", target, "--bs", "8k", "--verify")
    assert run(*options, "--rw", "write").returncode == 0
    flip(target, 100_000)
    done = run(*options, "--rw", "randread", "--iodepth", 8)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "dualblade-fio: the block at byte 98304 does not match its checksum"
    )


def test_verify_catches_writes_that_the_drive_loses(fault_device):
    device = fault_device(4 << 20)
    options = ("--filename", device.path, "--rw", "randwrite", "--bs", "16k", "--verify")
    assert run(*options).returncode == 0
    device.fail_nth("write", "drop", 5)
    done = run(*options)
    assert done.returncode == 1
    assert "is an older one: what this run wrote there is lost" in done.stderr


@pytest.mark.parametrize(("rw", "error"), [("read", "EIO"), ("write", "ENOSPC")])
def test_an_error_of_the_drive_ends_the_job(fault_device, job_engine, rw, error):
    device = fault_device(4 << 20)
    device.fail_nth(rw, error, 20)
    options = ("--bs", "16k", "--iodepth", 8, "--numjobs", 2, "--engine", job_engine, "--rw", rw)
    done = run("--filename", device.path, *options)
    assert done.returncode == 1
    assert f"({error})" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_wants_blocks_that_it_wrote(target):
    done = run("--filename", target, "--rw", "read", "--verify")
    assert done.returncode == 1
    assert "was not written with --verify" in done.stderr


# ---- reports -------------------------------------------------------------------------------------


def summary_of_fio_json(text):
    """What a script that was written for fio's JSON takes from it."""
    report = json.loads(text)
    lines = [report["fio version"], report["timestamp"], report["time"]]
    for job in report["jobs"]:
        lines += [job["jobname"], job["error"], job["elapsed"], job["job_runtime"]]
        lines += [job["job options"]["filename"], job["job options"]["bs"]]
        lines += [job["usr_cpu"] + job["sys_cpu"], job["ctx"], job["majf"], job["minf"]]
        lines += [job[f"latency_{unit}"]["1000"] for unit in ("ns", "us", "ms")]
        for name in ("read", "write", "trim"):
            part = job[name]
            for field in "io_bytes io_kbytes bw_bytes bw iops runtime total_ios short_ios".split():
                lines.append(part[field])
            for kind in ("slat_ns", "clat_ns", "lat_ns"):
                lines += [part[kind][field] for field in ("min", "max", "mean", "stddev", "N")]
            if part["total_ios"]:
                lines += [part["clat_ns"]["percentile"]["99.000000"]]
            lines += [part[field] for field in ("bw_min", "bw_max", "bw_mean", "iops_stddev")]
    return lines


@needs_fio
def test_the_json_reads_like_fios(target):
    job = ("--name=a", f"--filename={target}", "--rw=randrw", "--bs=16k", "--size=2m")
    job += ("--output-format=json", "--percentile_list=50:99")
    ours = run(*job, "--iodepth=4")
    theirs = subprocess.run(
        ["fio", *job, "--ioengine=psync"], capture_output=True, text=True, check=True
    )
    read = summary_of_fio_json(ours.stdout)
    expected = summary_of_fio_json(theirs.stdout)
    assert len(read) == len(expected)
    number = (int, float)
    kinds = [number if isinstance(value, number) else type(value) for value in expected]
    assert all(isinstance(value, kind) for value, kind in zip(read, kinds, strict=True))
    report = json.loads(ours.stdout)["jobs"][0]
    fio = json.loads(theirs.stdout)["jobs"][0]
    for name in ("read", "write"):
        assert set(fio[name]) <= set(report[name])
        assert set(fio[name]["clat_ns"]) == set(report[name]["clat_ns"])
        assert list(report[name]["clat_ns"]["percentile"]) == ["50.000000", "99.000000"]
    ios = [job["read"]["total_ios"] + job["write"]["total_ios"] for job in (report, fio)]
    assert ios == [128, 128]


def fields(value, path=""):
    """The fields of a JSON object, those of objects in it with their path."""
    if not isinstance(value, dict) or path.endswith((".percentile", ".bins", ".job options")):
        return {path: value}
    found = {}
    for name, inner in value.items():
        found |= fields(inner, f"{path}.{name}")
    return found


@needs_fio
@pytest.mark.parametrize("output_format", ["json", "json+"])
def test_every_field_of_fios_json_is_there(target, output_format):
    job = ("--name=a", f"--filename={target}", "--rw=randrw", "--bs=16k")
    job += (f"--output-format={output_format}", "--size=2m")
    ours = json.loads(run(*job, "--iodepth=4").stdout)
    command = ["fio", *job, "--ioengine=libaio", "--direct=1", "--iodepth=4"]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert set(theirs) <= set(ours)
    expected, found = fields(theirs["jobs"][0]), fields(ours["jobs"][0])
    missing = {name for name in expected if name not in found}
    assert missing == set()
    for name, value in expected.items():
        kind = (int, float) if isinstance(value, (int, float)) else type(value)
        assert isinstance(found[name], kind), name
    assert set(expected[".job options"]) - {"ioengine"} <= set(found[".job options"])


@needs_fio
@pytest.mark.parametrize("extra", [(), ("--compare", "--rounds", 2)])
def test_fios_own_converter_reads_the_latencies(target, tmp_path, extra):
    """fio_jsonplus_clat2csv comes with fio: it wants bins that sum up, and checks what it wrote."""
    converter = shutil.which("fio_jsonplus_clat2csv")
    python = shutil.which("python3", path="/usr/bin:/bin")
    if not converter or not python:
        pytest.skip("fio's converter is not installed")
    if subprocess.run([python, "-c", "import six"], capture_output=True, check=False).returncode:
        pytest.skip("fio's converter needs python3-six")
    report = tmp_path / "report.json"
    options = ("--filename", target, "--rw", "randrw", "--bs", "4k", "--iodepth", 8)
    options += ("--output-format", "json+", "--output", report)
    assert run(*options, *extra).returncode == 0
    for more in ([], ["--validate"]):
        command = [python, converter, str(report), str(tmp_path / "latency.csv"), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "mismatch" not in done.stdout
    jobs = json.loads(report.read_text())["jobs"]
    assert len(list(tmp_path.glob("latency_job*.csv"))) == len(jobs)
    for number, job in enumerate(jobs):
        table = (tmp_path / f"latency_job{number}.csv").read_text().splitlines()
        titles = [title.strip() for title in table[0].split(",")]
        for name in ("read", "write"):
            counts = [row.split(",")[titles.index(f"{name}_clat_ns_count")] for row in table[1:]]
            assert sum(int(count) for count in counts if count.strip()) == job[name]["total_ios"]


def test_the_json_agrees_with_itself(target):
    done = run("--filename", target, "--bs", "4k", "--iodepth", 8, "--output-format", "json+")
    job = json.loads(done.stdout)["jobs"][0]
    read = job["read"]
    clat = read["clat_ns"]
    assert clat["N"] == read["total_ios"] == 512
    assert sum(clat["bins"].values()) == 512
    assert clat["min"] <= clat["mean"] <= clat["max"]
    assert read["lat_ns"]["mean"] == pytest.approx(read["slat_ns"]["mean"] + clat["mean"])
    levels = list(clat["percentile"].values())
    assert levels == sorted(levels)
    assert read["bw_bytes"] == pytest.approx(read["io_bytes"] / read["runtime"] * 1000, rel=0.2)
    # One at a time until 8 are in flight, in batches of 2.
    levels = job["iodepth_level"]
    assert [levels["1"], levels["2"], levels["4"]] == [100 / 512, 200 / 512, 400 / 512]
    assert levels["8"] == pytest.approx(100 * 505 / 512)
    assert job["iodepth_submit"]["4"] == job["iodepth_complete"]["4"] == 100
    shares = [share for unit in ("ns", "us", "ms") for share in job[f"latency_{unit}"].values()]
    assert sum(shares) == pytest.approx(100)


def test_the_report_goes_where_it_is_told(target, tmp_path):
    path = tmp_path / "report.txt"
    done = run("--filename", target, "--output", path, "--percentile-list", "50,99.9")
    assert done.returncode == 0
    assert done.stdout == ""
    text = path.read_text()
    assert "IOPS=" in text
    assert re.findall(r"([\d.]+)th=", text) == ["50.00", "99.90"]
    assert "randseed=1" in text
    assert run("--filename", target, "--output", target).returncode == 2
    assert len(target.read_bytes()) == 2 << 20


def test_a_plot(target, tmp_path):
    path = tmp_path / "plot.png"
    done = run("--filename", target, "--rw", "randrw", "--plot", path)
    if "needs matplotlib" in done.stderr:
        assert done.returncode == 1
        assert done.stdout == ""
        return
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def test_progress_and_ctrl_c(target, job_engine):
    """It goes on until it is told to stop, and then says what there was."""
    options = ("--filename", target, "--rw", "randread", "--iodepth", "8", "--time-based")
    options += ("--engine", job_engine)
    options += ("--runtime", "100", "--output-format", "json", "--name", "endless")
    with subprocess.Popen(
        [*COMMAND, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stderr.readline()
        assert re.match(r"dualblade-fio: endless: \d+ s, .*read .*/s", line)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    job = json.loads(output)["jobs"][0]
    assert job["dualblade"]["interrupted"] is True
    assert job["read"]["total_ios"] > 0


def test_help_has_groups_and_examples():
    done = run("--help")
    assert done.returncode == 0
    for words in ("what is done", "how it is done", "examples:", "how latency is measured"):
        assert words in done.stdout


# ---- wrong usage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--filename"),
        (["--filename", "x", "--rw", "sideways"], "sideways"),
        (["--filename", "x", "--bs", "5000"], "multiple of 4096"),
        (["--filename", "x", "--bs", "4q"], "is not a size"),
        (["--filename", "x", "--size", "-1"], "--size"),
        (["--filename", "x", "--iodepth", "0"], "from 1 on"),
        (["--filename", "x", "--iodepth", "2000", "--numjobs", "3"], "at most 4096"),
        (["--filename", "x", "--iodepth", "2", "--iodepth-batch", "3"], "--iodepth-batch"),
        (["--filename", "x", "--request-bytes", "384k"], "power of two"),
        (["--filename", "x", "--time-based"], "--runtime"),
        (["--filename", "x", "--runtime", "soon"], "is not a time"),
        (["--filename", "x", "--rwmixread", "101", "--rw", "rw"], "0 to 100"),
        (["--filename", "x", "--rwmixread", "10"], "randrw"),
        (["--filename", "x", "--fixedbufs", "--direct", "0"], "--direct 1"),
        (["--filename", "x", "--percentile-list", "0:50"], "percentiles"),
        (["--filename", "x", "--layers", "3"], "kv-decode"),
        (["--filename", "x", "--path", "direct"], "--direct"),
        (["--filename", "x", "--workload", "kv-decode", "--bs", "8k"], "block jobs"),
        (["--filename", "x", "--rounds", "3"], "--compare"),
        (["--filename", "x", "--engine", "mmap"], "mmap"),
        (["--filename", "x", "--io", "4k"], "--io"),
        (["--filename", "x", "--hipri", "--engine", "aio"], "io_uring"),
        (["--filename", "x", "--sqthread-poll", "--engine", "threads"], "io_uring"),
        (["--filename", "x", "--hipri", "--direct", "0"], "--direct 1"),
        (["--filename", "x", "--engine", "pylibaio", "--direct", "0"], "--direct 1"),
        (["--filename", "x", "--engine", "pylibaio", "--fixedbufs"], "--fixedbufs"),
        (["--filename", "x", "--engine", "pylibaio", "--workload", "kv-decode"], "block jobs"),
        (["--filename", "not-there"], "give --size"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments, words, tmp_path):
    done = run(*arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pylibaio_says_what_to_install(tmp_path):
    command = [sys.executable, "-c", WITHOUT_PYLIBAIO, "--filename", str(tmp_path / "x")]
    command += ["--size", "1m", "--engine", "pylibaio"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- what is not overwritten ---------------------------------------------------------------------


def test_a_device_is_written_only_when_that_is_allowed(loop_device):
    device = loop_device(8 << 20)
    job = ("--filename", device.path, "--bs", "64k", "--rw")
    refused = run(*job, "write")
    assert refused.returncode == 1
    assert "--allow-device-write" in refused.stderr
    with open(device.path, "rb") as file:
        assert file.read().count(0) == 8 << 20
    assert run(*job, "read").returncode == 0
    allowed = run(*job, "write", "--allow-device-write", "--verify")
    assert allowed.returncode == 0, allowed.stderr
    too_large = run(*job, "read", "--size", "9m")
    assert too_large.returncode == 2


def test_a_device_with_a_filesystem_is_never_written(loop_device):
    device = loop_device(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
    with open(device.path, "rb") as file:
        before = file.read()
    for job in (["--rw", "write"], ["--workload", "kv-decode", "--layers", "1"]):
        done = run("--filename", device.path, *job, "--allow-device-write")
        assert done.returncode == 1
        assert "ext4" in done.stderr
    with open(device.path, "rb") as file:
        assert file.read() == before


def test_a_store_is_never_written(tmp_path):
    path = tmp_path / "kv.img"
    dualblade.open(path, size="8MiB").close()
    before = path.read_bytes()
    done = run("--filename", path, "--rw", "write")
    assert done.returncode == 1
    assert "dualblade store" in done.stderr
    assert path.read_bytes() == before


def test_failures_are_one_line(tmp_path):
    for arguments in (["--filename", tmp_path], ["--filename", tmp_path / "no" / "x"]):
        done = run(*arguments, "--size", "1m", "--rw", "write")
        assert done.returncode == 1
        assert done.stderr.startswith("dualblade-fio: ")
        assert "Traceback" not in done.stderr


# ---- beside fio ----------------------------------------------------------------------------------


FIO_ENGINES = {"uring": "io_uring", "aio": "libaio", "pylibaio": "libaio", "threads": "psync"}


@needs_fio
@pytest.mark.parametrize("rw", list(DIRECTIONS))
def test_compare(target, rw, job_engine):
    found = run_json(
        *("--filename", target, "--rw", rw, "--bs", "16k", "--iodepth", 4, "--engine", job_engine),
        *("--compare", "--rounds", 1),
    )
    assert found["jobs"][0]["dualblade"]["engine"] == job_engine
    assert f"--ioengine={FIO_ENGINES[job_engine]}" in found["compare"]["command"]
    # Both did the same work: all of the file once.
    jobs = [found["jobs"][0], found["fio"][0]]
    moved = [sum(job[name]["io_bytes"] for name in ("read", "write")) for job in jobs]
    assert moved == [2 << 20, 2 << 20]
    summary = found["compare"]["summary"]
    assert [name for name in ("read", "write") if f"{name} MB/s" in summary] == list(DIRECTIONS[rw])
    for row in summary.values():
        assert row["fio"]["min"] <= row["fio"]["median"] <= row["fio"]["max"]
    row = summary[f"{DIRECTIONS[rw][0]} MB/s"]
    assert row["ratio"] == pytest.approx(row["dualblade"]["median"] / row["fio"]["median"])
    assert jobs[1]["dualblade"]["start_cpu_seconds"] > 0


@needs_fio
def test_compare_polls_and_registers_on_both_sides(target, engine_refusals):
    if "uring" in engine_refusals:
        pytest.skip(engine_refusals["uring"])
    # A few I/Os: fio and the kernel's thread turn in circles, each on a CPU that others want too.
    options = ("--filename", target, "--bs", "64k", "--fixedbufs", "--sqthread-poll")
    options += ("--io-size", "256k")
    found = run_json(*options, "--compare", "--rounds", 2)
    assert len(found["jobs"]) == len(found["fio"]) == 2
    theirs = found["compare"]["command"]
    assert {"--fixedbufs=1", "--sqthread_poll=1", "--registerfiles"} <= set(theirs)
    ours = found["jobs"][0]["dualblade"]
    assert ours["registered_buffer_bytes"] == ours["buffer_bytes"]


@needs_fio
def test_compare_prints_a_table(target):
    done = run("--filename", target, "--rw", "randread", "--compare", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"read MB/s .* \(.* - .*\) .*\d\.\d\d\n", done.stdout)
    assert "CPU-s per GB" in done.stdout


@needs_fio
def test_ctrl_c_ends_a_comparison_with_the_rounds_until_then(target):
    options = ("--filename", target, "--rw", "randread", "--bs", "4k", "--time-based")
    options += ("--runtime", "500ms", "--compare", "--rounds", "100")
    with subprocess.Popen(
        [*COMMAND, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal interrupts fio as well
    ) as process:
        while "round 2" not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "interrupted: these are the rounds until then" in output
    assert re.search(r"read IOPS .* \d\.\d\d\n", output)


def test_compare_without_fio_says_how_to_get_it(target):
    done = run("--filename", target, "--compare", env=os.environ | {"PATH": "/nowhere"})
    assert done.returncode == 1
    assert "apt install fio" in done.stderr


# ---- a key/value cache ---------------------------------------------------------------------------

SMALL = ("--workload", "kv-decode", "--layers", 3, "--kv-heads", 2, "--head-dim", 64)
SMALL += ("--batch", 2, "--tokens", 100, "--gen", 3)


@pytest.mark.parametrize("path", ["direct", "pagecache", "dual"])
def test_kv_decode(tmp_path, path):
    target = tmp_path / "kv.img"
    row_bytes = 2 * 2 * 2 * 64 * 2  # keys and values of a token in a layer
    found = run_json("--filename", target, *SMALL, "--path", path, "--verify")
    prefill, decode = found["jobs"]
    assert prefill["write"]["io_bytes"] == 3 * 100 * row_bytes
    assert decode["read"]["total_ios"] == 3 * 3
    assert decode["read"]["io_bytes"] == 3 * (100 + 101 + 102) * row_bytes
    assert decode["write"]["io_bytes"] == 3 * 3 * row_bytes
    about = found["kv_decode"]
    assert about["steps"] == 3
    assert about["store"]["policy"] == path
    assert about["store"]["groups_direct"] == (3 if path == "direct" else 0)
    with dualblade.open(target) as store:
        assert len(store) == 0
    again = run("--filename", target, *SMALL, "--path", path)
    assert again.returncode == 0
    assert "tokens/s" in again.stdout


def test_a_memory_limit_holds_the_page_cache(tmp_path):
    try:
        MemoryCgroup(64 << 20).close()
    except Unavailable as error:
        pytest.skip(str(error))
    size = ("--layers", 4, "--tokens", 4096, "--gen", 1, "--kv-heads", 8, "--head-dim", 128)
    options = ("--filename", tmp_path / "kv.img", "--workload", "kv-decode", *size)
    found = run_json(*options, "--memory-limit", "100m")["kv_decode"]
    assert found["memory_limit_bytes"] == 100 << 20
    assert found["store"]["memory_budget_bytes"] < 100 << 20
    # The budget may have fallen this moment, and who is over it is on the way out.
    assert found["store"]["pagecache_bytes"] <= found["memory_limit_bytes"]
    assert list(Path(limits().cgroup_path).parent.rglob("dualblade-fio-*")) == []


def test_a_memory_limit_that_is_too_small_says_the_least(tmp_path):
    options = ("--filename", tmp_path / "kv.img", *SMALL, "--memory-limit")
    done = run(*options, "1m")
    assert done.returncode == 2
    (least,) = re.findall(r"give (\d+m) or more\n", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "kv.img").exists()
    try:
        MemoryCgroup(64 << 20).close()
    except Unavailable as error:
        pytest.skip(str(error))
    assert run(*options, least).returncode == 0


def test_messages_name_options_rather_than_arguments(tmp_path):
    for arguments, words, status in (
        (("--filename", tmp_path / "no/nope", "--size", "4m"), "there is no directory", 1),
        (("--filename", tmp_path), "with --size to create it", 1),
        (("--filename", "f", "--verify=crc32c"), "--verify takes no value", 2),
        (("--filename", "f", "--plot", "x.gif"), "must end in .png, .svg, .pdf", 2),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == status
        assert words in done.stderr
        assert "size=" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_polling_that_is_refused_names_its_option(target):
    done = run("--filename", target, "--hipri")
    if "can't be polled for" not in done.stderr:
        pytest.skip("nothing says here that polling is refused")
    assert "leave --hipri out" in done.stderr
    assert "iopoll out" not in done.stderr


@pytest.mark.parametrize(("suffix", "first"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_plot_is_what_its_name_says(target, tmp_path, suffix, first):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot{suffix}"
    assert run("--filename", target, "--plot", path).returncode == 0
    assert path.read_bytes().startswith(first)
