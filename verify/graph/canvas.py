"""What the writers of a plan's graph share: inputs, outputs, weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fusecheck.graph.builder import GraphBuilder
from fusecheck.graph.plan import GraphPlan

FP8 = torch.float8_e4m3fn


class Canvas:
    """A plan's graph being written: its inputs, outputs and weights, named so that every rank draws the same.

    Args:
        plan: the graph.
        rank: this rank.
        world_size: of the group.
        device: of the tensors.
    """

    def __init__(self, plan: GraphPlan, rank: int, world_size: int, device: torch.device) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        dimension = int(plan.batched)
        self.builder = GraphBuilder(plan.seed, rank, dimension if plan.dynamic else None, device)
        self.outputs: list[Node] = []
        self.without_meta: list[Node] = []
        self.replicated: list[int] = []
        self.open_shape = [1, -1, plan.hidden] if plan.batched else [-1, plan.hidden]

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Of an input."""
        return (1, tokens, self.plan.hidden) if self.plan.batched else (tokens, self.plan.hidden)

    def example(self, tokens: int) -> tuple[Tensor, ...]:
        """Inputs of this rank for a token count."""
        shape, dtype, magnitude = self.shape(tokens), self.dtype, self.plan.magnitude
        drawn = tuple(
            self.builder.activations(f"{name}@{tokens}", shape, dtype, magnitude, per_rank=per_rank)
            for name, per_rank in self.builder.inputs
        )
        for tensor, (_, per_rank) in zip(drawn, self.builder.inputs, strict=True):
            if self.plan.nan and tokens > 1 and not per_rank:
                tensor[..., -2, 0] = float("nan")
        return drawn

    def input(self, name: str, *, per_rank: bool = False) -> Node:
        """A graph input like the activations."""
        example = torch.zeros(self.shape(self.plan.tokens), dtype=self.dtype)
        return self.builder.placeholder(name, example, per_rank=per_rank)

    def output(self, node: Node, *, replicated: bool = False) -> None:
        """Return a node."""
        if replicated:
            self.replicated.append(len(self.outputs))
        self.outputs.append(node)

    def weight(self, name: str, rows: int, columns: int) -> Node:
        """A plain weight [rows, columns], this rank's own."""
        values = self.builder.normal(name, rows, columns, per_rank=True) / columns**0.5
        return self.builder.attribute(name, values.to(self.dtype))

    def weight_fp8(self, name: str, rows: int, columns: int) -> tuple[Node, Node]:
        """A quantised weight [rows, columns], this rank's own, and its scale, which all ranks share."""
        values = self.builder.normal(name, rows, columns, per_rank=True)
        scale = 1 / 112 / columns**0.5
        codes = (values * 112).clamp(-448, 448).to(FP8)
        return self.builder.attribute(name, codes), self.scalar(f"{name}_scale", scale)

    def scalar(self, name: str, value: float) -> Node:
        """A float32 scalar attribute."""
        return self.builder.attribute(name, torch.tensor(value))
