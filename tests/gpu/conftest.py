"""Devices to test: the host, CUDA over a simulated CuPy, and a GPU where there is one."""

from __future__ import annotations

import gc
import importlib.util
import sys

import pytest

from dualblade import gpu
from dualblade.errors import UnsupportedError
from tests.helpers import Gate
from tests.simulated_cuda import Simulation


def open_cuda():
    """A real GPU, or the test is skipped with the reason why there is none."""
    try:
        return gpu.open_device("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def simulation(monkeypatch):
    """A CuPy with two simulated GPUs is what `import cupy` finds."""
    made = Simulation()
    monkeypatch.setitem(sys.modules, "cupy", made.module)
    yield made
    made.close()
    made.free.clear()
    gc.collect()


# Where there is no CuPy, tests/gpu/test_cuda.py says so once.
DEVICES = ["cpu", "simulated", *(["cuda"] if importlib.util.find_spec("cupy") else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cpu":
        return gpu.open_device("cpu")
    if request.param == "simulated":
        request.getfixturevalue("simulation")
        return gpu.open_device("cuda")
    return open_cuda()


@pytest.fixture
def cuda():
    return open_cuda()


@pytest.fixture
def stream(device):
    stream = device.stream()
    yield stream
    stream.close()


@pytest.fixture
def hold(device):
    """A function (stream) -> Gate at which the stream then stands."""
    gates = []

    def hold(stream):
        gate = Gate()
        gates.append(gate)
        if device.kind == "host":
            stream.launch(gate)
        else:
            import cupy

            cupy.cuda.runtime.launchHostFunc(stream.ptr, gate, 0)
        assert gate.reached.wait(60)
        return gate

    yield hold
    for gate in gates:
        gate.opened.set()
