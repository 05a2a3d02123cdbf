"""Where the unit tests make their stores, and what memory they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers import MIB, Memory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is not there yet."""
    return tmp_path / "kv.img"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """What is free to stores that are opened, as the test says: 100 MiB at first."""
    free = Memory(100 * MIB)
    monkeypatch.setattr("dualblade.opening.MemoryWatch", lambda: free)
    return free
