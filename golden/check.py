"""Check a recording: on its own chip bit for bit; elsewhere by the oracle and by the emulator with its dataflow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fusecheck.case import digest, returned
from fusecheck.case.run import Caller, request
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.errors import Inconclusive
from fusecheck.golden.record import Entry, Golden, as_quiet, finite, unsigned_zero
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankOutputs
from fusecheck.oracle import Oracle
from fusecheck.verdict import judge_rows

CPU = torch.device("cpu")


@dataclass
class Checked:
    """What a check showed.

    Attributes:
        entries: Problems checked.
        outputs: outputs compared bit for bit.
        elements: elements of recorded tensors that the oracle judged.
        off_nominal: of those, how many are not the nominal but inside.
        undecided: digests of norm or codes that differ from the emulator's, where no tensor was kept.
        wrong: one line per disagreement.
    """

    entries: int = 0
    outputs: int = 0
    elements: int = 0
    off_nominal: int = 0
    undecided: int = 0
    wrong: list[str] = field(default_factory=list)


def check_same(golden: Golden, pool: Caller) -> Checked:
    """Run the recorded Problems on the recorded backend again: every digest is the same.

    Raises:
        Inconclusive: a rank failed.
    """
    checked = Checked()
    for entry in golden.entries:
        replies = pool.call("run", request(entry.problem, golden.backend), timeout=60.0)
        failure = next((reply.failure for reply in replies if reply.failure is not None), None)
        if failure is not None:
            raise Inconclusive(f"{entry.problem.to_json()}: {failure.error}: {failure.message}")
        now = replies[0].value["calls"][0]["digests"]
        checked.entries += 1
        checked.outputs += len(entry.digests)
        different = [name for name in entry.digests if now.get(name) != entry.digests[name]]
        if different:
            checked.wrong.append(f"{', '.join(different)} differ from the record: {entry.problem.to_json()}")
    return checked


def check_anywhere(golden: Golden) -> Checked:
    """Judge the recorded tensors by the oracle, and compare residual_out with the model of the recorded dataflow."""
    checked, flow = Checked(), dataflow(golden.dataflow)
    for entry in golden.entries:
        checked.entries += 1
        (_judge_whole if entry.outputs else _compare_digests)(entry, flow, checked)
    return checked


def _judge_whole(entry: Entry, flow: Dataflow, checked: Checked) -> None:
    problem = entry.problem
    line = problem.to_json()
    native = problem.format.dtype
    recorded = RankOutputs(
        residual=entry.outputs["residual"].view(native),
        norm=entry.outputs["norm"].view(native) if "norm" in entry.outputs else None,
        quant=entry.outputs["quant"].view(torch.float8_e4m3fn) if "quant" in entry.outputs else None,
    )
    for name, tensor in returned.named(recorded).items():
        checked.outputs += 1
        if digest.whole(tensor) != entry.digests[name]:
            checked.wrong.append(f"{name}: the tensor is not the one whose digest was recorded: {line}")
    oracle = Oracle(flow, Inputs(problem, CPU).operands(range(problem.tokens)))
    for tally in judge_rows(oracle, recorded, 0):
        checked.elements += tally.elements
        checked.off_nominal += tally.off_nominal
        if tally.outside:
            checked.wrong.append(f"{tally.stage.value}: {tally.outside} elements outside under {flow.name}: {line}")
    ours = as_quiet(unsigned_zero(oracle.residual().view(torch.int16)), problem)
    theirs = as_quiet(unsigned_zero(entry.outputs["residual"]), problem)
    if not torch.equal(ours, theirs):
        checked.wrong.append(f"residual: {int((ours != theirs).sum())} elements are not the nominal: {line}")
    if recorded.norm is not None and recorded.quant is not None and finite(problem) and flow.exact_reciprocal:
        codes = oracle.codes(recorded.residual, recorded.norm)
        if not torch.equal(codes & 0x7F, entry.outputs["quant"] & 0x7F):
            checked.wrong.append(f"quant: the codes are not those of the recorded norm: {line}")


def _compare_digests(entry: Entry, flow: Dataflow, checked: Checked) -> None:
    problem = entry.problem
    oracle = Oracle(flow, Inputs(problem, CPU).operands(range(problem.tokens)))
    residual = oracle.residual()
    norm = oracle.norm(residual)
    codes = oracle.codes(residual, norm if problem.op.returns_norm else None)
    ours = {"residual": residual, "norm": norm, "quant": codes}
    same = {name: digest.whole(ours[name]) == entry.digests[name] for name in entry.digests}
    checked.outputs += sum(same.values())
    if not same["residual"]:
        checked.wrong.append(f"residual: its digest is not the nominal's under {flow.name}: {problem.to_json()}")
    if flow.exact_reciprocal and same.get("norm") and not same.get("quant", True):
        checked.wrong.append(f"quant: its digest is not that of the recorded norm's codes: {problem.to_json()}")
    checked.undecided += sum(not equal for name, equal in same.items() if name != "residual")


def wrong_dataflow(golden: Golden, name: str) -> Golden:
    """The same recording, said to follow another dataflow: what a check must reject."""
    return replace(golden, dataflow=name)
