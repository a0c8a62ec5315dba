"""Runs the one-pass judge in Triton's interpreter on random Problems and planted errors, against the eager judge.

A program of its own, since the interpreter is chosen before Triton is imported. Prints how many cases it compared.
"""

from __future__ import annotations

import os
import random
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch

from fusecheck.case import alive, digest, returned
from fusecheck.case.calls import Step, rows_of, shard
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import STATIC_OPS, RankOutputs
from fusecheck.onepass import judge, kernels, outputs
from fusecheck.onepass.arena import FlatArena
from fusecheck.onepass.operands import Made, make
from fusecheck.oracle import Operands, Oracle
from fusecheck.problem import Call, Problem
from fusecheck.verdict import Stage, Tally, judge_rows, raw

CPU = torch.device("cpu")
PLANTED = ("nothing", "nothing", "residual", "norm", "quant", "input", "canary", "unwritten")
_FAMILIES = ("gaussian", "gaussian", "negative-zero", "special", "subnormal", "overflow", "cancelling", "exact")


def _problem(draw: random.Random) -> Problem:
    return Problem(
        op=draw.choice(list(STATIC_OPS)),
        tokens=draw.choice([2, 3, 4]),
        hidden=draw.choice([64, 96, 520]),
        world_size=draw.choice([2, 4]),
        family=draw.choice(_FAMILIES),
        dtype=draw.choice(["bf16", "bf16", "fp16"]),
        seed=draw.randrange(2**60),
        scale=draw.choice([0.0125, 0.5, 1.0, 3e-3]),
        weight_bias=draw.choice([0.0, 1.0]),
        gamma=draw.choice(["spread", "signed"]),
    )


def _step(problem: Problem, flow: Dataflow, index: int, share: range) -> tuple[Step, Made]:
    """A call that returned the nominal outputs, in poisoned memory between canaries."""
    made, arena = make(problem, index, share, CPU), FlatArena(problem, CPU)
    step = Step(Call(problem.tokens), problem, flow, made.inputs, arena.guard(made.inputs), arena)
    oracle = Oracle(flow, Inputs(problem, CPU).operands(range(problem.tokens)))
    residual = oracle.residual()
    norm = oracle.norm(residual) if problem.op.returns_norm else None
    codes = oracle.codes(residual, norm).view(torch.float8_e4m3fn) if problem.op.returns_quant else None
    values = {"residual": residual, "norm": norm, "quant": codes}
    outputs = {name: arena.empty(tuple(x.shape), x.dtype, name).copy_(x) for name, x in values.items() if x is not None}
    step.outputs = RankOutputs(**outputs)
    return step, made


def _plant(kind: str, step: Step, row: int) -> bool:
    """Spoil one thing; whether there was such a thing."""
    assert step.outputs is not None
    outputs = returned.named(step.outputs)
    if kind in outputs:
        raw(outputs[kind])[row, 5] ^= 4
    elif kind == "input":
        raw(step.guarded.residual)[-1, 2] ^= 1
    elif kind == "canary":
        assert isinstance(step.arena, FlatArena)
        step.arena.canary()[0] = 0
    elif kind == "unwritten":
        raw(step.outputs.residual)[-1, 3] = alive.POISONS[0][2]
    else:
        return False
    return True


def _compare(draw: random.Random) -> None:
    flow = DATAFLOWS[draw.choice(["trtllm", "trtllm-fp32", "flashinfer", "flashinfer-fp32", "vllm-c", "unfused"])]
    problem = _problem(draw)
    index = draw.randrange(2)
    share = shard(problem.tokens, index, 2)
    step, made = _step(problem, flow, index, share)
    planted = _plant(draw.choice(PLANTED), step, share.start)
    counts = torch.zeros(kernels.SLOTS, dtype=torch.int64)
    judge.launch(step, made, share, counts)
    seen = [int(count) for count in counts]
    assert step.outputs is not None
    assert judge.digests(seen, problem) == {n: digest.whole(t) for n, t in returned.named(step.outputs).items()}
    operands = Operands(
        list(made.partials), made.inputs.residual[share.start : share.stop], made.inputs.gamma,
        float(made.inputs.scale), problem.eps, problem.weight_bias, op=problem.op,
    )  # fmt: skip
    eager = judge_rows(Oracle(flow, operands), rows_of(step.outputs, share), share.start)
    wrong = step.wrong() is not None or any(tally.outside for tally in eager)
    doubt = judge.in_doubt(seen)
    assert doubt or not wrong, f"passed in one pass, failed eagerly: {problem}"
    assert doubt or not planted or not wrong
    if not doubt:
        ours = [
            (t.stage, t.elements, t.off_nominal) for t in judge.tallies(seen, problem.op, len(share) * problem.hidden)
        ]
        assert ours == [(t.stage, t.elements, t.off_nominal) for t in eager]
    if not planted and problem.family in ("gaussian", "cancelling", "exact"):
        assert not doubt, f"in doubt about nominal outputs: {problem}"


def _brief(tallies: list[Tally]) -> list[tuple[Stage, int, int]]:
    return [(t.stage, t.elements, t.off_nominal) for t in tallies]


if __name__ == "__main__":
    source = random.Random(4)
    there = patch.multiple(outputs, available=lambda _: True, LEAST_ELEMENTS=0, compiled=lambda *_: True)
    with there:
        for _ in range(40):
            _compare(source)
    print("compared 40")
