"""Which layers of a KVCache are on their way before they are asked for, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualblade.errors import DualbladeError
from dualblade.kvlayer import Layer, Snapshot

if TYPE_CHECKING:
    from dualblade.buffer_pool import BufferPool
    from dualblade.store import TensorStore
    from dualblade.write_behind import WriteBehind

# Layers are read ahead into memory of at most this, or a share of the store's budget if that is
# more, but no more than a quarter of it; and never less than what keeps a drive busy for a moment.
# A layer of 64 MiB and what it grows by fit in: where the drive has but half a layer to read while
# page-cached ones are copied, a step takes up to twice as long.
STAGING_BYTES = 80 << 20
STAGING_SHARE = 32
STAGING_LEAST_BYTES = 4 << 20
LOOKAHEAD_LAYERS = 2


class ReadAhead:
    """Reads of a decoder's next layers, which goes through them in cyclic order.

    The next layers on the direct path come first, however many page-cached ones lie before them:
    the drive works on those while these are copied. They are submitted before the layer that is
    waited for has come, so that the drive does not run dry in between. Page-cached layers are
    copied ahead, while the caller computes, where memory is left.

    Arguments:
        layers: of the cache; the list may change.
        lookahead: how many layers, whatever they take; None: at most two of each path, within
            `limit_bytes`.
    """

    def __init__(
        self,
        store: TensorStore,
        pool: BufferPool,
        behind: WriteBehind,
        layers: Sequence[Layer],
        lookahead: int | None,
    ) -> None:
        self._store = store
        self._pool = pool
        self._behind = behind
        self._layers = layers
        self._lookahead = lookahead
        self._ahead: dict[int, Snapshot] = {}
        self._expected = 0
        self.counts: Counter[str] = Counter()

    @property
    def nbytes(self) -> int:
        """Of what is ahead now."""
        return sum(snapshot.nbytes for snapshot in self._ahead.values())

    @property
    def limit_bytes(self) -> int:
        """What may be ahead, unless the number of layers was given."""
        budget_bytes = self._store.memory_budget
        wanted_bytes = max(STAGING_BYTES, budget_bytes // STAGING_SHARE)
        return max(STAGING_LEAST_BYTES, min(wanted_bytes, budget_bytes // 4))

    def get(self, index: int) -> Snapshot | None:
        """What is ahead of a layer."""
        return self._ahead.get(index)

    def take(self, index: int, first: int) -> Snapshot | None:
        """What is ahead of a layer for who wants its tokens from this one on, who has it now."""
        self._drop_useless(index, first)
        return self._ahead.pop(index, None)

    def refill(self, current: int) -> None:
        """Starts reading the layers after this one, as far as they are not on their way."""
        try:
            wanted, copied = self.plan(current)
        except DualbladeError:
            return  # a layer is gone: its own fetch() says so
        if current != self._expected:
            for index in set(self._ahead).difference(wanted, copied):
                self.drop(index)
        self._expected = (current + 1) % len(self._layers)
        for index in wanted:
            if not self._start(index, in_part=index == wanted[0]):
                return
        for index in copied:
            if index not in self._ahead and self._size(index) <= self._room():
                self._start(index, in_part=False)

    def plan(self, current: int) -> tuple[list[int], list[int]]:
        """The next layers on the direct path, and those to be copied from the page cache."""
        count = len(self._layers)
        most = LOOKAHEAD_LAYERS if self._lookahead is None else self._lookahead
        direct: list[int] = []
        cached: list[int] = []
        for step in range(1, count + 1):
            if len(direct) == most:
                break
            index = (current + step) % count
            layer = self._layers[index]
            if layer.tokens == 0:
                continue
            if self.is_direct(layer):
                direct.append(index)
            elif step <= most:
                cached.append(index)
        if self._lookahead is not None:
            cached = cached[: most - len(direct)]
        return direct, cached

    def is_direct(self, layer: Layer) -> bool:
        """Whether a layer is on the direct path now."""
        return self._store.path_of(layer.group) == "direct"

    def _size(self, index: int) -> int:
        layer = self._layers[index]
        row_bytes = layer.row_bytes(0) + layer.row_bytes(1)
        return (layer.tokens - layer.first_token()) * row_bytes

    def _room(self) -> int:
        if self._lookahead is not None:
            return 1 << 62
        return self.limit_bytes - self.nbytes

    def _start(self, index: int, *, in_part: bool) -> bool:
        """Has a layer read ahead, as far as there is room; False if it can't be now."""
        layer = self._layers[index]
        first = layer.first_token()
        self._drop_useless(index, first)
        snapshot = self._ahead.get(index)
        if snapshot is not None and snapshot.is_whole:
            return True
        if not self._behind.is_stored(layer):
            return True  # the next fetch() looks again
        is_new = snapshot is None
        if snapshot is None:
            snapshot = Snapshot(self._pool, layer, first)
        try:
            taken_bytes = snapshot.read_ahead(self._store, self._room(), in_part=in_part)
        except (DualbladeError, MemoryError):
            self._ahead.pop(index, None)
            return False  # fetch() of that layer will say what is wrong, if it still is
        if is_new and taken_bytes:
            self._ahead[index] = snapshot
            self.counts["ahead_started"] += 1
        return True

    def _drop_useless(self, index: int, first: int) -> None:
        snapshot = self._ahead.get(index)
        if snapshot is not None and not snapshot.serves(first):
            self.drop(index)

    def drop(self, index: int) -> None:
        """Forgets what was read ahead, once its memory is nobody's any more."""
        snapshot = self._ahead.pop(index, None)
        if snapshot is not None:
            self.counts["ahead_unused"] += 1
            snapshot.fails()

    def settle(self, index: int) -> None:
        """Waits for a read ahead, since the tensor that it reads is about to change."""
        snapshot = self._ahead.get(index)
        if snapshot is not None and snapshot.fails():
            self.drop(index)

    def poll(self) -> None:
        """Sees to what has come."""
        for snapshot in self._ahead.values():
            snapshot.poll()

    def clear(self) -> None:
        """Forgets everything, as drop() does."""
        for index in list(self._ahead):
            self.drop(index)
