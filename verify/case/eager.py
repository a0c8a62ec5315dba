"""Eager calls whose outputs others are compared with, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusecheck.case import returned
from fusecheck.case.calls import Step
from fusecheck.case.compare import compare_bits
from fusecheck.interface import Kernel, RankInputs, RankOutputs
from fusecheck.verdict import Element, Tally


def finished(kernel: Kernel, inputs: RankInputs, step: Step) -> RankOutputs:
    """What a call on these inputs returns, once the device has finished it."""
    outputs = kernel.run(inputs, op=step.problem.op, strategy=step.problem.strategy)
    torch.cuda.synchronize()
    return outputs


def copied(outputs: RankOutputs) -> RankOutputs:
    """The outputs in memory of their own, which no later call reuses."""
    return returned.mapped(outputs, torch.Tensor.clone)


def compare_outputs(tally: Tally, what: str, expected: RankOutputs, got: RankOutputs) -> None:
    """Count differing elements as outside, and say where they were met."""
    first = returned.named(expected)
    for name, tensor in returned.named(got).items():
        before = len(tally.shown)
        compare_bits(tally, name, first[name], tensor)
        for index in range(before, len(tally.shown)):
            shown: Element = tally.shown[index]
            tally.shown[index] = replace(shown, context=f"{what} {shown.context}")
