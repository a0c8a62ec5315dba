"""What judging costs, against the check that is usual today, on the same tensors on one core.

    python -m fusecheck.property_tests.suite.judging

The usual check computes a float32 reference in torch and compares each output by `torch.testing.assert_close` with
the tolerances of FlashInfer's test. Fusecheck's gives every element a verdict: nominal first, enclosures where
an element differs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Problem, RankOutputs
from fusecheck.case.calls import blocks
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite import judging_formats
from fusecheck.verdict import judge_rows

TOKENS, HIDDEN, WORLD_SIZE = 1024, 4096, 2
ROUNDS = 7
CPU = torch.device("cpu")


def outputs_of(operands: Operands) -> RankOutputs:
    """What a conforming kernel returns: the fused ops in torch, each rounding where TensorRT-LLM rounds."""
    stream = operands.partials[0]
    for partial in operands.partials[1:]:
        stream = stream + partial
    stream = stream + operands.residual
    wide = stream.float()
    root = torch.rsqrt(wide.square().sum(-1, keepdim=True) / HIDDEN + operands.eps)
    norm = (wide * root * operands.gamma.float()).to(stream.dtype)
    quotient = norm.float() * (1 / torch.tensor(operands.scale))
    return RankOutputs(stream, norm, quotient.clamp(-448, 448).to(torch.float8_e4m3fn))


def usual_check(operands: Operands, outputs: RankOutputs) -> None:
    """A float32 reference and `assert_close` on each output."""
    assert outputs.norm is not None
    assert outputs.quant is not None
    total = torch.stack([partial.float() for partial in operands.partials]).sum(0)
    stream = total + operands.residual.float()
    norm = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + operands.eps) * operands.gamma.float()
    codes = (norm / operands.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    dequantised = (outputs.quant.float() * operands.scale, codes.float() * operands.scale)
    for got, wanted in ((outputs.residual.float(), stream), (outputs.norm.float(), norm), dequantised):
        torch.testing.assert_close(got, wanted, atol=0.8, rtol=0.01)


def full_check(operands: Operands, outputs: RankOutputs) -> int:
    """Fusecheck's judgement of the same outputs; the number of elements outside."""
    assert outputs.norm is not None
    assert outputs.quant is not None
    outside = 0
    for rows in blocks(range(TOKENS), HIDDEN, CPU):
        part = slice(rows.start, rows.stop)
        these = Operands(
            [partial[part] for partial in operands.partials],
            operands.residual[part],
            operands.gamma,
            operands.scale,
            operands.eps,
        )
        shown = RankOutputs(outputs.residual[part], outputs.norm[part], outputs.quant[part])
        outside += sum(t.outside for t in judge_rows(Oracle(DATAFLOWS["trtllm"], these), shown, rows.start))
    return outside


def seconds_of(act: Callable[[], object]) -> float:
    """Seconds of one call on one thread, in CPU time: on a busy machine the same as on an idle one."""
    began = time.process_time()
    act()
    return time.process_time() - began


def spoilt(outputs: RankOutputs) -> RankOutputs:
    """The same with one code one step off, which the usual check cannot see."""
    assert outputs.quant is not None
    codes: Tensor = outputs.quant.clone()
    bits = codes.view(torch.uint8)
    row = int(torch.nonzero((bits[:, 0] & 0x7F) < 0x70)[0])
    bits[row, 0] += 1
    return RankOutputs(outputs.residual, outputs.norm, codes)


def main() -> None:
    """Print both times, their ratio, and that only one of the two checks sees a code that is one step off."""
    torch.set_num_threads(1)
    problem = Problem(tokens=TOKENS, hidden=HIDDEN, world_size=WORLD_SIZE, seed=1)
    operands = Inputs(problem, CPU).operands(range(TOKENS))
    outputs = outputs_of(operands)
    pairs = [
        (seconds_of(lambda: full_check(operands, outputs)), seconds_of(lambda: usual_check(operands, outputs)))
        for _ in range(ROUNDS + 1)
    ][1:]
    ours, usual = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(u / o for o, u in pairs)
    elements = 3 * TOKENS * HIDDEN
    print(f"tokens {TOKENS}, hidden {HIDDEN}, tp {WORLD_SIZE}, one core, median of {ROUNDS}")
    print(f"usual check  {usual * 1e3:7.1f} ms  {elements / usual / 1e6:7.1f} M elements/s")
    print(f"Fusecheck    {ours * 1e3:7.1f} ms  {elements / ours / 1e6:7.1f} M elements/s  ratio {ratio:.1f}")
    wrong = spoilt(outputs)
    usual_check(operands, wrong)
    print(f"one code one step off: usual check accepts, Fusecheck counts {full_check(operands, wrong)} outside")
    judging_formats.main()


if __name__ == "__main__":
    main()
