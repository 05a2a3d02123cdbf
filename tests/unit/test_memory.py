"""Sizes as people write them, and the budget that a store starts with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade import memory
from tests.memory_tree import GIB, MIB, Tree


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("512MB", 512_000_000),
        ("100KiB", 102400),
        ("100 kib", 102400),
        (" 1.5GiB ", 3 * GIB // 2),
        ("0.1KB", 100),
        ("1TiB", 1 << 40),
        ("3PB", 3 * 10**15),
        ("4096", 4096),
        ("7 bytes", 7),
        ("8B", 8),
        (4096, 4096),
        (0, 0),
    ],
)
def test_a_size_is_read(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("", "is not a size"),
        ("lots", "is not a size"),
        ("1e9", "is not a size"),
        ("GiB", "is not a size"),
        ("2GiB free", "is not a size"),
        ("\u0661GiB", "is not a size"),
        ("2XB", "unknown unit 'XB'"),
        ("2G", "2GiB .* 2GB"),
        ("0.1KiB", "whole number"),
        ("-1", "negative"),
        ("-2GiB", "negative"),
        (-1, "negative"),
        (1 << 63, "larger than any"),
        ("99999999PB", "larger than any"),
    ],
)
def test_a_size_that_cannot_be_is_a_value_error_that_shows_it(bad, says):
    with pytest.raises(ValueError, match=says) as caught:
        memory.parse_size(bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [1.5, True, None, b"2GiB", [1]])
def test_a_size_of_another_type_is_a_type_error(bad):
    with pytest.raises(TypeError, match="is not a size"):
        memory.parse_size(bad)


@given(st.integers(0, 2**63 - 1))
def test_a_formatted_size_reads_back_to_a_tenth_of_its_unit(size):
    text = memory.format_size(size)
    number, unit = text.split()
    assert 0 <= float(number) < 1024
    if unit != "EiB":
        one = 1 if unit.startswith("byte") else memory.parse_size(f"1{unit}")
        assert abs(round(float(number) * one) - size) <= one * 0.06


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (GIB - 1, "1 GiB")],
)
def test_sizes_are_short(size, text):
    assert memory.format_size(size) == text


# ---- budgets ------------------------------------------------------------------------------------


def test_auto_leaves_a_quarter_and_the_staging_to_the_program(tree):
    budget = memory.page_cache_budget("auto", 4 * GIB, root=tree.root)
    assert budget.bytes == (12 - 4) * GIB * 3 // 4
    assert "8 GiB" in budget.source


def test_auto_is_never_negative(tree):
    assert memory.page_cache_budget("auto", 13 * GIB, root=tree.root).bytes == 0


def test_a_size_is_taken_as_it_is(tree):
    assert memory.page_cache_budget("13GiB", 4 * GIB, root=tree.root).bytes == 13 * GIB
    assert memory.page_cache_budget(MIB, 0, root=tree.root).bytes == MIB


def test_a_size_beyond_the_machine_or_its_cgroup_is_refused(tree):
    with pytest.raises(ValueError, match="more than there is: 16 GiB in this machine"):
        memory.page_cache_budget("17GiB", 0, root=tree.root)
    tree.write("proc/self/cgroup", "0::/\n")
    tree.v2("", anon=MIB, max=GIB, current=2 * MIB)
    with pytest.raises(ValueError, match="1 GiB limit of the cgroup"):
        memory.page_cache_budget("2GiB", 0, root=tree.root)
    assert memory.page_cache_budget("1GiB", 0, root=tree.root).bytes == GIB


@pytest.mark.parametrize("size", [0, MIB - 1, "100KiB"])
def test_a_size_too_small_for_one_transfer_is_refused(tree, size):
    with pytest.raises(ValueError, match=r"policy='direct'"):
        memory.page_cache_budget(size, 0, root=tree.root)
