"""The dualblade command, as a person runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest

import dualblade


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dualblade.cli.admin", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "kv.img"
    with dualblade.open(path, size="8MiB", memory="1MiB") as store:
        store.put("a", np.arange(1000, dtype="float32"))
    return path


def test_format_makes_a_store(tmp_path):
    path = tmp_path / "new.img"
    done = run("format", path, "--size", "8MiB")
    assert done.returncode == 0, done.stderr
    assert "7 MiB" in done.stdout
    with dualblade.open(path) as store:
        assert len(store) == 0


def test_format_asks_before_it_overwrites(target):
    refused = run("format", target)
    assert refused.returncode == 1
    assert "holds a dualblade store" in refused.stdout
    assert "--yes" in refused.stderr
    with dualblade.open(target) as store:
        assert "a" in store
    assert run("format", target, "--yes").returncode == 0
    with dualblade.open(target) as store:
        assert "a" not in store


def test_info_and_stat_speak_json(target):
    info = json.loads(run("info", target, "--json").stdout)
    assert info["device"]["size"] == 8 << 20
    assert len(info["store"]["store_id"]) == 32
    stat = json.loads(run("stat", target, "--json").stdout)
    assert [about["key"] for about in stat["keys"]] == ["a"]
    assert "1000 " in run("stat", target).stdout


def test_check_finds_a_flipped_bit(target):
    assert run("check", target).returncode == 0
    with dualblade.open(target) as store:
        offset = store.info("a").offset
    with open(target, "r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)[0]
        file.seek(offset + 100)
        file.write(bytes([byte ^ 1]))
    done = run("check", target)
    assert done.returncode == 1
    assert "'a'" in done.stdout
    assert "corrupt" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info",), ("stat", "a", "--bad")])
def test_wrong_usage(arguments):
    assert run(*arguments).returncode == 2


def test_failures_are_one_line(tmp_path):
    strange = tmp_path / "letter.txt"
    strange.write_text("Dear Sir or Madam" * 1000)
    for done in (run("stat", tmp_path / "missing"), run("stat", strange), run("info", tmp_path)):
        assert done.returncode == 1
        assert done.stderr.startswith("dualblade: ")
        assert "Traceback" not in done.stderr
    assert strange.read_text().startswith("Dear Sir")
