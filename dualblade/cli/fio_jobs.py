"""Running a job: batches of requests in flight on one Device, from one or several threads."""

from __future__ import annotations

import itertools
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dualblade import Completion, Device, aligned_empty
from dualblade.cli.fio_latency import Recorder
from dualblade.cli.fio_offsets import Directions, Offsets
from dualblade.cli.fio_options import Options
from dualblade.cli.fio_pylibaio import Batch, PylibaioDevice
from dualblade.cli.fio_target import Region
from dualblade.cli.fio_verify import Pattern, check_block

_POLL_S = 0.1


@dataclass
class Result:
    """What a job of all its threads did."""

    recorders: dict[str, Recorder]
    wall_s: float = 0.0
    user_s: float = 0.0
    system_s: float = 0.0
    context_switches: int = 0
    major_faults: int = 0
    minor_faults: int = 0
    engine: str = ""
    registered_bytes: int = 0
    buffer_bytes: int = 0
    interrupted: bool = False
    verified_blocks: int | None = None
    started_unix: float = 0.0
    device_stats: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def cpu_s(self) -> float:
        """CPU time of the whole process while the job ran."""
        return self.user_s + self.system_s

    @property
    def io_bytes(self) -> int:
        """Both directions."""
        return sum(recorder.io_bytes for recorder in self.recorders.values())


class Lane:
    """One direction of one thread: where it goes next, and what it took."""

    __slots__ = ("is_read", "places", "recorder")

    def __init__(self, *, is_read: bool, places: Offsets) -> None:
        self.is_read = is_read
        self.places = places
        self.recorder = Recorder()


class Slot:
    """Memory for one batch, and the batch that is in flight with it."""

    __slots__ = ("completion", "lane", "memory", "offsets", "started_ns", "submitted_ns", "views")

    def __init__(self, count: int, block_bytes: int, rng: np.random.Generator, lane: Lane) -> None:
        self.memory = aligned_empty(count * block_bytes, np.uint8)
        noise = rng.bytes(min(len(self.memory), 1 << 20))
        for start in range(0, len(self.memory), len(noise)):  # this faults its pages in, too
            part = self.memory[start : start + len(noise)]
            part[:] = np.frombuffer(noise, np.uint8)[: len(part)]
        whole = memoryview(self.memory)
        self.views = [whole[i * block_bytes : (i + 1) * block_bytes] for i in range(count)]
        self.completion: Completion | Batch | None = None
        self.offsets: list[int] = []
        self.lane = lane
        self.started_ns = 0
        self.submitted_ns = 0

    def requests(self) -> zip[tuple[int, memoryview]]:
        """What Device takes; the last batch of a job may have fewer offsets than views."""
        return zip(self.offsets, self.views, strict=False)


class _Verifier:
    """What of the target was written, and whether it is still there."""

    def __init__(self, options: Options, region: Region) -> None:
        self.pattern = Pattern(options.bs)
        self.written = np.zeros(region.size_bytes // options.bs, np.bool_)
        self.only_reads = not options.writes
        self._block_bytes = options.bs

    def fill(self, slot: Slot) -> None:
        for offset, view in slot.requests():
            self.pattern.fill(view, offset)

    def note(self, slot: Slot) -> None:
        """Of a batch that is complete."""
        if not slot.lane.is_read:
            self.written[np.array(slot.offsets, np.int64) // self._block_bytes] = True
        elif self.only_reads:
            for offset, view in slot.requests():
                check_block(view, offset)


class Worker:
    """One of a job's threads: its buffers, its offsets, its figures."""

    def __init__(
        self, number: int, options: Options, region: Region, verifier: _Verifier | None
    ) -> None:
        self._options = options
        self._block_bytes = options.bs
        self._verifier = verifier
        seed = options.randseed * 1000003 + number
        rng = np.random.default_rng(seed)
        batches = -(-options.iodepth // options.iodepth_batch)
        counts = [options.iodepth_batch] * (batches - 1)
        counts.append(options.iodepth - sum(counts))
        blocks = region.size_bytes // options.bs
        self.lanes = {
            name: Lane(
                is_read=name == "read",
                places=Offsets(blocks, options.bs, random=options.is_random, seed=seed),
            )
            for name in options.directions
        }
        lanes = list(self.lanes.values())
        if options.is_random and len(lanes) == 2:
            lanes[1].places = lanes[0].places  # a pass visits each block once, to read or to write
        self.slots = [Slot(count, options.bs, rng, lanes[0]) for count in counts]
        self._mix = Directions(options.rwmixread, seed + 1) if len(lanes) == 2 else None
        moves = options.io_size or region.size_bytes
        self._blocks_left = None if options.time_based else max(1, moves // options.bs)
        self.stopped = False
        self.ended = threading.Event()
        """Set from another thread: no more batches are started."""

    def run(self, device: Device | PylibaioDevice, start_ns: int) -> None:
        """Keeps the depth in flight until the job is done or `stopped`.

        What is done here between a completion and the next batch is part of what is measured.
        """
        runtime = self._options.runtime
        deadline = start_ns + int(runtime * 1e9) if runtime else 1 << 63
        path = self._options.access_path
        read, write = device.read, device.write
        choose, complete = self._choose, self._complete
        fill = self._verifier.fill if self._verifier else None
        clock = time.perf_counter_ns
        now = start_ns
        try:
            for slot in itertools.cycle(self.slots):
                if slot.completion is not None:
                    slot.completion.wait()
                    now = clock()
                    complete(slot, now, start_ns)
                if now >= deadline or self.stopped or not choose(slot):
                    break
                is_read = slot.lane.is_read
                if fill and not is_read:
                    fill(slot)
                start = read if is_read else write
                requests = slot.requests()
                slot.started_ns = clock()
                slot.completion = start(requests, path=path)
                slot.submitted_ns = clock()
        finally:
            self._drain(start_ns)

    def _choose(self, slot: Slot) -> bool:
        """The next batch's direction and offsets; False when everything was handed out."""
        count = len(slot.views)
        left = self._blocks_left
        if left is not None:
            if left < count:
                if left == 0:
                    return False
                count = left
            self._blocks_left = left - count
        if self._mix is not None:
            slot.lane = self.lanes["read" if self._mix.next_is_read() else "write"]
        slot.offsets = slot.lane.places.take(count)
        return True

    def _complete(self, slot: Slot, now: int, start_ns: int) -> None:
        slot.completion = None
        count = len(slot.offsets)
        submitted_ns = slot.submitted_ns
        recorder = slot.lane.recorder
        is_full = recorder.record(
            count,
            count * self._block_bytes,
            submitted_ns - slot.started_ns,
            now - submitted_ns,
            now - start_ns,
        )
        if is_full:
            recorder.fold()
        if self._verifier is not None:
            self._verifier.note(slot)

    def _drain(self, start_ns: int) -> None:
        """Oldest first: waits for all of them, whatever one of them raises."""
        error = None
        for slot in sorted(self.slots, key=lambda slot: slot.started_ns):
            if slot.completion is None:
                continue
            try:
                slot.completion.wait()
            except Exception as caught:  # noqa: BLE001 - raised below, once nothing is in flight
                slot.completion = None
                error = error or caught
            else:
                self._complete(slot, time.perf_counter_ns(), start_ns)
        for lane in self.lanes.values():
            lane.recorder.fold()
        if error is not None:
            raise error


class Job:
    """All threads of a job on one open Device."""

    def __init__(self, options: Options, region: Region, device: Device | PylibaioDevice) -> None:
        self._options = options
        self._device = device
        self._moved_before = device.stats()[options.access_path]
        self._verifier = _Verifier(options, region) if options.verify else None
        self._workers = [Worker(i, options, region, self._verifier) for i in range(options.numjobs)]
        self._error: BaseException | None = None

    def run(self, report: Callable[[Job, float], None]) -> Result:
        """Runs to the end, or until Ctrl-C; `report` is called some times a second."""
        result = Result({name: Recorder() for name in self._options.directions})
        slots = [slot for worker in self._workers for slot in worker.slots]
        result.buffer_bytes = sum(slot.memory.nbytes for slot in slots)
        if self._options.fixedbufs:
            result.registered_bytes = self._device.register([slot.memory for slot in slots])
        result.engine = self._device.info.engine
        if not self._options.direct:
            result.engine = self._device.info.pagecache_engine
        result.started_unix = time.time()
        before = resource.getrusage(resource.RUSAGE_SELF)
        start_ns = time.perf_counter_ns()
        self._run_threads(result, start_ns, report)
        if self._options.end_fsync and self._options.writes:
            self._device.flush()
            result.recorders["write"].last_ns = time.perf_counter_ns() - start_ns
        result.wall_s = (time.perf_counter_ns() - start_ns) / 1e9
        account(result, before, resource.getrusage(resource.RUSAGE_SELF))
        for worker in self._workers:
            for name, lane in worker.lanes.items():
                result.recorders[name].merge(lane.recorder)
        result.device_stats = self._device.stats()
        if self._error is not None:
            raise self._error
        if self._verifier is not None and not result.interrupted:
            try:
                result.verified_blocks = self._verify_written(result)
            except KeyboardInterrupt:
                result.interrupted = True
        return result

    def moved_bytes(self) -> dict[str, int]:
        """So far, as far as it is known: what the progress line shows."""
        stats = self._device.stats()[self._options.access_path]
        return {
            name: stats[f"{name}_bytes"] - self._moved_before[f"{name}_bytes"]
            for name in self._options.directions
        }

    def _run_threads(
        self, result: Result, start_ns: int, report: Callable[[Job, float], None]
    ) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(worker, start_ns), name=f"job-{i}")
            for i, worker in enumerate(self._workers)
        ]
        try:
            for thread in threads:
                thread.start()
            for worker in self._workers:
                while not worker.ended.wait(_POLL_S):
                    report(self, (time.perf_counter_ns() - start_ns) / 1e9)
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            self._stop()
            # Not join() alone: one that an interrupt cut short takes the thread for ended.
            for worker, thread in zip(self._workers, threads, strict=True):
                if thread.ident is not None:
                    worker.ended.wait()
                    thread.join()

    def _guarded(self, worker: Worker, start_ns: int) -> None:
        try:
            worker.run(self._device, start_ns)
        except BaseException as error:  # noqa: BLE001 - run() raises it in the caller's thread
            self._error = self._error or error
            self._stop()
        finally:
            worker.ended.set()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stopped = True

    def _verify_written(self, result: Result) -> int:
        """Reads everything that was written back; how many blocks were compared."""
        verifier = self._verifier
        assert verifier is not None
        if verifier.only_reads:
            return result.recorders["read"].requests
        path = self._options.access_path
        if not self._options.direct:
            self._device.flush()
            self._device.drop_cached(0, len(verifier.written) * self._options.bs)
        blocks = np.flatnonzero(verifier.written)
        offsets = (blocks * self._options.bs).tolist()
        slot = self._workers[0].slots[0]
        for start in range(0, len(offsets), len(slot.views)):
            slot.offsets = offsets[start : start + len(slot.views)]
            self._device.read(slot.requests(), path=path).wait()
            for offset, view in slot.requests():
                verifier.pattern.check(view, offset)
        return len(offsets)


def account(result: Result, before: Any, after: Any) -> None:
    """Notes CPU time, switches and faults between two getrusage()."""
    result.user_s = after.ru_utime - before.ru_utime
    result.system_s = after.ru_stime - before.ru_stime
    result.context_switches = after.ru_nvcsw - before.ru_nvcsw + after.ru_nivcsw - before.ru_nivcsw
    result.major_faults = after.ru_majflt - before.ru_majflt
    result.minor_faults = after.ru_minflt - before.ru_minflt
