"""Eager calls whose outputs others are compared with, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusecheck.case import returned
from fusecheck.case.calls import Step
from fusecheck.case.compare import compare_bits, same_bits
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
    return returned.mapped(_read(outputs, step), Tensor.clone)


def _read(outputs: RankOutputs, step: Step) -> RankOutputs:
    """With scales [tokens, groups]: nobody wrote the padding of a tensor that was not poisoned."""
    rows = len(next(iter(returned.named(outputs).values())))
    return returned.read(outputs, step.problem, rows)


Pair = tuple[str, RankOutputs, RankOutputs]
"""Which call it is, what `copied` kept of another, and what the call returned."""


def compare_outputs(tally: Tally, step: Step, pairs: Sequence[Pair]) -> None:
    """Count elements that differ from `copied` ones as outside, and say where they were met.

    All pairs are compared by their bits with one wait for the device; each is looked at only where something differs.
    """
    read = [(what, expected, _read(got, step)) for what, expected, got in pairs]
    sides = [[returned.named(outputs) for outputs in (expected, got)] for _, expected, got in read]
    # Codes are compared as they are stored, and counted one by one.
    every = [(first[name], second[name]) for first, second in sides for name in second]
    if same_bits(every):
        tally.elements += sum(t.numel() * _codes_in(name, t, step) for _, got in sides for name, t in got.items())
        return
    for what, *both in read:
        first, second = (returned.named(returned.unpacked(outputs, step.problem)) for outputs in both)
        for name, tensor in second.items():
            compare_bits(tally, f"{what} {name}", first[name], tensor, payloads=step.flow.nan_payload == "kept")


def _codes_in(name: str, tensor: Tensor, step: Step) -> int:
    """How many codes share an element of an output as it is stored."""
    packed = name == "quant" and step.problem.op.returns_scale
    return step.problem.hidden // tensor.shape[-1] if packed else 1
