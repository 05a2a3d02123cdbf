"""The contract suite's files are large and many: each goes with its test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.devices import Target


@pytest.fixture(autouse=True)
def room_is_given_back(target: Target) -> Iterator[None]:
    yield
    if not target.is_block_device:
        os.unlink(target)
