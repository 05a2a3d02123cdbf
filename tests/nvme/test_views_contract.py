"""What store.view() promises, with NVMe commands."""

from tests.contract.test_views import *  # noqa: F403 - its tests and their fixtures
