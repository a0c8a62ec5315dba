"""Who runs which cases: every kernel the whole core plan, or several of one make a share each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from fusecheck import backends
from fusecheck.dataflow import dataflow
from fusecheck.interface import Backend
from fusecheck.kernel.core import core_plan
from fusecheck.kernel.coverage import Coverage
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import Subject
from fusecheck.kernel.table import Case, Cell, cells_of
from fusecheck.problem import Problem

FAMILIES_APART = 7
"""Families by which the streams behind a joint core begin apart, one world size from the next."""

Takes = Callable[[Backend, Problem], bool]


@dataclass
class Share:
    """The cases of one subject.

    Attributes:
        subject: who runs them.
        core: its part of the core plan.
        coverage: what was reached; several subjects may fill one.
        first: number of the first case that is drawn behind the core.
        endless: whether cases are drawn at all.
    """

    subject: Subject
    core: list[Case]
    coverage: Coverage
    first: int = 0
    endless: bool = True
    cells: list[set[Cell]] = field(default_factory=list)

    def __post_init__(self) -> None:
        backend = backends.backend(self.subject.backend)
        self.cells = [cells_of(case, _accumulate(self.subject, backend, case.problem)) for case in self.core]

    def stream(self, plan: Plan) -> Iterator[tuple[Case, set[Cell]]]:
        """The core, then drawn cases, each with its cells."""
        yield from zip(self.core, self.cells, strict=True)
        backend = backends.backend(self.subject.backend)
        plan = plan.about(backend)
        for index in count(self.first) if self.endless else ():
            case = plan.draw(self.subject.world_size, index)
            yield case, cells_of(case, _accumulate(self.subject, backend, case.problem))


def own_shares(plan: Plan, subjects: Sequence[Subject], takes: Takes) -> dict[Subject, Share]:
    """Every subject runs the whole core plan."""
    found = {}
    for subject in subjects:
        backend = backends.backend(subject.backend)
        core = core_plan(plan.about(backend), subject.world_size, partial(takes, backend))
        found[subject] = _wanting(Share(subject, core, Coverage()))
    return found


def joint_shares(plan: Plan, subjects: Sequence[Subject], takes: Takes) -> dict[Subject, Share]:
    """The subjects of a world size are variants of one kernel: each case goes to the next of them that takes it."""
    found = {}
    for turn, size in enumerate(dict.fromkeys(subject.world_size for subject in subjects)):
        mine = [subject for subject in subjects if subject.world_size == size]
        known = [backends.backend(subject.backend) for subject in mine]

        def by_any(problem: Problem, among: Sequence[Backend] = tuple(known)) -> bool:
            return any(takes(backend, problem) for backend in among)

        dealt: list[list[Case]] = [[] for _ in mine]
        for number, case in enumerate(core_plan(plan.about(known[0]), size, by_any)):
            turns = [(number + step) % len(mine) for step in range(len(mine))]
            steps = [step for _, step in case.problem.calls()]
            taker = next((i for i in turns if all(takes(known[i], step) for step in steps)), turns[0])
            dealt[taker].append(case)
        coverage = Coverage()
        for subject, cases in zip(mine, dealt, strict=True):
            found[subject] = _wanting(Share(subject, cases, coverage, first=turn * FAMILIES_APART))
    return found


def given_shares(given: Mapping[Subject, Sequence[Case]]) -> dict[Subject, Share]:
    """Every subject runs the cases that it was given, and no others."""
    return {
        subject: Share(subject, list(cases), Coverage(cases=len(cases)), endless=False)
        for subject, cases in given.items()
    }


def _wanting(share: Share) -> Share:
    share.coverage.cases += len(share.core)
    share.coverage.wanted.update(*share.cells)
    return share


def _accumulate(subject: Subject, backend: Backend, problem: Problem) -> str:
    """Of the sums over ranks, as declared; a declaration that fails is the ranks' finding, not the plan's."""
    try:
        flow = dataflow(subject.flow) if subject.flow else backend.dataflow(problem)
        return str(flow.accumulate)
    except Exception:
        return "undeclared"
