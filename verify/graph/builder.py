"""Writing an FX graph node by node, each with its meta value, as an export would leave it."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusecheck.graph import nodes


class GraphBuilder:
    """A graph under construction, its attributes, and the inputs that it takes.

    Args:
        seed: of weights and inputs.
        rank: this rank; tensors that differ per rank are drawn with it.
        token_dimension: of the inputs, open in the graph; None for a graph of one size.
        device: where attributes and inputs live.
    """

    def __init__(self, seed: int, rank: int, token_dimension: int | None, device: torch.device) -> None:
        self.graph = Graph()
        self.root = nn.Module()
        self.seed, self.rank, self.token_dimension, self.device = seed, rank, token_dimension, device
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.inputs: list[tuple[str, bool]] = []

    def generator(self, name: str, *, per_rank: bool) -> torch.Generator:
        """Random numbers that depend on the seed, the name, and the rank if they are to differ."""
        text = f"{self.seed}/{name}/{self.rank if per_rank else 'all'}"
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))

    def normal(self, name: str, *shape: int, per_rank: bool = False) -> Tensor:
        """Standard normal float32 values."""
        return torch.randn(*shape, generator=self.generator(name, per_rank=per_rank))

    def attribute(self, name: str, tensor: Tensor) -> Node:
        """Register a buffer under a dotted name, or find it, and read it."""
        path, _, leaf = name.rpartition(".")
        owner = self.root
        for part in path.split(".") if path else []:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if not hasattr(owner, leaf):
            owner.register_buffer(leaf, tensor.to(self.device))
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.mode.from_tensor(getattr(owner, leaf), static_shapes=True)
        return node

    def placeholder(self, name: str, example: Tensor, *, per_rank: bool) -> Node:
        """Take an input; all inputs have the shape of `example` and its open token dimension."""
        others = (node for node in self.graph.nodes if node.op != "placeholder")
        node = self.graph.placeholder(name)
        example = example.to(self.device)
        if (first := next(others, node)) is not node:
            first.prepend(node)
        if self.token_dimension is None:
            node.meta["val"] = self.mode.from_tensor(example, static_shapes=True)
        else:
            sizes = [DimDynamic.STATIC] * example.dim()
            sizes[self.token_dimension] = DimDynamic.DYNAMIC
            context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
            node.meta["val"] = self.mode.from_tensor(example, symbolic_context=context)
        self.inputs.append((name, per_rank))
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call an operator; its meta value comes from running it on fake tensors."""
        node = self.graph.call_function(target, args, kwargs)
        nodes.set_value(node)
        return node

    def finish(self, outputs: list[Node]) -> GraphModule:
        """Return these nodes, and make the module."""
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return GraphModule(self.root, self.graph)
