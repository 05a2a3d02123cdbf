"""What dualblade.open does beside the file that it is given."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dualblade
from dualblade.errors import DeviceError, DeviceRefusedError, DualbladeError


def test_a_file_that_only_has_the_name_of_a_catalog_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "kv.img.catalog"
    for content in (b"my notes", b"SQLite format 3\0" + bytes(9000)):
        notes.write_bytes(content)
        with pytest.raises(DeviceRefusedError, match="kv.img.catalog, but that is a file which"):
            dualblade.open(tmp_path / "kv.img", size="4MiB")
        assert notes.read_bytes() == content
        assert not (tmp_path / "kv.img").exists()
    # Nor is a blank file made a store beside it, and another store can be such a file.
    (tmp_path / "kv.img").write_bytes(bytes(4 << 20))
    notes.unlink()
    with dualblade.open(notes, size="4MiB") as other:
        other.put("a", np.ones(3))
        with pytest.raises(DeviceRefusedError, match="did not write"):
            dualblade.open(tmp_path / "kv.img", format=True)
        assert (other.get("a") == 1).all()
    assert (tmp_path / "kv.img").read_bytes() == bytes(4 << 20)


@pytest.mark.parametrize("leftover", ["closed", "killed", "empty"])
def test_the_catalog_of_a_store_that_is_gone_is_replaced(tmp_path: Path, leftover: str) -> None:
    path = tmp_path / "kv.img"
    if leftover == "empty":
        Path(f"{path}.catalog").touch()
    else:
        script = (
            "import dualblade, numpy, os, sys\n"
            "store = dualblade.open(sys.argv[1], size='4MiB')\n"
            "store.put('a', numpy.ones(3))\n"
            "store.flush() if sys.argv[2] == 'killed' else store.close()\n"
            "os._exit(0)"
        )
        command = [sys.executable, "-c", script, str(path), leftover]
        subprocess.run(command, check=True, timeout=60)
        path.unlink()
    with dualblade.open(path, size="4MiB") as store:
        assert store.keys() == []


def test_a_damaged_catalog_does_not_keep_its_store_from_being_formatted(tmp_path: Path) -> None:
    path = tmp_path / "kv.img"
    with dualblade.open(path, size="4MiB") as store:
        store.put("a", np.ones(3))
    Path(f"{path}.catalog").write_bytes(b"damaged")
    with dualblade.open(path, format=True) as store:
        assert store.keys() == []


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no directory '.*/missing'") as caught:
        dualblade.open(tmp_path / "missing" / "kv.img", size="4MiB")
    assert caught.value.errno == errno.ENOENT


def digest(path: str) -> str:
    """Of a whole file: what a failed comparison can show."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_refused_striped_format_leaves_every_member_as_it_was(tmp_path: Path) -> None:
    p, q, a, b = (str(tmp_path / name) for name in "pqab")
    with dualblade.open([p, q], size="16MiB") as store:
        store.put("w", np.arange(1 << 20))
    held = digest(p)
    with dualblade.open([a, b], size="16MiB"):
        for size in ("8MiB", "16MiB", "20MiB"):
            with pytest.raises(DeviceRefusedError, match="another process has it open"):
                dualblade.open([p, b], format=True, size=size)
            assert digest(p) == held
    with dualblade.open([p, q]) as store:
        assert (store.get("w") == np.arange(1 << 20)).all()


def test_without_room_for_all_members_every_one_keeps_its_size(tmp_path: Path) -> None:
    larger, smaller = paths = [str(tmp_path / name) for name in "ab"]
    with open(larger, "wb") as file:
        file.writelines(bytes([mib + 1]) * (1 << 20) for mib in range(48))
    Path(smaller).write_bytes(b"b" * 4096)
    held = [digest(path) for path in paths]
    script = (
        "import dualblade, resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 20, 32 << 20))\n"
        "try: dualblade.open(sys.argv[1:], format=True, size='80MiB')\n"
        "except dualblade.errors.DeviceError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, *paths]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert "ulimit -f" in done.stdout
    assert [digest(path) for path in paths] == held


@pytest.mark.parametrize(
    ("where", "named"), [(8 << 20, "resized"), (100, "damaged"), (8, "version")]
)
def test_what_would_make_a_striped_store_anew_names_all_members(
    tmp_path: Path, where: int, named: str
) -> None:
    paths = [str(tmp_path / name) for name in "ab"]
    dualblade.open(paths, size="16MiB").close()
    with open(paths[1], "r+b") as file:
        if named == "resized":
            file.truncate(4 << 20)
        else:
            file.seek(where)
            file.write(b"\x77")
    with pytest.raises(DualbladeError) as caught:
        dualblade.open(paths)
    assert named in str(caught.value)
    if named != "resized":
        assert f"`dualblade format {paths[0]} {paths[1]}`" in str(caught.value)
    assert f"format {paths[1]}`" not in str(caught.value).replace(" ".join(paths), "")


@pytest.mark.parametrize("target", ["", [""], ["", ""], ["kv.img", ""]])
def test_an_empty_path_is_said_to_be_empty(target: str | list[str]) -> None:
    with pytest.raises(ValueError, match="path is empty"):
        dualblade.open(target, size="16MiB")


def test_one_key_where_several_are_taken(tmp_path: Path) -> None:
    with dualblade.open(tmp_path / "kv.img", size="4MiB") as store:
        store.put("w1", np.ones(3))
        store.put("w", np.ones(3))
        for many in (store.get_many, store.get_many_async, store.delete_many):
            with pytest.raises(TypeError, match="keys is a str: give a list of keys"):
                many("w1")
        assert store.keys() == ["w1", "w"]
