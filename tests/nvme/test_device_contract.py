"""What Device promises, with NVMe commands."""

from tests.contract.test_device import *  # noqa: F403 - its tests and their fixtures
