"""What judging costs, against the check that is usual today, on the same tensors on one core, for every format.

    python -m fusecheck.property_tests.suite.judging

The usual check computes a float32 reference in torch and compares each output by `torch.testing.assert_close`, codes
dequantised, with the tolerances of FlashInfer's tests. Fusecheck's gives every element a verdict: nominal first,
enclosures where an element differs. The outputs are those of the emulated kernel, approximate divisions included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Operation, Problem, RankOutputs
from fusecheck.case.calls import blocks
from fusecheck.case.returned import decoded
from fusecheck.dataflow import Dataflow
from fusecheck.formats.element import E4M3
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.operations import GIVEN_SCALE
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite.family import CPU, emulated
from fusecheck.quantflow import QUANT_FLOWS
from fusecheck.quantisers.known import QUANTISERS
from fusecheck.quantisers.scales import in_groups
from fusecheck.testing import conforms
from fusecheck.verdict import judge_rows

TOKENS, HIDDEN, WORLD_SIZE = 1024, 4096, 2
ROUNDS = 5
TOLERANCE = {GIVEN_SCALE: 0.01}
"""The relative one of the usual check, beside 0.8; where scales are the kernel's own it has to be 0.3."""


@dataclass(frozen=True)
class Sample:
    """One call that returned everything, of which both checks get the same tensors."""

    flow: Dataflow
    operands: Operands
    outputs: RankOutputs


def sample(name: str) -> Sample:
    """A call by a right kernel that quantises to this format."""
    flow = DATAFLOWS["trtllm" if name == GIVEN_SCALE else "flashinfer-fp32"]
    suffix = "FP8" if name == GIVEN_SCALE else name.upper().replace("-", "_")
    problem = Problem(
        op=Operation.named(f"RESIDUAL_RMS_NORM_OUT_QUANT_{suffix}"),
        tokens=TOKENS,
        hidden=HIDDEN,
        world_size=WORLD_SIZE,
        scale=0.0125 if name == GIVEN_SCALE else 640.0,
        seed=1,
    )
    return Sample(flow, Inputs(problem, CPU).operands(range(TOKENS)), decoded(emulated(problem, flow), problem))


def usual_check(of: Sample) -> None:
    """A float32 reference, and `assert_close` of residual, norm and the dequantised codes."""
    operands, outputs = of.operands, of.outputs
    assert outputs.residual is not None
    assert outputs.norm is not None
    total = torch.stack([partial.float() for partial in operands.partials]).sum(0)
    stream = total + operands.residual.float()
    norm = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + operands.eps) * operands.gamma.float()
    wanted = norm
    if operands.op.quantiser == GIVEN_SCALE:
        wanted = (norm / operands.scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * operands.scale
    pairs = ((outputs.residual.float(), stream), (outputs.norm.float(), norm), (dequantise(of), wanted))
    for got, reference in pairs:
        torch.testing.assert_close(got, reference, atol=0.8, rtol=TOLERANCE.get(operands.op.quantiser, 0.3))


def dequantise(of: Sample) -> Tensor:
    """Code times scale, float32, [rows, hidden]."""
    assert of.outputs.quant is not None
    name, scale = of.operands.op.quantiser, of.outputs.scale
    if scale is None:
        return of.outputs.quant.float() * of.operands.scale
    wide = QUANTISERS[name].values(scale, of.flow.quant(name)).float()
    wide = wide / of.operands.scale if name == "nvfp4" else wide
    codes = of.outputs.quant.view(torch.uint8)
    table = torch.tensor(QUANTISERS[name].element.values, dtype=torch.float32)
    values = codes.view(E4M3.dtype).float() if QUANTISERS[name].element is E4M3 else table[codes.int()]
    return (in_groups(values, wide.shape[-1]) * wide[..., None]).flatten(-2)


def full_check(of: Sample) -> int:
    """Fusecheck's judgement of the same outputs; the number of elements outside."""
    outside = 0
    for rows in blocks(range(TOKENS), HIDDEN, CPU):
        part = slice(rows.start, rows.stop)
        partials = [partial[part] for partial in of.operands.partials]
        these = replace(of.operands, partials=partials, residual=of.operands.residual[part])
        there = {field.name: getattr(of.outputs, field.name) for field in fields(of.outputs)}
        shown = RankOutputs(**{name: None if tensor is None else tensor[part] for name, tensor in there.items()})
        outside += sum(tally.outside for tally in judge_rows(Oracle(of.flow, these), shown, rows.start))
    return outside


def conforming(of: Sample, dataflow: str | None) -> bool:
    """The same by `fusecheck.testing`, held to a dataflow, or with one looked for among the known."""
    operands, outputs = of.operands, of.outputs
    found = conforms(
        outputs.residual,
        outputs.norm,
        outputs.quant,
        partials=operands.partials,
        residual_in=operands.residual,
        gamma=operands.gamma,
        scale=operands.scale,
        eps=operands.eps,
        dataflow=dataflow,
    )
    return bool(found)


def spoilt(of: Sample) -> Sample:
    """The same with one code or one scale one step off."""
    changed = of.outputs.quant if of.outputs.scale is None else of.outputs.scale
    assert changed is not None
    changed = changed.clone()
    bits = changed.view(torch.int32 if changed.dtype is torch.float32 else torch.uint8)
    row = int(torch.nonzero((bits[:, 0] & 0x7F) < 0x7E)[0])
    bits[row, 0] += 8 if changed.dtype is torch.float32 else 1
    name = "quant" if of.outputs.scale is None else "scale"
    return replace(of, outputs=replace(of.outputs, **{name: changed}))


def accepted(of: Sample) -> bool:
    """Whether the usual check passes."""
    try:
        usual_check(of)
    except AssertionError:
        return False
    return True


def seconds_of(act: Callable[[], object]) -> float:
    """Seconds of one call on one thread, in CPU time: on a busy machine the same as on an idle one."""
    began = time.process_time()
    act()
    return time.process_time() - began


def compared(of: Sample, ours: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Median seconds of the usual check and of ours, and the median of their ratio, in turns."""
    pairs = [(seconds_of(lambda: usual_check(of)), seconds_of(ours)) for _ in range(rounds + 1)][1:]
    usual, own = (statistics.median(column) for column in zip(*pairs, strict=True))
    return usual, own, statistics.median(each / other for each, other in pairs)


def main() -> None:
    """Print both times and their ratio, and which of the two checks sees what is one step off."""
    torch.set_num_threads(1)
    print(f"tokens {TOKENS}, hidden {HIDDEN}, tp {WORLD_SIZE}, all outputs, one core, CPU time, median of {ROUNDS}")
    for name in QUANT_FLOWS:
        of = sample(name)
        usual, own, ratio = compared(of, partial(full_check, of))
        wrong = spoilt(of)
        print(
            f"{name:28} usual {usual * 1e3:7.1f} ms  Fusecheck {own * 1e3:7.1f} ms  ratio {ratio:4.1f}  outside"
            f" {full_check(of)}, with one {'code' if name == GIVEN_SCALE else 'scale'} a step up {full_check(wrong)}"
            f" (usual check {'accepts' if accepted(wrong) else 'rejects'} it)"
        )
        if name == GIVEN_SCALE:
            for told, dataflow in (("conforms, with a dataflow", "trtllm"), ("conforms, without one", None)):
                usual, own, ratio = compared(of, partial(conforming, of, dataflow))
                print(f"{told:28} usual {usual * 1e3:7.1f} ms  Fusecheck {own * 1e3:7.1f} ms  ratio {ratio:4.1f}")


if __name__ == "__main__":
    main()
