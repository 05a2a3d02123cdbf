"""The contract suite's engines with their options; its files, which are large and many."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ENGINES, allowed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.devices import Engine, Target


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine, and way to open it, that the build and the kernel allow."""
    return allowed(request)


@pytest.fixture(autouse=True)
def room_is_given_back(target: Target) -> Iterator[None]:
    yield
    if not target.is_block_device:
        os.unlink(target)
