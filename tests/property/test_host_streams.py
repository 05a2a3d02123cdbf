"""The host's streams against a sequential model: order, events, and what an error leaves out."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from dualblade import gpu

STREAMS = 3
SLOTS = 4
SLOT_BYTES = 64


class Step(NamedTuple):
    kind: str
    stream: int
    source: int
    target: int
    seen: bool
    """Whether the caller waits for it."""


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(["to_device", "to_host", "add", "fail"]),
        st.integers(0, STREAMS - 1),
        st.integers(0, SLOTS - 1),
        st.integers(0, SLOTS - 1),
        st.booleans(),
    ),
    max_size=40,
)


class Fails(Exception):
    pass


def fail():
    raise Fails


class Model:
    """What the memory holds and which streams are spoiled, one step after the other."""

    def __init__(self, host, device):
        self.memory = {"host": host.copy(), "device": device.copy()}
        self.spoiled = [False] * STREAMS
        self.users = {}
        """(memory, slot) -> the last steps that used it, and whether they were spoiled."""

    def uses(self, step):
        if step.kind == "to_device":
            return ("host", step.source), ("device", step.target)
        if step.kind == "to_host":
            return ("device", step.source), ("host", step.target)
        return (("device", step.target),) if step.kind == "add" else ()

    def before(self, step):
        """The earlier steps that this one has to come after, and that may not be in its stream."""
        return sorted({number for use in self.uses(step) for number in self.users.get(use, ())})

    def take(self, number, step, spoiled_before):
        """Whether it leaves its stream spoiled."""
        spoiled = self.spoiled[step.stream] or spoiled_before
        for use in self.uses(step):
            self.users.setdefault(use, []).append(number)
        if not spoiled:
            host, device = self.memory["host"], self.memory["device"]
            if step.kind == "to_device":
                device[step.target] = host[step.source]
            elif step.kind == "to_host":
                host[step.target] = device[step.source]
            elif step.kind == "add":
                device[step.target] += 1
        self.spoiled[step.stream] = spoiled or step.kind == "fail"
        return self.spoiled[step.stream]


def put(stream, step, host, device):
    """One step into a stream."""
    if step.kind == "to_device":
        stream.copy_to_device(device[step.target], host[step.source])
    elif step.kind == "to_host":
        stream.copy_to_host(host[step.target], device[step.source])
    elif step.kind == "add":
        stream.launch(lambda slot=device[step.target]: np.add(slot, 1, out=slot))
    else:
        stream.launch(fail)


def raises(event):
    try:
        event.wait(60)
    except Fails:
        return True
    return False


@given(steps, st.sampled_from([None, 2e6]))
def test_streams_do_what_a_sequence_does(program, bandwidth):
    opened = gpu.open_device("cpu", copy_bytes_per_s=bandwidth)
    host = np.arange(SLOTS * SLOT_BYTES, dtype=np.uint8).reshape(SLOTS, SLOT_BYTES)
    device = (host + 101).astype(np.uint8)
    model = Model(host, device)
    streams = [opened.stream() for _ in range(STREAMS)]
    events, spoiled = [], []
    try:
        for number, step in enumerate(program):
            earlier = model.before(step)
            for other in earlier:
                streams[step.stream].wait(events[other])
            put(streams[step.stream], step, host, device)
            events.append(streams[step.stream].record())
            spoiled.append(model.take(number, step, any(spoiled[n] for n in earlier)))
            if step.seen and not spoiled[-1]:
                assert not raises(events[-1])
        assert [raises(event) for event in events] == spoiled
        assert np.array_equal(host, model.memory["host"])
        assert np.array_equal(device, model.memory["device"])
        # Every error was told: the streams go on.
        for stream in streams:
            stream.copy_to_device(device[0], host[1])
            stream.record().wait(60)
        assert np.array_equal(device[0], host[1])
    finally:
        for stream in streams:
            stream.close()
