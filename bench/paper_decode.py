"""One policy's prefill and decode on a device, step by step as its parent says.

As decode.py, but every layer is brought to a device, where a kernel runs on it: by a copy when it
has been read, or by the pipeline.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from decode import Counters, Decoder, die_with_parent, difference, say
from kernels import Attention, Timed
from policies import POLICIES, Array, Job

from dualblade.gpu import HostDevice, open_device

BOUNCE_BYTES = 8 << 20
CHOOSE_STEPS_MAX = 30


@dataclass(frozen=True)
class DeviceJob(Job):
    """A job whose layers go to a device."""

    device: str
    is_piped: bool
    copy_bytes_per_s: float
    """Of the host in a GPU's place."""
    kernel_bytes_per_s: float
    """How fast a kernel goes through a layer there."""


class Plain:
    """Copies a layer to the device when it has been read, through pinned memory; the next one is
    read while its kernel runs."""

    def __init__(self, device: Any, job: DeviceJob) -> None:
        self.device = device
        self.stream = device.stream()
        self.arena = device.arena(2 * BOUNCE_BYTES)
        self.halves = [self.arena.array[:BOUNCE_BYTES], self.arena.array[BOUNCE_BYTES:]]
        self.copied: list[Any] = [None, None]
        # One layer is copied while the kernel of another runs.
        self.memory = [
            [device.empty(job.tensor_bytes, "uint8", stream=self.stream) for _ in (0, 1)]
            for _ in (0, 1)
        ]
        self.used: list[Any] = [None, None]
        self.turn = 0

    def bring(self, pair: tuple[Array, Array], kernel: Any) -> list[Any]:
        """Keys and values as flat arrays of the device, ordered in the kernel's stream."""
        self.turn ^= 1
        if self.used[self.turn] is not None:
            self.stream.wait(self.used[self.turn])
        found = []
        for source, memory in zip(pair, self.memory[self.turn], strict=True):
            flat = source.reshape(-1)
            for number, start in enumerate(range(0, len(flat), BOUNCE_BYTES)):
                half = number % 2
                if self.copied[half] is not None:
                    self.copied[half].wait()
                part = flat[start : start + BOUNCE_BYTES]
                np.copyto(self.halves[half][: len(part)], part)
                self.stream.copy_to_device(
                    memory[start : start + len(part)], self.halves[half][: len(part)]
                )
                self.copied[half] = self.stream.record()
            found.append(memory[: len(flat)])
        kernel.stream.wait(self.stream.record())
        return found

    def is_used(self, kernel: Any) -> None:
        """The kernel has been put into its stream."""
        self.used[self.turn] = kernel.stream.record()

    def close(self) -> None:
        """Lets go of what it has."""
        self.stream.close()
        self.arena.close()


class DeviceDecoder(Decoder):
    """Prefill as on the host, decode on the device."""

    def __init__(self, job: DeviceJob, stack: ExitStack) -> None:
        super().__init__(job, POLICIES[job.policy](job))
        self.shape = (-1, job.of.batch, job.of.kv_heads, job.of.head_dim)
        self.stack = stack
        self.plain: Plain | None = None

    def ready(self) -> dict[str, Any]:
        """What the interpreter takes, with the device open."""
        job = self.job
        if job.device == "cpu":
            self.device: Any = HostDevice(copy_bytes_per_s=job.copy_bytes_per_s)
            self.kernel: Any = Timed(self.device)
            self.kernel.calibrate([], job.layer_bytes / job.kernel_bytes_per_s)
        else:
            self.device = open_device(job.device)
            self.kernel = Attention(self.device)
        self.stack.callback(self.kernel.stream.close)
        if not job.is_piped:
            self.plain = Plain(self.device, job)
            self.stack.callback(self.plain.close)
        self.counters = Counters(job)
        return super().ready()

    def step(self) -> dict[str, Any]:
        """Every layer on the device, a kernel on it, and one more token for it."""
        job = self.job
        before = self.counters.sample()
        started = time.monotonic()
        untimed = 0.0
        for layer in range(job.layers):
            self._run_layer(layer)
            begin = time.perf_counter()
            rows = self.rows.make(layer, self.tokens, 1)
            untimed += time.perf_counter() - begin
            self.policy.append(layer, *rows)
        self.kernel.stream.record().wait()
        ended = time.monotonic()
        after = self.counters.sample()
        self.tokens += 1
        return {
            "ms": (ended - started - untimed) * 1e3,
            "counts": difference(after, before),
        }

    def _run_layer(self, layer: int) -> None:
        kernel = self.kernel
        with kernel.stream:
            if self.plain is None:
                kernel.launch(self.policy.cache.fetch(layer, device=self.device))
                return
            flat = self.plain.bring(self.policy.fetch(layer), kernel)
            kernel.launch([each.view(np.float16).reshape(self.shape) for each in flat])
            self.plain.is_used(kernel)

    def choose(self) -> dict[str, Any]:
        """Steps until the pipeline has chosen, each of the same tokens."""
        count = 0
        while self.plain is None and count < CHOOSE_STEPS_MAX and not self._has_chosen():
            before = self.tokens
            self.step()
            self.policy.cache.truncate(before)
            self.tokens = before
            count += 1
        return {"steps": count}

    def _has_chosen(self) -> bool:
        lanes = [
            stats[lane]
            for stats in self.policy.cache.stats()["devices"].values()
            for lane in ("direct", "pagecache")
        ]
        used = [lane for lane in lanes if lane["bytes"]]
        return bool(used) and all(lane["settled"] for lane in used)

    def check(self) -> None:
        """Raises ValueError if what reaches the device is not what was appended."""
        for layer in (0, self.job.layers - 1):
            if self.plain is None:
                arrays = self.policy.cache.fetch(layer, device=self.device)
            else:
                arrays = self.plain.bring(self.policy.fetch(layer), self.kernel)
            self.kernel.stream.record().wait()
            pair = [self._on_host(array) for array in arrays]
            self.rows.check(layer, (pair[0], pair[1]), self.tokens)

    def _on_host(self, array: Any) -> Array:
        flat = self.device.bytes_of(array)
        out = np.empty(flat.nbytes, np.uint8)
        stream = self.device.current_stream()
        stream.copy_to_host(out, flat)
        stream.record().wait()
        return out.reshape(self.tokens, -1)


def main() -> None:
    """The process. An error is its last answer."""
    die_with_parent()
    job = DeviceJob(**json.loads(sys.argv[1]))
    try:
        with ExitStack() as stack:
            decoder = DeviceDecoder(job, stack)
            say(decoder.ready())
            for line in sys.stdin:
                command = json.loads(line)
                if command["do"] == "prefill":
                    decoder.tokens = job.prompt
                    say(decoder.prefill(command["room_bytes"]))
                elif command["do"] == "step":
                    say(decoder.step())
                elif command["do"] == "choose":
                    say(decoder.choose())
                elif command["do"] == "settle":
                    decoder.policy.settle()
                    decoder.check()
                    say({})
                else:
                    say({"stats": decoder.policy.stats()})
                    decoder.policy.close()
    except Exception as error:  # noqa: BLE001  whatever it is, the parent has a row for it
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        sys.exit(1)


if __name__ == "__main__":
    main()
