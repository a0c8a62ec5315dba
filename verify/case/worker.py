"""What runs on a rank: make the inputs, call the kernel, judge this rank's share of the rows.

The only place where backends and ranks meet. Results leave as small JSON-ready records, never as tensors.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from verify import backends
from verify.case import alive, device_checks, digest
from verify.case.calls import Done, Step, blocks, limits_of, part_of, pause, rows_of, shard, within
from verify.case.compare import code_differences, compare_bits
from verify.dataflow import DATAFLOWS, Dataflow, dataflow
from verify.inputs.families import FAMILIES
from verify.inputs.properties import Sample
from verify.inputs.rank_inputs import Inputs
from verify.interface import Backend, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy
from verify.onepass.batch import Batch, available, takes
from verify.oracle import Operands, Oracle
from verify.problem import Call, Problem
from verify.verdict import Stage, Tally, admissible_codes, judge_rows, raw

SAMPLED = 2**12
"""Elements per call whose full enclosure is computed, for the mean number of admissible codes."""
SAMPLED_ROWS = 20


class CaseWorker:
    """Runs cases on one rank; its kernels stay open from case to case.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._kernels: dict[str, tuple[Limits, Kernel]] = {}
        self._backends: dict[str, Backend] = {}
        self._last: list[Done] = []

    # ------------------------------------------------------------------ requests
    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case: every call of its schedule, each judged; then the checks that it names.

        The calls follow each other without anything in between, and are judged when all have returned.

        Args:
            case: `problem` (JSON), `backend`, and optionally `dataflow` (a name), `checks` (of `repeat`, `strategies`,
                `unfused`, `layouts`), `limits` ([max_tokens, hidden] of the workspace to keep) and `fresh` (a workspace
                of its own, as a schedule always has).
        """
        problem = Problem.from_json(case["problem"])
        backend = self._backend(case["backend"])
        fresh = bool(problem.schedule) or case.get("fresh", False)
        if fresh:
            self._close(backend.name)
        self._last = []
        limits = limits_of(problem, case.get("limits"))
        steps = [self._prepare(call, step, backend, case) for call, step in problem.calls()]
        for step in steps:
            self._call(backend, limits, step)
        records = [self._record(step) for step in steps]
        # A check is a collective call, so all ranks make it, also one whose own outputs are not whole.
        records += [getattr(self, f"_check_{check}")(backend, steps[-1]) for check in case.get("checks", ())]
        if fresh:
            self._close(backend.name)
        return {"calls": records}

    def run_many(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`run` of each case; on CUDA, plain ones follow each other without a wait and are judged in one pass."""
        results: list[dict[str, Any] | None] = [None] * len(cases)
        batch, places = Batch(self.rank, len(cases)), []
        for index, case in enumerate(cases):
            problem = Problem.from_json(case["problem"])
            backend = self._backend(case["backend"])
            flow = self._flow(problem, backend, case)
            if available(self.rank.device) and takes(case, problem, flow):
                kernel = self._kernel(backend, limits_of(problem, case.get("limits")))
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
                record["codes"] = self._sample(step.done(), shard(step.problem.tokens, *self._place))
            results[index] = {"calls": [record]}
        return [result for result in results if result is not None]

    @property
    def _place(self) -> tuple[int, int]:
        return self.rank.index, self.rank.world_size

    def judge_all(self) -> list[list[dict[str, Any]]]:
        """Judge every row of the last case's outputs on this rank; asked when the ranks disagree."""
        return [[t.to_record() for t in self._judge(done, range(done.problem.tokens))] for done in self._last]

    def explain(self) -> list[str]:
        """The names of the known dataflows under which every row of the last case's outputs is inside."""
        return [name for name, flow in DATAFLOWS.items() if all(self._explains(done, flow) for done in self._last)]

    def row_digests(self, index: int) -> dict[str, list[int]]:
        """Per output of a call, the digest of each row; asked when the ranks disagree."""
        return {name: digest.rows(tensor) for name, tensor in alive.named(self._last[index].outputs).items()}

    def row_bits(self, index: int, output: str, row: int) -> list[int]:
        """The bits of one row of one output of a call."""
        return [int(b) for b in raw(alive.named(self._last[index].outputs)[output])[row].tolist()]

    # ------------------------------------------------------------------ one call
    def _prepare(self, call: Call, problem: Problem, backend: Backend, case: dict[str, Any]) -> Step:
        flow = self._flow(problem, backend, case)
        made = Inputs(problem, self.rank.device).of_rank(self.rank.index)
        arena = alive.Arena(self.rank.device)
        return Step(call, problem, flow, made, arena.guard(made), arena)

    def _flow(self, problem: Problem, backend: Backend, case: dict[str, Any]) -> Dataflow:
        named = case.get("dataflow")
        return dataflow(named) if named else backend.dataflow(problem)

    def _call(self, backend: Backend, limits: Limits, step: Step) -> None:
        call = step.call
        if call.reopen:
            self._close(backend.name)
        kernel = self._kernel(backend, limits)
        delay = call.delay_ms if call.delayed == self.rank.index else 0
        pause(call.idle_ms + (0 if call.late else delay))
        began = time.perf_counter()
        step.outputs = self._run(kernel, step.guarded, step.problem, step.arena)
        step.seconds = time.perf_counter() - began
        if call.overwrite:
            step.overwrite()
        pause(delay if call.late else 0)

    def _run(self, kernel: Kernel, inputs: RankInputs, problem: Problem, arena: alive.Arena) -> RankOutputs:
        with alive.Poisoned(arena):
            outputs = kernel.run(inputs, op=problem.op, strategy=problem.strategy)
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)
        return outputs

    def _record(self, step: Step) -> dict[str, Any]:
        """Judge this rank's share of a call's rows."""
        record: dict[str, Any] = {"problem": step.problem.to_json(), "kernel_seconds": step.seconds}
        wrong = step.wrong()
        if wrong is not None:
            return record | {"tallies": [wrong.to_record()]}
        done = step.done()
        self._last.append(done)
        share = shard(done.problem.tokens, self.rank.index, self.rank.world_size)
        began = time.perf_counter()
        tallies = self._judge(done, share)
        codes = self._sample(done, share)
        return record | {
            "dataflow": done.flow.name,
            "judge_seconds": time.perf_counter() - began,
            "digests": {name: digest.whole(tensor) for name, tensor in alive.named(done.outputs).items()},
            "tallies": [t.to_record() for t in tallies],
            "codes": codes,
        }

    def _judge(self, done: Done, rows: range, flow: Dataflow | None = None) -> list[Tally]:
        """Judge some rows in blocks; merged tallies, one per stage."""
        merged: dict[Stage, Tally] = {}
        for block in blocks(rows, done.problem.hidden, self.rank.device):
            oracle = Oracle(flow or done.flow, self._operands(done, block))
            for tally in judge_rows(oracle, rows_of(done.outputs, block), block.start):
                merged.setdefault(tally.stage, Tally(tally.stage)).add(tally)
        return list(merged.values())

    def _operands(self, done: Done, rows: range) -> Operands:
        """What the oracle reads for some rows; this rank's own share of it was made before the call."""
        if done.judged is not None and within(rows, done.judged[0]):
            return part_of(done.judged[1], slice(rows.start - done.judged[0].start, rows.stop - done.judged[0].start))
        problem, made, part = done.problem, done.inputs, slice(rows.start, rows.stop)
        source = Inputs(problem, self.rank.device)
        operands = Operands(
            partials=[
                made.partial[part] if rank == self.rank.index else source.partial(rank, rows)
                for rank in range(problem.world_size)
            ],
            residual=made.residual[part],
            gamma=made.gamma,
            scale=float(made.scale),
            eps=made.eps,
            weight_bias=made.weight_bias,
        )
        done.judged = rows, operands
        return operands

    def _explains(self, done: Done, flow: Dataflow) -> bool:
        tallies = self._judge(done, range(done.problem.tokens), flow)
        return not any(t.outside for t in tallies)

    def _sample(self, done: Done, share: range) -> dict[str, Any]:
        """Admissible codes over a sample of rows, and whether the family's property holds on it."""
        count = max(1, min(SAMPLED_ROWS, SAMPLED // done.problem.hidden))
        rows = range(share.start, min(share.stop, share.start + count))
        if not rows:
            return {"codes": 0, "elements": 0, "property": None}
        operands = self._operands(done, rows)
        codes, elements = 0, 0
        # One rank's sample is enough: the ranks take turns.
        if done.outputs.quant is not None and done.problem.seed % self.rank.world_size == self.rank.index:
            codes, elements = admissible_codes(Oracle(done.flow, operands), rows_of(done.outputs, rows))
        sample = Sample(
            torch.stack(operands.partials).to(torch.float64),
            operands.residual.to(torch.float64),
            operands.gamma.to(torch.float64),
            operands.eps,
            operands.scale,
            done.problem.format,
        )
        return {"codes": codes, "elements": elements, "property": FAMILIES[done.problem.family].holds(sample)}

    # ------------------------------------------------------------------ further checks
    def _check_repeat(self, backend: Backend, step: Step) -> dict[str, Any]:
        """The same inputs again: bitwise the same outputs."""
        again = self._again(backend, step, step.problem)
        tally = Tally(Stage.AGAIN)
        if step.whole:
            first = alive.named(step.done().outputs)
            for name, tensor in alive.named(again).items():
                compare_bits(tally, name, first[name], tensor)
        return _check_record("repeat", step, tally)

    def _check_strategies(self, backend: Backend, step: Step) -> dict[str, Any]:
        """One-shot and two-shot: the same residual_out where the order is named, but for the sign of zero."""
        tally = Tally(Stage.AGAIN)
        for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
            problem = replace(step.problem, strategy=strategy)
            if strategy is step.problem.strategy or not backend.supports(problem).ok:
                continue
            if backend.dataflow(problem).order != "rank" or step.flow.order != "rank":
                continue
            other = self._again(backend, step, problem)
            if step.whole:
                compare_bits(tally, "residual", step.done().outputs.residual + 0.0, other.residual + 0.0)
        return _check_record("strategies", step, tally)

    def _check_layouts(self, backend: Backend, step: Step) -> dict[str, Any]:
        """The same values as views with strides and an offset: bitwise the same outputs, or an error, never misread."""
        tally = Tally(Stage.AGAIN)
        arena = alive.Arena(self.rank.device)
        kernel = self._kernel(backend, limits_of(step.problem, None))
        try:
            outputs = self._run(kernel, arena.spread(step.made), step.problem, arena)
        except Exception:  # a refusal may be of any type
            return _check_record("layouts", step, tally)
        if step.whole:
            first = alive.named(step.done().outputs)
            for name, tensor in alive.named(outputs).items():
                compare_bits(tally, name, first[name], tensor)
        return _check_record("layouts", step, tally)

    def _check_unfused(self, backend: Backend, step: Step) -> dict[str, Any]:
        """The unfused reference on the same inputs: judged by its own dataflow, and the differences of its codes."""
        reference = self._backend("unfused")
        outputs = self._again(reference, step, step.problem)
        theirs = Done(step.problem, reference.dataflow(step.problem), step.made, outputs)
        share = shard(step.problem.tokens, self.rank.index, self.rank.world_size)
        merged = Tally(Stage.UNFUSED)
        for tally in self._judge(theirs, share):
            merged.add(tally)
        histogram = {}
        if step.whole:
            within_one = not step.flow.round_squares  # such squares may overflow in fp16
            histogram = code_differences(step.done().outputs, outputs, share, merged, within_one=within_one)
        return _check_record("unfused", step, merged) | {"histogram": histogram}

    def _check_graphs(self, backend: Backend, step: Step) -> dict[str, Any]:
        """CUDA only: calls captured in graphs and replayed with changed inputs."""
        tally = device_checks.replay_graphs(self._kernel(backend, limits_of(step.problem, None)), step)
        return _check_record("graphs", step, tally)

    def _check_producer(self, backend: Backend, step: Step) -> dict[str, Any]:
        """CUDA only: the operands come from a kernel right before that triggers its dependents early."""
        tally = device_checks.follow_producer(self._kernel(backend, limits_of(step.problem, None)), step)
        return _check_record("producer", step, tally)

    def _again(self, backend: Backend, step: Step, problem: Problem) -> RankOutputs:
        arena = alive.Arena(self.rank.device)
        inputs = arena.guard(step.made)
        return self._run(self._kernel(backend, limits_of(problem, None)), inputs, problem, arena)

    # ------------------------------------------------------------------ workspaces
    def _kernel(self, backend: Backend, limits: Limits) -> Kernel:
        """The open workspace if it is large enough, else a new one; the same decision on every rank."""
        if backend.name in self._kernels:
            have, kernel = self._kernels[backend.name]
            if have.dtype == limits.dtype and have.max_tokens >= limits.max_tokens and have.hidden >= limits.hidden:
                return kernel
            self._close(backend.name)
        kernel = backend.open(self.rank, limits)
        self._kernels[backend.name] = (limits, kernel)
        return kernel

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = backends.backend(name)
        return self._backends[name]

    def _close(self, name: str) -> None:
        if name in self._kernels:
            self._kernels.pop(name)[1].close()


def _check_record(check: str, step: Step, tally: Tally) -> dict[str, Any]:
    return {"problem": step.problem.to_json(), "check": check, "tallies": [tally.to_record()]}
