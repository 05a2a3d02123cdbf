"""The contract suite where something is refused: python -m tests.restricted NAME [PYTEST ARGUMENT]

Names: no-locked-memory, no-io-uring, ordinary-user. To be run as root, from the root of the
checkout. DUALBLADE_TEST_ENGINES and DUALBLADE_TEST_TARGETS choose cells, as they always do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from tests.devices import LoopDevice, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
NOBODY = 65534
TARGET_BYTES = 64 << 20

# Each is a command that goes before another one.
ENVIRONMENTS: dict[str, list[str]] = {
    # Room for two rings, which some kernels count too, but not for the least staging memory.
    "no-locked-memory": [
        *("setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"),
        *("prlimit", f"--memlock={240 << 10}:{240 << 10}"),
    ],
    "no-io-uring": [sys.executable, "-m", "tests.seccomp", "io_uring_setup"],
    "ordinary-user": [
        *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"),
        *("--bounding-set", "-all", "--inh-caps", "-all"),
    ],
}


class Restricted:
    """One of the environments, with a folder that its processes can write to."""

    def __init__(self, name: str, folder: Path, devices: dict[str, str]) -> None:
        self.name = name
        self.folder = folder
        self.prefix = ENVIRONMENTS[name]
        self.devices = devices  # by the name of the usual target that each stands for
        self.report = folder / "report.xml"

    def start(self, arguments: list[str], **options: object) -> subprocess.CompletedProcess:
        """Runs this Python with these arguments to its end."""
        usual = os.environ.get("DUALBLADE_TEST_TARGETS", "file,loop512,loop4096")
        targets = [self.devices.get(target, target) for target in usual.split(",")]
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "DUALBLADE_TEST_TARGETS": ",".join(targets),
        }
        command = [*self.prefix, sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False, **options)

    def contract(self, arguments: list[str], **options: object) -> subprocess.CompletedProcess:
        """Runs the contract suite, which leaves a report."""
        given = [f"--basetemp={self.folder / 'tests'}", f"--junitxml={self.report}"]
        pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-q", *given]
        return self.start([*pytest, *arguments, "tests/contract"], **options)

    def outcomes(self) -> dict[str, str]:
        """By the name of each test: "passed", "failed", or why it was skipped."""
        found = {}
        for case in ET.parse(self.report).iter("testcase"):
            skipped, failed = case.find("skipped"), case.find("failure")
            wrong = failed if failed is not None else case.find("error")
            outcome = "passed" if skipped is None else skipped.get("message", "")
            found[f"{case.get('classname')}.{case.get('name')}"] = (
                outcome if wrong is None else "failed"
            )
        return found


@contextlib.contextmanager
def restricted(name: str) -> Iterator[Restricted]:
    """Sets the environment up. Raises Unavailable where that is not to be had."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dualblade-restricted-"))
        stack.callback(shutil.rmtree, folder)
        devices = {}
        if name == "ordinary-user":
            folder.chmod(0o777)
            for block_bytes in (512, 4096):
                loop = stack.enter_context(LoopDevice(folder, TARGET_BYTES, block_bytes))
                owner = os.stat(loop.path)
                stack.callback(os.chown, loop.path, owner.st_uid, owner.st_gid)
                os.chown(loop.path, NOBODY, NOBODY)
                devices[f"loop{block_bytes}"] = loop.path
        place = Restricted(name, folder, devices)
        try:
            tried = place.start(["-c", "import pytest, dualblade"], capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Unavailable(f"{error.filename} is not installed") from None
        if tried.returncode:
            raise Unavailable(f"{name} is not to be had here: {tried.stderr.strip()}")
        yield place


def main() -> int:
    """Runs the suite in the environment named first, with the other arguments for pytest."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in ENVIRONMENTS:
        print(__doc__)
        return 0 if name in ("-h", "--help") else 2
    try:
        with restricted(name) as place:
            return place.contract(sys.argv[2:]).returncode
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
