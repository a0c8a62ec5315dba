"""What runs on a rank for the tests that give the kernel tensors of their own; small records come back."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import psutil
import torch

from fusecheck.case import alive, digest, returned
from fusecheck.case.calls import limits_of, rows_of, shard
from fusecheck.case.compare import compare_bits
from fusecheck.case.returned import decoded
from fusecheck.case.variants import held
from fusecheck.case.worker import CaseWorker
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.interface import Backend, RankInputs, RankOutputs
from fusecheck.oracle import Oracle
from fusecheck.problem import Problem
from fusecheck.property_tests.kernel.given import Given
from fusecheck.property_tests.kernel.layouts import LAYOUTS
from fusecheck.property_tests.kernel.refusals import SPOILERS
from fusecheck.property_tests.kernel.relations import RELATIONS
from fusecheck.verdict import Stage, Tally, judge_rows, raw


def holdings(device: torch.device) -> dict[str, int]:
    """Open files of this process, its mappings of shared memory, and bytes in use on its GPU."""
    process = psutil.Process()
    shared = sum("/dev/shm/" in mapping.path for mapping in process.memory_maps(grouped=False))
    held = {"open files": process.num_fds(), "mappings of shared memory": shared}
    if device.type == "cuda":
        gc.collect()  # a handle in a cycle would else be given back at some later time
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        held["bytes on the GPU"] = total - free
    return held


class RelationWorker(CaseWorker):
    """A `CaseWorker` that also runs given tensors."""

    def relate(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run two related calls, judge each, and compare them.

        Args:
            case: as for `run`, with `relation` and its `parameters`.
        """
        problem, backend, flow = self._read(case)
        related = RELATIONS[case["relation"]](Given.of(problem, self.rank.device), **case["parameters"])
        tally = Tally(Stage.AGAIN)
        records = []
        returned = []
        for given in (related.first, related.second):
            outputs, record = self._judged(backend, flow, given, given.of_rank(self.rank.index))
            returned.append(outputs)
            records.append(record)
        if all(not record.get("broken") for record in records):
            for name, expected, got in related.equal(*returned):
                compare_bits(tally, name, expected, got)
            if related.admissible is not None:
                self._cross_judge(flow, related.second, related.admissible(returned[0]), tally)
        records.append({"problem": problem.to_json(), "check": case["relation"], "tallies": [tally.to_record()]})
        self.workspaces.close(backend.name)
        return {"calls": records}

    def sweep(self, case: dict[str, Any], first: int) -> dict[str, Any]:
        """Give the quantiser the native values of `hidden` consecutive bit patterns, of both signs, and judge them.

        A row of ones has a mean square of one, so its norm is gamma itself; a row of minus ones, its negative.

        Args:
            case: as for `run`; two tokens.
            first: the first bit pattern.

        Returns:
            `calls`, as `run` does, and on rank 0 `seen`: one byte for each of the 65,536 patterns, 1 where the
            norm took it.
        """
        problem, backend, flow = self._read(case)
        native, device = problem.format.dtype, self.rank.device
        patterns = (torch.arange(first, first + problem.hidden, device=device) & 0xFFFF).to(torch.int16)
        # One NaN for all: kernels need not keep a payload, and one payload is what unwritten memory holds.
        values = patterns.view(native)
        values = torch.where(values.isnan(), torch.nan, values)
        ones = torch.tensor([[1.0], [-1.0]], device=device).to(native).expand(2, problem.hidden).contiguous()
        zeros = torch.zeros_like(ones)
        partials = (ones, *[zeros] * (problem.world_size - 1))
        given = Given(problem, partials, zeros, values)
        outputs, record = self._judged(backend, flow, given, given.of_rank(self.rank.index))
        seen = torch.zeros(65536, dtype=torch.uint8)
        if outputs.norm is not None:
            seen[(raw(outputs.norm).to(torch.int64) & 0xFFFF).reshape(-1).cpu()] = 1
        self.workspaces.close(backend.name)
        return {"calls": [record], "seen": bytes(seen.tolist()) if self.rank.index == 0 else b""}

    def norms_and_codes(self, case: dict[str, Any]) -> tuple[list[float], list[int]]:
        """Every element of the norm, and its code; for small calls."""
        problem, backend, _ = self._read(case)
        outputs = self._execute(backend, problem, Given.of(problem, self.rank.device).of_rank(self.rank.index))
        assert outputs.norm is not None
        assert outputs.quant is not None
        self.workspaces.close(backend.name)
        return outputs.norm.double().reshape(-1).tolist(), raw(outputs.quant).reshape(-1).tolist()

    def lay_out(self, case: dict[str, Any], layout: str, operand: str) -> dict[str, Any]:
        """Give the kernel one operand in an unusual layout; `refused` says why where it declines."""
        problem, backend, flow = self._read(case)
        given, inputs = LAYOUTS[layout](Given.of(problem, self.rank.device), self.rank.index, operand)
        return self._taken_or_refused(backend, flow, given, inputs)

    def spoil(self, case: dict[str, Any], spoiler: str) -> dict[str, Any]:
        """Give the kernel an operand that it cannot read rightly, then right ones: the workspace must still serve."""
        problem, backend, flow = self._read(case)
        given = Given.of(problem, self.rank.device)
        refused = ""
        try:
            self._execute(backend, problem, SPOILERS[spoiler](given.of_rank(self.rank.index)))
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
        _, record = self._judged(backend, flow, given, given.of_rank(self.rank.index))
        self.workspaces.close(backend.name)
        return {"calls": [record], "refused": refused}

    def attempt(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run a call that the backend says it refuses."""
        problem, backend, flow = self._read(case)
        given = Given.of(problem, self.rank.device)
        return self._taken_or_refused(backend, flow, given, given.of_rank(self.rank.index))

    def reopen(self, case: dict[str, Any], times: int) -> dict[str, Any]:
        """Open a workspace, use it and close it, so many times.

        Returns:
            `calls`, as `run` does, and `held`: what this process holds after each closing, by kind.
        """
        problem, backend, flow = self._read(case)
        given = Given.of(problem, self.rank.device)
        records, held = [], []
        for _ in range(times):
            _, record = self._judged(backend, flow, given, given.of_rank(self.rank.index))
            records.append(record)
            self.workspaces.close(backend.name)
            held.append(holdings(self.rank.device))
        return {"calls": records, "held": held}

    # ------------------------------------------------------------------ one call
    def _read(self, case: dict[str, Any]) -> tuple[Problem, Backend, Dataflow]:
        problem, backend = Problem.from_json(case["problem"]), self.workspaces.backend(case["backend"])
        self.workspaces.close(backend.name)
        named = case.get("dataflow")
        return problem, backend, dataflow(named) if named else backend.dataflow(problem)

    def _taken_or_refused(self, backend: Backend, flow: Dataflow, given: Given, inputs: RankInputs) -> dict[str, Any]:
        try:
            _, record = self._judged(backend, flow, given, inputs)
        except Exception as error:
            return {"calls": [], "refused": f"{type(error).__name__}: {error}"}
        finally:
            self.workspaces.close(backend.name)
        return {"calls": [record], "refused": ""}

    def _execute(self, backend: Backend, problem: Problem, inputs: RankInputs) -> RankOutputs:
        kernel = self.workspaces.kernel(backend, limits_of(problem, None))
        return self.workspaces.call(kernel, inputs, problem, alive.Arena(self.rank.device))

    def _judged(
        self, backend: Backend, flow: Dataflow, given: Given, inputs: RankInputs
    ) -> tuple[RankOutputs, dict[str, Any]]:
        """Run on `inputs`, which hold what `given` says, and judge this rank's share of the rows."""
        problem = given.problem
        before = held(inputs)
        arena = alive.Arena(self.rank.device)
        kernel = self.workspaces.kernel(backend, limits_of(problem, None))
        outputs = self.workspaces.call(kernel, inputs, problem, arena)
        record: dict[str, Any] = {"problem": problem.to_json(), "dataflow": flow.name, "check": "given"}
        wrong = alive.intact(arena, before, inputs, outputs, problem)
        if wrong is not None:
            return outputs, record | {"tallies": [wrong.to_record()], "broken": True}
        outputs = decoded(outputs, problem)
        share = shard(problem.tokens, self.rank.index, problem.world_size)
        tallies = [] if not share else self._judge_given(flow, given, outputs, share)
        digests = {name: digest.whole(tensor) for name, tensor in returned.named(outputs).items()}
        return outputs, record | {"tallies": [tally.to_record() for tally in tallies], "digests": digests}

    def _judge_given(self, flow: Dataflow, given: Given, outputs: RankOutputs, rows: range) -> list[Tally]:
        return judge_rows(Oracle(flow, given.operands(rows)), rows_of(outputs, rows), rows.start)

    def _cross_judge(self, flow: Dataflow, given: Given, outputs: RankOutputs, tally: Tally) -> None:
        for judged in self._judge_given(flow, given, outputs, range(given.problem.tokens)):
            judged.shown = [
                replace(element, context=f"{judged.stage.value} of the first call  {element.context}")
                for element in judged.shown
            ]
            tally.add(judged)
