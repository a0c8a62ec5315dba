"""Expert tensors of batches whose rows are put together: what an MoE collective sums for a row goes with the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusecheck.inputs.expert_inputs import ROUTED_SCALING, TERMS
from fusecheck.operations import Collective
from fusecheck.problem import Problem
from fusecheck.stages.experts import Experts


def factor(problem: Problem) -> float:
    """By which the experts of `of_addends` multiply each addend."""
    return ROUTED_SCALING if problem.op.collective is Collective.MOE_FINALIZE else 1.0


def of_addends(problem: Problem, addends: Tensor) -> Experts:
    """Experts that sum up to `factor` times these addends, [tokens, hidden]: one term each, with a weight of one."""
    tokens, device = len(addends), addends.device
    if problem.op.collective is Collective.MOE_REDUCTION:
        terms = torch.zeros((TERMS, *addends.shape), dtype=addends.dtype, device=device)
        terms[0] = addends
        return Experts(terms, torch.ones(TERMS, tokens, device=device), None, None)
    rows = torch.full((tokens, TERMS), -1, dtype=torch.int32, device=device)
    rows[:, 0] = torch.arange(tokens, dtype=torch.int32, device=device)
    weights = torch.ones(tokens, TERMS, dtype=addends.dtype, device=device)
    return Experts(addends.clone(), weights, rows, None, ROUTED_SCALING)


def first(experts: Experts, tokens: int) -> Experts:
    """The experts of the first rows of a batch; whatever they gather from stays."""
    shared = None if experts.shared is None else experts.shared[:tokens]
    if experts.rows is None:
        return replace(experts, tokens=experts.tokens[:, :tokens], scale=experts.scale[:, :tokens], shared=shared)
    return replace(experts, rows=experts.rows[:tokens], scale=experts.scale[:tokens], shared=shared)


def filled(experts: Experts, *, with_: float | None = None, times: float = 1.0) -> Experts:
    """The same with every token one value, or multiplied."""

    def changed(x: Tensor) -> Tensor:
        return x * times if with_ is None else torch.full_like(x, with_)

    shared = None if experts.shared is None else changed(experts.shared)
    return replace(experts, tokens=changed(experts.tokens), shared=shared)


def placed(batch: Experts, rows: Sequence[Experts], places: Sequence[int]) -> Experts:
    """The experts of a batch with those of single rows at some places."""
    tokens, scale = batch.tokens.clone(), batch.scale.clone()
    shared = None if batch.shared is None else batch.shared.clone()
    routes = None if batch.rows is None else batch.rows.clone()
    for one, place in zip(rows, places, strict=True):
        if shared is not None:
            shared[place] = 0 if one.shared is None else one.shared[0]
        if routes is None or one.rows is None:
            tokens[:, place], scale[:, place] = one.tokens[:, 0], one.scale[:, 0]
            continue
        routes[place] = torch.where(one.rows[0] < 0, -1, one.rows[0] + len(tokens))
        scale[place] = one.scale[0]
        tokens = torch.cat((tokens, one.tokens))
    return Experts(tokens.contiguous(), scale.contiguous(), routes, shared, batch.routed_scaling)
