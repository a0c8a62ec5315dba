"""What the tests of Fusecheck itself need around them: a browser or not, and an interrupt that arrives."""

from __future__ import annotations

import signal

import pytest

from fusecheck.property_tests.suite import chromium


def pytest_configure() -> None:
    """Let programs that tests start be interrupted: a job that a shell put into the background ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs Chromium on a machine without it."""
    if chromium.find() is not None:
        return
    needing = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
