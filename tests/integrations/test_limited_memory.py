"""A cache of 268 MB decodes in a control group that leaves 128 MiB for it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

SCRIPT = Path(__file__).with_name("decode_long_context.py")
ROOM_BYTES = 128 << 20
KV_BYTES = 268_435_456


def command(place):
    return [sys.executable, str(SCRIPT), str(place)]


def environment():
    root = str(Path(__file__).parents[2])
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": root}


def used_bytes(cgroup):
    """What the group's processes need: all that is charged to it but unmapped page cache."""
    lines = (cgroup.path / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    if cgroup.version == 1:
        usage = int((cgroup.path / "memory.usage_in_bytes").read_text())
        return usage - (stat["cache"] - stat["mapped_file"])
    usage = int((cgroup.path / "memory.current").read_text())
    return usage - (stat["file"] - stat["file_mapped"])


def run_limited(cgroup, place):
    """Runs the script; once everything is loaded, the group gets ROOM_BYTES beyond that."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with cgroup.start(command(place), env=environment(), **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        cgroup.set_limit(used_bytes(cgroup) + ROOM_BYTES)
        try:
            output, _ = process.communicate("go\n", timeout=540)
        except BaseException:
            process.kill()
            raise
    return process.returncode, output


def has_swap():
    return len(Path("/proc/swaps").read_text().splitlines()) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_decodes_with_less_memory_than_its_cache(memory_cgroup, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command("memory"), env=environment(), **pipes) as unlimited:
        unlimited.stdin.write("go\n")
        unlimited.stdin.flush()
        # Without a store the same work does not fit: the limit is a limit.
        if not has_swap():
            cgroup = memory_cgroup(8 << 30)
            returncode, _ = run_limited(cgroup, "memory")
            assert returncode == -signal.SIGKILL
            assert cgroup.out_of_memory_kills > 0
        output, _ = unlimited.communicate()
    assert unlimited.returncode == 0
    theirs = json.loads(output.removeprefix("ready\n"))

    cgroup = memory_cgroup(8 << 30)
    returncode, output = run_limited(cgroup, tmp_path / "kv.img")
    assert cgroup.out_of_memory_kills == 0
    assert returncode == 0
    ours = json.loads(output)
    assert ours["ids"] == theirs["ids"]
    assert ours["logits"] == theirs["logits"]
    assert len(set(theirs["ids"])) > 1
    # Every step reads what is on storage again; a cache that stayed in memory would read nothing.
    steps = len(ours["ids"]) - 1
    assert sum(path["read_bytes"] for path in ours["paths"].values()) > steps / 2 * KV_BYTES
