"""The header: what is packed is found again, and nothing else is taken for it."""

import struct
from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade._core import checksum
from dualblade.errors import CorruptionError, DeviceRefusedError, UnsupportedError
from dualblade.header import DATA_OFFSET, HEADER_BYTES, Header

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
single = {
    "store_id": st.binary(min_size=16, max_size=16).map(bytes.hex),
    "size_bytes": u64,
    "lba_bytes": u32,
    "chunk_bytes": u32,
    "data_offset": u64,
    "created_unix": u64,
}
striped = {
    "member": u32,
    "members": st.integers(2, 2**32 - 1),
    "stripe_bytes": u64,
    "member_bytes": u64,
}
headers = st.builds(Header, **single) | st.builds(Header, **single, **striped)
ONE = Header("00112233445566778899aabbccddeeff", 1 << 30, 512, 262144, DATA_OFFSET, 1_700_000_000)


@given(headers)
def test_a_header_round_trips(header):
    block = header.pack()
    assert len(block) == HEADER_BYTES
    assert astuple(Header.unpack(block, target="kv.img")) == astuple(header)
    assert Header.find(bytearray(block + b"data"), target="kv.img") == header


def test_the_layout_is_what_is_written_down():
    """Stores outlive releases: these places may not move while the version is 1 or 2."""
    block = ONE.pack()
    assert block[:8] == b"DUALBLAD"
    assert struct.unpack_from("<I", block, 8) == (1,)
    assert struct.unpack_from("<I", block, 12) == (4096,)
    assert block[16:32].hex() == ONE.store_id
    assert struct.unpack_from("<QIIQQ", block, 32) == (
        1 << 30,
        512,
        262144,
        1 << 20,
        1_700_000_000,
    )
    assert set(block[64:4088]) == {0}
    member = replace(ONE, member=2, members=3, stripe_bytes=1 << 20, member_bytes=1 << 29).pack()
    assert struct.unpack_from("<I", member, 8) == (2,)
    assert member[12:64] == block[12:64]
    assert struct.unpack_from("<IIQQ", member, 64) == (2, 3, 1 << 20, 1 << 29)
    assert set(member[88:4088]) == {0}
    assert struct.unpack_from("<Q", block, 4088) == (checksum(block[:4088]),)


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_no_flipped_bit_goes_unseen(bit):
    block = bytearray(ONE.pack())
    block[bit // 8] ^= 1 << bit % 8
    if bit < 64:
        assert Header.find(block, target="kv.img") is None
    else:
        with pytest.raises((CorruptionError, UnsupportedError), match=r"kv.img"):
            Header.find(block, target="kv.img")


@pytest.mark.parametrize("block", [b"", b"DUAL", bytes(4096), b"\xff" * 4096, b"dualblad" * 512])
def test_anything_else_is_no_header(block):
    assert Header.find(block, target="kv.img") is None
    with pytest.raises(CorruptionError, match=r"no store header.*dualblade format kv.img"):
        Header.unpack(block, target="kv.img")


def test_without_a_target_the_message_still_reads():
    with pytest.raises(CorruptionError, match="of the device is cut off"):
        Header.find(ONE.pack()[:100])


def test_a_header_cut_off_is_corrupt():
    with pytest.raises(CorruptionError, match="cut off after 100 bytes"):
        Header.find(ONE.pack()[:100], target="kv.img")


def test_another_version_is_named_even_if_its_checksum_is_elsewhere():
    block = bytearray(ONE.pack())
    block[8:12] = struct.pack("<I", 7)
    with pytest.raises(UnsupportedError, match=r"format version 7.*reads version 1 and 2"):
        Header.find(block, target="kv.img")


def test_store_ids_are_drawn_anew():
    ids = {Header.new_store_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(bytes.fromhex(each)) == 16 for each in ids)


@pytest.mark.parametrize("size", [1 << 30, 1 << 31])
@pytest.mark.parametrize("lba", [512, 4096])
def test_a_device_that_holds_the_store_is_taken(size, lba):
    ONE.check_device(size, lba, "kv.img")


def test_a_smaller_device_is_refused():
    with pytest.raises(DeviceRefusedError, match=r"has 1073741823 bytes.*truncated"):
        ONE.check_device((1 << 30) - 1, 512, "kv.img")


def test_blocks_larger_than_the_layout_are_refused():
    with pytest.raises(DeviceRefusedError, match="logical blocks of 16384"):
        ONE.check_device(1 << 30, 16384, "kv.img")
