"""The contract suites' fixtures on NVMe passthrough; outside of the machine all is skipped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.devices import Engine, Target, given_target, wipe
from tests.nvme.drives import find

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KERNEL = os.environ.get("NVME_VM")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if KERNEL:
        return
    here = pytest.mark.skip(reason="needs NVMe drives: ./tools/nvme-vm --test")
    for item in items:
        if item.path.parent.name == "nvme":
            item.add_marker(here)


@pytest.fixture(params=["512", "4096"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Namespaces of both block sizes, all zeros at both ends."""
    made = given_target(find("vm0", 1 if request.param == "512" else 2).block)
    assert made.lba_bytes == int(request.param)
    yield made
    wipe(made)


@pytest.fixture(params=["nvme"])
def engine() -> Engine:
    """NVMe commands."""
    return Engine("nvme")


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the catalogs of stores on block devices go."""
    path = tmp_path / "state"
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(path))
    return path
