"""Tail against plain concatenation: applying its writes gives the bytes that were appended."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade._core import BLOCK_BYTES, Tail, checksum, checksum_chunks
from dualblade.errors import AlignmentError

CHUNK = 4 * BLOCK_BYTES
sizes = st.one_of(st.integers(0, 3 * CHUNK), st.sampled_from([1, BLOCK_BYTES, CHUNK, 130000]))


def content(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


class Run:
    """What a device would hold if every request of a Tail were written."""

    def __init__(self) -> None:
        self.stored = bytearray()
        self.digests: list[int] = []

    def apply(self, write: object) -> None:
        for offset, memory in write.requests:
            data = bytes(memory)
            assert offset == len(self.stored)  # each byte is written once, in order
            assert offset % BLOCK_BYTES == 0
            assert len(data) % BLOCK_BYTES == 0
            self.stored += data
        if write.requests:
            self.digests[write.first_chunk :] = write.digests.tolist()


@given(st.lists(st.tuples(sizes, st.booleans()), max_size=12), st.data())
def test_appends_make_the_run(appends: list[tuple[int, bool]], data: st.DataObject) -> None:
    tail, run = Tail(CHUNK), Run()
    everything = content(sum([length for length, _ in appends]))
    at = 0
    for length, is_copied in appends:
        new = everything[at : at + length].copy()
        copy = np.empty(length, np.uint8) if is_copied else None
        write = tail.append(new, copy)
        if copy is not None:
            assert np.array_equal(copy, new)
            new[:] = 0  # the caller's again
        run.apply(write)
        at += length
        whole = everything[:at].tobytes()
        assert run.stored == whole[: len(run.stored)]
        assert tail.stored == len(run.stored)
        assert tail.held == at - tail.stored < BLOCK_BYTES
        assert bytes(tail.block()) == whole[tail.stored :].ljust(BLOCK_BYTES, b"\0")
        assert run.digests == checksum_chunks(run.stored, CHUNK).tolist()
        assert tail.digest == checksum(whole[tail.stored // CHUNK * CHUNK :])
    # go on from a stored block, as after a truncation
    blocks = data.draw(st.integers(0, len(run.stored) // BLOCK_BYTES))
    kept = blocks * BLOCK_BYTES
    tail.reset(kept, run.stored[kept // CHUNK * CHUNK : kept])
    run.stored = run.stored[:kept]
    run.digests = checksum_chunks(run.stored, CHUNK).tolist()
    more = content(2 * CHUNK + 17)
    run.apply(tail.append(more))
    assert run.stored == everything[:kept].tobytes() + more.tobytes()[: len(run.stored) - kept]
    assert run.digests == checksum_chunks(run.stored, CHUNK).tolist()


def test_a_head_being_written_stops_the_tail() -> None:
    tail = Tail(CHUNK)
    tail.append(b"a" * 100)
    write = tail.append(b"b" * BLOCK_BYTES)
    (_, head), *_ = write.requests
    with memoryview(head) as view:
        for change in (lambda: tail.append(b"c"), lambda: tail.reset(0, b"")):
            with pytest.raises(RuntimeError, match="still being written"):
                change()
        assert view.readonly
        assert bytes(view) == b"a" * 100 + b"b" * (BLOCK_BYTES - 100)
    tail.append(b"c")
    with pytest.raises(BufferError, match="moved on"):
        memoryview(head)


def test_a_head_outlives_its_tail() -> None:
    tail = Tail(CHUNK)
    tail.append(b"a" * 100)
    (_, head), *_ = tail.append(b"b" * BLOCK_BYTES).requests
    view = memoryview(head)
    del tail, head
    assert bytes(view) == b"a" * 100 + b"b" * (BLOCK_BYTES - 100)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="power of two"):
        Tail(5000)
    tail = Tail(CHUNK)
    with pytest.raises(AlignmentError):
        tail.reset(100, b"")
    with pytest.raises(ValueError, match="4096 stored bytes"):
        tail.reset(CHUNK + BLOCK_BYTES, b"few")
    with pytest.raises(ValueError, match="contiguous"):
        tail.append(np.zeros((4, 4))[:, 0])
    with pytest.raises(ValueError, match="copy must hold the 5 bytes of data, got 4"):
        tail.append(b"12345", bytearray(4))
    with pytest.raises(ValueError, match="writable"):
        tail.append(b"12345", b"12345")
    with pytest.raises(TypeError, match="buffer protocol"):
        tail.append("text")
