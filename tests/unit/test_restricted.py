"""Some of the contract suite where something is refused; all of it: python -m tests.restricted."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade.errors import UnsupportedError
from tests.devices import Unavailable
from tests.helpers import MIB
from tests.restricted import ENVIRONMENTS, Restricted, restricted

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 120
# Between them they use both paths, staging, batches, checksums, threads, and a store.
SOME = "random_runs or (filled_in and 65537) or share_a_device or come_back_as"
AXES = {
    "DUALBLADE_TEST_ENGINES": "uring,uring-sqpoll,aio",  # the threads ask the kernel for nothing
    "DUALBLADE_TEST_TARGETS": "file,loop4096",
}
PROBE = """
import json, os, sys
import numpy as np, dualblade
with open("/proc/self/status") as file:
    privileges = {line.split()[0]: line.split()[1] for line in file if line.startswith("Cap")}
with open(sys.argv[1], "wb") as file:
    file.write(bytes(4 << 20))
with dualblade.Device.open(sys.argv[1]) as device:
    asked = dualblade.aligned_empty(4 << 20, np.uint8)
    found = {
        "uid": os.getuid(),
        "capabilities": int(privileges["CapEff:"], 16),
        "engine": device.info.engine,
        "refused": device.info.engines_refused,
        "registered": device.register([asked]),
        "counted": device.stats()["direct"]["registered_bytes"],
    }
    asked[:] = 7
    device.write([(0, asked)]).wait()
    out = np.zeros((4 << 20) + 1, np.uint8)[1:]
    device.read([(0, out)]).wait()
    assert (out == 7).all()
json.dump(found, sys.stdout)
"""


@pytest.fixture(params=ENVIRONMENTS)
def place(request: pytest.FixtureRequest) -> Iterator[Restricted]:
    try:
        with restricted(request.param) as made:
            yield made
    except Unavailable as error:
        pytest.skip(str(error))


def probe(place: Restricted) -> dict[str, Any]:
    """What a process finds there."""
    arguments = ["-c", PROBE, str(place.folder / "probe.img")]
    done = place.start(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_contract_is_kept(
    place: Restricted, engine_refusals: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    found = probe(place)
    refused = set(engine_refusals)
    if place.name == "no-locked-memory":
        assert found["registered"] == found["counted"] == 0
    elif place.name == "no-io-uring":
        assert found["engine"] != "uring"
        assert "uring" in found["refused"]
        refused |= {"uring", "uring-sqpoll"}
    else:
        assert found["uid"] != 0
        assert found["capabilities"] == 0

    for name, value in AXES.items():
        monkeypatch.setenv(name, value)
    done = place.contract(["-k", SOME], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = place.outcomes()
    assert len(outcomes) >= 60
    for name, outcome in outcomes.items():
        cell = cell_of(name)
        if cell not in refused:
            assert outcome == "passed", name
        elif cell in engine_refusals:
            assert outcome.startswith(f"engine {cell}: "), name
        else:
            assert re.fullmatch(f"engine {cell}: .*not permitted.*", outcome), name


def cell_of(name: str) -> str:
    """The engine's cell in a test's name, such as "test[loop4096-uring-sqpoll-direct]"."""
    found = re.search(r"-(uring-sqpoll|uring|aio)[]-]", name)
    assert found, name
    return found[1]


def test_polling_for_completions_is_refused_where_a_read_would_fail(target, tmp_path, monkeypatch):
    """The set-up of such a ring succeeds anywhere; it is the first read that would say no."""
    if target.kind == "given":
        pytest.skip(f"{target} may poll")
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(tmp_path / "state"))
    said = []
    for opens, options in [(dualblade.Device.open, {}), (dualblade.open, {"format": True})]:
        try:
            opens(target, engine="uring", iopoll=True, **options).close()
        except UnsupportedError as error:
            said.append(str(error))
    if target.is_block_device or said:  # the disk that a file is on may poll
        assert len(said) == 2
        assert all(target.path in words and "polling queues" in words for words in said)
    with dualblade.Device.open(target, engine="uring") as device:
        out = np.ones(MIB, np.uint8)
        device.read([(0, out)]).wait()
        if said:
            assert not out.any()  # nothing was formatted


@pytest.mark.parametrize("option", ["sqpoll", "iopoll"])
@pytest.mark.parametrize("engine", ["aio", "threads"])
def test_polling_is_io_urings(tmp_path, engine, option):
    image = tmp_path / "device.img"
    with pytest.raises(ValueError, match="io_uring"):
        dualblade.open(image, size="16MiB", engine=engine, **{option: True})
    assert not image.exists()
    image.write_bytes(bytes(MIB))
    with pytest.raises(ValueError, match="io_uring"):
        dualblade.Device.open(image, engine=engine, **{option: True})
