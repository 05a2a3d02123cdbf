"""ExtentMap: its errors, its numbers and its choice of the best fit."""

from __future__ import annotations

import errno

import pytest

from dualblade._core import ExtentMap
from dualblade.errors import NoSpaceError
from tests.helpers import MIB


def test_a_new_map_is_one_free_run() -> None:
    extents = ExtentMap(MIB + 100)
    assert extents.total_bytes == extents.free_bytes == extents.largest_free_bytes == MIB
    assert extents.free_extents == 1
    assert extents.fragmentation == 0
    assert list(extents.free_runs()) == [(0, MIB)]
    extents.verify()


def test_the_smallest_run_that_fits_is_taken() -> None:
    extents = ExtentMap(MIB)
    extents.reserve(0, MIB)
    for offset, length in ((65536, 16384), (131072, 8192), (262144, 32768)):
        extents.free(offset, length)
    assert extents.allocate(8192) == 131072
    assert extents.allocate(8192) == 65536
    assert extents.allocate(20000) == 262144
    assert extents.free_bytes == 8192 + 32768 - 20480


def test_lengths_are_rounded_up_and_offsets_aligned() -> None:
    extents = ExtentMap(MIB)
    assert extents.allocate(1) == 0
    assert extents.allocate(4097, align=65536) == 65536
    assert extents.free_bytes == MIB - 3 * 4096
    extents.free(0, 1)
    extents.free(65536, 4097)
    assert list(extents.free_runs()) == [(0, MIB)]


def test_fragmentation_is_what_the_largest_run_lacks() -> None:
    extents = ExtentMap(8 * 4096)
    extents.reserve(0, 8 * 4096)
    assert extents.fragmentation == 0
    assert extents.free_bytes == 0
    extents.free(0, 4096)
    extents.free(2 * 4096, 3 * 4096)
    assert extents.fragmentation == pytest.approx(0.25)
    assert extents.free_extents == 2


def test_a_full_map_says_what_is_left() -> None:
    extents = ExtentMap(MIB)
    extents.reserve(4096, 4096)
    with pytest.raises(NoSpaceError, match="largest run has 1040384") as caught:
        extents.allocate(MIB)
    assert caught.value.errno == errno.ENOSPC
    assert extents.allocate(4096) == 0


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("reserve", (8192, 8192), "taken already"),
        ("reserve", (MIB, 4096), "outside"),
        ("reserve", (MIB - 4096, 8192), "outside"),
        ("free", (0, 4096), "free already"),
        ("free", (8192, 8192), "free already"),
        ("free", (MIB, 4096), "outside"),
        ("free", (100, 4096), "unaligned"),
        ("allocate", (0,), "positive"),
        ("allocate", (-1,), "negative"),
        ("allocate", (4096, 3), "power of two"),
    ],
)
def test_mistakes_change_nothing(method: str, arguments: tuple, words: str) -> None:
    extents = ExtentMap(MIB)
    extents.reserve(8192, 4096)
    before = list(extents.free_runs())
    with pytest.raises(ValueError, match=words):
        getattr(extents, method)(*arguments)
    assert list(extents.free_runs()) == before
    extents.verify()


@pytest.mark.parametrize(
    ("size", "unit", "error"),
    [
        (0, 4096, ValueError),
        (4095, 4096, ValueError),
        (MIB, 3, ValueError),
        (MIB, 0, ValueError),
        (-1, 4096, ValueError),
        ("1MiB", 4096, TypeError),
    ],
)
def test_maps_that_cannot_be(size: object, unit: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        ExtentMap(size, unit)
