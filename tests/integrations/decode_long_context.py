"""A program for test_limited_memory.py: a Llama-shaped model decodes behind 8,192 tokens of KV.

Loads everything, says "ready", waits for a line, then decodes; prints a JSON object at the end.
Usage: decode_long_context.py memory | decode_long_context.py PATH-OF-STORE
"""

import hashlib
import json
import os
import sys
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import dualblade
from dualblade.integrations.transformers import DualBladeCache

LAYERS, HEADS, DIM, TOKENS = 8, 8, 128, 8192
STEPS = int(os.environ.get("DUALBLADE_TEST_STEPS", "8"))
CHUNK = 512
KV_BYTES = 2 * LAYERS * HEADS * DIM * TOKENS * 2  # keys and values, float16


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HEADS * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        intermediate_size=256,
        max_position_embeddings=TOKENS,
        initializer_range=0.05,
    )
    # On a CPU, eager attention is the faster one for a single query in float16.
    model = LlamaForCausalLM._from_config(config, dtype=torch.float16, attn_implementation="eager")
    return model.eval()


def fill(cache, tokens):
    """The keys and values of a long prompt, a chunk at a time, as a prefill brings them.

    They are random numbers: computing them takes minutes on a small CPU, and says nothing more.
    """
    generator = torch.Generator().manual_seed(1)
    for start in range(0, tokens, CHUNK):
        shape = (1, HEADS, min(CHUNK, tokens - start), DIM)
        for layer in range(LAYERS):
            keys, values = (torch.randn(shape, generator=generator).half() for _ in "kv")
            cache.update(keys, values, layer)


def decode(model, cache, steps):
    """Greedy decoding: the token ids, and a digest of all logits."""
    ids, digest = [1], hashlib.sha256()
    for _ in range(steps):
        logits = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1]
        digest.update(logits.numpy().tobytes())
        ids.append(int(logits.argmax()))
    return ids, digest.hexdigest()


def main(place):
    torch.set_num_threads(1)  # and a CPU is left to the store
    model = make_model()
    # One pass of each kind, so that what torch allocates for itself once is there beforehand.
    warm_up = DynamicCache()
    model(torch.ones((1, 64), dtype=torch.long), past_key_values=warm_up)
    decode(model, warm_up, 2)
    del warm_up
    print("ready", flush=True)
    sys.stdin.readline()

    stats = {}
    if place == "memory":
        cache = DynamicCache()
    else:
        store = dualblade.open(place, size=KV_BYTES + (64 << 20), memory="auto")
        cache = DualBladeCache(store, max_tokens=TOKENS)
    fill(cache, TOKENS - STEPS)
    start = time.monotonic()
    ids, digest = decode(model, cache, STEPS)
    seconds = time.monotonic() - start
    assert cache.get_seq_length() == TOKENS
    if place != "memory":
        stats = store.stats()["paths"]
        cache.close()
        store.close()
    print(json.dumps({"ids": ids, "logits": digest, "decode_s": seconds, "paths": stats}))


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
