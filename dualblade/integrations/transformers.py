"""DualBladeCache: a transformers cache whose keys and values live in a TensorStore."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

try:
    import torch
    from transformers import Cache, DynamicCache
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    message = (
        f"dualblade.integrations.transformers needs torch and transformers 5.18 or newer: {error}. "
        "Install them with: pip install 'dualblade[transformers]' 'transformers>=5.18'"
    )
    raise ImportError(message) from error

from dualblade._core import aligned_empty
from dualblade.errors import ClosedError, UnsupportedError
from dualblade.gpu import open_device
from dualblade.kvcache import KVCache
from dualblade.tensor import to_torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from typing_extensions import Self

    from dualblade.store import TensorStore

# torch's own allocations start on such a line. BLAS kernels choose their code path by the address
# they are given, and another path rounds differently: what is handed out starts on one as well.
_LINE_BYTES = 64
# malloc keeps what is freed, up to 32 MiB a piece, for the next to ask: where memory is short that
# is a layer too many. Copies from this size on are mapped and unmapped.
_LARGE_BYTES = 1 << 20


class DualBladeCache(Cache):
    """The key/value cache of one `generate` call, or of several in a row, kept in a store.

    The tokens that a model generates with it are those it generates with
    `DynamicCache(config=config)`, bit for bit::

        import dualblade
        from dualblade.integrations.transformers import DualBladeCache

        with dualblade.open("kv.img", size="8GiB", memory="2GiB") as store:
            with DualBladeCache(store, model.config) as cache:
                ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=200)

    Args:
        store: what `dualblade.open` returned. One store serves many caches at once.
        config: the model's config. With it, layers with a sliding or chunked window read back the
            window only, and layers without keys and values (linear attention) keep their small
            state in memory. Without it, every layer attends to all tokens.
        max_tokens: how many tokens to lay out storage for; None leaves it to KVCache.
        lookahead: how many layers to read ahead of the one being used; None leaves it to KVCache.
        device: a device of dualblade.gpu that layers are brought to; None: where the model's
            tensors are, which is the host or a CUDA GPU.

    Windowed layers store every token and read the last ones, so `crop` works at any length and
    `activate_past_recording` is not needed. `layers[i].keys` and `.values` stay None: the tensors
    exist only while attention uses them. Gradients do not flow through what was read back.

    `close()` gives the space in the store back; so do `with` and dropping the last reference.
    `reset()` empties the cache for another prompt, of any batch size (of the same one where the
    model has layers whose state is kept in memory).

    On a GPU the next layers are on their way there while attention runs, in the order of torch's
    current stream; that needs CuPy (`pip install 'dualblade[gpu]'`).

    Raises UnsupportedError for tensors elsewhere and for layer types that keep more than keys and
    values; ClosedError once the cache or its store is closed; NoSpaceError when the
    store is full.
    """

    def __init__(
        self,
        store: TensorStore,
        config: PreTrainedConfig | None = None,
        *,
        max_tokens: int | None = None,
        lookahead: int | None = None,
        device: Any = None,
    ) -> None:
        self._backing = _Backing(store, max_tokens, lookahead, device)
        if config is None:
            super().__init__(layer_class_to_replicate=partial(DualBladeLayer, self._backing))
        else:
            super().__init__(layers=_layers_for(config, self._backing))
        # Not a method of self: a finalizer that holds the cache would keep it alive.
        self._finalizer = weakref.finalize(self, self._backing.close)

    def close(self) -> None:
        """Frees the space in the store. May be called twice, and after the store was closed."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """What KVCache.stats() says; an empty dict before the first token."""
        return {} if self._backing.kv is None else self._backing.kv.stats()

    def reset(self) -> None:
        """Forgets all tokens and frees their space; the store takes other shapes from then on."""
        self._backing.forget()
        for layer in self.layers:
            if isinstance(layer, DualBladeLayer):
                layer.is_initialized = False
            else:
                layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; their number is given as a negative int, as to DynamicCache.

        Raises ValueError if tokens_to_remove is positive.
        """
        if tokens_to_remove > 0:
            message = (
                f"crop({tokens_to_remove}): the number of tokens to remove is given as a negative "
                f"number. To remove the last {tokens_to_remove} tokens, call "
                f"crop({-tokens_to_remove}); to keep that many, crop(n - cache.get_seq_length())."
            )
            raise ValueError(message)
        for layer in self._layers_in_memory():
            layer.crop(tokens_to_remove)
        if tokens_to_remove < 0 and self._backing.kv is not None:
            self._backing.kv.truncate(max(self.get_seq_length() + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i of the batch becomes what sequence beam_idx[i] was."""
        for layer in self._layers_in_memory():
            layer.reorder_cache(beam_idx)
        if self._backing.kv is not None:
            self._backing.kv.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence of the batch, [a, b] becoming [a, a, b, b]."""
        for layer in self._layers_in_memory():
            layer.batch_repeat_interleave(repeats)
        if self._backing.kv is not None:
            self._backing.kv.repeat_batch(repeats)
            self._backing.batch *= repeats

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences of the batch: indices, or a mask of bools."""
        for layer in self._layers_in_memory():
            layer.batch_select_indices(indices)
        if self._backing.kv is not None:
            chosen = torch.arange(self._backing.batch)[indices].tolist()
            self._backing.kv.select_batch(chosen)
            self._backing.batch = len(chosen)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing to ask for: reading one layer sets the next ones on their way."""

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Nothing to move: keys and values are in the store already."""

    def _layers_in_memory(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, DualBladeLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> DualBladeCache:
        message = (
            "A DualBladeCache cannot be copied: its tensors are in a store. To reuse a prompt, "
            "generate from it and crop() back to the prompt's length, or fill a second cache."
        )
        raise UnsupportedError(message)

    def __reduce_ex__(self, protocol: Any) -> Any:
        message = (
            "A DualBladeCache cannot be pickled or copied: its tensors are in a store that is open "
            "in this process. Make a new cache where it is needed."
        )
        raise UnsupportedError(message)


class _Backing:
    """The KVCache that the layers of one cache share, made when the first shapes are known."""

    def __init__(
        self, store: TensorStore, max_tokens: int | None, lookahead: int | None, device: Any
    ) -> None:
        self.store = store
        self.max_tokens = max_tokens
        self.lookahead = lookahead
        self.device = device
        self.gpus: dict[str, Any] = {}
        self.kv: KVCache | None = None
        self.batch = 0
        self.closed = False

    def add_layer(self, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> int:
        self.check_open()
        batch, heads, _, dim = keys.shape
        shape = {"kv_heads": heads, "head_dim": dim, "value_dim": values.shape[-1]}
        dtype = str(keys.dtype).removeprefix("torch.")
        if self.kv is None:
            self.kv = KVCache(
                self.store,
                layers=0,
                **shape,
                dtype=dtype,
                batch=batch,
                max_tokens=self.max_tokens,
                lookahead=self.lookahead,
            )
            self.batch = batch
        return self.kv.add_layer(**shape, dtype=dtype, batch=batch, window=window)

    def device_of(self, states: torch.Tensor) -> Any:
        """What layers are to be brought to; None where that is the host's own memory."""
        if self.device is not None:
            return self.device
        if states.device.type == "cpu":
            return None
        if states.device.type != "cuda":
            message = (
                f"DualBladeCache takes tensors on the CPU or on a CUDA GPU and was given one on "
                f"{states.device}. Run the model on one of these."
            )
            raise UnsupportedError(message)
        name = f"cuda:{states.device.index}"
        if name not in self.gpus:
            self.gpus[name] = open_device(name)
        return self.gpus[name]

    def opened(self) -> KVCache:
        self.check_open()
        assert self.kv is not None
        return self.kv

    def check_open(self) -> None:
        if self.closed:
            message = "This DualBladeCache was closed. Make a new one on the store."
            raise ClosedError(message)

    def forget(self) -> None:
        self.check_open()
        if self.kv is not None:
            self.kv.close()
            self.kv = None

    def close(self) -> None:
        self.closed = True
        if self.kv is not None:
            self.kv.close()
            self.kv = None


class DualBladeLayer(CacheLayerMixin):
    """The keys and values of one layer that attends to all tokens, or to a window of them.

    What concerns all layers at once (reset, crop, beams, batch) is asked of the DualBladeCache.
    """

    is_croppable = True

    def __init__(self, backing: _Backing, sliding_window: int | None = None) -> None:
        super().__init__()
        self._backing = backing
        self._index = -1
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes room in the store for tensors like these, [batch, kv_heads, any, dim]."""
        self._backing.device_of(key_states)
        if value_states.dtype != key_states.dtype:
            message = (
                f"The keys are {key_states.dtype} and the values {value_states.dtype}; a layer is "
                "stored in one data type. Load the model in a single dtype and without autocast."
            )
            raise UnsupportedError(message)
        self._index = self._backing.add_layer(key_states, value_states, self.sliding_window)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new tokens; returns all that attention is to see, the new ones included.

        Tensors are [batch, kv_heads, tokens, dim]. Those returned may be views of token-major
        memory: attention over them gives the same bits as over DynamicCache's.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        device = self._backing.device_of(key_states)
        if device is None:
            return self._update(key_states, value_states, None)
        # What the cache enqueues and allocates is in the order of the model's own stream.
        with device.current_stream(key_states):
            return self._update(key_states, value_states, device)

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, device: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kv = self._backing.opened()
        past, new = kv.tokens(self._index), key_states.shape[-2]
        window = self.sliding_window
        if past == 0:
            self._append(kv, key_states, value_states)
            return _in_torch_layout(key_states), _in_torch_layout(value_states)
        if window is None or new == 1 or past + new <= window:
            self._append(kv, key_states, value_states)
            keys, values = kv.fetch(self._index, device=device)
            return _for_attention(keys, device), _for_attention(values, device)
        # The first of several new tokens sees window - 1 tokens before it: more than the window
        # that reaches back from the last one, so these are read before the new ones are stored.
        keys, values = kv.fetch(self._index, device=device)
        first = max(len(keys) - (window - 1), 0)
        self._append(kv, key_states, value_states)
        return (
            torch.cat([_heads_first(keys[first:], device), key_states], dim=-2),
            torch.cat([_heads_first(values[first:], device), value_states], dim=-2),
        )

    def _append(self, kv: KVCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        rows = [new.detach().permute(2, 0, 1, 3) for new in (keys, values)]
        if keys.device.type == "cuda":
            rows = [new.contiguous() for new in rows]
        kv.append(self._index, *rows)

    def get_seq_length(self) -> int:
        """Tokens stored, those outside of the window included."""
        return self._backing.opened().tokens(self._index) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return for this many new tokens, and the first's position."""
        past = self.get_seq_length()
        seen = past if self.sliding_window is None else min(past, self.sliding_window - 1)
        return seen + query_length, past - seen

    def get_max_length(self) -> int:
        """The window of a layer that has one, else -1: the store's size is the only limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_max_cache_shape(self) -> int:
        """get_max_length() by the name it has in older releases of transformers."""
        return self.get_max_length()

    def offload(self) -> None:
        """Nothing to move: keys and values are in the store already."""

    def prefetch(self) -> None:
        """Nothing to ask for: reading one layer sets the next ones on their way."""

    def _refuse_alone(self, *_: Any) -> None:
        message = (
            "The layers of a DualBladeCache change together: call reset, crop, reorder_cache, "
            "batch_repeat_interleave and batch_select_indices on the cache, not on a layer."
        )
        raise UnsupportedError(message)

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse_alone


def _layers_for(config: PreTrainedConfig, backing: _Backing) -> list[Any]:
    """One layer for each that DynamicCache would have: it knows how to read every config."""
    layers: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            layers.append(DualBladeLayer(backing))
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(DualBladeLayer(backing, layer.sliding_window))
        elif not isinstance(layer, CacheLayerMixin):
            # A state of fixed size, or nothing at all: there is no token to store.
            layers.append(layer)
        else:
            message = (
                f"Layer {index} of this {config.model_type} model needs a {type(layer).__name__}, "
                "which keeps more than keys and values; DualBladeCache stores layers of full, "
                "sliding and chunked attention. Use transformers' DynamicCache for this model."
            )
            raise UnsupportedError(message)
    return layers


def _heads_first(rows: Any, device: Any) -> torch.Tensor:
    """[tokens, batch, kv_heads, dim] seen as [batch, kv_heads, tokens, dim]."""
    found = to_torch(rows) if device is None else device.to_torch(rows)
    return found.permute(1, 2, 0, 3)


def _for_attention(rows: Any, device: Any) -> torch.Tensor:
    """[tokens, batch, kv_heads, dim] as attention takes it, [batch, kv_heads, tokens, dim].

    On the host, of float32 a view: attention is as fast on it, and gives the same bits as on
    DynamicCache's contiguous tensors as long as each row of dim numbers starts on a line in both
    layouts. Where that does not hold, and of the half precisions, a copy in DynamicCache's layout:
    over strided rows their CPU kernels lose several times what the copy takes. On a GPU a copy.
    """
    states = _heads_first(rows, device)
    if device is not None:
        # Also where it is contiguous: the array's memory is not torch's to use again.
        return states.clone(memory_format=torch.contiguous_format)
    starts_on_line = states.data_ptr() % _LINE_BYTES == 0
    rows_on_lines = states.shape[-1] * states.element_size() % _LINE_BYTES == 0
    is_wide = states.element_size() >= torch.float32.itemsize
    if starts_on_line and (states.is_contiguous() or (is_wide and rows_on_lines)):
        return states
    if rows.nbytes < _LARGE_BYTES:
        return _in_torch_layout(states)
    return to_torch(aligned_empty(tuple(states.shape), rows.dtype)).copy_(states)


def _in_torch_layout(states: torch.Tensor) -> torch.Tensor:
    """Contiguous and starting on a line, as torch.cat makes it; copied only if it is not so."""
    if states.is_contiguous() and states.data_ptr() % _LINE_BYTES == 0:
        return states
    return states.clone(memory_format=torch.contiguous_format)
