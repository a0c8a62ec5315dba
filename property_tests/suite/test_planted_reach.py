"""The cases that reach one cell of the core plan catch a kernel that is wrong there; all: `planted_reach_run`."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.case.question import Question
from fusecheck.case.run import WORKER, request, run_case
from fusecheck.interface import Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.interrupts import Interruption
from fusecheck.kernel import turn
from fusecheck.kernel.core import core_plan
from fusecheck.kernel.isolation import Isolation
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import Group, KernelReport, Subject
from fusecheck.kernel.run import Run
from fusecheck.kernel.table import Case, Cell, cells_of
from fusecheck.kernel.turn import Budget
from fusecheck.problem import Problem
from fusecheck.property_tests.suite import command_line
from fusecheck.property_tests.suite.planted_reach import FAULTS
from fusecheck.property_tests.suite.planted_reach_run import HERE, hunt
from fusecheck.ranks import Pool
from fusecheck.report import Verdict

CELLS = {
    "rows-132": ("rows", "133 "),
    "hidden-1016": ("hidden % 1024", "1016"),
    "hidden-prime": ("hidden", "2056"),
    "nan-residual": ("special value", ""),
    "gamma-stride": ("layout", ""),
    "gap": ("layout", ""),
    "two-workspaces": ("workspace", "two in turn"),
}
"""Faults by name, each with the dimension and the beginning of the values through which it shows."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(WORKER, 2) as made:
        yield made


@cache
def core() -> list[tuple[Case, set[Cell]]]:
    """The core plan at tp 2, each case with the cells that it reaches."""
    return [(case, cells_of(case, "")) for case in core_plan(Plan(), 2)]


def reaching(dimension: str, value: str) -> list[Case]:
    """The core plan's cases that reach such a cell."""
    return [case for case, cells in core() if any(d == dimension and v.startswith(value) for d, v in cells)]


@pytest.mark.parametrize("name", CELLS)
def test_a_kernel_that_is_wrong_in_one_cell_is_found_there_and_the_right_one_passes(name: str, pool: Pool) -> None:
    cases = reaching(*CELLS[name])
    assert cases
    found = hunt(f"{HERE}:{name.replace('-', '_')}", {2: pool}, {2: cases})
    assert found.line, f"{name} ({FAULTS[name].does}) survives {found.cases} cases"
    right = hunt("emulated", {2: pool}, {2: cases[: found.cases]})
    assert not right.line, right.line


def test_a_finding_that_needs_earlier_cases_takes_the_least_of_them_into_its_line_and_fails_when_replayed(
    pool: Pool, tmp_path: Path
) -> None:
    backend = f"{HERE}:stale_eps"
    wide, narrow = (Problem(tokens=2, hidden=64, world_size=2, seed=3, eps=eps) for eps in (1e-2, 1e-6))
    history = [request(replace(wide, seed=seed), backend) for seed in range(3)]
    asked = request(narrow, backend)
    pool.close()
    assert [run_case(pool, case, timeout=60).findings for case in history] == [[], [], []]
    outcome = run_case(pool, asked, timeout=60)
    assert outcome.findings
    shown, _, again = Isolation(timeout=60).isolate(pool, asked, history, outcome)
    assert again
    assert len(shown["before"]) == 1
    line = Question.of(shown, "cpu").to_json()
    code, said = command_line.told("replay", line, "--run-dir", tmp_path / "whole")
    assert code == 1
    assert f"{outcome.findings[0].stage.value}: " in said
    alone = Question.of(asked, "cpu").to_json()
    assert command_line.run("replay", alone, "--run-dir", tmp_path / "alone") == 0


class Hanging(EmulatedBackend):
    """Hangs on rows of 72 columns; with `behind`, after a call on 64 only, and may raise without one."""

    def __init__(self, behind: str = "", *, raises: bool = False) -> None:
        super().__init__()
        self.name, self._armed, self._raises = "hanging", not behind, raises

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        opened = super().open(rank, limits)
        run = opened.run

        def hanging(inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
            while self._armed and inputs.partial.shape[1] == 72:
                pass
            self._armed |= inputs.partial.shape[1] == 64
            if self._raises and not self._armed:
                raise ValueError("a call on 64 was not made")
            return run(inputs, op=op, strategy=strategy)

        return SimpleNamespace(run=hanging, close=opened.close)


def _behind() -> Hanging:
    return Hanging("a call on 64")


def _else_raises() -> Hanging:
    return Hanging("a call on 64", raises=True)


@pytest.mark.parametrize(("name", "before"), [("Hanging", 0), ("_behind", 3), ("_else_raises", 3)])
def test_a_case_that_hangs_is_tried_once_alone_and_keeps_what_came_before_only_if_it_needs_it(
    pool: Pool, name: str, before: int
) -> None:
    backend = f"{__name__}:{name}"
    history = [request(Problem(tokens=2, hidden=64, world_size=2, seed=seed), backend) for seed in range(3)]
    asked = request(Problem(tokens=2, hidden=72, world_size=2), backend)
    pool.close()
    assert [run_case(pool, case, timeout=60).findings for case in history] == [[], [], []]
    outcome = run_case(pool, asked, timeout=2)
    assert outcome.findings[0].message.startswith("hang")
    shown, _, again = Isolation(timeout=2).isolate(pool, asked, history, outcome)
    assert (len(shown.get("before", ())), again) == (before, True)


def test_a_finding_is_kept_when_ctrl_c_comes_while_it_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Isolation, "isolate", interrupted)
    subject = Subject(f"{__name__}:Hanging", 2)
    report = Run([subject], Plan(tokens=(2,), hidden=(64, 72)), Budget(cases=12), timeout=2).execute()
    assert (report.interrupted, report.verdict, report.groups[subject].failed) == (True, Verdict.FAIL, 1)
    (found,) = report.finding_records()
    assert found["message"].startswith("hang")
    assert len(json.loads(found["question"]).get("before", ())) == report.groups[subject].cases - 1


def test_a_finding_is_kept_when_ctrl_c_comes_while_one_of_several_pools_makes_it_smaller(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def takes_long(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(30)
        raise RuntimeError("its pool is gone")

    monkeypatch.setattr(Isolation, "isolate", takes_long)
    monkeypatch.setattr(turn, "INTERRUPT_SECONDS", 0.2)
    subject = Subject(f"{__name__}:Hanging", 2)
    run = Run([subject], Plan(tokens=(2,), hidden=(72,)), Budget(cases=2), timeout=2)
    report = KernelReport(groups={subject: Group(subject)})
    with Interruption() as stop, Pool(WORKER, 2) as other:
        turn.Turn(run, run.shares()[subject], report, Isolation(2), stop).run([pool, other])
    ended.set()
    assert stop.happened
    assert report.groups[subject].failed >= 1
    assert {found["message"].partition(":")[0] for found in report.finding_records()} == {"hang"}
