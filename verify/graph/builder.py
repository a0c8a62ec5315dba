"""Writing an FX graph node by node, each with its meta value, as an export would leave it."""

from __future__ import annotations

import operator
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from fusecheck.dataflow import DATAFLOWS
from fusecheck.graph import (
    fused_ops,  # noqa: F401 - registers the operators
    nodes,
)
from fusecheck.graph.fakes import shared_fakes
from fusecheck.graph.quantised import Form, quantise

aten, own = torch.ops.aten, torch.ops.fusecheck

WIDE = 2.0**18
"""What some columns of a wide row are multiplied by."""


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
        self.fakes = shared_fakes()
        self.inputs: list[tuple[str, bool]] = []

    def generator(self, name: str, *, per_rank: bool) -> torch.Generator:
        """Random numbers that depend on the seed, the name, and the rank if they are to differ."""
        text = f"{self.seed}/{name}/{self.rank if per_rank else 'all'}"
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))

    def normal(self, name: str, *shape: int, per_rank: bool = False) -> Tensor:
        """Standard normal float32 values."""
        return torch.randn(*shape, generator=self.generator(name, per_rank=per_rank))

    def activations(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, magnitude: float, *, per_rank: bool
    ) -> Tensor:
        """An input's values: normal ones, and where there are several rows in bf16, a last one beyond fp16's range.

        A stream that comes back through another 16-bit format loses what that format does not hold: values above
        65504, and below 6e-8.
        """
        drawn = self.normal(name, *shape, per_rank=per_rank) * magnitude
        if dtype is torch.bfloat16 and not per_rank and shape[-2] > 1:
            drawn[..., -1, ::4] *= WIDE / magnitude
            drawn[..., -1, 1::4] /= WIDE * magnitude * WIDE
        return drawn.to(self.device, dtype)

    def attribute(self, name: str, tensor: Tensor) -> Node:
        """Register a buffer under a dotted name, or find it, and read it."""
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.fakes.from_form(nodes.hold(self.root, name, tensor.to(self.device)))
        return node

    def placeholder(self, name: str, example: Tensor, *, per_rank: bool) -> Node:
        """Take an input; all inputs have the shape of `example` and its open token dimension."""
        others = (node for node in self.graph.nodes if node.op != "placeholder")
        node = self.graph.placeholder(name)
        example = example.to(self.device)
        if (first := next(others, node)) is not node:
            first.prepend(node)
        node.meta["val"] = self.fakes.from_form(example, self.token_dimension)
        self.inputs.append((name, per_rank))
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call an operator; its meta value comes from running it on fake tensors."""
        node = self.graph.call_function(target, args, kwargs)
        nodes.set_value(node)
        return node

    def weight_made(self, name: str, rows: int, columns: int, form: Form) -> tuple[Node, Node]:
        """A weight [rows, columns] in a format that makes its scales, this rank's own, filled up to whole groups."""
        values = self.normal(name, rows, columns, per_rank=True) / columns**0.5
        padded = nn.functional.pad(values, (0, missing(columns, form))).to(self.device, torch.bfloat16)
        codes, scales = quantise(padded, None, form, DATAFLOWS["trtllm"])
        return self.attribute(name, codes), self.attribute(f"{name}_scales", scales)

    def quantised(self, x: Node, width: int, factor: Node | None, form: Form) -> tuple[Node, Node]:
        """Codes and scales of rows of `width` elements, filled up to whole groups."""
        if short := missing(width, form):
            # Not by a pad: its meta kernel fixes an open token count.
            zeros = self.call(aten.zeros_like.default, x)
            rest = self.call(aten.slice.Tensor, zeros, -1, 0, short % width)
            x = self.call(aten.cat.default, [x, *[zeros] * (short // width), rest], -1)
        pair = self.call(own.quantize.default, x, factor, form.name, form.layout)
        codes, scales = (self.call(operator.getitem, pair, index) for index in (0, 1))
        return codes, scales

    def made_linear(
        self,
        name: str,
        operand: tuple[Node, Node, Node | None],
        sizes: tuple[int, int],
        form: Form,
        dtype: str,
        bias: Node | None = None,
    ) -> Node:
        """A layer of this rank's own weight, [outputs, inputs] = `sizes`, on codes, their scales, and their factor."""
        codes, scales, factor = operand
        weight, weight_scales = self.weight_made(f"{name}.weight", *sizes, form)
        args = (codes, scales, weight, weight_scales, bias, factor, None, form.name, form.layout, dtype)
        return self.call(own.quantized_linear.default, *args)

    def finish(self, outputs: list[Node]) -> GraphModule:
        """Return these nodes, and make the module."""
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return _LazyGraphModule(self.root, self.graph)


def missing(width: int, form: Form) -> int:
    """How many elements a row lacks to be whole groups."""
    return -width % (form.quantiser.group or 1)
