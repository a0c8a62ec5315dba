"""The operators of the family: quantisers that make their scales, layers on them, experts, rows spread over the ranks.

One operator a role: which quantiser it is, an argument says. So a format needs no operator of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.graph import quantised
from fusecheck.graph.context import active
from fusecheck.graph.ops import dtype_named, fake, implement, sum_ranks
from fusecheck.graph.quantised import Form
from fusecheck.stages.experts import Experts, expert_sum


@implement("quantize")
def _quantize(x: Tensor, scale: Tensor | None, quantiser: str, layout: str = "") -> tuple[Tensor, Tensor]:
    return quantised.quantise(x, scale, Form(quantiser, layout), active().dataflow)


@fake("quantize")
def _fake_quantize(x: Tensor, scale: Tensor | None, quantiser: str, layout: str = "") -> tuple[Tensor, Tensor]:
    return Form(quantiser, layout).like(x)


@implement("quantized_linear")
def _quantized_linear(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    weight_scale: Tensor | None,
    quantiser: str,
    layout: str,
    out_dtype: str,
) -> Tensor:
    operands = (codes, scales, scale), (weight, weight_scales, weight_scale)
    return quantised.linear(*operands, bias, Form(quantiser, layout), active().dataflow, dtype_named(out_dtype))


@fake("quantized_linear")
def _fake_quantized_linear(codes: Tensor, scales: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype_named(str(rest[-1])))


# Experts ------------------------------------------------------------------------------------------------------------


@implement("moe_finalize")
def _moe_finalize(
    tokens: Tensor, scale: Tensor, rows: Tensor, shared: Tensor | None = None, routed_scaling: float = 1.0
) -> Tensor:
    """This rank's sum of the rows that its routes name, in the order that the active backend declares."""
    return expert_sum(Experts(tokens, scale, rows, shared, routed_scaling), active().dataflow.experts)


@fake("moe_finalize")
def _fake_moe_finalize(tokens: Tensor, scale: Tensor, rows: Tensor, *rest: object) -> Tensor:
    return tokens.new_empty((rows.shape[0], tokens.shape[-1]))


# Rows spread over the ranks -----------------------------------------------------------------------------------------


@implement("reduce_scatter")
def _reduce_scatter(x: Tensor, world_size: int, strategy: str) -> Tensor:
    """This rank's rows of the sum over ranks; a collective call."""
    context = active()
    return _rows(sum_ranks(context.gather(x), context.dataflow), world_size)


@implement("all_gather")
def all_gather(x: Tensor, world_size: int, strategy: str) -> Tensor:
    """All ranks' rows, in rank order; a collective call."""
    return torch.cat(active().gather(x), dim=-2)


@implement("shard")
def _shard(x: Tensor, world_size: int) -> Tensor:
    return _rows(x, world_size)


def _rows(x: Tensor, world_size: int) -> Tensor:
    """This rank's part of the rows, [..., tokens / world_size, hidden].

    Raises:
        RuntimeError: the ranks do not divide the rows.
    """
    if x.shape[-2] % world_size:
        raise RuntimeError(f"got {x.shape[-2]} rows, expected a multiple of {world_size} ranks")
    return x.chunk(world_size, dim=-2)[active().rank.index].clone()


@fake("reduce_scatter", "shard")
def _fake_shard(x: Tensor, world_size: int, strategy: str = "") -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-2] // world_size, x.shape[-1]))


@fake("all_gather")
def _fake_all_gather(x: Tensor, world_size: int, strategy: str) -> Tensor:
    return x.new_empty((*x.shape[:-2], x.shape[-2] * world_size, x.shape[-1]))
