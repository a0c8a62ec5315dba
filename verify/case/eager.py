"""Eager calls whose outputs others are compared with, bit for bit."""

from __future__ import annotations

from dataclasses import replace

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


def copied(outputs: RankOutputs, step: Step) -> RankOutputs:
    """The outputs in memory of their own, which no later call reuses; scales without what lies around them."""
    return returned.mapped(_decoded(outputs, step), torch.Tensor.clone)


def _decoded(outputs: RankOutputs, step: Step) -> RankOutputs:
    """With one code a byte and scales [tokens, groups]: nobody wrote the padding of a tensor that was not poisoned."""
    rows = len(next(iter(returned.named(outputs).values())))
    return returned.decoded(outputs, replace(step.problem, tokens=rows, schedule=()))


def compare_outputs(tally: Tally, what: str, step: Step, expected: RankOutputs, got: RankOutputs) -> None:
    """Count elements that differ from `copied` ones as outside, and say where they were met."""
    first = returned.named(expected)
    for name, tensor in returned.named(_decoded(got, step)).items():
        compare_bits(tally, f"{what} {name}", first[name], tensor, payloads=step.flow.nan_payload == "kept")
