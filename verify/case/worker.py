"""What runs on a rank: make the inputs, call the kernel, judge this rank's share of the rows.

Results leave as small JSON-ready records, never as tensors.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

from torch import Tensor

from fusecheck.backends.checked import noticed
from fusecheck.case import alive, digest
from fusecheck.case.calls import Done, Step, limits_of, pause
from fusecheck.case.checks import Checker
from fusecheck.case.fresh import FreshWorkspaces
from fusecheck.case.judging import Judge, promised
from fusecheck.case.workspaces import Workspaces
from fusecheck.dataflow import DATAFLOWS, Dataflow, dataflow
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Backend, Limits, Rank, overwritten
from fusecheck.onepass.batch import Batch, available, takes
from fusecheck.problem import Call, Problem
from fusecheck.stages.judgement import whole
from fusecheck.verdict import Stage, Tally, raw

_parse = lru_cache(maxsize=64)(Problem.from_json)


class CaseWorker:
    """Runs cases on one rank; its kernels stay open from case to case.

    Args:
        rank: this process's place in the group.

    Attributes:
        workspaces: the open kernels.
        judge: judges what they return.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.workspaces = Workspaces(rank, foresee=True)
        self._own = FreshWorkspaces(rank)
        """Those of a case that has its own; the others stay open meanwhile."""
        self.judge = Judge(rank)
        self._last: list[Done] = []
        self._suspected: list[dict[str, Tensor]] = []

    # ------------------------------------------------------------------ requests
    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case: every call of its schedule, each judged; then the checks that it names.

        The calls follow each other without anything in between, and are judged when all have returned.

        Args:
            case: `problem` (JSON), `backend`, and optionally `dataflow` (a name), `checks` (of `repeat`, `strategies`,
                `unfused`, `layouts`), `limits` ([max_tokens, hidden] of the workspace to keep), `fresh` (a workspace
                of its own, as a schedule always has) and `before` (earlier cases, each with its `checks`).
        """
        for earlier in case.get("before", ()):
            self.run({key: value for key, value in case.items() if key != "before"} | earlier)
        backend = self.workspaces.backend(case["backend"])  # first: it may bring a quantiser of its own
        problem = _parse(case["problem"])
        self._last, self._suspected = [], []
        steps = self._calls(case, problem, backend)
        records = [self._record(step) for step in steps]
        checker = Checker(self._workspaces(case, problem), self.judge)
        records += [checker.check(check, backend, steps[-1]) for check in case.get("checks", ())]
        if _fresh(case, problem):
            self._own.refresh(backend)
        if words := noticed():
            tally = Tally(Stage.ALIVE, elements=problem.elements, outside=1)
            tally.shown.append(whole("; ".join(words), "the floating-point state as it was; it was set back here"))
            records[0]["tallies"].append(tally.to_record())
        return {"calls": records}

    def run_many(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`run` of each case; on CUDA, plain ones follow each other without a wait and are judged in one pass."""
        results: list[dict[str, Any] | None] = [None] * len(cases)
        batch, places = Batch(self.rank, len(cases)), []
        for index, case in enumerate(cases):
            backend = self.workspaces.backend(case["backend"])
            problem = _parse(case["problem"])
            flow = self._flow(problem, backend, case)
            if available(self.rank.device) and takes(case, problem, flow):
                kernel = self.workspaces.kernel(backend, limits_of(problem, case.get("limits")))
                places.append((index, batch.start(kernel, problem, flow, case["problem"])))
            else:
                results[index] = self.run(case)
        finished = batch.finish()
        self._last = []
        for index, place in places:
            step, record = finished[place]
            if record is None:
                record = self._record(step)
            elif place == 0:
                record["codes"] = self.judge.sample(step.done(), self.judge.share(step.problem.tokens))
            results[index] = {"calls": [record]}
        return [result for result in results if result is not None]

    def unwritten(self, case: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Run the calls of the last case once more, on other poison: per call, a tally of what neither run wrote."""
        problem = _parse(case["problem"])
        steps = self._calls(case, problem, self.workspaces.backend(case["backend"]), poison=1)
        found: list[dict[str, Any] | None] = []
        for step, suspected in zip(steps, self._suspected, strict=True):
            whole = step.wrong() is None
            tally = alive.never_written(step.done().outputs, suspected, step.problem) if whole else None
            found.append(None if tally is None else tally.to_record())
        return found

    def varying(self, case: dict[str, Any], repeats: int) -> int:
        """Run the calls of the last case some more times: how many of them gave other bits in any output."""
        backend = self.workspaces.backend(case["backend"])  # first: it may bring a quantiser of its own
        problem = _parse(case["problem"])
        different = 0
        for _ in range(repeats):
            steps = self._calls(case, problem, backend)
            if len(steps) == len(self._last) and all(step.wrong() is None for step in steps):
                pairs = zip(self._last, (step.done() for step in steps), strict=True)
                different += any(_digests(a) != _digests(b) for a, b in pairs)
            else:
                different += 1
        return different

    def judge_all(self) -> list[list[dict[str, Any]]]:
        """Judge every row of the last case's outputs on this rank; asked when the ranks disagree."""
        return [[t.to_record() for t in self.judge.tallies(done, range(done.problem.tokens))] for done in self._last]

    def explain(self) -> list[str]:
        """The names of the known dataflows under which every row of the last case's outputs is inside."""
        if not self._last:
            return []
        return [name for name, flow in DATAFLOWS.items() if all(self.judge.explains(done, flow) for done in self._last)]

    def row_digests(self, index: int) -> dict[str, list[int]]:
        """Per output of a call, the digest of each row; asked when the ranks disagree."""
        return {name: digest.rows(tensor) for name, tensor in promised(self._last[index]).items()}

    def row_bits(self, index: int, output: str, row: int) -> list[int]:
        """The bits of one row of one output of a call."""
        return [int(b) for b in raw(promised(self._last[index])[output])[row].tolist()]

    # ------------------------------------------------------------------ one call
    def _calls(self, case: dict[str, Any], problem: Problem, backend: Backend, poison: int = 0) -> list[Step]:
        """Make every call of a case, one right after the other."""
        if _fresh(case, problem):
            self._own.refresh(backend)
            if getattr(backend, "one_workspace", False):
                self.workspaces.close(backend.name)
        limits, workspaces = limits_of(problem, case.get("limits")), self._workspaces(case, problem)
        steps = [self._prepare(call, step, backend, case, poison) for call, step in problem.calls()]
        for step in steps:
            self._call(workspaces, backend, limits, step)
        return steps

    def _workspaces(self, case: dict[str, Any], problem: Problem) -> Workspaces:
        return self._own if _fresh(case, problem) else self.workspaces

    def _prepare(self, call: Call, problem: Problem, backend: Backend, case: dict[str, Any], poison: int) -> Step:
        flow = self._flow(problem, backend, case)
        made = Inputs(problem, self.rank.device).of_rank(self.rank.index)
        arena = alive.Arena(self.rank.device, poison)
        step = Step(call, problem, flow, made, arena.guard(made), arena, overwritten(backend))
        if problem is _parse(case["problem"]):
            step.line = case["problem"]
        return step

    def _flow(self, problem: Problem, backend: Backend, case: dict[str, Any]) -> Dataflow:
        named = case.get("dataflow")
        return dataflow(named) if named else backend.dataflow(problem)

    def _call(self, workspaces: Workspaces, backend: Backend, limits: Limits, step: Step) -> None:
        call = step.call
        if call.reopen:
            workspaces.close(backend.name, call.workspace)
        kernel = workspaces.kernel(backend, limits, call.workspace)
        delay = call.delay_ms if call.delayed == self.rank.index else 0
        pause(call.idle_ms + (0 if call.late else delay))
        began = time.perf_counter()
        step.outputs = workspaces.call(kernel, step.guarded, step.problem, step.arena)
        step.seconds = time.perf_counter() - began
        if call.overwrite:
            step.overwrite()
        pause(delay if call.late else 0)

    def _record(self, step: Step) -> dict[str, Any]:
        """Judge this rank's share of a call's rows."""
        wrong = step.wrong()
        if wrong is not None:
            self._suspected.append({})
            return {"problem": step.line, "kernel_seconds": step.seconds, "tallies": [wrong.to_record()]}
        done = step.done()
        self._last.append(done)
        suspected = alive.suspects(done.outputs, done.problem)
        self._suspected.append(suspected)
        record = self.judge.record(step, done)
        return record | {"unwritten": None} if suspected else record


def _fresh(case: dict[str, Any], problem: Problem) -> bool:
    """Whether a case has a workspace of its own."""
    return bool(problem.schedule) or bool(case.get("fresh"))


def _digests(done: Done) -> dict[str, int]:
    return digest.whole_of(promised(done))
