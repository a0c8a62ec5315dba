"""Workspaces: opened, used and closed again and again, they leave nothing behind."""

from __future__ import annotations

import pytest

from fusecheck.interface import Strategy
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.kernel.reopening import check_that_closing_gives_everything_back


@pytest.mark.parametrize("strategy", [Strategy.ONESHOT, Strategy.TWOSHOT])
def test_a_closed_workspace_has_given_everything_back(bench: Bench, strategy: Strategy) -> None:
    check_that_closing_gives_everything_back(bench, strategy)
