"""What judging a format costs, against the check that is usual today: dequantise, and compare by `assert_close`.

The outputs are those of the emulated kernel, approximate divisions included; both checks get the same tensors. The
usual check computes a float32 norm and its own scales; the tolerances are those of FlashInfer's test of dynamic FP8.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Operation, Problem, RankOutputs
from fusecheck.case.calls import blocks
from fusecheck.case.returned import decoded
from fusecheck.formats import ue8m0
from fusecheck.formats.element import E4M3
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite.family import emulated
from fusecheck.quantflow import QUANT_FLOWS
from fusecheck.quantisers.known import QUANTISERS
from fusecheck.quantisers.scales import in_groups
from fusecheck.verdict import judge_rows

TOKENS, HIDDEN, ROUNDS = 512, 4096, 5
FLOW = DATAFLOWS["flashinfer-fp32"]
CPU = torch.device("cpu")


def problem_of(name: str) -> Problem:
    """One call that returns everything."""
    op = Operation.named(f"RESIDUAL_RMS_NORM_OUT_QUANT_{name.upper().replace('-', '_')}")
    return Problem(op=op, tokens=TOKENS, hidden=HIDDEN, world_size=2, scale=640.0, seed=1)


def full_check(operands: Operands, outputs: RankOutputs) -> int:
    """Fusecheck's judgement of residual, norm, scales and codes; how many are outside."""
    outside = 0
    for rows in blocks(range(TOKENS), HIDDEN, CPU):
        part = slice(rows.start, rows.stop)
        partials = [partial[part] for partial in operands.partials]
        these = replace(operands, partials=partials, residual=operands.residual[part])
        shown = RankOutputs(*(None if x is None else x[part] for x in _fields(outputs)))
        outside += sum(t.outside for t in judge_rows(Oracle(FLOW, these), shown, rows.start))
    return outside


def _fields(outputs: RankOutputs) -> tuple[Tensor | None, ...]:
    return outputs.residual, outputs.norm, outputs.quant, outputs.scale


def usual_check(operands: Operands, outputs: RankOutputs) -> None:
    """A float32 reference, and `assert_close` of residual, norm and the dequantised codes."""
    assert outputs.residual is not None
    assert outputs.norm is not None
    total = torch.stack([partial.float() for partial in operands.partials]).sum(0)
    stream = total + operands.residual.float()
    norm = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + operands.eps) * operands.gamma.float()
    dequantised = dequantise(outputs, operands)
    for got, wanted in ((outputs.residual.float(), stream), (outputs.norm.float(), norm), (dequantised, norm)):
        torch.testing.assert_close(got, wanted, atol=0.8, rtol=0.3)


def dequantise(outputs: RankOutputs, operands: Operands) -> Tensor:
    """Code times scale, float32, [rows, hidden]."""
    assert outputs.quant is not None
    assert outputs.scale is not None
    quantiser = QUANTISERS[operands.op.quantiser]
    scale = outputs.scale
    if scale.dtype is torch.uint8:
        wide = E4M3.decode(scale) / operands.scale if quantiser.name == "nvfp4" else ue8m0.decode(scale)
        scale = wide.float()
    table = torch.tensor(quantiser.element.values, dtype=torch.float32)
    codes = outputs.quant.view(torch.uint8)
    values = codes.view(E4M3.dtype).float() if quantiser.element is E4M3 else table[codes.int()]
    return (in_groups(values, scale.shape[-1]) * scale[..., None]).flatten(-2)


def seconds_of(act: Callable[[], object]) -> float:
    """Seconds of one call on one thread, in CPU time."""
    began = time.process_time()
    act()
    return time.process_time() - began


def spoilt(outputs: RankOutputs) -> RankOutputs:
    """The same with one scale one step up, which the usual check cannot see."""
    assert outputs.scale is not None
    scale = outputs.scale.clone()
    bits = scale.view(torch.int32) if scale.dtype is torch.float32 else scale
    bits[3, 0] += 8 if scale.dtype is torch.float32 else 1
    return RankOutputs(outputs.residual, outputs.norm, outputs.quant, scale)


def measure(name: str) -> tuple[float, float, int, int]:
    """Seconds of the usual check and of ours, and how many ours finds outside: as it is, and with a wrong scale."""
    problem = problem_of(name)
    outputs = decoded(emulated(problem, FLOW), problem)
    operands = Inputs(problem, CPU).operands(range(TOKENS))
    usual_check(operands, outputs)
    pairs = [
        (seconds_of(lambda: usual_check(operands, outputs)), seconds_of(lambda: full_check(operands, outputs)))
        for _ in range(ROUNDS)
    ]
    usual, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return usual, ours, full_check(operands, outputs), full_check(operands, spoilt(outputs))


def main() -> None:
    """Print one line a format."""
    torch.set_num_threads(1)
    print(f"formats: tokens {TOKENS}, hidden {HIDDEN}, tp 2, one core, median of {ROUNDS}; all outputs")
    for name in QUANT_FLOWS:
        if name != "static-fp8":
            usual, ours, outside, found = measure(name)
            print(
                f"{name:18} usual {usual * 1e3:7.1f} ms  Fusecheck {ours * 1e3:7.1f} ms  ratio {usual / ours:4.1f}  "
                f"outside {outside}, with one scale a step up {found}"
            )


if __name__ == "__main__":
    main()
