"""What dualblade.open does beside the file that it is given."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dualblade
from dualblade.errors import DeviceError, DeviceRefusedError


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
