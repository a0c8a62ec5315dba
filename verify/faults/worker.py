"""The worker of `fusecheck faults`: a case worker that also asks the field's criteria about the same kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecheck import backends
from fusecheck.case import digest
from fusecheck.case.calls import pause
from fusecheck.case.returned import decoded, layout_of
from fusecheck.case.worker import CaseWorker
from fusecheck.dataflow import Dataflow
from fusecheck.faults.catalogue import resolve
from fusecheck.faults.comparison import Evidence, Floats, Outputs
from fusecheck.faults.criteria import CRITERIA, Criterion
from fusecheck.faults.format_criteria import FORMAT_CRITERIA, FormatEvidence, Quantised
from fusecheck.faults.peer_tests import PROFILES, inputs_of, operands
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Backend, FusionOp, Limits, RankInputs, RankOutputs, Strategy
from fusecheck.oracle import Operands, Oracle
from fusecheck.problem import Call, Problem
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.layouts import UNTOUCHED
from fusecheck.stages.judgement import raw

BOTH = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8


class FaultWorker(CaseWorker):
    """Judges as `CaseWorker` does; `criteria` and `own_test` give the field's verdicts instead."""

    def weaken(self, patch: str) -> None:
        """Weaken the judgement in this process, for as long as it lives.

        Args:
            patch: the patching function as `package.module:attribute`.
        """
        resolve(patch)()

    def criteria(self, line: str, backend: str) -> list[dict[str, Any]]:
        """Every criterion's verdict on each call of a Problem, on this rank.

        Args:
            line: the Problem as JSON.
            backend: the kernel.

        Returns:
            For each call, `passed` by criterion name, and the digest of residual_out.
        """
        steps, kernel_of = Problem.from_json(line).calls(), backends.backend(backend)
        made = [Inputs(step, self.rank.device) for _, step in steps]
        outputs = self._run_all(kernel_of, steps, [each.of_rank(self.rank.index) for each in made])
        return [
            format_verdicts(kernel_of.dataflow(step), step, each.operands(range(step.tokens)), got)
            if step.op.returns_scale
            else verdicts(kernel_of.dataflow(step), each.operands(range(step.tokens)), got, CRITERIA)
            for (_, step), each, got in zip(steps, made, outputs, strict=True)
        ]

    def _run_all(
        self, backend: Backend, steps: list[tuple[Call, Problem]], given: list[RankInputs]
    ) -> list[RankOutputs]:
        """The outputs of all calls, which follow each other as a case's do, with nothing in between."""
        problems = [problem for _, problem in steps]
        largest = max(p.tokens for p in problems), max(p.hidden for p in problems)
        limits = Limits(*largest, problems[0].format.dtype)
        kernel, outputs = backend.open(self.rank, limits), []
        for (call, problem), inputs in zip(steps, given, strict=True):
            if call.reopen:
                kernel.close()
                kernel = backend.open(self.rank, limits)
            delay = call.delay_ms if call.delayed == self.rank.index else 0
            pause(call.idle_ms + (0 if call.late else delay))
            outputs.append(kernel.run(inputs, op=problem.op, strategy=problem.strategy))
            if call.overwrite:
                inputs.partial.fill_(torch.nan)
            pause(delay if call.late else 0)
        kernel.close()
        return outputs

    def own_test(self, profile: str, shape: tuple[int, int, int], seed: int, backend: str) -> list[dict[str, Any]]:
        """The verdicts on the data of a project's own test of the criteria that it is the test of; as `criteria`."""
        asked = [criterion for criterion in CRITERIA if criterion.profile == profile]
        kernel_of, data = backends.backend(backend), PROFILES[profile]
        world_size, tokens, hidden = shape
        made = operands(data, world_size, tokens, hidden, seed)
        tokens, hidden = made.residual.shape
        kernel = kernel_of.open(self.rank, Limits(tokens, hidden, made.residual.dtype))
        op = BOTH if data.returns_quant else FusionOp.RESIDUAL_RMS_NORM
        replies = []
        for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
            for _ in range(1 + data.warmups):
                outputs = kernel.run(inputs_of(made, self.rank.index), op=op, strategy=strategy)
            problem = Problem(dtype=data.dtype, world_size=world_size, tokens=tokens, hidden=hidden)
            replies.append(verdicts(kernel_of.dataflow(problem), made, outputs, asked))
        kernel.close()
        return replies


def verdicts(
    flow: Dataflow, made: Operands, outputs: RankOutputs, asked: Sequence[Criterion[Evidence]]
) -> dict[str, Any]:
    """What each criterion says of one rank's outputs, `passed` by its name, and the digest of residual_out."""
    oracle = Oracle(flow, made)
    residual = oracle.residual()
    norm = oracle.norm(residual)
    codes = oracle.codes(residual, norm if flow.round_norm else None)
    own_norm = oracle.norm(outputs.residual)
    own_codes = oracle.codes(outputs.residual, outputs.norm) if outputs.quant is not None else None
    evidence = Evidence(
        got=_outputs(outputs),
        expected=Outputs(_wide(residual), _wide(norm), codes.numpy()),
        scale=made.scale,
        own_norm=_wide(own_norm),
        own_codes=None if own_codes is None else own_codes.numpy(),
        bits=8 if residual.dtype is torch.bfloat16 else 11,
    )
    passed = {criterion.name: bool(criterion.rule(evidence)) for criterion in asked}
    return {"passed": passed, "residual": digest.whole(outputs.residual.contiguous())}


def format_verdicts(flow: Dataflow, problem: Problem, made: Operands, outputs: RankOutputs) -> dict[str, Any]:
    """The same by the criteria for a quantiser that makes its scales."""
    assert outputs.quant is not None
    assert outputs.scale is not None
    oracle = Oracle(flow, made)
    residual = oracle.residual()
    norm = oracle.norm(residual)
    own_norm = norm if outputs.norm is None else outputs.norm
    streams = [(_wide(outputs.residual), _wide(residual))]
    streams += [] if outputs.norm is None else [(_wide(outputs.norm), _wide(norm))]
    shown = decoded(outputs, problem)
    assert shown.quant is not None
    assert shown.scale is not None
    evidence = FormatEvidence(
        streams=tuple(streams),
        own_norm=_wide(own_norm),
        got=_quantised(problem, flow, shown.quant, shown.scale, outputs.scale),
        expected=_nominal(problem, flow, oracle, norm),
        own=_nominal(problem, flow, oracle, own_norm),
        bits=8 if residual.dtype is torch.bfloat16 else 11,
        four_bits=quantiser(problem.op.quantiser).element.per_byte > 1,
    )
    with np.errstate(invalid="ignore", over="ignore"):
        passed = {c.name: bool(c.rule(evidence)) for c in FORMAT_CRITERIA if c.takes(problem.op.quantiser)}
    return {"passed": passed, "residual": digest.whole(outputs.residual.contiguous())}


def _nominal(problem: Problem, flow: Dataflow, oracle: Oracle, norm: Tensor) -> Quantised:
    """Codes and scales as they should be, of a norm."""
    scales = oracle.scales(None, norm)
    stored = scales.nominal()
    storage = layout_of(problem, flow).allocate(0)
    layout_of(problem, flow).write(stored, storage)
    codes = scales.quantiser.codes(scales.read(), stored, scales.rules, problem.scale)
    return _quantised(problem, flow, codes, stored, storage)


def _quantised(problem: Problem, flow: Dataflow, codes: Tensor, scales: Tensor, storage: Tensor) -> Quantised:
    of, rules, layout = quantiser(problem.op.quantiser), flow.quant(problem.op.quantiser), layout_of(problem, flow)
    numbers = np.asarray(of.element.values, dtype=np.float64)[codes.numpy()]
    values = _wide(of.values(scales, rules))
    if rules.given in ("multiplies", "divides"):
        values = values / problem.scale if rules.given == "multiplies" else values * problem.scale
    slots, kept = raw(layout.slots(storage)), layout.classes() != UNTOUCHED
    return Quantised(codes.numpy(), numbers, values, slots[kept].contiguous().view(torch.uint8).numpy())


def _wide(x: Tensor) -> Floats:
    return np.asarray(x.double().numpy())


def _outputs(outputs: RankOutputs) -> Outputs:
    norm = None if outputs.norm is None else _wide(outputs.norm)
    codes = None if outputs.quant is None else outputs.quant.contiguous().view(torch.uint8).numpy()
    return Outputs(_wide(outputs.residual), norm, codes)
