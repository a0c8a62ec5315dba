"""Many calls on one open workspace, whatever they are: each of them is right."""

from __future__ import annotations

from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.kernel.schedules import run_schedules


def test_every_call_on_one_workspace_is_right_whatever_came_before(bench: Bench) -> None:
    run_schedules(bench)
