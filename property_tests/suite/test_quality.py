"""The property tests find planted faults, and shrink what they find to a stated minimum."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from fusecheck.interface import Strategy
from fusecheck.property_tests.kernel.bench import WORKER, Bench
from fusecheck.property_tests.kernel.reopening import check_that_closing_gives_everything_back
from fusecheck.property_tests.kernel.schedules import run_schedules
from fusecheck.property_tests.strategies import problems
from fusecheck.ranks import Pool

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "fusecheck.property_tests.suite.planted"
PUBLISHED = "fusecheck.faults.backend"
MOST_CASES = 300
"""For finding and shrinking one fault; half a minute on two cores. Unlike seconds, the same on a busy machine."""
REPLAY = """
from fusecheck.property_tests.kernel.bench import WORKER, Bench
from fusecheck.problem import Problem
from fusecheck.ranks import Pool
with Pool(WORKER, 2) as pool:
    Bench({backend!r}, 2, [pool]).check(Problem.from_json({line!r}))
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(WORKER, 2) as ranks:
        yield ranks


def find(bench: Bench, *, shrink: bool) -> None:
    """The main property, with the profile's own number of examples and no memory of earlier runs."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @settings(phases=phases, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def stages_hold(data: st.DataObject) -> None:
        bench.check(data.draw(problems(2)))

    stages_hold()


def schedules(bench: Bench, *, shrink: bool) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_schedules(bench, wanted=settings(phases=phases, database=None, derandomize=True, stateful_step_count=11))


def test_a_fault_of_the_last_eight_lanes_is_found_shrunk_and_replayed(pool: Pool) -> None:
    bench = Bench(f"{PLANTED}:tail_lanes", 2, [pool])
    with pytest.raises(AssertionError):
        find(bench, shrink=True)
    assert bench.failure is not None
    found = bench.failure.problem
    assert (found.hidden, found.tokens, found.world_size) == (256, 1, 2), found
    assert bench.cases < MOST_CASES
    script = REPLAY.format(backend=bench.backend, line=found.to_json())
    again = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert bench.failure.lines[0] in again.stderr


@pytest.mark.parametrize(("fault", "least_calls"), [("KP-01", 4), ("KP-05", 2)])
def test_a_race_between_calls_is_found_with_the_calls_that_it_takes(pool: Pool, fault: str, least_calls: int) -> None:
    bench = Bench(f"{PUBLISHED}:{fault}", 2, [pool], timeout=10.0)
    # Who loses a race differs from run to run: Hypothesis may call that flaky, and shrinking it would be chance.
    with pytest.raises((AssertionError, Flaky)):
        schedules(bench, shrink=False)
    assert bench.failure is not None
    assert len(bench.failure.problem.schedule) + 1 >= least_calls


def test_a_wrong_split_of_the_remainder_is_found(pool: Pool) -> None:
    bench = Bench(f"{PUBLISHED}:LW-09b", 2, [pool], timeout=10.0)
    with pytest.raises(AssertionError):
        schedules(bench, shrink=True)
    assert bench.failure is not None
    # An even split has no remainder, so the schedule that fails must hold an odd count of tokens.
    assert any(step.tokens % 2 for _, step in bench.failure.problem.calls())


def test_a_sentinel_tested_by_its_value_is_found_as_a_hang(pool: Pool) -> None:
    bench = Bench(f"{PUBLISHED}:KP-03b", 2, [pool], timeout=3.0)
    with pytest.raises(AssertionError, match="alive: hang"):
        schedules(bench, shrink=False)


def test_a_workspace_that_keeps_its_memory_is_found_and_what_it_keeps_is_named(pool: Pool) -> None:
    bench = Bench(f"{PLANTED}:keeps_its_buffers", 2, [pool])
    with pytest.raises(AssertionError, match="12 more mappings of shared memory after 6 further openings"):
        check_that_closing_gives_everything_back(bench, Strategy.ONESHOT)
