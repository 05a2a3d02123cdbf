"""What TensorStore promises, with NVMe commands."""

from tests.contract.test_store import *  # noqa: F403 - its tests and their fixtures
