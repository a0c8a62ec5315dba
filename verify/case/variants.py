"""Other operands for more calls of the kernel of a case: fewer rows, or other values in tensors of the same shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.interface import OPERANDS, RankInputs
from fusecheck.stages.experts import EXPERT_TENSORS, Experts


def first_rows(inputs: RankInputs, rows: int) -> RankInputs:
    """The operands of the first rows alone."""
    experts = None if inputs.experts is None else _experts_at(inputs.experts, slice(rows))
    return replace(inputs, partial=inputs.partial[:rows], residual=inputs.residual[:rows], experts=experts)


def repeated_rows(inputs: RankInputs, rows: int) -> RankInputs:
    """Operands of so many rows: the rows there are, again from the first."""
    index = torch.arange(rows, device=inputs.residual.device) % len(inputs.residual)
    experts = None if inputs.experts is None else _experts_at(inputs.experts, index)
    return replace(inputs, partial=inputs.partial[index], residual=inputs.residual[index], experts=experts)


def another(inputs: RankInputs) -> RankInputs:
    """Operands of the same shapes with other values: addends negated, the rest in reverse, the scale doubled."""
    experts = inputs.experts
    return replace(
        inputs,
        partial=-inputs.partial,
        residual=inputs.residual.flip(0),
        gamma=inputs.gamma.flip(0),
        scale=inputs.scale * 2,
        experts=None if experts is None else replace(experts, tokens=-experts.tokens, scale=experts.scale.flip(-1)),
    )


def held(inputs: RankInputs) -> RankInputs:
    """The same values in memory of their own."""
    copies: dict[str, Any] = {name: getattr(inputs, name).clone() for name in OPERANDS}
    if inputs.experts is not None:
        copies["experts"] = inputs.experts.mapped(lambda _, tensor: tensor.clone())
    return replace(inputs, **copies)


def fill(inputs: RankInputs, values: RankInputs) -> None:
    """Give operands that `held` made the values of others, in place."""
    for own, other in zip(_tensors(inputs), _tensors(values), strict=True):
        own.copy_(other)


def _tensors(inputs: RankInputs) -> list[Tensor]:
    """All that a kernel reads."""
    found = [getattr(inputs, name) for name in OPERANDS]
    found += [] if inputs.experts is None else [getattr(inputs.experts, name) for name in EXPERT_TENSORS]
    return [tensor for tensor in found if tensor is not None]


def _experts_at(experts: Experts, index: Tensor | slice) -> Experts:
    """The experts of some of the rows."""
    shared = None if experts.shared is None else experts.shared[index]
    if experts.rows is None:
        tokens, scale = experts.tokens[:, index].contiguous(), experts.scale[:, index].contiguous()
        return replace(experts, tokens=tokens, scale=scale, shared=shared)
    return replace(experts, scale=experts.scale[index], rows=experts.rows[index], shared=shared)
