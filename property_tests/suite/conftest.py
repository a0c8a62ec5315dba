"""Tests in a real browser are taken out where there is none, rather than passed."""

from __future__ import annotations

import pytest

from property_tests.suite import chromium


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs Chromium on a machine without it."""
    if chromium.find() is not None:
        return
    needing = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
