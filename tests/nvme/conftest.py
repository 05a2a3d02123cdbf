"""The contract suites' fixtures on NVMe drives; outside of the machine all is skipped."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.devices import Engine, Target, given_target
from tests.nvme.drives import find

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = os.environ.get("NVME_VM")
# With the block device, which loop devices stand in for elsewhere, each kernel has one block size.
BLOCK_DEVICE_HAS = {"6.12": "4096", "6.1": "512"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if KERNEL:
        spared = [item for item in items if cell(item) == ("uring", not_of(KERNEL))]
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in spared]
        return
    here = pytest.mark.skip(reason="needs NVMe drives: ./tools/nvme-vm --test")
    for item in items:
        if item.path.parent.name == "nvme":
            item.add_marker(here)


def not_of(kernel: str) -> str:
    """The block size that the block device is not tested with."""
    return "512" if BLOCK_DEVICE_HAS[kernel] == "4096" else "4096"


def cell(item: pytest.Item) -> tuple[Any, Any]:
    """Engine and block size of a test of a contract suite."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    return values.get("engine"), values.get("target")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not KERNEL:
        return
    counts = Counter()
    for report in terminalreporter.getreports("passed"):
        place = dict(report.user_properties).get("contract", ("nvme", ""))
        counts[place[0]] += report.when == "call"
    terminalreporter.write_line(
        f"NVMe commands, Linux {KERNEL}: {counts['nvme']} tests passed; "
        f"{counts['uring']} more on the block device"
    )


@pytest.fixture(params=["512", "4096"])
def target(request: pytest.FixtureRequest) -> Target:
    """Namespaces of both block sizes, all zeros."""
    namespace = find("vm0", 1 if request.param == "512" else 2)
    namespace.blank()
    made = given_target(namespace.block)
    assert made.lba_bytes == int(request.param)
    return made


@pytest.fixture(params=["nvme", "uring"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """NVMe commands, and io_uring on the block device."""
    return Engine(request.param)


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the catalogs of stores on block devices go."""
    path = tmp_path / "state"
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(path))
    return path
