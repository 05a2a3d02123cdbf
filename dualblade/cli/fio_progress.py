"""The line that says how far a run is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from dualblade.memory import format_size

LINE_EVERY_S = 1.0


class Progress:
    """With rich on a terminal one line that changes, otherwise a plain line each second."""

    def __init__(self) -> None:
        self._status: Any = None
        self._shown_at = time.monotonic()
        self._moved: dict[str, int] = {}
        self._moved_at = 0.0
        self._show: Callable[[str], None] = _print_line

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
            except ImportError:
                return self
            # A slow spinner: each turn takes the GIL from the threads that are being measured.
            self._status = Console(stderr=True).status("starting", refresh_per_second=2)
            self._status.start()
            self._show = self._status.update
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, what: str) -> None:
        """What the changing line says now; or a plain line, unless there was one just now."""
        now = time.monotonic()
        if self._status is not None or now - self._shown_at >= LINE_EVERY_S:
            self._shown_at = now
            self._show(what)

    def restart(self) -> None:
        """What has moved is counted from nothing again: another job begins."""
        self._moved, self._moved_at = {}, 0.0

    def moved(self, title: str, elapsed_s: float, total: dict[str, int]) -> None:
        """Says how fast bytes move, given how many of each direction have moved in all."""
        now = time.monotonic()
        if now - self._shown_at < LINE_EVERY_S:
            return
        if elapsed_s < self._moved_at:
            self.restart()
        seconds = max(elapsed_s - self._moved_at, 1e-9)
        rates = [
            f"{name} {format_size(int((count - self._moved.get(name, 0)) / seconds))}/s"
            for name, count in total.items()
        ]
        done = format_size(sum(total.values()))
        self._moved, self._moved_at = dict(total), elapsed_s
        self.say(f"{title}: {elapsed_s:.0f} s, {done}, {', '.join(rates)}")


def _print_line(what: str) -> None:
    print(f"dualblade-fio: {what}", file=sys.stderr, flush=True)
