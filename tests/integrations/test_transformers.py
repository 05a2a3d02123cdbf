"""DualBladeCache against transformers' own DynamicCache: the same logits, bit for bit."""

import copy
import gc
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dualblade
from dualblade.gpu import HostDevice, open_device

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import DynamicCache  # noqa: E402

from dualblade.integrations.transformers import DualBladeCache  # noqa: E402

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # Wide enough that what attention sees decides the next token.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
WINDOW = 8


def config_of(family):
    if family == "llama":
        return transformers.LlamaConfig(**SIZES, **GROUPED)
    if family == "qwen3":
        return transformers.Qwen3Config(**SIZES, **GROUPED | {"head_dim": 32})
    if family == "mistral":
        return transformers.MistralConfig(**SIZES, **GROUPED, sliding_window=WINDOW)
    if family == "gemma3":
        layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3TextConfig(
            **SIZES,
            **GROUPED | {"num_key_value_heads": 1},
            sliding_window=WINDOW,
            layer_types=layer_types,
            query_pre_attn_scalar=16,
        )
    if family == "lfm2":
        layer_types = ["conv", "full_attention", "conv"]
        return transformers.Lfm2Config(**SIZES, **GROUPED, layer_types=layer_types)
    if family == "gemma3n":
        return transformers.Gemma3nTextConfig(
            **SIZES,
            **GROUPED | {"intermediate_size": [96] * 3},
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            num_kv_shared_layers=1,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 3,
        )
    assert family == "opt"
    return transformers.OPTConfig(
        **{key: value for key, value in SIZES.items() if key != "initializer_range"},
        init_std=0.3,
        ffn_dim=96,
        word_embed_proj_dim=64,
    )


FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "opt"]
_models = {}


def model_of(family, dtype=torch.float32, **options):
    key = (family, dtype, *options.items())
    if key not in _models:
        torch.manual_seed(len(family))
        config = config_of(family)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        _models[key] = model.eval()
    return _models[key]


def prompts(batch=2, tokens=21, seed=0):
    """Random ids; every sequence but the first is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 128, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def run(model, cache, inputs, **options):
    """Generates; returns the token ids, and the logits of every step where there are some."""
    options = {"max_new_tokens": 24, "do_sample": False} | options
    torch.manual_seed(1234)
    result = model.generate(
        **inputs,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    assert result.past_key_values is cache
    return result.sequences, torch.stack(result.logits)


def assert_same(ours, theirs):
    assert ours[0].tolist() == theirs[0].tolist()
    assert torch.equal(ours[1], theirs[1])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small, torch's other threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path):
    with dualblade.open(tmp_path / "kv.img", size="64MiB", memory="4MiB") as store:
        yield store


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_dynamic_cache_generates(store, family, mode):
    model = model_of(family)
    theirs = run(model, DynamicCache(config=model.config), prompts(), **MODES[mode])
    with DualBladeCache(store, model.config) as cache:
        assert_same(run(model, cache, prompts(), **MODES[mode]), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(store, family, dtype):
    model = model_of(family, dtype)
    theirs = run(model, DynamicCache(config=model.config), prompts())
    with DualBladeCache(store, model.config) as cache:
        assert_same(run(model, cache, prompts()), theirs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_eager_attention(store, family):
    model = model_of(family, attn_implementation="eager")
    theirs = run(model, DynamicCache(config=model.config), prompts())
    with DualBladeCache(store, model.config) as cache:
        assert_same(run(model, cache, prompts()), theirs)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_a_config_all_layers_attend_to_all_tokens(store, family):
    model = model_of(family)
    theirs = run(model, DynamicCache(), prompts())
    with DualBladeCache(store) as cache:
        assert_same(run(model, cache, prompts()), theirs)
        assert not any(cache.is_sliding)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", ["lfm2", "gemma3n"])
def test_layers_that_store_nothing(store, family, mode):
    """A convolution's state stays in memory; a layer may use what another one stored."""
    model = model_of(family)
    theirs = run(model, DynamicCache(config=model.config), prompts(), **MODES[mode])
    with DualBladeCache(store, model.config) as cache:
        assert_same(run(model, cache, prompts(), **MODES[mode]), theirs)


def test_encoder_and_decoder(store):
    config = transformers.BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
        init_std=0.3,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    options = {"max_new_tokens": 12, "num_beams": 2, "do_sample": False}
    theirs = model.generate(**prompts(), **options)
    with DualBladeCache(store) as cache:
        both = transformers.EncoderDecoderCache(cache, DynamicCache())
        ours = model.generate(**prompts(), past_key_values=both, **options)
        assert cache.get_seq_length() > 0
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_continues_in_one_cache(store, family):
    model = model_of(family)

    def converse(cache):
        first = run(model, cache, prompts(batch=1))
        more = torch.cat([first[0], prompts(batch=1, tokens=9, seed=5)["input_ids"]], dim=1)
        return run(model, cache, {"input_ids": more, "attention_mask": torch.ones_like(more)})

    with DualBladeCache(store, model.config) as cache:
        assert_same(converse(cache), converse(DynamicCache(config=model.config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_reused_after_crop(store, family):
    model = model_of(family)

    def twice(cache):
        cache.activate_past_recording()
        prompt = prompts(batch=1)
        run(model, cache, prompt, max_new_tokens=17)
        cache.crop(20 - cache.get_seq_length())
        assert cache.get_seq_length() == 20
        return run(model, cache, prompt)

    with DualBladeCache(store, model.config) as cache:
        assert_same(twice(cache), twice(DynamicCache(config=model.config)))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("draft", ["prompt lookup", "assistant"])
def test_assisted_generation_crops_refused_tokens(store, family, draft):
    model = model_of(family)
    options = {"prompt_lookup_num_tokens": 3}
    if draft == "assistant":
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            assistant.get_input_embeddings().weight.add_(0.1)
        options = {"assistant_model": assistant}
    inputs = prompts(batch=1, tokens=6)
    inputs = {key: value.repeat(1, 4) for key, value in inputs.items()}
    theirs = run(model, DynamicCache(config=model.config), inputs, **options)
    with DualBladeCache(store, model.config) as cache:
        assert_same(run(model, cache, inputs, **options), theirs)


# The state that lfm2's layers without keys keep in memory has the first prompt's batch for good.
@pytest.mark.parametrize(("family", "batch"), [("llama", 3), ("gemma3", 1), ("lfm2", 4)])
def test_reset_makes_a_used_cache_new(store, family, batch):
    model = model_of(family)
    with DualBladeCache(store, model.config) as cache:
        run(model, cache, prompts(batch=2), num_beams=2)
        cache.reset()
        assert cache.get_seq_length() == 0
        theirs = run(model, DynamicCache(config=model.config), prompts(batch=batch, seed=7))
        assert_same(run(model, cache, prompts(batch=batch, seed=7)), theirs)


def test_two_caches_share_one_store(store):
    model = model_of("llama")

    def interleave(*caches):
        for turn in range(3):
            for seed, cache in enumerate(caches):
                inputs = prompts(batch=1, tokens=20 + 30 * turn, seed=seed)
                yield run(model, cache, inputs)

    with (
        DualBladeCache(store, model.config) as first,
        DualBladeCache(store, model.config) as second,
    ):
        theirs = interleave(DynamicCache(config=model.config), DynamicCache(config=model.config))
        for mine, other in zip(interleave(first, second), theirs, strict=True):
            assert_same(mine, other)


# ---- the layers alone, against the tensors that DynamicCache returns ----------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("reorder"), st.randoms(use_true_random=False)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.randoms(use_true_random=False)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


class Pair:
    """The same calls to a DualBladeCache and to a DynamicCache; every answer is compared."""

    def __init__(self, ours, theirs, heads, dim, dtype):
        self.caches = ours, theirs
        self.shape = heads, dim
        self.dtype = dtype
        self.batch = 2
        self.is_cropped = False
        self.generator = torch.Generator().manual_seed(0)

    def states(self, tokens):
        heads, dim = self.shape
        shape = (self.batch, tokens, heads, dim)
        # As a model makes them: heads moved forward, so not contiguous.
        return torch.randn(shape, generator=self.generator).to(self.dtype).transpose(1, 2)

    def update(self, tokens):
        self.is_cropped = False
        for layer in range(3):
            keys, values = self.states(tokens), self.states(tokens)
            ours, theirs = (cache.get_mask_sizes(tokens, layer) for cache in self.caches)
            assert ours == theirs
            ours, theirs = (cache.update(keys, values, layer) for cache in self.caches)
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.dtype == other.dtype
                assert torch.equal(mine, other)

    def crop(self, tokens):
        # DynamicCache's windowed layers fail when nothing is stored, and below zero; and they keep
        # only what the next update needs, so that a second crop before it loses tokens.
        tokens = min(tokens, self.caches[1].get_seq_length())
        if self.caches[1].get_seq_length() == 0 or self.is_cropped:
            return
        self.is_cropped = True
        for cache in self.caches:
            cache.crop(-tokens)

    def reorder(self, random):
        beams = torch.tensor([random.randrange(self.batch) for _ in range(self.batch)])
        for cache in self.caches:
            cache.reorder_cache(beams)

    def repeat(self, repeats):
        if self.batch * repeats <= 8 and self.caches[1].get_seq_length() > 0:
            for cache in self.caches:
                cache.batch_repeat_interleave(repeats)
            self.batch *= repeats

    def select(self, random):
        if self.caches[1].get_seq_length() > 0:
            kept = random.sample(range(self.batch), random.randint(1, self.batch))
            for cache in self.caches:
                cache.batch_select_indices(torch.tensor(kept))
            self.batch = len(kept)

    def reset(self, _):
        for cache in self.caches:
            cache.reset()


@given(
    steps=STEPS,
    window=st.integers(2, 12),
    heads=st.integers(1, 3),
    dim=st.sampled_from([4, 20, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_layers_return_what_dynamic_cache_returns(store, steps, window, heads, dim, dtype):
    config = config_of("gemma3")
    config.sliding_window = window
    theirs = DynamicCache(config=config)
    theirs.activate_past_recording()
    with DualBladeCache(store, config) as ours:
        pair = Pair(ours, theirs, heads, dim, dtype)
        for name, argument in steps:
            getattr(pair, name)(argument)
            lengths = [cache.get_seq_length() for cache in pair.caches]
            assert lengths[0] == lengths[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 256), (8, 128), (3, 20), (4, 80)])
def test_attention_does_not_see_the_layout(store, two_threads, heads, dim, dtype):
    """What is handed out is a view of token-major memory: the kernels' sums must not change."""
    generator = torch.Generator().manual_seed(dim)
    theirs = DynamicCache()

    def random(tokens):
        shape = (2, heads, tokens, dim)
        return torch.randn(shape, generator=generator).to(dtype)

    with DualBladeCache(store, max_tokens=64) as ours:
        for tokens in (33, 1, 1, 16):
            keys, values, queries = random(tokens), random(tokens), random(tokens)
            results = []
            for cache in (ours, theirs):
                all_keys, all_values = cache.update(keys, values, 0)
                fused = torch.nn.functional.scaled_dot_product_attention(
                    queries, all_keys, all_values
                )
                weights = torch.softmax(queries @ all_keys.transpose(2, 3), dim=-1)
                results.append((fused, weights, weights @ all_values))
            for mine, other in zip(*results, strict=True):
                assert torch.equal(mine, other)


def test_window_is_all_that_is_read_back(store):
    config = config_of("mistral")
    with DualBladeCache(store, config) as cache:
        states = torch.randn(1, 2, 100, 16)
        cache.update(states, states, 0)
        keys, values = cache.update(states[:, :, :1], states[:, :, :1], 0)
        assert keys.shape == values.shape == (1, 2, WINDOW, 16)
        assert cache.get_seq_length() == 101


def test_properties(store):
    config = config_of("gemma3")
    with DualBladeCache(store, config) as cache:
        reference = DynamicCache(config=config)
        assert cache.is_sliding == reference.is_sliding == [True, False, True]
        assert cache.is_croppable
        assert not cache.is_compileable
        assert len(cache) == 3
        for layer in (None, 0, 1):
            assert cache.get_max_length(layer) == reference.get_max_length(layer)
        assert cache.stats() == {}
        states = torch.randn(1, 1, 3, 16)
        cache.update(states, states, 0)
        assert cache.stats()


# ---- memory, space and closing ------------------------------------------------------------------


def filled(store, **options):
    cache = DualBladeCache(store, **options)
    states = torch.randn(1, 2, 40, 16)
    cache.update(states, states, 0)
    return cache


def free_bytes(store):
    return store.stats()["free_bytes"]


def test_space_is_given_back(store):
    before = free_bytes(store)
    cache = filled(store)
    assert free_bytes(store) < before
    cache.close()
    assert free_bytes(store) == before
    cache.close()

    cache = filled(store)
    del cache
    gc.collect()
    assert free_bytes(store) == before


def test_a_closed_cache_says_so(store):
    cache = filled(store)
    cache.close()
    states = torch.randn(1, 2, 1, 16)
    with pytest.raises(dualblade.ClosedError, match="Make a new one"):
        cache.update(states, states, 0)
    with pytest.raises(dualblade.ClosedError):
        cache.get_seq_length()
    with pytest.raises(dualblade.ClosedError):
        cache.reset()


def test_a_closed_store_says_so(tmp_path):
    store = dualblade.open(tmp_path / "kv.img", size="8MiB", memory="1MiB")
    cache = filled(store)
    store.close()
    states = torch.randn(1, 2, 1, 16)
    with pytest.raises(dualblade.ClosedError):
        cache.update(states, states, 0)
    with pytest.raises(dualblade.ClosedError):
        cache.update(states, states, 1)
    cache.close()


def test_a_full_store_says_so_and_goes_on(tmp_path):
    with dualblade.open(tmp_path / "kv.img", size="4MiB", memory="1MiB") as store:
        cache = DualBladeCache(store)
        states = torch.randn(1, 8, 64, 128)
        with pytest.raises(dualblade.NoSpaceError):
            for layer in range(64):
                for _ in range(8):
                    cache.update(states, states, layer)
        cache.close()
        other = filled(store)
        assert other.get_seq_length() == 40


def test_a_copy_is_refused(store):
    cache = filled(store)
    with pytest.raises(dualblade.UnsupportedError, match="crop"):
        copy.deepcopy(cache)
    with pytest.raises(dualblade.UnsupportedError, match="new cache"):
        copy.copy(cache)


def test_tensors_elsewhere_are_refused(store):
    states = torch.empty(1, 2, 4, 16, device="meta")
    with pytest.raises(dualblade.UnsupportedError, match="on the CPU or on a CUDA GPU.*meta"):
        DualBladeCache(store).update(states, states, 0)


def test_mixed_dtypes_are_refused(store):
    states = torch.randn(1, 2, 4, 16)
    with pytest.raises(dualblade.UnsupportedError, match=r"float32.*float16"):
        DualBladeCache(store).update(states, states.half(), 0)


def test_layers_that_keep_more_are_refused(store):
    config = transformers.FalconH1Config(vocab_size=128, hidden_size=64, num_hidden_layers=2)
    with pytest.raises(dualblade.UnsupportedError, match="Layer 0 of this falcon_h1 model"):
        DualBladeCache(store, config)


def test_a_positive_crop_is_refused(store):
    cache = filled(store)
    with pytest.raises(ValueError, match=r"crop\(-3\)"):
        cache.crop(3)
    assert cache.get_seq_length() == 40


def test_one_layer_is_not_changed_alone(store):
    cache = filled(store)
    for change in ("reset", "crop", "reorder_cache"):
        with pytest.raises(dualblade.UnsupportedError, match="on the cache"):
            getattr(cache.layers[0], change)(*[torch.tensor([0])][: change != "reset"])


def test_without_transformers_it_says_what_to_install():
    program = "import sys; sys.modules['torch'] = None; import dualblade.integrations.transformers"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'dualblade[transformers]'" in done.stderr


# ---- models elsewhere ----------------------------------------------------------------------------


@pytest.fixture(params=["staged", "unified"])
def device(request):
    """The host in a GPU's place."""
    if request.param == "unified":
        return HostDevice(unified=True)
    return HostDevice(copy_bytes_per_s=5e9)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_go_to_a_device_are_the_same(store, family, device):
    model, inputs = model_of(family), prompts()
    theirs = run(model, DynamicCache(config=model.config), inputs)
    with DualBladeCache(store, model.config, device=device) as cache:
        assert_same(run(model, cache, inputs), theirs)
        ahead = cache.stats()["devices"]["cpu"]["ahead_used"]
        assert ahead > 20 * (len(cache.layers) - 1)
        cache.reset()
        assert_same(run(model, cache, inputs), theirs)


def test_beams_on_a_device_are_the_same(store, device):
    model, inputs = model_of("llama", torch.bfloat16), prompts(batch=2)
    options = {"num_beams": 3, "num_return_sequences": 2}
    theirs = run(model, DynamicCache(config=model.config), inputs, **options)
    with DualBladeCache(store, model.config, device=device) as cache:
        assert_same(run(model, cache, inputs, **options), theirs)


@pytest.fixture
def cuda():
    """A GPU's name to torch, or the test is skipped with the reason why there is none."""
    try:
        return open_device("cuda").name
    except dualblade.UnsupportedError as error:
        pytest.skip(str(error))


def on(name, inputs):
    return {key: each.to(name) for key, each in inputs.items()}


# Kernels of a GPU may take other ways to the same number: tokens are compared, not logits' bits.


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked prefill"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_on_cuda_what_dynamic_cache_generates(store, cuda, family, mode):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    model, inputs = copy.deepcopy(model_of(family)).to(cuda), on(cuda, prompts())
    theirs = run(model, DynamicCache(config=model.config), inputs, **MODES[mode])
    with DualBladeCache(store, model.config) as cache:
        ours = run(model, cache, inputs, **MODES[mode])
        assert ours[0].tolist() == theirs[0].tolist()
        torch.testing.assert_close(ours[1], theirs[1])
        if mode == "greedy":
            ahead = cache.stats()["devices"][cuda]["ahead_used"]
            assert ahead > 20 * (len(cache.layers) - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cuda(store, cuda, dtype):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    model, inputs = copy.deepcopy(model_of("llama", dtype)).to(cuda), on(cuda, prompts())
    theirs = run(model, DynamicCache(config=model.config), inputs)
    with DualBladeCache(store, model.config) as cache:
        assert run(model, cache, inputs)[0].tolist() == theirs[0].tolist()


def test_a_stream_of_torchs_on_cuda(store, cuda):
    """Nothing that a model does in a stream of its own is overtaken by what the cache does."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    model, inputs = copy.deepcopy(model_of("llama")).to(cuda), on(cuda, prompts())
    theirs = run(model, DynamicCache(config=model.config), inputs)
    with torch.cuda.stream(torch.cuda.Stream()), DualBladeCache(store, model.config) as cache:
        assert run(model, cache, inputs)[0].tolist() == theirs[0].tolist()
