"""Pipelines and KVCache on every computing device: the host, simulated CUDA, and a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import dualblade

MIB = 1 << 20
LAYERS = 5


@pytest.fixture
def store(tmp_path):
    with dualblade.open(tmp_path / "kv.img", size="160MiB", memory="64MiB", live=False) as store:
        yield store
        assert store.stats()["operations_active"] == 0


@pytest.fixture
def expected(store):
    rng = np.random.default_rng(0)
    found = {}
    for layer in range(LAYERS):
        arrays = {
            f"{layer}/{which}": rng.integers(0, 1000, (3000, 4, 64), np.int16) for which in "kv"
        }
        store.put_many(arrays, group=str(layer))
        store.set_path(str(layer), ("direct", "pagecache")[layer % 2])
        found |= arrays
    return found


def on_host(device, array):
    """What an array of the device holds after what is in the caller's stream."""
    stream = device.current_stream()
    flat = device.bytes_of(array)
    out = np.zeros(flat.nbytes, np.uint8)
    stream.copy_to_host(out, flat)
    stream.record().wait(60)
    return out.view(np.dtype(array.dtype)).reshape(array.shape)


def test_groups_come_and_go(device, store, expected):
    groups = [[f"{layer}/k", f"{layer}/v"] for layer in range(LAYERS)]
    with store.pipeline(device, staging="16MiB") as pipe:
        for number, arrays in enumerate(pipe.stream(groups * 3)):
            keys = groups[number % LAYERS]
            for key, array in zip(keys, arrays, strict=True):
                assert (on_host(device, array) == expected[key]).all()
            if number < LAYERS:
                pipe.put({f"copy/{key}": array for key, array in zip(keys, arrays, strict=True)})
        pipe.settle()
        assert pipe.stats()["staging_taken_bytes"] == 0
        with pytest.raises(dualblade.KeyNotFoundError):
            list(pipe.stream([["nobody"]]))
    for key, array in expected.items():
        assert (store.get(f"copy/{key}") == array).all()


def test_memory_is_used_again_after_the_callers_stream(device, store, expected):
    """The caller's stream is far behind: what it copies of each group is that group's content."""
    groups = [[f"{layer}/k"] for layer in range(LAYERS)] * 4
    stream = device.stream()
    copies = []
    with store.pipeline(device, staging="8MiB", chunk_bytes=MIB, depth=2) as pipe, stream:
        for arrays in pipe.stream(groups):
            flat = device.bytes_of(arrays[0])
            copies.append(np.zeros(flat.nbytes, np.uint8))
            stream.copy_to_host(copies[-1], flat)
        stream.record().wait(60)
    stream.close()
    for keys, copy in zip(groups, copies, strict=True):
        assert (copy == expected[keys[0]].reshape(-1).view(np.uint8)).all()


def test_layers_of_a_cache(device, store):
    rng = np.random.default_rng(1)
    batch, heads, dim = 2, 3, 16
    with dualblade.KVCache(store, LAYERS, heads, dim, "float16", batch, 64) as kv:
        whole = [[np.zeros((0, batch, heads, dim), np.float16)] * 2 for _ in range(LAYERS)]
        order = np.arange(batch)
        for step in range(30):
            for layer in range(LAYERS):
                rows = rng.random((1 + 5 * (step == 0), 2, batch, heads, dim), np.float32)
                rows = rows.astype(np.float16)
                new = [rows[:, 0], rows[:, 1]]
                if step % 3 == 1 and device.kind == "cuda":  # from the device
                    kv.append(layer, *(put(device, each) for each in new))
                else:
                    kv.append(layer, *new)
                whole[layer] = [
                    np.concatenate(pair) for pair in zip(whole[layer], new, strict=True)
                ]
                found = kv.fetch(layer, device=device)
                for array, right in zip(found, whole[layer], strict=True):
                    assert (on_host(device, array) == right).all()
            if step == 20 and hasattr(found[0], "take"):  # the simulated CuPy computes nothing
                order = order[::-1]
                kv.reorder(order.tolist())
                whole = [[array[:, order] for array in pair] for pair in whole]
        assert kv.stats()["devices"][device.name]["ahead_used"] > 20 * (LAYERS - 1)


def put(device, data):
    """An array of the device with this content, in the order of the caller's stream."""
    array = device.empty(data.shape, data.dtype)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    device.current_stream().copy_to_device(device.bytes_of(array), flat)
    return array
