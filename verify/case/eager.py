"""Eager calls whose outputs others are compared with, bit for bit."""

from __future__ import annotations

import torch

from fusecheck.case import returned
from fusecheck.case.calls import Step
from fusecheck.case.compare import compare_bits
from fusecheck.interface import Kernel, RankInputs, RankOutputs, spared
from fusecheck.verdict import Tally


def called(kernel: Kernel, inputs: RankInputs, step: Step) -> RankOutputs:
    """Call on these inputs, of which the kernel gets copies where it overwrites them."""
    given = spared(inputs, step.overwrites)
    return kernel.run(given, op=step.problem.op, strategy=step.problem.strategy)


def finished(kernel: Kernel, inputs: RankInputs, step: Step) -> RankOutputs:
    """What a call on these inputs returns, once the device has finished it."""
    outputs = called(kernel, inputs, step)
    torch.cuda.synchronize()
    return outputs


def copied(outputs: RankOutputs) -> RankOutputs:
    """The outputs in memory of their own, which no later call reuses."""
    return returned.mapped(outputs, torch.Tensor.clone)


def compare_outputs(tally: Tally, what: str, step: Step, expected: RankOutputs, got: RankOutputs) -> None:
    """Count differing elements as outside, and say where they were met."""
    first = returned.named(expected)
    for name, tensor in returned.named(got).items():
        compare_bits(tally, f"{what} {name}", first[name], tensor, payloads=step.flow.nan_payload == "kept")
