"""The dualblade command, as a person runs it."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

import dualblade
from tests.commands import Command
from tests.helpers import flip

ADMIN = Command("dualblade.cli.admin")


@pytest.fixture(scope="module", autouse=True)
def forks_end():
    yield
    ADMIN.close()


def run(*arguments):
    return ADMIN.run(*arguments)


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
    flip(target, offset + 100)
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


def test_stat_shows_keys_that_would_garble_a_terminal_escaped(target):
    with dualblade.open(target) as store:
        store.put("a\x1b[31m\nb", np.ones(1))
    done = run("stat", target)
    assert done.returncode == 0, done.stderr
    assert "'a\\x1b[31m\\nb'  1 float64" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_reader_that_leaves_early_is_no_traceback(target):
    with dualblade.open(target, memory="1MiB") as store:
        store.put_many({f"{i:0500}": np.ones(1) for i in range(500)})  # more than a pipe holds
    command = [sys.executable, "-m", "dualblade.cli.admin", "stat", str(target)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_info_on_a_file_that_is_too_small(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("hello\n")
    done = run("info", path)
    assert done.returncode == 1
    assert "it holds no store" in done.stderr


def test_end_of_input_is_not_a_yes(target):
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "dualblade.cli.admin", "format", target])
    seen = b""
    while b"Type yes" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x04")
    with contextlib.suppress(OSError):  # EIO when the other side has gone
        while part := os.read(terminal, 4096):
            seen += part
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    os.close(terminal)
    assert b"Traceback" not in seen
    assert seen.endswith(b"Nothing was changed.\r\n")
    with dualblade.open(target) as store:
        assert "a" in store


KILLED = """
import os, sys, numpy as np, dualblade
store = dualblade.open(sys.argv[1])
store.put("b", np.ones(10))
os._exit(1)
"""


@pytest.mark.parametrize("command", ["stat", "check"])
def test_looking_at_a_store_that_was_not_closed_leaves_it_alone(target, command):
    subprocess.run([sys.executable, "-c", KILLED, target], check=False, timeout=60)
    done = run(command, target)
    assert done.returncode == 1
    assert "not closed" in done.stderr
    assert done.stderr.startswith("dualblade: the store on ")
    assert done.stderr.count("\n") == 1
    assert "the 1 tensors" in done.stderr
    assert run(command, target).stderr == done.stderr


def test_several_targets_are_one_striped_store(tmp_path):
    a, b = tmp_path / "a.img", tmp_path / "b.img"
    done = run("format", a, b, "--size", "16MiB", "--stripe", "512KiB")
    assert done.returncode == 0, done.stderr
    assert f"{a}, {b} are an empty store with room for 15 MiB" in done.stdout
    with dualblade.open([a, b]) as store:
        store.put("x", np.arange(300_000))
    info = json.loads(run("info", a, b, "--json").stdout)
    assert info["device"]["targets"] == [str(a), str(b)]
    assert info["device"]["stripe_bytes"] == info["store"]["stripe_bytes"] == 512 << 10
    assert "512 KiB" in run("info", a, b).stdout
    assert "member 1 of 2 of a dualblade store" in run("info", b).stdout
    assert json.loads(run("stat", a, b, "--json").stdout)["tensors"] == 1
    assert "1 tensors read, 0 problems" in run("check", a, b).stdout
    for command in ("info", "stat", "check"):
        swapped = run(command, b, a)
        assert swapped.returncode == 1
        assert "swapped" in swapped.stderr
    alone = run("stat", a)
    assert "member 0 of a store that is striped over 2" in alone.stderr
    refused = run("format", a, b)
    assert refused.stdout.count("holds a dualblade store") == 2
    assert run("format", a, b, "--yes").returncode == 0
    assert json.loads(run("stat", a, b, "--json").stdout)["tensors"] == 0


@pytest.mark.parametrize("option", [("--stripe", "300KiB"), ("--size", "4KiB")])
def test_format_refuses_what_can_not_be_before_it_asks(tmp_path, option):
    paths = [tmp_path / "a", tmp_path / "b"]
    dualblade.open(paths, size="16MiB").close()
    done = run("format", *paths, *option)
    assert done.returncode == 1
    assert option[0][2:] + "=" in done.stderr
    assert "Formatting" not in done.stdout
    assert "--yes" not in done.stderr


def test_a_store_that_is_missing_is_made_by_a_command(tmp_path):
    done = run("info", tmp_path / "nope")
    assert done.returncode == 1
    assert "dualblade format" in done.stderr
    assert "size=" not in done.stderr
