"""Published faults in a test of FlashInfer's manner: with its own criterion, and with `assert_conforms` in its place.

    python -m fusecheck.property_tests.suite.testing_faults --json golden/faults_testing.json

Each fault of the catalogue's arithmetic and quantisers is computed by the emulated kernel on every rank, on the data
of FlashInfer's test (normal numbers) and on the calls of the case by which `fusecheck faults` caught it, one by one.
What a call shows beside its outputs (canaries, other calls, hangs) is not seen from within a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusecheck import DATAFLOWS, Problem, RankOutputs
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.dataflow import Dataflow
from fusecheck.faults.catalogue import Fault, catalogue, resolve
from fusecheck.faults.criteria import CRITERIA
from fusecheck.faults.peer_tests import PROFILES, operands
from fusecheck.faults.worker import format_verdicts, verdicts
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.operations import GIVEN_SCALE, Collective, compose
from fusecheck.oracle import Oracle
from fusecheck.property_tests.suite.family import CPU, Given, emulated
from fusecheck.quantflow import without_group
from fusecheck.report import Verdict, write_result
from fusecheck.testing import conforms

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPES = ((2, 16, 1024), (4, 4, 8192))
"""Ranks, tokens, hidden: those of FlashInfer's test that a CPU runs quickly."""
MOST_CALLS = 24
"""Of a recorded case's schedule, from the end."""
ORIGINAL = {
    "": "FI fusion",
    "dynamic-fp8": "FI 10/11",
    "group-fp8": "vLLM group",
    "group-fp8-packed": "FI 8/9",
    "mxfp8": "torch default quant",
    "nvfp4": "FI FP4",
    "mxfp4": "FI FP4",
}
"""The criterion that FlashInfer's test of the format has; vLLM's or PyTorch's default where it has none."""


@dataclass(frozen=True)
class Call:
    """One call on given inputs."""

    problem: Problem
    source: Inputs
    flow: Dataflow
    criterion: str

    def outputs(self, patch: type[Any] | None = None) -> list[RankOutputs]:
        """Of every rank, by the right kernel or one with a fault."""
        changed: dict[str, Any] = {}
        if patch is not None:
            changed = {"arithmetic" if issubclass(patch, Arithmetic) else "quantising": patch}
        ranks = range(self.problem.world_size)
        return [emulated(self.problem, self.flow, source=self.source, rank=rank, **changed) for rank in ranks]

    def original(self, outputs: list[RankOutputs]) -> bool:
        """Whether the original criterion passes on all ranks."""
        made, asked = (
            self.source.operands(range(self.problem.tokens)),
            [c for c in CRITERIA if c.name == self.criterion],
        )
        every = (
            format_verdicts(self.flow, self.problem, made, each)
            if self.problem.op.returns_scale
            else verdicts(self.flow, made, each, asked)
            for each in outputs
        )
        return all(each["passed"][self.criterion] for each in every)

    def conforming(self, outputs: list[RankOutputs], flow: Dataflow | None) -> bool:
        """Whether `conforms` passes on all ranks, held to a dataflow or with one looked for."""
        problem, made = self.problem, self.source.operands(range(self.problem.tokens))
        return all(
            conforms(
                each.residual,
                each.norm,
                each.quant,
                each.scale,
                partials=made.partials,
                residual_in=made.residual if problem.op.residual else None,
                gamma=made.gamma,
                scale=made.scale,
                eps=made.eps,
                weight_bias=made.weight_bias,
                quantiser=problem.op.quantiser if problem.op.returns_quant else GIVEN_SCALE,
                layout=problem.layout or None,
                dataflow=flow,
            )
            for each in outputs
        )


def usual_calls(name: str, flow: Dataflow) -> Iterator[Call]:
    """Calls on the data of FlashInfer's test, all outputs returned; without a name the scale is given."""
    kind = without_group(name)
    profile = PROFILES["flashinfer-group" if "group" in name else "flashinfer"]
    for ranks, tokens, hidden in SHAPES:
        made = operands(profile, ranks, tokens, hidden, seed=42)
        op = compose(Collective.ALL_REDUCE, residual=True, quantiser=name or GIVEN_SCALE, norm_out=True)
        oracle = Oracle(flow, made)
        largest = float(oracle.norm(oracle.residual()).abs().amax())
        given = float(torch.tensor(448 * 6 / largest)) if name == "nvfp4" else made.scale
        problem = Problem(op=op, world_size=ranks, tokens=tokens, hidden=hidden, eps=made.eps, scale=given)
        yield Call(problem, Given(problem, made.partials, made.residual, made.gamma), flow, ORIGINAL[kind])


def caught_calls(fault: Fault, line: str) -> Iterator[Call]:
    """The calls of the case by which `fusecheck faults` caught a fault, the last one first."""
    criterion = next(usual_calls(fault.quantiser, fault.flow)).criterion
    for _, problem in reversed(Problem.from_json(line).calls()[-MOST_CALLS:]):
        yield Call(problem, Inputs(problem, CPU), fault.flow, criterion)


def faults() -> list[Fault]:
    """Those of the arithmetic and of quantisers that are in what one call computes."""
    of = [each for each in catalogue().faults if each.group in ("arithmetic", "quantiser")]
    return [each for each in of if issubclass(resolve(each.patch), (Arithmetic, Quantising))]


def cases() -> dict[str, str]:
    """The recorded case that caught each fault, as JSON."""
    records = [
        json.loads((GOLDEN / name).read_text(encoding="utf-8")) for name in ("faults.json", "faults_quantisers.json")
    ]
    return {row["id"]: row["case"] for record in records for row in record["summary"]["rows"] if row["case"]}


def row(fault: Fault, case: str) -> dict[str, Any]:
    """Who notices a fault, on the usual data and on the recorded case; who rejects the right kernel is not credited."""
    found: dict[str, Any] = {"id": fault.id, "title": fault.title, "original": ORIGINAL[""]}
    data = {"usual": usual_calls(fault.quantiser, fault.flow), "ours": caught_calls(fault, case)}
    for where, calls in data.items():
        patch = type("Fresh", (resolve(fault.patch),), {})  # some faults show once in the life of their class
        found |= {f"original_{where}": False, f"conforms_{where}": False, f"alarms_{where}": 0}
        for call in calls:
            right, wrong = call.outputs(), call.outputs(patch)
            found["original"] = call.criterion
            found[f"original_{where}"] |= call.original(right) and not call.original(wrong)
            found[f"conforms_{where}"] |= not call.conforming(wrong, call.flow)
            found[f"alarms_{where}"] += not call.conforming(right, call.flow)
            if found[f"original_{where}"] and found[f"conforms_{where}"]:
                break
    return found


def legal() -> tuple[int, int]:
    """Right kernels of every known dataflow and its quantisers, held to it or not: calls judged, and calls rejected."""
    judged = rejected = 0
    for flow in DATAFLOWS.values():
        for name in ("", *dict(flow.quants)):
            for call in usual_calls(name, flow):
                outputs = call.outputs()
                verdict = [call.conforming(outputs, declared) for declared in (flow, None)]
                judged, rejected = judged + 2, rejected + verdict.count(False)
    return judged, rejected


def main() -> int:
    """Print the table; 0 unless a right kernel was rejected."""
    parser = argparse.ArgumentParser(description="assert_conforms in place of a closeness test: what each catches.")
    parser.add_argument("--json", type=Path, help="write the record there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorded = cases()
    rows = [row(fault, recorded[fault.id]) for fault in faults()]
    judged, rejected = legal()
    marks = ("original_usual", "conforms_usual", "original_ours", "conforms_ours")
    print(f"{'fault':28}{'original criterion':22}" + "".join(f"{mark:>16}" for mark in marks))
    for each in rows:
        print(f"{each['id']:28}{each['original']:22}" + "".join(f"{'x' if each[mark] else '.':>16}" for mark in marks))
    alarms = rejected + sum(each["alarms_usual"] + each["alarms_ours"] for each in rows)
    totals = {mark: sum(each[mark] for each in rows) for mark in marks}
    print(f"caught of {len(rows)}: {totals}; right kernels rejected: {alarms}, of {judged} calls of legal dataflows")
    summary = {"faults": len(rows), "legal_calls": judged, "false_alarms": alarms, "caught": totals, "rows": rows}
    verdict = Verdict.of(failed=alarms > 0, complete=bool(rows))
    if arguments.json:
        with tempfile.TemporaryDirectory() as folder:
            write_result(Path(folder), "testing-faults", verdict, summary, [], arguments.json)
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main())
