"""Latencies and bytes of one direction, folded into a histogram while the job runs."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

# 64 bins to each power of two, as fio has them: a percentile is off by 0.8 % at the most.
_BIN_BITS = 6
_BINS = 64 - _BIN_BITS << _BIN_BITS
INTERVAL_MS = 100
"""Of the throughput over time."""
FOLD_BATCHES = 2048
_FIELDS = 5  # of a batch: requests, bytes, slat, clat, when it completed


class Moments:
    """Least, greatest, mean and deviation of numbers that are not kept."""

    def __init__(self) -> None:
        self.count = 0
        self.least = 0
        self.greatest = 0
        self._sum = 0
        self._squares = 0.0

    def add(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Takes in int64 values, each as often as its weight says."""
        least, greatest = int(values.min()), int(values.max())
        self.least = min(self.least, least) if self.count else least
        self.greatest = max(self.greatest, greatest)
        self.count += int(weights.sum())
        self._sum += int((values * weights).sum())
        self._squares += float((values.astype(np.float64) ** 2 * weights).sum())

    def add_one(self, value: int) -> None:
        """Takes in one number."""
        self.add(np.array([value]), np.ones(1, np.int64))

    def merge(self, other: Moments) -> None:
        """Takes in what another one has."""
        if other.count:
            self.least = min(self.least, other.least) if self.count else other.least
            self.greatest = max(self.greatest, other.greatest)
            self.count += other.count
            self._sum += other._sum
            self._squares += other._squares

    @property
    def mean(self) -> float:
        """0 when there is nothing."""
        return self._sum / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 when there is nothing."""
        if self.count == 0:
            return 0.0
        return math.sqrt(max(0.0, self._squares / self.count - self.mean**2))


class Recorder:
    """What happened in one direction of one job, or of several after merge()."""

    def __init__(self) -> None:
        self.io_bytes = 0
        self.requests = 0
        self.slat = Moments()
        self.clat = Moments()
        self.lat = Moments()
        self.last_ns = 0
        """When the last batch completed, since the start."""
        self.bytes_in_interval: Counter[int] = Counter()
        self.batches: Counter[int] = Counter()
        """How many batches had so many requests."""
        self._bins = np.zeros(_BINS, np.int64)
        self._samples: list[int] = []

    def record(
        self, requests: int, moved_bytes: int, slat_ns: int, clat_ns: int, completed_ns: int
    ) -> bool:
        """Notes one batch; True when it is time to fold()."""
        samples = self._samples
        samples += (requests, moved_bytes, slat_ns, clat_ns, completed_ns)
        return len(samples) >= FOLD_BATCHES * _FIELDS

    def fold(self) -> None:
        """Takes what record() noted into the figures."""
        if not self._samples:
            return
        samples = np.array(self._samples, np.int64).reshape(-1, _FIELDS)
        requests, moved, slat, clat, completed = samples.T
        self.requests += int(requests.sum())
        self.io_bytes += int(moved.sum())
        self.slat.add(slat, requests)
        self.clat.add(clat, requests)
        self.lat.add(slat + clat, requests)
        self.last_ns = max(self.last_ns, int(completed.max()))
        sizes, counts = np.unique(requests, return_counts=True)
        self.batches.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
        np.add.at(self._bins, _bin_of(clat), requests)
        intervals, inverse = np.unique(completed // (INTERVAL_MS * 1_000_000), return_inverse=True)
        sums = np.bincount(inverse, weights=moved)
        for interval, count in zip(intervals.tolist(), sums.tolist(), strict=True):
            self.bytes_in_interval[interval] += int(count)
        self._samples = []

    def merge(self, other: Recorder) -> None:
        """Takes in what another one has folded."""
        self.requests += other.requests
        self.io_bytes += other.io_bytes
        self.slat.merge(other.slat)
        self.clat.merge(other.clat)
        self.lat.merge(other.lat)
        self.last_ns = max(self.last_ns, other.last_ns)
        self._bins += other._bins
        self.bytes_in_interval.update(other.bytes_in_interval)
        self.batches.update(other.batches)

    def bins(self) -> dict[int, int]:
        """Requests by clat in nanoseconds: the middle of each bin that has any."""
        return {_middle(i): int(self._bins[i]) for i in np.flatnonzero(self._bins).tolist()}

    def percentile(self, percent: float) -> int:
        """clat in nanoseconds that this share of the requests did not exceed; 0 without any."""
        total = int(self._bins.sum())
        if total == 0:
            return 0
        wanted = max(1, math.ceil(total * percent / 100))
        index = int(np.searchsorted(np.cumsum(self._bins), wanted))
        return min(max(_middle(index), self.clat.least), self.clat.greatest)

    def bytes_per_second(self, interval_ms: int = 500) -> list[float]:
        """Of each whole interval since the start."""
        step = interval_ms // INTERVAL_MS
        whole = self.last_ns // 1_000_000 // interval_ms
        return [
            sum(self.bytes_in_interval[i * step + j] for j in range(step)) / (interval_ms / 1000)
            for i in range(whole)
        ]


def _bin_of(values: np.ndarray) -> np.ndarray:
    """Below 128 a bin for each; above, the highest bit and the six that follow."""
    _, exponent = np.frexp(values.astype(np.float64))
    shift = np.maximum(exponent - 1 - _BIN_BITS, 0)
    return np.minimum((shift << _BIN_BITS) + (values >> shift), _BINS - 1)


def _middle(index: int) -> int:
    shift = max(0, (index >> _BIN_BITS) - 1)
    low = index - (shift << _BIN_BITS) << shift
    return low + (1 << shift >> 1)
