"""The bench: a kernel under test, the ranks that run it, and what failed there last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from fusecheck import backends
from fusecheck.case.finding import Finding
from fusecheck.case.question import Question
from fusecheck.case.run import Outcome, collect, request, run_case
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.interface import Backend
from fusecheck.problem import Problem
from fusecheck.ranks import Pool, Reply, Request, map_cases

WORKER = "fusecheck.property_tests.kernel.relation_worker:RelationWorker"


@dataclass(frozen=True)
class Failure:
    """The last failure of a test.

    Attributes:
        problem: what was run.
        lines: what was said.
        relation: the metamorphic relation that did not hold, if it was one.
        parameters: of the relation.
        replays: the Problem (with its relation) alone shows it again; else only the test does.
        question: the replay line of the first failing case.
    """

    problem: Problem
    lines: tuple[str, ...]
    relation: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    replays: bool = True
    question: str = ""


@dataclass(repr=False)
class Bench:
    """Runs Problems on a backend and raises AssertionError, with the report lines, where it is wrong.

    Attributes:
        backend: its name, or `package.module:attribute`.
        world_size: ranks.
        pools: one per group of ranks; several under mpirun.
        flow: the name of a dataflow to judge by, instead of the declared one.
        timeout: seconds after which a case is a hang.
        fresh: every case gets a workspace of its own, so that it does not depend on earlier ones.
        failure: of the test that runs; None while nothing failed.
        cases: how many were run.
    """

    backend: str
    world_size: int
    pools: Sequence[Pool]
    flow: str | None = None
    timeout: float = 30.0
    fresh: bool = True
    failure: Failure | None = None
    cases: int = 0

    def __post_init__(self) -> None:
        self._backend: Backend = backends.backend(self.backend)

    def __repr__(self) -> str:
        return f"<bench: {self.backend}, {self.world_size} ranks>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def accepts(self, problem: Problem) -> bool:
        """Whether the backend takes the Problem."""
        return self._backend.supports(problem).ok

    def dataflow(self, problem: Problem) -> Dataflow:
        """What the backend is judged by."""
        return dataflow(self.flow) if self.flow else self._backend.dataflow(problem)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that calls on one bf16 workspace may have."""
        return ("bf16", "fp16") if getattr(self._backend, "mixes_dtypes", False) else ("bf16",)

    def order_free(self, problem: Problem) -> bool:
        """Whether the declared sum over ranks is one number, whatever the order of the ranks' addends."""
        return self.world_size <= 2 or problem.family in ("exact", "rank-tagged", "one-hot")

    def check(self, problem: Problem, checks: Sequence[str] = ()) -> Outcome:
        """Judge a Problem at every stage.

        Raises:
            AssertionError: a stage found something; one report line a finding.
        """
        case = request(problem, self.backend, flow=self.flow, checks=checks, fresh=self.fresh)
        self.cases += 1
        pool = self._next_pool()
        outcome = run_case(pool, case, timeout=self.timeout)
        if not outcome.passed:
            self._fail(Failure(problem, self._lines(case, outcome.findings), question=self._question(case)))
        return outcome

    def check_all(self, problems: Iterable[Problem], checks: Sequence[str] = ()) -> None:
        """Judge several Problems, as many at a time as there are groups of ranks."""
        cases = [
            request(problem, self.backend, flow=self.flow, checks=checks, fresh=self.fresh) for problem in problems
        ]
        if len(cases) == 1 or len(self.pools) == 1:
            for case in cases:
                self.check(Problem.from_json(case["problem"]), checks)
            return
        self.cases += len(cases)
        requests = (Request("run", (case,), tag=case) for case in cases)
        failed = [
            (asked.tag, outcome)
            for asked, replies in map_cases(self.pools, requests, timeout=self.timeout)
            if not (outcome := collect(asked.tag, replies)).passed
        ]
        if failed:
            lines = tuple(line for case, outcome in failed for line in self._lines(case, outcome.findings))
            self._fail(Failure(failed[0][1].problem, lines, question=self._question(failed[0][0])))

    def relate(self, relation: str, problem: Problem, **parameters: Any) -> None:
        """Run a Problem and its relative, and compare what must be equal.

        Args:
            relation: a key of `fusecheck.property_tests.kernel.relations.RELATIONS`.
            problem: where it starts.
            parameters: of the relation, JSON-ready.

        Raises:
            AssertionError: an output of either is wrong, or the relation does not hold.
        """
        case = request(problem, self.backend, flow=self.flow) | {"relation": relation, "parameters": parameters}
        self.cases += 1
        replies = self._next_pool().call("relate", case, timeout=self.timeout)
        findings = collect(case, replies).findings
        if findings:
            how = f"relation={relation} {parameters}"
            lines = tuple(f"{line}  {how}" for line in self._lines(case, findings))
            self._fail(Failure(problem, lines, relation, parameters))

    def ask(self, method: str, problem: Problem, *arguments: Any) -> list[Any]:
        """Call another method of the worker with the case; every rank's value.

        Raises:
            AssertionError: a rank hung, crashed or raised.
        """
        case = request(problem, self.backend, flow=self.flow)
        self.cases += 1
        replies = self._next_pool().call(method, case, *arguments, timeout=self.timeout)
        findings = collect(case, replies).findings if any(not reply.ok for reply in replies) else []
        if findings:
            self._fail(Failure(problem, self._lines(case, findings), replays=False))
        return [reply.value for reply in replies]

    def judge(self, problem: Problem, answers: Sequence[dict[str, Any]], what: str = "") -> None:
        """Report what is wrong with the `calls` of the ranks' answers to `ask`, said of `what`."""
        replies = [Reply(rank, answer) for rank, answer in enumerate(answers)]
        for finding in collect({"problem": problem.to_json()}, replies).findings:
            self.fail(problem, what + finding.line())

    def fail(self, problem: Problem, line: str) -> NoReturn:
        """Report a failure that a test found itself."""
        self._fail(Failure(problem, (line,), replays=False))

    def replay(self, problem: Problem, relation: str, parameters: dict[str, Any]) -> None:
        """Try a kept failure again."""
        if relation:
            self.relate(relation, problem, **parameters)
        else:
            self.check(problem, ("repeat",) if not problem.schedule else ())

    def _lines(self, case: dict[str, Any], findings: Sequence[Finding]) -> tuple[str, ...]:
        """The report lines, each with the whole question."""
        return tuple(replace(finding, question=self._question(case)).line() for finding in findings)

    def _question(self, case: dict[str, Any]) -> str:
        return Question.of(case, str(getattr(self._backend, "device", "cpu"))).to_json()

    def _next_pool(self) -> Pool:
        """The groups of ranks in turn."""
        return self.pools[self.cases % len(self.pools)]

    def _fail(self, failure: Failure) -> NoReturn:
        __tracebackhide__ = True
        self.failure = failure
        raise AssertionError("\n".join(failure.lines))
