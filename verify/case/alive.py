"""Stage 0: outputs are poisoned before the call, canaries lie around every buffer, inputs must not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusecheck.case.compare import same_bits
from fusecheck.case.returned import named
from fusecheck.inputs.families import FAMILIES
from fusecheck.interface import OPERANDS, RankInputs, RankOutputs
from fusecheck.problem import Problem
from fusecheck.stages.judgement import whole
from fusecheck.verdict import Element, Stage, Tally, raw

MARGIN = 256
"""Canary bytes on either side of a buffer; keeps the alignment that vector loads need."""
CANARY = 0xC5
_CANARIES = bytes([CANARY]) * MARGIN
POISONS = ({1: 0xFF, 2: 0xFFA5 - 2**16, 4: -1}, {1: 0x2B, 2: 0x7FD3, 4: 0x2B2B2B2B})
"""By element size: a NaN code; a signalling NaN of bf16 and fp16, which no arithmetic makes. The second is for another
call, where an output held the first: a kernel may also have written that."""


@dataclass
class Arena:
    """The buffers of one call and what lies around them."""

    device: torch.device
    poison: int = 0
    blocks: list[tuple[str, Tensor]] = field(default_factory=list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        """A poisoned tensor between canaries."""
        made = self._between(shape, dtype, name)
        if dtype.itemsize == 2:
            raw(made).fill_(POISONS[self.poison][2])
        else:
            made.view(torch.uint8).fill_(POISONS[self.poison][1])
        return made

    def copy(self, source: Tensor, name: str) -> Tensor:
        """A copy of a tensor between canaries."""
        return self._between(tuple(source.shape), source.dtype, name).copy_(source)

    def _between(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        """A tensor between canaries, not yet filled."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype, device=self.device)
        block = torch.full((nbytes + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=self.device)
        self.blocks.append((name, block))
        return block[MARGIN : MARGIN + nbytes].view(dtype).view(shape)

    def guard(self, inputs: RankInputs) -> RankInputs:
        """The inputs, each between canaries."""
        return replace(
            inputs,
            partial=self.copy(inputs.partial, "partial"),
            residual=self.copy(inputs.residual, "residual"),
            gamma=self.copy(inputs.gamma, "gamma"),
            scale=self.copy(inputs.scale, "scale"),
            experts=None if inputs.experts is None else inputs.experts.mapped(lambda name, x: self.copy(x, name)),
        )

    def poison_of(self, tensor: Tensor) -> int | None:
        """The byte that filled a tensor's memory before the call; None where the kernel brought its own."""
        address = tensor.data_ptr()
        mine = any(block.data_ptr() <= address < block.data_ptr() + block.numel() for _, block in self.blocks)
        return POISONS[self.poison][1] if mine else None

    def margins(self) -> list[tuple[Tensor, Tensor]]:
        """The memory around the buffers, and what must be there."""
        whole = canary(self.device)[:MARGIN]
        return [(part, whole) for _, block in self.blocks for part in (block[:MARGIN], block[-MARGIN:])]

    def trampled(self) -> str | None:
        """The name of a buffer with a write beyond its end or before its start; None when all are intact."""
        if self.device.type == "cpu":
            return next((name for name, block in self.blocks if not _margins_intact(block)), None)
        if not self.blocks:
            return None
        edges = torch.stack([torch.cat((block[:MARGIN], block[-MARGIN:])) for _, block in self.blocks])
        where = torch.nonzero((edges != CANARY).any(-1))
        return self.blocks[int(where[0])][0] if len(where) else None


def _margins_intact(block: Tensor) -> bool:
    """Whether both margins of a block in host memory are as they were made; bytes compare faster than tensors."""
    data = block.numpy()
    return data[:MARGIN].tobytes() == data[-MARGIN:].tobytes() == _CANARIES


@lru_cache(maxsize=16)
def canary(device: torch.device) -> Tensor:
    """What must lie in a margin, [2 * MARGIN] bytes."""
    return torch.full((2 * MARGIN,), CANARY, dtype=torch.uint8, device=device)


class Poisoned(TorchFunctionMode):
    """Within it, `torch.empty` and its kin return poisoned memory between canaries of an arena."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Every use of a tensor in the kernel comes by here.
        made = func(*args, **kwargs) if kwargs else func(*args)
        if func not in _UNINITIALISED:
            return made
        if not made.is_contiguous() or made.device.type != self._arena.device.type:
            return made
        return self._arena.empty(tuple(made.shape), made.dtype, "an output")


_UNINITIALISED = {torch.empty, torch.empty_like, torch.Tensor.new_empty}


def unwritten(output: Tensor, poison: int = 0) -> Tensor:
    """Which elements hold the poison; a kernel may have written what looks the same."""
    return raw(output) == POISONS[poison][output.element_size()]


def suspects(outputs: RankOutputs, problem: Problem) -> dict[str, Tensor]:
    """Per output, which elements hold the first poison, where there are any.

    Of codes and scales only where a NaN among them would be wrong: one is the poison.
    """
    finite = FAMILIES[problem.family].finite
    held = {name: unwritten(x) for name, x in named(outputs).items() if finite or name not in ("quant", "scale")}
    found = torch.stack([where.any() for where in held.values()]).tolist() if held else []
    return {name: where for (name, where), any_held in zip(held.items(), found, strict=True) if any_held}


def never_written(outputs: RankOutputs, suspected: dict[str, Tensor], problem: Problem) -> Tally | None:
    """What held the first poison after one call and the second one after another: a tally, or None."""
    tally = Tally(Stage.ALIVE, elements=problem.elements)
    now = named(outputs)
    for name, before in suspected.items():
        held = before & unwritten(now[name], 1)
        count = int(held.sum())
        if count:
            tally.outside += count
            row, column = (int(i[0]) for i in torch.nonzero(held, as_tuple=True))
            tally.shown.append(Element(row, column, f"{name} not written", "written", f"{count} elements"))
    return tally if tally.outside else None


def untouched(
    arena: Arena,
    made: RankInputs,
    inputs: RankInputs,
    overwrites: frozenset[str],
    others: Sequence[tuple[Tensor, Tensor]] = (),
) -> bool:
    """Whether one look at a GPU shows that nothing is wrong, also with `others`, each with what it must be.

    Arguments as for `intact`. Each look waits for the device; in host memory the places are compared one by one.
    """
    if arena.device.type == "cpu":
        return False
    kept = [(getattr(made, name), getattr(inputs, name)) for name in OPERANDS if name not in overwrites]
    return same_bits([*arena.margins(), *kept, *others])


def intact(
    arena: Arena,
    made: RankInputs,
    inputs: RankInputs,
    outputs: RankOutputs,
    problem: Problem,
    overwrites: frozenset[str] = frozenset(),
) -> Tally | None:
    """Stage 0 but for what was not written: a tally with what is wrong, or None.

    Args:
        arena: of the call.
        made: the inputs, which no kernel saw.
        inputs: their copy that the kernel was given.
        outputs: what it returned.
        problem: the call.
        overwrites: operands that it may change.
    """
    if untouched(arena, made, inputs, overwrites):
        return None
    tally = Tally(Stage.ALIVE, elements=problem.elements)
    trampled = arena.trampled()
    if trampled is not None:
        tally.outside += 1
        tally.shown.append(whole(f"{trampled} was written beyond its ends", "canaries intact"))
    for name in OPERANDS:
        if name not in overwrites and not torch.equal(_bits(getattr(made, name)), _bits(getattr(inputs, name))):
            tally.outside += 1
            hint = "unchanged; a kernel that works in place declares overwrites"
            tally.shown.append(whole(f"{name} was changed by the call", hint))
    return tally if tally.outside else None


def _bits(operand: Tensor) -> Tensor:
    """The bits of an operand as integers of its size, so that a NaN equals itself."""
    return operand.view(torch.int16 if operand.element_size() == 2 else torch.int32)
