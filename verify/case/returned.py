"""What a call returned, by its operation: the form that it must have, and the codes and scales in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.interface import RankOutputs
from fusecheck.problem import Problem
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.layouts import Layout

_NAMES = tuple(field.name for field in fields(RankOutputs))


def named(outputs: RankOutputs) -> dict[str, Tensor]:
    """The outputs that are there, contiguous, by name."""
    return {name: tensor.contiguous() for name in _NAMES if (tensor := getattr(outputs, name)) is not None}


def mapped(outputs: RankOutputs, change: Callable[[Tensor], Tensor]) -> RankOutputs:
    """The outputs with each one that is there changed."""
    return RankOutputs(**{"residual": None} | {name: change(tensor) for name, tensor in named(outputs).items()})


def layout_of(problem: Problem, flow: Dataflow | None = None, tokens: int | None = None) -> Layout:
    """How the scales of a case lie, or of so many rows; padding as the dataflow declares it, if one is given."""
    name = problem.op.quantiser
    rules = flow.quant(name) if flow is not None else QuantFlow()
    return _layout(name, problem.tokens if tokens is None else tokens, problem.hidden, rules, problem.layout)


@lru_cache(maxsize=64)
def _layout(name: str, tokens: int, hidden: int, rules: QuantFlow, layout: str) -> Layout:
    return quantiser(name).layout(tokens, hidden, rules, layout or None)


def decoded(outputs: RankOutputs, problem: Problem, tokens: int | None = None) -> RankOutputs:
    """The outputs with one code a byte, and with scales [tokens, groups]; of the first op as they are.

    Args:
        outputs: as returned.
        problem: the call.
        tokens: how many rows were asked, where these are others than the Problem's.
    """
    if not problem.op.returns_scale:
        return outputs
    assert outputs.quant is not None
    assert outputs.scale is not None
    codes = outputs.quant.view(torch.uint8)
    if codes.shape[-1] != problem.hidden:
        codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    return replace(outputs, quant=codes, scale=layout_of(problem, tokens=tokens).read(outputs.scale))


def misshapen(outputs: RankOutputs, problem: Problem, device: torch.device) -> list[str]:
    """What is wrong with the presence, shape, dtype or device of each output: got and expected, in words."""
    wrong = []
    shapes = dict.fromkeys(("total", "residual", "norm"), (problem.format.dtype, (problem.tokens, problem.hidden)))
    shapes["quant"] = (torch.float8_e4m3fn, (problem.tokens, problem.hidden))
    if problem.op.returns_quant and (per := quantiser(problem.op.quantiser).element.per_byte) > 1:
        shapes["quant"] = (torch.uint8, (problem.tokens, problem.hidden // per))
    for field in fields(outputs):
        name, tensor = field.name, getattr(outputs, field.name)
        if name not in problem.op.returns:
            wrong += [] if tensor is None else [f"{name}, which {problem.op.name} does not return, expected None"]
        elif not isinstance(tensor, Tensor):
            wrong.append(f"{name} = {type(tensor).__name__}, expected a tensor")
        elif tensor.device.type != device.type:
            wrong.append(f"{name} on {tensor.device}, expected on {device}")
        elif name in shapes and (tensor.dtype, tuple(tensor.shape)) != shapes[name]:
            dtype, shape = shapes[name]
            wrong.append(f"{name} {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")
        elif name == "scale":
            try:
                layout_of(problem).slots(tensor)
            except (ValueError, RuntimeError) as error:
                wrong.append(f"scale that cannot be read: {error}")
    return wrong
