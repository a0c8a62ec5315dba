"""Judging calls that returned: this rank's share of the rows, or all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import digest, returned
from fusecheck.case.calls import Done, Step, blocks, part_of, rows_of, shard, within
from fusecheck.case.compare import comparable
from fusecheck.dataflow import Dataflow, ExpertFlow
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.properties import Sample
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Rank, RankInputs, RankOutputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.problem import Problem
from fusecheck.stages.experts import WRONG
from fusecheck.verdict import Stage, Tally, admissible_codes, judge_rows, off_nominal_share

SAMPLED, SAMPLED_ROWS = 2**12, 20
"""Elements, and rows, of a call on which the property of its family is looked for."""
COUNTED = 2**10
"""Elements of a call whose full enclosure is computed, for the mean number of admissible codes; at least a row."""


def promised(done: Done) -> dict[str, Tensor]:
    """The outputs of a call by name, as far as their bits are equal on all ranks."""
    outputs = returned.named(done.outputs)
    return outputs if FAMILIES[done.problem.family].finite else comparable(outputs, done.flow)


@dataclass(frozen=True)
class Made:
    """The operands that were made last, and of what; another kernel may be called on the same."""

    inputs: RankInputs
    problem: Problem
    experts: ExpertFlow
    judged: tuple[range, Operands]

    def of(self, done: Done) -> bool:
        """Whether they are those of a call."""
        return self.inputs is done.inputs and (self.problem, self.experts) == (done.problem, done.flow.experts)


class Judge:
    """Judges what one rank's kernels returned.

    Args:
        rank: this process's place in the group.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._last: Made | None = None

    def share(self, tokens: int) -> range:
        """The rows that this rank judges."""
        return shard(tokens, self._rank.index, self._rank.world_size)

    def record(self, step: Step, done: Done) -> dict[str, Any]:
        """Judge this rank's share of a call that stage 0 found whole."""
        share = self.share(done.problem.tokens)
        began = time.perf_counter()
        tallies = self.tallies(done, share)
        if done.layout is not None:
            tallies.append(done.layout)
        codes = self.sample(done, share)
        return {
            "problem": step.line,
            "kernel_seconds": step.seconds,
            "dataflow": done.flow.name,
            "off_nominal_share": off_nominal_share(done.flow, done.problem.format, done.problem.hidden),
            "judge_seconds": time.perf_counter() - began,
            "digests": digest.whole_of(promised(done)),
            "tallies": [t.to_record() for t in tallies],
            "codes": codes,
        }

    def tallies(self, done: Done, rows: range, flow: Dataflow | None = None) -> list[Tally]:
        """Judge some rows in blocks, by another dataflow if one is given; merged tallies, one per stage."""
        merged: dict[Stage, Tally] = {}
        for block in blocks(rows, done.problem.hidden, self._rank.device):
            oracle = Oracle(flow or done.flow, self._operands(done, block))
            outputs = rows_of(done.outputs, block)
            for tally in judge_rows(oracle, outputs, block.start):
                if tally.stage is Stage.RESIDUAL and tally.outside and done.problem.op.has_experts:
                    tally = self._of_experts(done, block, outputs, tally)
                merged.setdefault(tally.stage, Tally(tally.stage)).add(tally)
        return list(merged.values())

    def _of_experts(self, done: Done, rows: range, outputs: RankOutputs, tally: Tally) -> Tally:
        """A wrong stream is the experts' where another way to sum them explains every element of it."""
        source, operands = Inputs(done.problem, self._rank.device), self._operands(done, rows)
        for what, changed in WRONG.items():
            flow = replace(done.flow.experts, **changed)  # type: ignore[arg-type]
            oracle = Oracle(done.flow, replace(operands, partials=source.partials(rows, flow)))
            if flow != done.flow.experts and not judge_rows(oracle, outputs, rows.start)[0].outside:
                shown = [replace(each, context=f"as if {what}  {each.context}") for each in tally.shown]
                return replace(tally, stage=Stage.EXPERTS, shown=shown)
        return tally

    def explains(self, done: Done, flow: Dataflow) -> bool:
        """Whether every row is inside under this dataflow."""
        return not any(t.outside for t in self.tallies(done, range(done.problem.tokens), flow))

    def sample(self, done: Done, share: range) -> dict[str, Any]:
        """Admissible codes over a sample of rows, and whether the family's property holds on one."""
        hidden = done.problem.hidden
        rows = share[: max(1, min(SAMPLED_ROWS, SAMPLED // hidden))]
        if not rows:
            return {"codes": 0, "elements": 0, "property": None}
        operands = _on_host(self._operands(done, rows))
        codes, elements = 0, 0
        # One rank's sample is enough: the ranks take turns.
        if done.outputs.quant is not None and done.problem.seed % self._rank.world_size == self._rank.index:
            counted = rows[: max(1, COUNTED // hidden)]
            oracle = Oracle(done.flow, part_of(operands, slice(len(counted))))
            seen = returned.mapped(rows_of(done.outputs, counted), Tensor.cpu)
            codes, elements = admissible_codes(oracle, seen)
        sample = Sample(
            torch.stack(operands.partials).to(torch.float64),
            operands.residual.to(torch.float64),
            operands.gamma.to(torch.float64),
            operands.eps,
            operands.scale,
            done.problem.format,
            done.problem.gamma,
        )
        held = None if done.problem.op.has_experts else FAMILIES[done.problem.family].holds(sample)  # of single addends
        return {"codes": codes, "elements": elements, "property": held}

    def _operands(self, done: Done, rows: range) -> Operands:
        """What the oracle reads for some rows; this rank's own share of it was made before the call."""
        last = self._last
        if done.judged is None and last is not None and last.of(done):
            done.judged = last.judged
        if done.judged is not None and within(rows, done.judged[0]):
            return part_of(done.judged[1], slice(rows.start - done.judged[0].start, rows.stop - done.judged[0].start))
        problem, made, part = done.problem, done.inputs, slice(rows.start, rows.stop)
        source = Inputs(problem, self._rank.device)
        operands = Operands(
            partials=[
                made.partial[part]
                if rank == self._rank.index and made.experts is None
                else source.partial(rank, rows, done.flow.experts)
                for rank in source.addends(self._rank.index)
            ],
            residual=made.residual[part],
            gamma=made.gamma,
            scale=float(made.scale),
            eps=made.eps,
            weight_bias=made.weight_bias,
            op=problem.op,
        )
        done.judged = rows, operands
        self._last = Made(made, problem, done.flow.experts, done.judged)
        return operands


def _on_host(operands: Operands) -> Operands:
    """The same in host memory, where a hundred operations on few elements take less time than their launches."""
    return replace(
        operands,
        partials=[partial.cpu() for partial in operands.partials],
        residual=operands.residual.cpu(),
        gamma=operands.gamma.cpu(),
    )
