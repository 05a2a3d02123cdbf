"""Runs commands of this project as processes of their own that need not import it all anew.

One process imports a command's module and then forks for each call, so that what is forked is a
Python that has just started; it ends as any Python does. As a program: tests/commands.py MODULE.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

CALL_TIMEOUT_S = 120


class Command:
    """A module with a main() that takes sys.argv and returns the exit status."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._lock = threading.Lock()
        self._server: subprocess.Popen[str] | None = None

    def run(self, *arguments: Any) -> subprocess.CompletedProcess[str]:
        """What subprocess.run() of `python -m MODULE` gives, with its output captured as text."""
        given = [str(argument) for argument in arguments]
        with self._lock, tempfile.TemporaryDirectory() as folder:
            if self._server is None:
                self._server = subprocess.Popen(
                    [sys.executable, os.path.abspath(__file__), self.module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # to be ended with all that it has started
                )
            paths = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            call = {"arguments": given, "folder": os.getcwd(), "outputs": paths}
            late = threading.Timer(CALL_TIMEOUT_S, os.killpg, (self._server.pid, signal.SIGKILL))
            late.start()
            try:
                self._server.stdin.write(json.dumps(call) + "\n")
                self._server.stdin.flush()
                answer = self._server.stdout.readline()
            finally:
                late.cancel()
            if not answer:
                self.close()
                raise subprocess.TimeoutExpired([self.module, *given], CALL_TIMEOUT_S)
            texts = []
            for path in paths:
                with open(path, encoding="utf-8") as file:
                    texts.append(file.read())
        return subprocess.CompletedProcess([self.module, *given], json.loads(answer), *texts)

    def close(self) -> None:
        """Ends the process that forks."""
        if self._server is not None:
            self._server.communicate()
            self._server = None


def child(module: Any, call: dict[str, Any]) -> None:
    """The forked process: becomes the command."""
    os.chdir(call["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(call["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.argv = [module.__name__, *call["arguments"]]
    sys.exit(module.main())


def main() -> None:
    """Forks for each line of standard input, and answers with the exit status."""
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(module, json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
