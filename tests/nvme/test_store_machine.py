"""The store's state machine on an NVMe namespace: with NVMe commands, and on the block device."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

import dualblade
from tests.nvme.drives import find
from tests.property.test_store import STORE_BYTES, StoreMachine


class NvmeMachine(StoreMachine):
    """As it is, but for where the store lies; what is deleted may be discarded."""

    @initialize(
        verify=st.sampled_from(("always", "always", "open", "never")),
        policy=st.sampled_from(("dual", "dual", "direct", "pagecache")),
        engine=st.sampled_from(("nvme", "nvme", "nvme", "uring")),
        discard=st.booleans(),
    )
    def open(self, verify: str, policy: str, engine: str, discard: bool) -> None:
        namespace = find("machine")
        assert namespace.size_bytes == STORE_BYTES
        self.target = namespace.character
        self.begin(verify=verify, policy=policy, engine=engine, discard=discard)
        self.store = dualblade.open(self.target, format=True, **self.options)
        assert self.store.stats()["engine"] == engine


TestStoreOnNvme = NvmeMachine.TestCase
TestStoreOnNvme.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # making it small takes minutes there
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)
