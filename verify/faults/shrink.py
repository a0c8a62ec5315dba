"""Make a failing Problem smaller, one field at a time: fewer calls, rows, columns and ranks, plainer data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fusecheck.kernel.compositions import fitting
from fusecheck.problem import Call, Problem

TOKENS = (1, 2, 3, 5, 9, 17, 33)
HIDDEN = (64, 128, 256, 264, 512, 520, 1024)


class Shrinker:
    """Keeps the smallest Problem that still fails.

    Args:
        fails: whether a Problem still fails, by running it.
        taken: whether the kernel takes a Problem.
        runs: how many Problems may be run.
        seconds: and for how long.
    """

    def __init__(
        self, fails: Callable[[Problem], bool], taken: Callable[[Problem], bool], runs: int, seconds: float
    ) -> None:
        self._fails, self._taken, self._runs = fails, taken, runs
        self._deadline = time.monotonic() + seconds

    def shrink(self, problem: Problem) -> Problem:
        """The smallest failing Problem found, the given one if none."""
        tried = {problem.to_json()}
        improved = True
        while improved:
            improved = False
            for smaller in candidates(problem):
                line = smaller.to_json()
                if line in tried or not self._taken(smaller):
                    continue
                if not self._runs or time.monotonic() > self._deadline:
                    return problem
                tried.add(line)
                self._runs -= 1
                if self._fails(smaller):
                    problem, improved = smaller, True
                    break
        return problem


def candidates(problem: Problem) -> Iterator[Problem]:
    """Problems that differ in one respect and are smaller or plainer, the largest steps first."""
    if problem.schedule:
        yield replace(problem, schedule=())
        for index in range(len(problem.schedule)):
            yield replace(problem, schedule=problem.schedule[:index] + problem.schedule[index + 1 :])
    for hidden in dict.fromkeys(fitting(hidden, problem.op) for hidden in HIDDEN):
        if hidden < problem.hidden:
            yield replace(problem, hidden=hidden, schedule=tuple(_narrow(call, hidden) for call in problem.schedule))
    for tokens in TOKENS:
        if tokens < problem.tokens:
            yield replace(problem, tokens=tokens)
    if problem.world_size > 2:
        yield replace(problem, world_size=2, schedule=tuple(_within(call, 2) for call in problem.schedule))
    yield from _plainer(problem)


def _plainer(problem: Problem) -> Iterator[Problem]:
    plain = Problem()
    for name in ("family", "gamma", "dtype", "weight_bias", "op", "scale", "eps", "strategy"):
        if name == "scale" and problem.family == problem.gamma == "captured":
            continue  # the scale is that gamma's site's, and the case would not be what its name says
        if getattr(problem, name) != getattr(plain, name):
            layout = "" if name == "op" else problem.layout
            yield replace(problem, layout=layout, **{name: getattr(plain, name)})


def _narrow(call: Call, hidden: int) -> Call:
    return call if call.hidden is None else replace(call, hidden=min(call.hidden, hidden))


def _within(call: Call, world_size: int) -> Call:
    return call if call.delayed is None else replace(call, delayed=call.delayed % world_size)
