"""Eager calls whose outputs others are compared with, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusecheck.case import returned
from fusecheck.case.calls import Step
from fusecheck.case.compare import compare_each
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
    return returned.mapped(_decoded(outputs, step), Tensor.clone)


def _decoded(outputs: RankOutputs, step: Step) -> RankOutputs:
    """With one code a byte and scales [tokens, groups]: nobody wrote the padding of a tensor that was not poisoned."""
    rows = len(next(iter(returned.named(outputs).values())))
    return returned.decoded(outputs, step.problem, rows)


Pair = tuple[str, RankOutputs, RankOutputs]
"""Which call it is, what `copied` kept of another, and what the call returned."""


def compare_outputs(tally: Tally, step: Step, pairs: Sequence[Pair]) -> None:
    """Count elements that differ from `copied` ones as outside, and say where they were met.

    All pairs are compared by their bits with one wait for the device; each is looked at only where something differs.
    """
    each = [
        (f"{what} {name}", first[name], tensor)
        for what, expected, got in pairs
        for first in (returned.named(expected),)
        for name, tensor in returned.named(_decoded(got, step)).items()
    ]
    compare_each(tally, each, payloads=step.flow.nan_payload == "kept", at_once=True)
