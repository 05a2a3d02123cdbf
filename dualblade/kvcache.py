"""KVCache: the keys and values of a model's layers, token by token, on top of a TensorStore."""

from __future__ import annotations

import operator
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dualblade import tensor
from dualblade.buffer_pool import BufferPool
from dualblade.errors import ClosedError, DualbladeError
from dualblade.gpu import open_device
from dualblade.kvdevice import OnDevice, device_of
from dualblade.kvlayer import Layer, Snapshot, reordered
from dualblade.readahead import ReadAhead
from dualblade.write_behind import WriteBehind

if TYPE_CHECKING:
    from dualblade.store import TensorStore

Array = np.ndarray[Any, Any]

# What a layer that names no length starts with; it grows as it must.
GROWING_TOKENS = 1024
# Memory that waits to be used again: at most this, or a layer's keys and values if they are more.
IDLE_BYTES = 16 << 20
# Batches are rewritten this much at a time.
REWRITE_BYTES = 8 << 20


class KVCache:
    """The key/value cache of one batch of sequences, kept in a store.

    Each layer has two tensors, "<name>/<layer>/k" [tokens, batch, kv_heads, head_dim] and
    "<name>/<layer>/v" [tokens, batch, kv_heads, value_dim], laid out in one contiguous run and
    bound to one group, so that they are on the same path. `append()` adds tokens to a layer,
    `fetch()` returns those it has, and sets the next layers on their way: the reads of a decoder
    that goes through its layers in order, step after step, overlap with its computing.

    Growing past `max_tokens` moves a layer to a run twice as large, doubled as often as it takes,
    in the time of a copy.

    Beam search permutes the batch at every step. `reorder()` rewrites nothing: for each token it
    remembers in which row of the batch a sequence's keys and values were stored, and `fetch()`
    gathers them. Tokens appended later are stored in their own rows again.

    Arguments:
        store: what `dualblade.open()` returned.
        layers: layers to lay out now; `add_layer()` adds more, of other shapes.
        kv_heads, head_dim, value_dim: of a token; value_dim is head_dim unless given.
        dtype: anything with a dtype tag: "float16", "bfloat16", numpy.float32, torch.float16.
        batch: sequences.
        max_tokens: to lay out storage for, in each layer; None starts small and grows.
        name: what the keys start with; made up if not given.
        lookahead: layers to read ahead, whatever memory they take. None: two of those on the
            direct path and the page-cached ones among the next two, as far as they fit into 80 MiB
            (1/32 of the store's memory budget if that is more, 1/4 if that is less); of a direct
            layer that does not fit, a part.

    All methods may be called from any thread, one at a time does its work. Raises NoSpaceError when
    the store has no room, and then nothing was changed; ClosedError after `close()`.
    """

    def __init__(
        self,
        store: TensorStore,
        layers: int = 32,
        kv_heads: int = 8,
        head_dim: int = 128,
        dtype: Any = "float16",
        batch: int = 1,
        max_tokens: int | None = 32768,
        *,
        name: str | None = None,
        value_dim: int | None = None,
        lookahead: int | None = None,
    ) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._is_closed = False
        self.name = f"kv-{uuid.uuid4().hex[:12]}" if name is None else str(name)
        self._batch = _count("batch", batch)
        self._kv_heads = _count("kv_heads", kv_heads)
        self._head_dim = _count("head_dim", head_dim)
        self._value_dim = self._head_dim if value_dim is None else _count("value_dim", value_dim)
        self._dtype = tensor.dtype_tag(dtype)
        max_tokens = GROWING_TOKENS if max_tokens is None else max_tokens
        self._max_tokens = _count("max_tokens", max_tokens)
        if lookahead is not None:
            lookahead = _count("lookahead", lookahead, least=0)
        self._pool = BufferPool(min(IDLE_BYTES, store.memory_budget // 4))
        self._layers: list[Layer] = []
        self._changing: dict[int, Layer] = {}
        """Layers whose tensors may be longer or shorter than their tokens: an interrupt may come
        while they change, and then whatever is done next begins with `_mend()`."""
        self._generation = 0
        self._behind = WriteBehind(store)
        self._ahead = ReadAhead(store, self._pool, self._behind, self._layers, lookahead)
        self._devices: dict[str, OnDevice] = {}
        self._names: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        try:
            for _ in range(_count("layers", layers, least=0)):
                self._add_layer(self._new_layer(self._kv_heads, self._head_dim, self._value_dim))
            store.rebalance()
        except BaseException:
            self.close()
            raise

    # ---- layers ----------------------------------------------------------------------------------

    def add_layer(
        self,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = None,
        batch: int | None = None,
        max_tokens: int | None = None,
        window: int | None = None,
    ) -> int:
        """Lays out one more layer; returns its index.

        dtype and max_tokens are the cache's unless given, value_dim is head_dim unless given.
        batch has to agree with the cache's. With a window, `fetch()` returns the last `window`
        tokens only. Raises ValueError, TypeError, NoSpaceError.

        Which layers the page cache keeps is decided anew for those that hold no tokens yet.
        """
        if batch is not None and _count("batch", batch) != self._batch:
            raise ValueError(
                f"a layer of batch {batch} does not fit a cache of batch {self._batch}: all layers "
                "hold the same sequences"
            )
        layer = self._new_layer(kv_heads, head_dim, value_dim, dtype, max_tokens, window)
        index = self._add_layer(layer)
        self._store.rebalance()
        return index

    def _new_layer(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        dtype: Any = None,
        max_tokens: int | None = None,
        window: int | None = None,
    ) -> Layer:
        head_dim = _count("head_dim", head_dim)
        return Layer(
            heads=_count("kv_heads", kv_heads),
            dims=(head_dim, head_dim if value_dim is None else _count("value_dim", value_dim)),
            dtype=self._dtype if dtype is None else tensor.dtype_tag(dtype),
            batch=self._batch,
            capacity=self._max_tokens if max_tokens is None else _count("max_tokens", max_tokens),
            window=None if window is None else _count("window", window),
        )

    def _add_layer(self, layer: Layer) -> int:
        with self._opened():
            index = len(self._layers)
            layer.group = f"{self.name}/{index:03d}"
            self._reserve(layer)
            self._layers.append(layer)
            return index

    def _reserve(self, layer: Layer) -> None:
        suffix = f"~{self._generation}" if self._generation else ""
        layer.keys = (f"{layer.group}/k{suffix}", f"{layer.group}/v{suffix}")
        for key in layer.keys:
            if key in self._store:
                raise ValueError(
                    f"the store has a tensor {key!r} already: give this cache another name, or "
                    "close() the one that has it"
                )
        self._store.reserve_many(
            {
                key: ((layer.capacity, *layer.row_shape(which)), layer.dtype)
                for which, key in enumerate(layer.keys)
            },
            group=layer.group,
        )

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._layers)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self._batch

    @property
    def length(self) -> int:
        """Tokens that every layer has."""
        return min((layer.tokens for layer in self._layers), default=0)

    def tokens(self, layer: int) -> int:
        """Tokens that this layer has, those before its window included."""
        return self._layer(layer).tokens

    def _layer(self, index: int) -> Layer:
        number = operator.index(index)
        if not 0 <= number < len(self._layers):
            raise IndexError(f"layer {number} of a cache that has {len(self._layers)} layers")
        return self._layers[number]

    # ---- append ----------------------------------------------------------------------------------

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Adds tokens to a layer: both of them, or neither if something goes wrong.

        k is [tokens, batch, kv_heads, head_dim], v [tokens, batch, kv_heads, value_dim]; numpy
        arrays or torch tensors in host memory, with any strides, or contiguous ones on a GPU: these
        are read after what is in the caller's stream. Raises ValueError if a shape, TypeError if a
        dtype is another.

        The arrays are copied, and written while the caller goes on (those of more than 16 MiB
        before this returns). What could not be written is kept: the next append() to this layer, or
        a fetch() before it that finds it so, writes it again, and raises DeviceError as long as
        that fails. `close()` gives it up, as all of the cache.
        """
        with self._opened():
            into = self._layer(layer)
            rows = [
                self._as_rows(into, which, self._on_host(array))
                for which, array in enumerate((k, v))
            ]
            count = len(rows[0])
            if len(rows[1]) != count:
                raise ValueError(f"k has {count} tokens and v {len(rows[1])}: they go together")
            if count == 0:
                return
            if into.tokens + count > into.capacity:
                self._grow(layer, into, into.tokens + count)
            self._changing[layer] = into
            try:
                self._behind.append(into, rows)
            except DualbladeError:  # and nothing was appended
                del self._changing[layer]
                raise
            into.tokens += count
            del self._changing[layer]
            ahead = self._ahead.get(layer)
            if ahead is not None:
                ahead.append(rows, into.tokens)
            for device in self._devices.values():
                device.append(layer, rows, into.tokens)

    def _on_host(self, array: Any) -> Any:
        name = device_of(array)
        return array if name is None else self._on(name).to_host(array)

    def _on(self, device: Any) -> OnDevice:
        """The pipeline to a device, made when it is first needed."""
        name = self._names.get(device, device) if isinstance(device, str) else device.name
        if name not in self._devices:
            opened = open_device(device) if isinstance(device, str) else device
            if isinstance(device, str):
                self._names[device] = opened.name  # "cuda" is one of "cuda:0", "cuda:1", ...
            name = opened.name
            if name not in self._devices:
                self._devices[name] = OnDevice(
                    self._store, opened, self._layers, self._behind, self._ahead.plan
                )
        return self._devices[name]

    def _drop_on_devices(self, index: int) -> None:
        for device in self._devices.values():
            device.drop(index)

    def _as_rows(self, layer: Layer, which: int, array: Any) -> Array:
        row_shape = layer.row_shape(which)
        if tensor.fits(array, row_shape, layer.dtype):
            return array  # type: ignore[no-any-return]
        try:
            rows = tensor.as_rows(array, row_shape, layer.dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{'kv'[which]}: {error}") from None
        return tensor.from_bytes(rows.data, rows.shape, rows.dtype)

    def _grow(self, index: int, layer: Layer, tokens: int) -> None:
        capacity = layer.capacity
        while capacity < tokens:
            capacity *= 2
        self._behind.settle(layer)
        self._ahead.settle(index)  # the run that it reads is about to be given up
        self._drop_on_devices(index)
        self._store.resize_many(dict.fromkeys(layer.keys, capacity))
        layer.capacity = capacity
        self._counts["grown"] += 1

    # ---- fetch -----------------------------------------------------------------------------------

    def fetch(self, layer: int, *, start: int | None = None, device: Any = None) -> tuple[Any, Any]:
        """A layer's keys and values: arrays [tokens, batch, kv_heads, dim] that are the caller's.

        From token `start` on; if it is None, from the first, or in a layer with a window the last
        `window` tokens. The arrays are contiguous and writable, and their memory is used again
        once nothing refers to it: neither they, nor views or torch tensors made of them.

        The next layers, in cyclic order, are read ahead meanwhile.

        With a device, "cuda" or "cuda:1", they are CuPy arrays there, and what is enqueued in the
        caller's current stream afterwards runs when they have come. Drop them while that stream is
        the current one.
        """
        with self._opened():
            source = self._layer(layer)
            first = source.first_token() if start is None else _count("start", start, least=0)
            if first > source.tokens:
                raise ValueError(f"start {first} is past the {source.tokens} tokens of the layer")
            self._counts["fetches"] += 1
            if device is not None and device != "cpu":
                return self._on(device).fetch(layer, first)
            found = self._ahead.take(layer, first)
            is_ahead = found is not None
            if found is None:
                found = Snapshot(self._pool, source, first)
            self._read_rest(found, source)
            if found.has_aside and not found.fails():
                found.join()  # first: its memory is needed for what is read ahead next
            self._ahead.refill(layer)
            self._ahead.poll()
            if is_ahead and found.fails():
                # Read it again, so that what is raised is of this read and not of one long ago.
                is_ahead, found = False, Snapshot(self._pool, source, first)
                self._read_rest(found, source)
            found.result()
            self._counts["ahead_used"] += is_ahead
            return found.take(first, source)

    def _read_rest(self, found: Snapshot, layer: Layer) -> None:
        """Starts reading what a snapshot lacks."""
        if not found.is_whole or not self._behind.is_busy(layer):
            self._behind.settle(layer)
        if not found.is_whole:
            found.read_rest(self._store)

    # ---- truncate, reorder, batch ----------------------------------------------------------------

    def truncate(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens of every layer; a layer with fewer stays as it is."""
        keep = _count("tokens", tokens, least=0)
        with self._opened():
            longer = [i for i, layer in enumerate(self._layers) if layer.tokens > keep]
            if not longer:
                return
            for index in longer:
                self._behind.begin_cut(self._layers[index], keep)
                self._ahead.settle(index)
                self._drop_on_devices(index)
            before = {index: self._layers[index].tokens for index in longer}
            self._changing.update({index: self._layers[index] for index in longer})
            for index in longer:  # first: whoever asks after an interrupt is told what is kept
                self._layers[index].tokens = keep
            try:
                self._store.truncate_many(
                    {key: keep for index in longer for key in self._layers[index].keys}
                )
            except DualbladeError:  # and nothing was cut
                for index in longer:
                    self._layers[index].tokens = before[index]
                self._changing.clear()
                raise
            cut: dict[int, Array] = {}  # layers share their row maps, and go on sharing them
            for index in longer:
                layer = self._layers[index]
                if layer.row_map is not None and len(layer.row_map) > keep:
                    cut.setdefault(id(layer.row_map), layer.row_map[:keep].copy())
                    layer.row_map = cut[id(layer.row_map)] if keep else None
                ahead = self._ahead.get(index)
                if ahead is not None and not ahead.truncate(keep):
                    self._ahead.drop(index)
                self._behind.end_cut(layer)
            self._changing.clear()

    def reset(self) -> None:
        """Forgets all tokens; what was laid out for them stays."""
        self.truncate(0)

    def reorder(self, index: Sequence[int] | Array) -> None:
        """Sequence i of the batch becomes what sequence index[i] was, in every layer.

        index has `batch` numbers, which may repeat. Nothing is read or written: see the class.
        """
        order = self._batch_index(index)
        if len(order) != self._batch:
            raise ValueError(f"index has {len(order)} numbers for a batch of {self._batch}")
        with self._opened():
            if (order == np.arange(self._batch)).all():
                return
            made: dict[tuple[int, int], Array | None] = {}
            before = [layer.row_map for layer in self._layers]  # keeps the ids apart
            for layer, row_map in zip(self._layers, before, strict=True):
                shared = (id(row_map), layer.tokens)
                if shared not in made:
                    made[shared] = reordered(row_map, layer.tokens, order)
                layer.row_map = made[shared]

    def select_batch(self, index: Sequence[int] | Array) -> None:
        """Keeps these sequences of the batch, in this order; they may repeat.

        Everything is written again, into new tensors: while it runs, both are in the store.
        """
        order = self._batch_index(index)
        if len(order) == 0:
            raise ValueError("select_batch() of no sequences: close() or reset() the cache instead")
        with self._opened():
            if len(order) == self._batch and (order == np.arange(self._batch)).all():
                return
            self._rewrite(order)

    def repeat_batch(self, times: int) -> None:
        """Repeats each sequence of the batch, [a, b] becoming [a, a, b, b]. As select_batch()."""
        times = _count("times", times)
        self.select_batch(np.repeat(np.arange(self._batch), times))

    def _batch_index(self, index: Sequence[int] | Array) -> Array:
        order = np.asarray(index)
        if order.size == 0:
            order = order.astype(np.int32)
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise TypeError(
                f"index has to be a sequence of whole numbers, not {order.ndim}-dimensional "
                f"of dtype {order.dtype}"
            )
        if order.size and not (order.min() >= 0 and order.max() < self._batch):
            raise ValueError(f"index {order.tolist()} is not within a batch of {self._batch}")
        return order.astype(np.int32)

    def _rewrite(self, order: Array) -> None:
        self._behind.settle_all()
        self._ahead.clear()
        for device in self._devices.values():
            device.clear()
        self._generation += 1
        moved: list[Layer] = []
        try:
            for layer in self._layers:
                new = layer.with_batch(len(order))
                self._reserve(new)
                moved.append(new)
                self._copy_rows(layer, new, order)
        except BaseException:
            self._store.delete_many([key for layer in moved for key in layer.keys])
            raise
        given_up = [key for layer in self._layers for key in layer.keys]
        self._layers[:], self._batch = moved, len(order)
        self._store.delete_many(given_up)

    def _copy_rows(self, source: Layer, target: Layer, order: Array) -> None:
        step = max(1, REWRITE_BYTES // (source.row_bytes(0) + source.row_bytes(1)))
        for first in range(0, source.tokens, step):
            part = source.until(min(first + step, source.tokens))
            snapshot = Snapshot(self._pool, part, first)
            snapshot.read_rest(self._store)
            snapshot.result()
            rows = [np.take(array, order, axis=1) for array in snapshot.take(first, part)]
            self._store.append_many(dict(zip(target.keys, rows, strict=True)))
            target.tokens = part.tokens

    # ---- the end ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What it holds and how reading ahead fares.

        "ahead_started", "ahead_used", "ahead_unused": layers that were read ahead, and what became
        of them. "ahead_bytes", "behind_bytes": of what is read ahead, and of tokens that are held
        until they are written; "staging_limit_bytes" is the most that is read ahead.
        "lent_bytes", "idle_bytes": memory of all arrays that somebody uses, those included, and
        waiting to be used again. "devices": of each that layers were fetched to, what its pipeline
        says, and how many layers were ahead when they were asked for.
        """
        with self._lock:
            return {
                "name": self.name,
                "layers": len(self._layers),
                "batch": self._batch,
                "tokens": self.length,
                "stored_bytes": sum(
                    layer.tokens * layer.row_bytes(which)
                    for layer in self._layers
                    for which in (0, 1)
                ),
                **{name: self._counts[name] for name in ("fetches", "ahead_used", "grown")},
                **{name: self._ahead.counts[name] for name in ("ahead_started", "ahead_unused")},
                "ahead_bytes": self._ahead.nbytes,
                "behind_bytes": self._behind.nbytes,
                "staging_limit_bytes": self._ahead.limit_bytes,
                "lent_bytes": self._pool.lent_bytes,
                "idle_bytes": self._pool.idle_bytes,
                "devices": {
                    device.device.name: device.pipe.stats() | {"ahead_used": device.used}
                    for device in self._devices.values()
                },
            }

    def close(self) -> None:
        """Deletes its tensors. May be called again, and after the store was closed."""
        with self._lock:
            if self._is_closed:
                return
            self._behind.close()
            self._ahead.clear()
            for device in self._devices.values():
                device.close()
            self._pool.close()
            try:
                self._store.delete_many([key for layer in self._layers for key in layer.keys])
            except ClosedError:
                pass  # the store is closed, and its space is nobody's to give back
            self._is_closed = True

    def __enter__(self) -> KVCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _opened(self) -> Iterator[None]:
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"KVCache {self.name} is closed: make a new one on the store")
            for index, layer in list(self._changing.items()):
                self._mend(index, layer)
            yield

    def _mend(self, index: int, layer: Layer) -> None:
        """Cuts a layer's tokens and its tensors to what both have, after an interrupt."""
        self._ahead.drop(index)
        self._drop_on_devices(index)
        self._behind.begin_cut(layer, layer.tokens)
        kept = min(layer.tokens, *(self._store.info(key).rows for key in layer.keys))
        self._store.truncate_many(dict.fromkeys(layer.keys, kept))
        layer.tokens = kept
        if layer.row_map is not None:
            layer.row_map = layer.row_map[:kept].copy() if kept else None
        self._behind.end_cut(layer)
        del self._changing[index]


def _count(name: str, value: Any, least: int = 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} has to be a whole number, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name} has to be at least {least}, got {number}")
    return number
