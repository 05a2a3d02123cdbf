"""The layers of a KVCache on a device: copied there ahead of time, in the order they are used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dualblade import tensor
from dualblade.buffer_pool import BufferPool
from dualblade.errors import DualbladeError
from dualblade.kvlayer import SPARE_TOKENS, Layer, gather, lend_rows
from dualblade.lanes import Fetch

if TYPE_CHECKING:
    from dualblade.buffer_pool import Array
    from dualblade.store import TensorStore
    from dualblade.write_behind import WriteBehind

# Rows come off the device through so much pinned memory.
BOUNCE_BYTES = 16 << 20
# The host in a GPU's place keeps memory as a GPU's pool does: all.
POOL_BYTES = 1 << 40
_DLPACK_CUDA_DEVICES = (2, 13)


@dataclass
class _Ahead:
    """A layer's tokens [first, stop) on a device, or on their way there, in stored order."""

    first: int
    stop: int
    arrays: tuple[Any, Any]
    """With room for more tokens."""
    fetch: Fetch
    events: list[Any]
    """After the copies of tokens that were appended since."""


class OnDevice:
    """The pipeline of a KVCache to one device, and which layers are ahead in it.

    Memory comes from the caller's stream, so that who drops an array need not wait: what is done
    there next is done after everything that used it.
    """

    def __init__(
        self,
        store: TensorStore,
        device: Any,
        layers: Sequence[Layer],
        behind: WriteBehind,
        plan: Callable[[int], tuple[list[int], list[int]]],
    ) -> None:
        self.pipe = store.pipeline(device)
        self.device = self.pipe.device
        self._layers = layers
        self._behind = behind
        self._pool = BufferPool(POOL_BYTES)
        self._plan = plan
        self._ahead: dict[int, _Ahead] = {}
        self._bounce: Any = None
        self.used = 0
        """How many layers were ahead when they were asked for."""

    def fetch(self, index: int, first: int) -> tuple[Any, Any]:
        """A layer's keys and values from token `first` on, ordered in the caller's stream."""
        layer = self._layers[index]
        stream = self.device.current_stream()
        found = self._ahead.pop(index, None)
        if found is not None and not (found.first <= first and found.stop == layer.tokens):
            self._cancel(found)
            found = None
        self.used += found is not None
        if found is None:
            self._behind.settle(layer)
            found = self._begin(index, first, stream)
        self._refill(index, stream)
        try:
            self.pipe.take(found.fetch, stream)
        except BaseException:
            self._cancel(found)
            raise
        for event in found.events:
            stream.wait(event)
        keys, values = (array[first - found.first : found.stop - found.first]
                        for array in found.arrays)  # fmt: skip
        if layer.row_map is not None:
            rows = layer.row_map[first : layer.tokens]
            keys, values = (self._gathered(stream, each, rows) for each in (keys, values))
        return keys, values

    def _begin(self, index: int, first: int, stream: Any) -> _Ahead:
        layer = self._layers[index]
        count = layer.tokens - first
        arrays = [self._empty(layer, which, first, count + SPARE_TOKENS)
                  for which in (0, 1)]  # fmt: skip
        wanted = [(key, first, layer.tokens) for key in layer.keys]
        fetch = Fetch(wanted, [array[:count] for array in arrays], [stream.record()])
        fetch.lane = self.pipe.lane_of(wanted)
        self.pipe.begin(fetch)
        return _Ahead(first, layer.tokens, (arrays[0], arrays[1]), fetch, [])

    def _empty(self, layer: Layer, which: int, first: int, count: int) -> Any:
        if self.device.kind == "host":
            return lend_rows(self._pool, layer, which, first, count)
        shape = (count, *layer.row_shape(which))
        return self.device.empty(shape, layer.dtype)  # in the order of the caller's stream

    def _refill(self, current: int, stream: Any) -> None:
        """Starts the layers after this one, as far as they are not on their way."""
        try:
            direct, cached = self._plan(current)
            for index in set(self._ahead).difference(direct, cached):
                self.drop(index)
            for index in (*direct, *cached):
                layer = self._layers[index]
                first = layer.first_token()
                found = self._ahead.get(index)
                if found is not None and found.first <= first and found.stop == layer.tokens:
                    continue
                self.drop(index)
                if index != current and self._behind.is_stored(layer):
                    self._ahead[index] = self._begin(index, first, stream)
        except (DualbladeError, MemoryError):
            return  # fetch() of that layer will say what is wrong, if it still is

    def append(self, index: int, rows: Sequence[Array], tokens: int) -> None:
        """Takes in what was just appended to a layer, after which it has so many tokens."""
        found = self._ahead.get(index)
        if found is None:
            return
        count = len(rows[0])
        at = found.stop - found.first
        if found.stop + count != tokens or at + count > found.arrays[0].shape[0]:
            return  # the next fetch() reads it anew
        stream = self.device.current_stream()
        for event in found.fetch.after:  # the memory may come from another stream's work
            stream.wait(event)
        for array, new in zip(found.arrays, rows, strict=True):
            # A copy, since the caller's memory is its own again.
            source = np.frombuffer(new.tobytes(), np.uint8)
            stream.copy_to_device(self.device.bytes_of(array[at : at + count]), source)
        found.events.append(stream.record())
        found.stop = tokens

    def to_host(self, array: Any) -> Array:
        """What an array of the device holds after what the caller has enqueued so far."""
        device = self.device
        stream = device.current_stream(array)
        source = device.bytes_of(array)
        if self._bounce is None:
            self._bounce = device.arena(BOUNCE_BYTES)
        bounce = self._bounce.array
        found = np.empty(source.nbytes, np.uint8)
        for start in range(0, source.nbytes, BOUNCE_BYTES):
            part = source[start : start + BOUNCE_BYTES]
            stream.copy_to_host(bounce[: part.nbytes], part)
            stream.record().wait()
            found[start : start + part.nbytes] = bounce[: part.nbytes]
        tag = tensor.dtype_tag(array.dtype)
        return tensor.from_bytes(found, tuple(array.shape), tag)

    def _gathered(self, stream: Any, array: Any, row_map: Array) -> Any:
        """The rows of the first tokens in the order of row_map [tokens, batch]."""
        if self.device.kind == "host":
            stream.launch(partial(gather, array, row_map))
            return array
        tokens, batch = array.shape[:2]
        order = np.arange(tokens * batch)
        stored_in = (np.arange(len(row_map)) * batch)[:, None] + row_map
        order[: stored_in.size] = stored_in.ravel()
        rows = array.reshape(tokens * batch, *array.shape[2:])
        with stream:  # also makes its GPU the current one, where the order goes first
            # Only a CuPy array comes here, so CuPy is there.
            return rows.take(sys.modules["cupy"].asarray(order), axis=0).reshape(array.shape)

    def drop(self, index: int) -> None:
        """Forgets what is ahead of a layer; nothing is under way of it after that."""
        found = self._ahead.pop(index, None)
        if found is not None:
            self._cancel(found)

    def _cancel(self, found: _Ahead) -> None:
        self.pipe.cancel(found.fetch)

    def clear(self) -> None:
        """Forgets everything that is ahead."""
        for index in list(self._ahead):
            self.drop(index)

    def close(self) -> None:
        """Closes the pipeline; arrays that were fetched stay."""
        self.clear()
        self.pipe.close()
        self._pool.close()
        if self._bounce is not None:
            self._bounce.close()


def device_of(array: Any) -> str | None:
    """The name of the GPU whose memory an array is in; None for the host's."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(array, getattr(torch, "Tensor", ())):
        return f"cuda:{array.device.index}" if array.device.type == "cuda" else None
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return f"cuda:{array.data.device_id}"
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return None
    kind, index = array.__dlpack_device__()
    return f"cuda:{int(index)}" if int(kind) in _DLPACK_CUDA_DEVICES else None
