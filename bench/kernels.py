"""What runs on a device in benchmarks: kernels of a set time on the host, attention on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np


class Timed:
    """Kernels of a set duration, on a stream of the host's: they take no processor."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.stream = device.stream()
        self.seconds = 0.0
        """Each."""
        self._free_at = 0.0

    def calibrate(self, arrays: Sequence[Any], seconds: float) -> None:  # noqa: ARG002
        """Has a kernel take so long."""
        self.seconds = seconds

    def launch(self, arrays: Sequence[Any]) -> None:  # noqa: ARG002
        """Puts one into the stream."""
        self.stream.launch(self._run)

    def _run(self) -> None:
        # What a sleep takes too long is made up for by the next.
        begin = max(self._free_at, time.perf_counter() - 1e-3)
        self._free_at = begin + self.seconds
        left = self._free_at - time.perf_counter()
        if left > 0:
            time.sleep(left)


class Attention:
    """Real kernels: one new token's attention over all keys and values of a layer."""

    def __init__(self, device: Any) -> None:
        import cupy

        self.device = device
        self.cupy = cupy
        self.stream = device.stream()
        self.repeats = 1
        self.out: Any = None

    def calibrate(self, arrays: Sequence[Any], seconds: float) -> None:
        """Has a kernel take about so long, by repeating it."""
        self.repeats = 1
        self._timed(arrays)  # compiles
        once = min(self._timed(arrays) for _ in range(3))
        self.repeats = max(1, round(seconds / once))

    def _timed(self, arrays: Sequence[Any]) -> float:
        with self.stream:
            begin = time.perf_counter()
            self.launch(arrays)
            self.stream.record().wait()
            return time.perf_counter() - begin

    def launch(self, arrays: Sequence[Any]) -> None:
        """Puts one into the stream, which is the current one."""
        keys, values = arrays
        query = keys[-1]
        for _ in range(self.repeats):
            self.out = attention(self.cupy, query, keys, values)


def attention(xp: Any, query: Any, keys: Any, values: Any) -> Any:
    """[batch, heads, dim] of one query over [tokens, batch, heads, dim]. `xp` is numpy or CuPy."""
    scores = (keys * query).sum(-1, dtype=np.float32) / np.sqrt(query.shape[-1])
    weights = xp.exp(scores - scores.max(0))
    weights = (weights / weights.sum(0)).astype(values.dtype)
    return (values * weights[..., None]).sum(0, dtype=np.float32)
