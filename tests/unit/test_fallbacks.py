"""Where the kernel or the container forbids something: what is used instead, and what is said.

Each test runs a program in a process of its own, for a filter on system calls stays for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 60  # a hang is a failure

PRELUDE = r"""
import gc, os, resource, sys, warnings
import numpy as np
import numpy.random
import dualblade
from dualblade import _core
from dualblade.errors import *
from tests.seccomp import forbid


def become_nobody():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def use(store):
    data = np.random.default_rng(1).integers(0, 256, 3_000_001, np.uint8)
    for group, path in [("d", "direct"), ("p", "pagecache")]:
        store.put(group, data, group=group)
        if store.info(group).path != path:
            store.set_path(group, path)
        assert np.array_equal(store.get(group), data)
    assert store.check() == []


path = sys.argv[1]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that any user can write to."""
    places = [tmp_path, *(p for p in tmp_path.parents if p.stat().st_uid == os.geteuid())]
    before = [(place, place.stat().st_mode) for place in places if len(place.parts) > 2]
    for place, mode in before:
        place.chmod(mode | 0o711)
    tmp_path.chmod(0o777)
    yield tmp_path
    for place, mode in before:
        place.chmod(mode)


def run(program: str, folder: Path, *arguments: str) -> str:
    """What the program prints. Its warnings are printed as lines "warning: ..."."""
    show = (
        "warnings.simplefilter('always')\n"
        "warnings.showwarning = lambda message, *_: print('warning:', message, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + show + program, str(folder / "kv.img"), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


AUTO = """
forbid(sys.argv[3].split(","), sys.argv[2])
for _ in range(2):
    with dualblade.open(path, size="16MiB", policy="dual", memory="4MiB") as store:
        print(store.stats()["engine"], store.stats()["fallbacks"])
        use(store)
"""


@pytest.mark.parametrize("refusal", ["EPERM", "ENOSYS", "EACCES"])
@pytest.mark.parametrize("calls", ["io_uring_setup", "io_uring_setup,io_uring_enter"])
def test_without_io_uring_it_is_aio_and_says_so_once(folder: Path, refusal: str, calls: str):
    output = run(AUTO, folder, refusal, calls)
    assert output.count("warning:") == 1
    assert output.count("aio [") == 2
    assert "using the aio engine" in output
    assert output.count("uring (") == 3  # once warned, twice in stats()


def test_a_ring_that_may_be_made_but_not_entered(folder: Path):
    output = run(AUTO, folder, "EPERM", "io_uring_enter")
    assert output.count("aio [") == 2


@pytest.mark.parametrize(
    "calls", ["io_uring_setup,io_setup", "io_uring_setup,io_submit", "io_uring_setup,io_getevents"]
)
def test_without_either_it_is_threads(folder: Path, calls: str):
    output = run(AUTO, folder, "EPERM", calls)
    assert output.count("warning:") == 1
    assert output.count("threads [") == 2
    assert "uring (" in output
    assert "aio (" in output


def test_aio_that_is_used_up(folder: Path):
    """What io_setup says beyond fs.aio-max-nr."""
    output = run(
        """
forbid(["io_uring_setup"])
forbid(["io_setup"], "EAGAIN")
with dualblade.open(path, size="16MiB") as store:
    print(store.stats()["engine"])
    use(store)
try:
    dualblade.open(path, engine="aio")
except DeviceRefusedError as error:
    print("refused", error)
except DeviceError as error:
    print("failed", error)
""",
        folder,
    )
    assert "\nthreads\n" in output
    assert "failed" in output  # and it is not another process that has the store open
    assert "aio-max-nr" in output


@pytest.mark.parametrize("refusal", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize(("engine", "call"), [("uring", "io_uring_setup"), ("aio", "io_setup")])
def test_an_engine_asked_for_by_name_is_not_replaced(
    folder: Path, refusal: str, engine: str, call: str
):
    output = run(
        """
forbid([sys.argv[4]], sys.argv[2])
try:
    dualblade.open(path, size="16MiB", engine=sys.argv[3])
except DualbladeError as error:
    print(type(error).__name__, error)
print(os.path.exists(path), _core.counters()["devices"])
""",
        folder,
        refusal,
        engine,
        call,
    )
    assert output.startswith("UnsupportedError" if refusal == "ENOSYS" else "DeviceError")
    assert output.endswith("False 0\n")


FORBIDDEN_LATER = """
engine = sys.argv[2]
store = dualblade.open(path, size="16MiB", policy="dual", memory="4MiB", engine=engine)
use(store)
calls = {"uring": ["io_uring_enter"], "aio": ["io_submit", "io_getevents"]}
forbid(calls[engine])
for act in (lambda: store.get("d"), lambda: store.put("e", bytes(5_000_000), group="d")):
    try:
        act()
    except DeviceError as error:
        print(error.errno, error.operation, error.offset is not None)
data = store.get("p")  # the page-cache path has an engine of its own
assert store.stats()["paths"]["direct"]["in_flight"] == 0
store.close()
del store
with dualblade.open(path) as store:
    print(store.stats()["engine"])
    assert np.array_equal(store.get("d"), data)
assert not any(_core.counters()[name] for name in ("devices", "requests", "batches"))
"""


@pytest.mark.parametrize("engine", ["uring", "aio"])
def test_a_filter_put_in_place_later_is_an_error_and_no_hang(folder: Path, engine: str):
    output = run(FORBIDDEN_LATER, folder, engine)
    assert "1 read True\n1 write True\n" in output


def test_what_io_uring_has_taken_completes_under_a_later_filter(folder: Path):
    output = run(
        """
with open(path, "wb") as file:
    file.write(np.arange(8 << 20, dtype=np.uint64).tobytes())
out = _core.aligned_empty(8 << 20, np.uint64)
with _core.Device.open(path, engine="uring") as device:
    done = device.read([(0, out)])
    forbid(["io_uring_enter"])
    try:
        done.wait()
        print("read")
        assert np.array_equal(out, np.arange(8 << 20, dtype=np.uint64))
    except DeviceError as error:  # what was still to be submitted
        print("refused", error.errno)
    assert done.done()
""",
        folder,
    )
    assert output in ("read\n", "refused 1\n")


def test_what_io_uring_has_refused_is_not_done_later(folder: Path):
    """Memory of a failed read is its owner's again, whatever wakes the kernel's thread then."""
    output = run(
        """
import subprocess, time
from pathlib import Path

def kernel_thread():
    [thread] = [task for task in Path("/proc/self/task").iterdir()
                if (task / "comm").read_text().startswith("iou-sqp")]
    fields = dict(line.split(":\\t") for line in (thread / "status").read_text().splitlines())
    return fields["State"][0], int(fields["voluntary_ctxt_switches"])

def wait_until(ready, act=lambda: None):
    deadline = time.monotonic() + 30
    while not ready(*kernel_thread()):
        act()
        assert time.monotonic() < deadline, kernel_thread()

def interrupt():
    command = f"kill -STOP {os.getpid()}; kill -CONT {os.getpid()}"
    subprocess.run(["sh", "-c", command], check=True)

with open(path, "wb") as file:
    file.write(bytes([7]) * 65536)
out = _core.aligned_empty(4096, np.uint8)
out[:] = 1
with _core.Device.open(path, engine="uring", sqpoll=True) as device:
    wait_until(lambda state, switches: state == "S" and switches > 0)
    before = kernel_thread()[1]
    forbid(["io_uring_enter"])
    try:
        device.read([(0, out)]).wait()
    except DeviceError as error:
        print("refused", error.errno)
    # Not each interrupt gets as far as the thread; these many times round it has looked.
    wait_until(lambda _, switches: switches > before + 3, interrupt)
    print(set(out.tolist()), device.stats()["direct"]["in_flight"])
""",
        folder,
    )
    assert output == "refused 1\n{1} 0\n"


def test_what_aio_has_taken_is_not_waited_for_without_end(folder: Path):
    """Nobody can ask for it any more. Every wait says so, and the process comes to its end."""
    output = run(
        """
with open(path, "wb") as file:
    file.write(bytes(64 << 20))
out = _core.aligned_empty(64 << 20, np.uint8)
device = _core.Device.open(path, engine="aio")
done = device.read([(0, out)])
forbid(["io_getevents", "io_submit"])
for act in (done.wait, done.done, device.close):
    try:
        act()
        print("done")
    except DeviceError as error:
        print(error.errno)
sys.stdout.flush()
del out, done, device
gc.collect()
""",
        folder,
    )
    assert output == "1\n1\n1\n"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@needs_root
def test_an_ordinary_user_has_all_of_it(folder: Path):
    output = run(
        """
become_nobody()
with dualblade.open(path, size="16MiB", policy="dual", memory="4MiB") as store:
    print(store.stats()["engine"], store.stats()["fallbacks"])
    use(store)
with dualblade.open(path) as store:
    assert store.keys() == ["d", "p"]
print(oct(os.stat(path).st_mode & 0o777), oct(os.stat(path + ".catalog").st_mode & 0o777))
for target in ("/proc/version", "/etc/passwd", "/nowhere/kv.img"):
    try:
        dualblade.open(target, size="16MiB", format=True)
    except DualbladeError as error:
        print(type(error).__name__, isinstance(error, OSError), target in str(error))
""",
        folder,
    )
    lines = output.splitlines()
    assert lines[0] == "uring []" or "aio [" in output
    assert "0o600 0o600" in lines
    assert sum(line.endswith("True True") for line in lines) == 3


@needs_root
def test_a_store_of_another_user_is_refused(folder: Path):
    output = run(
        """
with dualblade.open(path, size="16MiB") as store:
    use(store)
become_nobody()
for options in ({}, {"format": True}):
    try:
        dualblade.open(path, **options)
    except DeviceError as error:
        print(error.errno, error)
""",
        folder,
    )
    assert output.count("13 ") == 2
    assert output.count("permission was denied") == 2


def test_too_few_files(folder: Path):
    """From none to enough: an error that names the limit and leaves nothing behind, or a store."""
    output = run(
        """
for extra in range(48):
    before = os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + extra, 4096))
    store = message = None
    try:
        store = dualblade.open(path, size="16MiB")
    except OSError as error:
        message = f"{type(error).__name__} {error.errno} {error}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
    if store is None:
        print(message)
    else:
        store.close()
        print("opened")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert not any(_core.counters()[name] for name in ("devices", "requests", "buffers"))
with dualblade.open(path, size="16MiB") as store:
    use(store)
""",
        folder,
    )
    lines = [line for line in output.splitlines() if not line.startswith("warning:")]
    failures = lines.index("opened")
    assert lines[failures:] == ["opened"] * (48 - failures)
    assert failures >= 2
    for line in lines[:failures]:
        assert line.split()[1] == "24", line
        assert "too many files open (EMFILE)" in line or "Too many open files" in line


@needs_root
def test_too_few_threads(folder: Path):
    output = run(
        """
become_nobody()
with open(path, "wb") as file:
    file.write(bytes(16 << 20))
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
for engine in ("auto", "threads"):
    try:
        dualblade.open(path, format=True, engine=engine)
        print("opened")
    except DeviceRefusedError as error:
        print("refused", error)
    except OSError as error:
        print("failed", error)
assert not any(_core.counters().values())
""",
        folder,
    )
    assert output.count("ulimit -u for threads") == 2
    assert "another process" not in output
