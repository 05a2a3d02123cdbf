"""Fixtures that every test can ask for, the leak check, and the engine x device summary."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.devices import (
    Engine,
    LoopDevice,
    MemoryCgroup,
    Target,
    Unavailable,
    attach,
    detach,
    given_target,
    make_target,
    wipe,
)
from tests.faultdev import FaultDevice, unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def axis(name: str, *usual: str) -> tuple[str, ...]:
    """One axis of the contract suite: the usual cells, or what the environment names instead."""
    given = os.environ.get(name)
    return tuple(given.split(",")) if given else usual


# Options follow an engine's name: uring-iopoll. A target may also be the path of a block device
# that is blank, and is again after each test: DUALBLADE_TEST_TARGETS=/dev/nvme1n1
ENGINES = axis("DUALBLADE_TEST_ENGINES", "uring", "uring-sqpoll", "aio", "threads")
TARGETS = axis("DUALBLADE_TEST_TARGETS", "file", "loop512", "loop4096")
TARGET_BYTES = 64 << 20  # sparse

# HYPOTHESIS_PROFILE=thorough looks for longer. Seeds are random and printed on failure.
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_finish() -> None:
    """Collections that tests ask for look at what the tests made, not at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the C core holds no more devices, requests or buffers than before it, no
    stream or arena is open, and no thread of ours goes on."""
    before = live()
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        return  # the report's traceback keeps alive what the test had
    request.node.funcargs.clear()  # so does pytest, until the next test
    if grown(before, live()):
        gc.collect()  # what only a cycle keeps alive is no leak
    leaked = grown(before, live())
    assert not leaked, f"the test left these open: {leaked}"


def live() -> dict[str, int]:
    from dualblade import _core, gpu

    ours = [thread for thread in threading.enumerate() if thread.name.startswith("dualblade-")]
    return _core.counters() | gpu.counters() | {"threads": len(ours)}


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after if after[name] > before[name]}


# ---- the contract suite's two axes ---------------------------------------------------------------


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    """A file, a loop device with 512 byte blocks, and one with 4096: 64 MiB of zeros each.

    A device that was named is used as it is, with what size it has.
    """
    if request.param.startswith("/"):
        made = given_target(request.param)
        yield made
        wipe(made)
        return
    try:
        made, loop = make_target(request.param, tmp_path, TARGET_BYTES)
    except Unavailable as error:
        pytest.skip(str(error))
    yield made
    if loop:
        loop.close()


@pytest.fixture(params=dict.fromkeys(Engine(cell).name for cell in ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    """The name of each engine that the build and the kernel allow."""
    return allowed(request).name


def allowed(request: pytest.FixtureRequest) -> Engine:
    """The engine that the parameter names, or the test is skipped with what refuses it."""
    refusal = request.getfixturevalue("engine_refusals").get(request.param)
    if refusal:
        pytest.skip(f"engine {request.param}: {refusal}")
    return Engine(request.param)


@pytest.fixture(scope="session")
def engine_refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The engines that cannot be had here, and why. Any other failure to open is an error."""
    from dualblade import _core
    from dualblade.errors import DeviceError, UnsupportedError

    path = tmp_path_factory.mktemp("engines") / "probe.img"
    path.write_bytes(bytes(1 << 20))
    refusals = {}
    for engine in map(Engine, ENGINES):
        if "iopoll" in engine.options or engine.name == "nvme":
            continue  # this file says nothing about it: it is the device that can or can't
        try:
            _core.Device.open(path, engine=engine.name, **engine.options).close()
        except UnsupportedError as error:
            refusals[engine.cell] = str(error)
        except DeviceError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
                raise
            refusals[engine.cell] = str(error)
    return refusals


# ---- other places to do I/O on, made and removed with the test -----------------------------------


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Callable[..., LoopDevice]]:
    """A function (size_bytes, block_bytes=512) -> LoopDevice."""
    with contextlib.ExitStack() as stack:

        def make(size_bytes: int, block_bytes: int = 512) -> LoopDevice:
            try:
                return stack.enter_context(LoopDevice(tmp_path, size_bytes, block_bytes))
            except Unavailable as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture
def loop_over() -> Iterator[Callable[..., str]]:
    """A function (file or device, *options of losetup) -> the path of a loop device over it.

    Asked for behind the fixture that makes what is below: the loop device has to go first.
    """
    with contextlib.ExitStack() as stack:

        def make(below: str | os.PathLike[str], *options: str) -> str:
            try:
                path = attach(below, *options)
            except Unavailable as error:
                pytest.skip(str(error))
            stack.callback(detach, path)
            return path

        yield make


@pytest.fixture
def fault_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., FaultDevice]]:
    """A function (size_bytes=16 MiB) -> FaultDevice."""
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:

        def make(size_bytes: int = 16 << 20) -> FaultDevice:
            return stack.enter_context(FaultDevice(tmp_path_factory.mktemp("fault"), size_bytes))

        yield make


@pytest.fixture
def memory_cgroup() -> Iterator[Callable[[int], MemoryCgroup]]:
    """A function (limit_bytes) -> MemoryCgroup."""
    with contextlib.ExitStack() as stack:

        def make(limit_bytes: int) -> MemoryCgroup:
            try:
                return stack.enter_context(MemoryCgroup(limit_bytes))
            except Unavailable as error:
                pytest.skip(str(error))

        yield make


# ---- the summary: which engine ran on which device -----------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params
        if values and "engine" in values and "target" in values:
            item.user_properties.append(("contract", (values["engine"], values["target"])))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: defaultdict[tuple[str, str], Counter] = defaultdict(Counter)
    reasons = set()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            place = dict(getattr(report, "user_properties", ())).get("contract")
            if place:
                counts[tuple(place)][outcome] += 1
                if outcome == "skipped" and isinstance(report.longrepr, tuple):
                    reasons.add(report.longrepr[2])
    if not counts:
        return
    terminalreporter.section("contract: tests of each engine on each device")
    width = 24
    cells = [[""] + list(TARGETS)]
    for name in ENGINES:
        row = [counts[name, kind] for kind in TARGETS]
        cells.append([name] + [", ".join(f"{n} {o}" for o, n in c.items()) or "-" for c in row])
    for row in cells:
        line = f"{row[0]:14}" + "".join(f"{cell:{width}}" for cell in row[1:])
        terminalreporter.write_line(line.rstrip())
    for reason in sorted(reasons):
        terminalreporter.write_line(reason)
