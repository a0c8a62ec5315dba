"""What runs beside a call on a GPU: the kernels before and behind it under PDL, and calls on a second stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.case import returned
from fusecheck.case.calls import Step
from fusecheck.case.eager import called, compare_outputs, copied, finished
from fusecheck.case.variants import another, first_rows
from fusecheck.interface import Kernel, RankInputs, RankOutputs
from fusecheck.verdict import Stage, Tally

LATE = ("residual", "gamma", "scale")
"""Operands that the producer writes; the kernel's own part of the all-reduce is read after its grid sync anyway."""
NANOSECONDS = 200_000
"""How long the producer waits before it writes: longer than any launch takes, so that all three kernels overlap."""
BLOCK = 1024
PROGRAMS = 32
"""Blocks of the consumer: few, so that they find room beside the kernel under test."""
TURNS = 8
"""Calls on each of two streams."""


def between_neighbours(kernel: Kernel, step: Step) -> Tally:
    """An operand written by the kernel right before, each output read by the one right behind, launched by PDL.

    The producer lets its dependents start at once and writes late; the consumer waits as PDL demands. Both the outputs
    and what the consumer saw of them must be the bits of a call that nothing overlapped with.
    """
    from fusecheck.onepass import neighbours

    producer: Any = neighbours.late_copy
    tally = Tally(Stage.AGAIN)
    alone = finished(kernel, step.made, step)
    expected = copied(alone, step)
    for name in LATE:
        fresh = _words(getattr(step.made, name))
        for output in returned.named(expected):
            late = torch.zeros_like(getattr(step.made, name))
            changed: dict[str, Any] = {name: late}
            inputs = replace(step.made, **changed)
            seen = _room_like(getattr(alone, output))
            torch.cuda.synchronize()
            producer[(1,)](fresh, _words(late), fresh.numel(), NANOSECONDS, BLOCK=BLOCK)
            outputs = called(kernel, inputs, step)
            _read_behind(getattr(outputs, output), seen)
            torch.cuda.synchronize()
            behind: dict[str, Any] = {output: seen}
            before = (f"{name} written by the kernel before:", expected, outputs)
            compare_outputs(
                tally, step, [before, (f"{output} read by the kernel behind:", expected, replace(alone, **behind))]
            )
    return tally


def _read_behind(output: Tensor, seen: Tensor) -> None:
    from fusecheck.onepass import neighbours

    consumer: Any = neighbours.waiting_copy
    words = _words(_whole(output))
    consumer[(PROGRAMS,)](words, _words(_whole(seen)), words.numel(), BLOCK=BLOCK, launch_pdl=True)


def _whole(tensor: Tensor) -> Tensor:
    """All that lies in the memory of a tensor of scales with gaps; any other tensor itself."""
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _room_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the same form, gaps included."""
    return torch.empty_like(_whole(tensor)).as_strided(tensor.shape, tensor.stride())


def _words(tensor: Tensor) -> Tensor:
    """The tensor as integers: 32-bit ones of a float32, else 16-bit ones; rows are multiples of eight elements."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def on_two_streams(kernel: Kernel, second: Kernel | None, step: Step) -> Tally:
    """Calls from two streams: on one workspace in an order that events keep; and at once, on a workspace each.

    A refusal by an error is right, too.

    Args:
        kernel: the workspace of the case.
        second: one more of the same size; None where the kernel has but one.
        step: the case.
    """
    tally = Tally(Stage.AGAIN)
    few = step.problem.world_size + 1
    sets = [step.made, another(step.made)]
    short = [first_rows(x, few) for x in sets]
    _take_turns(tally, "in turn on two streams", step, sets, lambda _: kernel, ordered=True)
    if second is not None:
        pair = kernel, second
        _take_turns(tally, "at once on two streams", step, short, lambda turn: pair[turn], ordered=False)
    return tally


def _take_turns(
    tally: Tally,
    what: str,
    step: Step,
    sets: list[RankInputs],
    kernel_of: Callable[[int], Kernel],
    *,
    ordered: bool,
) -> None:
    """Call on two streams in turn, each with inputs of its own, and compare when all have ended."""
    expected = [copied(finished(kernel_of(turn), inputs, step), step) for turn, inputs in enumerate(sets)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]  # type: ignore[no-untyped-call]
    returned: list[RankOutputs] = []
    try:
        for call in range(2 * TURNS):
            mine, other = streams[call % 2], streams[1 - call % 2]
            if ordered:
                mine.wait_stream(other)
            with torch.cuda.stream(mine):
                returned.append(called(kernel_of(call % 2), sets[call % 2], step))
    except Exception:  # a refusal may be of any type; an error of the device comes again below
        return
    finally:
        torch.cuda.synchronize()
    pairs = [(f"{what}, call {call}:", expected[call % 2], outputs) for call, outputs in enumerate(returned)]
    compare_outputs(tally, step, pairs)
