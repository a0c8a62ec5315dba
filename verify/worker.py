"""What runs on a rank: make the inputs, call the kernel, judge this rank's share of the rows.

The only place where backends and ranks meet. Results leave as small JSON-ready records, never as tensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from verify import alive, backends, digest
from verify.compare import code_differences, compare_bits
from verify.dataflow import DATAFLOWS, Dataflow, dataflow
from verify.families import FAMILIES
from verify.inputs import Inputs
from verify.interface import Backend, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy
from verify.oracle import Operands, Oracle
from verify.problem import Call, Problem
from verify.properties import Sample
from verify.verdict import Stage, Tally, admissible_codes, judge_rows, raw

BLOCK = 2**18
"""Elements judged at a time, so that intermediates stay in cache (CPU) or in bounds (CUDA uses 2^26)."""
SAMPLED = 2**12
"""Elements per call whose full enclosure is computed, for the mean number of admissible codes."""
SAMPLED_ROWS = 20


@dataclass
class _Done:
    """One call that returned: what went in, what came out, and the operands judged last."""

    problem: Problem
    flow: Dataflow
    inputs: RankInputs
    outputs: RankOutputs
    judged: tuple[range, Operands] | None = None


class CaseWorker:
    """Runs cases on one rank; its kernels stay open from case to case.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._kernels: dict[str, tuple[Limits, Kernel]] = {}
        self._backends: dict[str, Backend] = {}
        self._last: list[_Done] = []

    # ------------------------------------------------------------------ requests
    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case: every call of its schedule, each judged; then the checks that it names.

        Args:
            case: `problem` (JSON), `backend`, and optionally `dataflow` (a name), `checks` (of `repeat`, `strategies`,
                `unfused`) and `limits` ([max_tokens, hidden] of the workspace to keep).
        """
        problem = Problem.from_json(case["problem"])
        backend = self._backend(case["backend"])
        named = case.get("dataflow")
        fresh = bool(problem.schedule)
        if fresh:
            self._close(backend.name)
        self._last = []
        records = []
        for call, step in problem.calls():
            flow = dataflow(named) if named else backend.dataflow(step)
            limits = _limits(problem, case.get("limits"))
            records.append(self._call(backend, limits, call, step, flow))
        if len(self._last) == len(records):  # every call returned whole outputs
            done = self._last[-1]
            records.extend(getattr(self, f"_check_{check}")(backend, done) for check in case.get("checks", ()))
        if fresh:
            self._close(backend.name)
        return {"calls": records}

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
    def _call(self, backend: Backend, limits: Limits, call: Call, problem: Problem, flow: Dataflow) -> dict[str, Any]:
        if call.reopen:
            self._close(backend.name)
        kernel = self._kernel(backend, limits)
        _pause(call.idle_ms)
        late = call.delay_ms if call.delayed == self.rank.index else 0
        _pause(0 if call.late else late)
        made = Inputs(problem, self.rank.device).of_rank(self.rank.index)
        arena = alive.Arena(self.rank.device)
        inputs = arena.guard(made)
        began = time.perf_counter()
        outputs = self._run(kernel, inputs, problem, arena)
        seconds = time.perf_counter() - began
        intact = alive.intact(arena, made, inputs, outputs, problem)
        if call.overwrite:
            inputs.partial.fill_(torch.nan)
        _pause(late if call.late else 0)
        if intact is not None:
            return {"problem": problem.to_json(), "kernel_seconds": seconds, "tallies": [intact.to_record()]}
        done = _Done(problem, flow, made, outputs)
        self._last.append(done)
        return self._record(done, seconds)

    def _run(self, kernel: Kernel, inputs: RankInputs, problem: Problem, arena: alive.Arena) -> RankOutputs:
        with alive.Poisoned(arena):
            outputs = kernel.run(inputs, op=problem.op, strategy=problem.strategy)
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)
        return outputs

    def _record(self, done: _Done, kernel_seconds: float) -> dict[str, Any]:
        share = shard(done.problem.tokens, self.rank.index, self.rank.world_size)
        began = time.perf_counter()
        tallies = self._judge(done, share)
        codes = self._sample(done, share)
        return {
            "problem": done.problem.to_json(),
            "dataflow": done.flow.name,
            "kernel_seconds": kernel_seconds,
            "judge_seconds": time.perf_counter() - began,
            "digests": {name: digest.whole(tensor) for name, tensor in alive.named(done.outputs).items()},
            "tallies": [t.to_record() for t in tallies],
            "codes": codes,
        }

    def _judge(self, done: _Done, rows: range, flow: Dataflow | None = None) -> list[Tally]:
        """Judge some rows in blocks; merged tallies, one per stage."""
        merged: dict[Stage, Tally] = {}
        for block in _blocks(rows, done.problem.hidden, self.rank.device):
            oracle = Oracle(flow or done.flow, self._operands(done, block))
            for tally in judge_rows(oracle, _rows(done.outputs, block), block.start):
                merged.setdefault(tally.stage, Tally(tally.stage)).add(tally)
        return list(merged.values())

    def _operands(self, done: _Done, rows: range) -> Operands:
        """What the oracle reads for some rows; this rank's own share of it was made before the call."""
        if done.judged is not None and _within(rows, done.judged[0]):
            return _part(done.judged[1], slice(rows.start - done.judged[0].start, rows.stop - done.judged[0].start))
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

    def _explains(self, done: _Done, flow: Dataflow) -> bool:
        tallies = self._judge(done, range(done.problem.tokens), flow)
        return not any(t.outside for t in tallies)

    def _sample(self, done: _Done, share: range) -> dict[str, Any]:
        """Admissible codes over a sample of rows, and whether the family's property holds on it."""
        count = max(1, min(SAMPLED_ROWS, SAMPLED // done.problem.hidden))
        rows = range(share.start, min(share.stop, share.start + count))
        if not rows:
            return {"codes": 0, "elements": 0, "property": None}
        operands = self._operands(done, rows)
        codes, elements = 0, 0
        # One rank's sample is enough: the ranks take turns.
        if done.outputs.quant is not None and done.problem.seed % self.rank.world_size == self.rank.index:
            codes, elements = admissible_codes(Oracle(done.flow, operands), _rows(done.outputs, rows))
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
    def _check_repeat(self, backend: Backend, done: _Done) -> dict[str, Any]:
        """The same inputs again: bitwise the same outputs."""
        again = self._again(backend, done, done.problem)
        tally = Tally(Stage.AGAIN)
        for name, tensor in alive.named(again).items():
            compare_bits(tally, name, alive.named(done.outputs)[name], tensor)
        return {"problem": done.problem.to_json(), "check": "repeat", "tallies": [tally.to_record()]}

    def _check_strategies(self, backend: Backend, done: _Done) -> dict[str, Any]:
        """One-shot and two-shot: the same residual_out where the order is named, but for the sign of zero."""
        tally = Tally(Stage.AGAIN)
        for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
            problem = replace(done.problem, strategy=strategy)
            if strategy is done.problem.strategy or not backend.supports(problem).ok:
                continue
            if backend.dataflow(problem).order != "rank" or done.flow.order != "rank":
                continue
            other = self._again(backend, done, problem)
            compare_bits(tally, "residual", done.outputs.residual + 0.0, other.residual + 0.0)
        return {"problem": done.problem.to_json(), "check": "strategies", "tallies": [tally.to_record()]}

    def _check_unfused(self, backend: Backend, done: _Done) -> dict[str, Any]:
        """The unfused reference on the same inputs: judged by its own dataflow, and the differences of its codes."""
        reference = self._backend("unfused")
        limits = _limits(done.problem, None)
        outputs = self._again(reference, done, done.problem, limits)
        theirs = _Done(done.problem, reference.dataflow(done.problem), done.inputs, outputs, done.judged)
        share = shard(done.problem.tokens, self.rank.index, self.rank.world_size)
        tallies = self._judge(theirs, share)
        merged = Tally(Stage.UNFUSED)
        for tally in tallies:
            merged.add(tally)
        within_one = not done.flow.round_squares  # such squares may overflow in fp16
        histogram = code_differences(done.outputs, outputs, share, merged, within_one=within_one)
        record = merged.to_record()
        return {
            "problem": done.problem.to_json(),
            "check": "unfused",
            "tallies": [record],
            "histogram": histogram,
        }

    def _again(self, backend: Backend, done: _Done, problem: Problem, limits: Limits | None = None) -> RankOutputs:
        arena = alive.Arena(self.rank.device)
        inputs = arena.guard(done.inputs)
        return self._run(self._kernel(backend, limits or _limits(problem, None)), inputs, problem, arena)

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


def shard(tokens: int, index: int, world_size: int) -> range:
    """The rows that a rank judges: a contiguous share, the remainder to the first ranks."""
    each, more = divmod(tokens, world_size)
    start = index * each + min(index, more)
    return range(start, start + each + (index < more))


def _within(rows: range, others: range) -> bool:
    return others.start <= rows.start and rows.stop <= others.stop


def _part(operands: Operands, rows: slice) -> Operands:
    return replace(
        operands, partials=[partial[rows] for partial in operands.partials], residual=operands.residual[rows]
    )


def _rows(outputs: RankOutputs, rows: range) -> RankOutputs:
    part = slice(rows.start, rows.stop)
    return RankOutputs(**{name: tensor[part] for name, tensor in alive.named(outputs).items()})


def _blocks(rows: range, hidden: int, device: torch.device) -> list[range]:
    step = max(1, (BLOCK if device.type == "cpu" else 2**26) // hidden)
    return [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def _limits(problem: Problem, given: list[int] | None) -> Limits:
    calls = [step for _, step in problem.calls()]
    tokens, hidden = max(c.tokens for c in calls), max(c.hidden for c in calls)
    if given is not None:
        tokens, hidden = max(tokens, given[0]), max(hidden, given[1])
    return Limits(tokens, hidden, problem.format.dtype)


def _pause(milliseconds: int) -> None:
    if milliseconds:
        time.sleep(milliseconds / 1000)
