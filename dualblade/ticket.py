"""The handle of an operation that was started and not yet waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from dualblade._core import Bracket, Completion


class Ticket:
    """What `put_async` and `get_async` return. Wait with `result()`, or `await` it.

    What fits into the device's queue is under way at once; the rest of a large operation follows
    while anybody waits for or starts something on the same path. The store finishes what nobody
    waited for when its result is needed: when the same key is used again, at `flush()` and at
    `close()`.
    """

    def __init__(
        self,
        completions: Sequence[Completion],
        finish: Callable[[BaseException | None], Any],
        end: Callable[[], None],
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._completions = completions
        self._finish = finish
        self._ending = Bracket(begin or _nothing, end)
        self._lock = threading.RLock()
        self._is_begun = False
        self._is_settled = False
        self._value: Any = None
        self._error: BaseException | None = None

    def result(self, timeout: float | None = None) -> Any:
        """What the operation returns. Raises what went wrong, or TimeoutError after `timeout`
        seconds, and then the operation is still under way."""
        self.settle(timeout)
        if self._error is not None:
            raise self._error
        return self._value

    def done(self) -> bool:
        """Whether `result()` would return at once."""
        return self._is_settled or all(completion.done() for completion in self._completions)

    @property
    def is_fulfilled(self) -> bool:
        """Whether it is finished, and `result()` returns."""
        return self._is_settled and self._error is None

    def settle(self, timeout: float | None = None) -> None:
        """Waits and finishes, but keeps an error for `result()`. Raises TimeoutError."""
        if self._is_settled:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        error: BaseException | None = None
        for completion in self._completions:
            error = _outcome(completion, deadline) or error
        with self._lock:
            # Once, even if an interrupt cuts it short: what it gives back must not be given twice.
            if self._is_begun:
                return
            try:
                with self._ending:
                    self._is_begun = True
                    finish, self._finish = self._finish, _nothing
                    self._value = finish(error)
            except Exception as problem:  # noqa: BLE001  kept for result()
                self._error = problem
            except BaseException as interrupt:
                self._error = interrupt  # there is no value: result() must not return one later
                raise
            finally:
                # Last: whoever reads this without the lock reads the value next.
                self._is_settled = True
                self._completions = ()
                self._ending = Bracket(_nothing, _nothing)

    def __await__(self) -> Generator[Any, None, Any]:
        # The wait is in C without the GIL: a thread of the loop's executor costs only itself.
        return asyncio.get_running_loop().run_in_executor(None, self.result).__await__()


def _outcome(completion: Completion, deadline: float | None) -> Exception | None:
    """What went wrong with a batch, once it is done. Raises TimeoutError."""
    while True:
        try:
            completion.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Exception as problem:
            if not completion.done():
                raise
            if not isinstance(problem, TimeoutError):
                return problem
            # It was done just after the time was up: once more, for what came of it.
        else:
            return None


def _nothing(error: BaseException | None = None) -> None:
    del error
