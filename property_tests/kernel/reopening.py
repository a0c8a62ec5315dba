"""Workspaces: opened, used and closed again and again, they leave nothing behind."""

from __future__ import annotations

import pytest

from fusecheck.interface import Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.kernel.bench import Bench

FIRST = 3
"""Openings after which all that is made once is made."""
MORE = 6


def check_that_closing_gives_everything_back(bench: Bench, strategy: Strategy) -> None:
    """Open, use and close workspaces, and have the bench fail for whatever grows."""
    problem = Problem(world_size=bench.world_size, tokens=4 * bench.world_size, hidden=4096, strategy=strategy)
    if not bench.accepts(problem):
        pytest.skip(f"{bench.backend} does not take {strategy.value} at {problem.tokens} x {problem.hidden}")
    answers = bench.ask("reopen", problem, FIRST + MORE)
    bench.judge(problem, answers)
    for rank, answer in enumerate(answers):
        early, late = answer["held"][FIRST - 1], answer["held"][-1]
        grown = {kind: late[kind] - early[kind] for kind in early if late[kind] > early[kind]}
        if grown:
            told = ", ".join(f"{count} more {kind}" for kind, count in grown.items())
            bench.fail(problem, f"rank {rank} holds {told} after {MORE} further openings, expected none")
