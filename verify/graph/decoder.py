"""A tensor-parallel FP8 Llama-like decoder, written node by node: the graph on which counts are known.

Per layer: norm, q/k/v, attention, output projection, sum over ranks, add, norm, gate/up, down projection; the sum over
ranks of the down projection belongs to the next layer's first norm, or to the final norm before the bf16 head.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from fusecheck.graph import roles
from fusecheck.graph.build import CPU, BuiltGraph
from fusecheck.graph.builder import GraphBuilder
from fusecheck.graph.family import takes_scale
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.graph.quantised import Form
from fusecheck.operations import GIVEN_SCALE

aten = torch.ops.aten
own = torch.ops.fusecheck
FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 8
VOCABULARY = 96
EPS = 1e-5
INPUT_SCALE = 4 / 448


def build_decoder(plan: ModelPlan, rank: int, world_size: int, device: torch.device = CPU) -> BuiltGraph:
    """One rank's graph; the inputs are `h`, the embedded tokens, [tokens, hidden], equal on all ranks."""
    return _Decoder(plan, rank, world_size, device).build()


class _Decoder:
    """Writes the layers; `stream` is the residual, `partial` this rank's addend of the next sum."""

    def __init__(self, plan: ModelPlan, rank: int, world_size: int, device: torch.device) -> None:
        self.plan, self.world_size = plan, world_size
        self.hidden, self.intermediate = plan.hidden, 2 * plan.hidden
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.builder = GraphBuilder(plan.seed, rank, 0 if plan.dynamic else None, device)
        self.call = self.builder.call
        self.sites = 0

    def build(self) -> BuiltGraph:
        """All layers and the head."""
        example = torch.zeros(self.plan.tokens, self.hidden, dtype=self.dtype)
        stream = self.builder.placeholder("h", example, per_rank=False)
        partial: Node | None = None
        for layer in range(self.plan.layers):
            name = f"layer{layer}"
            stream = stream if partial is None else self.reduce_add(partial, stream, residual_first=False)
            x = self.norm(stream, "input_norm.gamma" if partial is None else self.next_gamma())
            partial = self.attention(name, x)
            stream = self.reduce_add(partial, stream, residual_first=True)
            partial = self.feed_forward(name, self.norm(stream, self.next_gamma()))
        assert partial is not None
        stream = self.reduce_add(partial, stream, residual_first=False)
        x = self.norm(stream, self.next_gamma())
        head = self.builder.normal("head", VOCABULARY, self.hidden) / self.hidden**0.5
        logits = self.call(aten.linear.default, x, self.builder.attribute("head", head.to(self.dtype)))
        module = self.builder.finish([logits, stream])
        return BuiltGraph(module, self.example, (0, 1), self.builder.token_dimension)

    def example(self, tokens: int) -> tuple[Tensor, ...]:
        """Inputs for a token count."""
        shape, magnitude = (tokens, self.hidden), self.plan.magnitude
        return (self.builder.activations(f"h@{tokens}", shape, self.dtype, magnitude, per_rank=False),)

    def reduce_add(self, partial: Node, stream: Node, *, residual_first: bool) -> Node:
        """The sum over ranks and the residual, in either order of the add."""
        reduced = self.call(own.all_reduce.default, partial, self.plan.strategy)
        operands = (stream, reduced) if residual_first else (reduced, stream)
        return self.call(aten.add.Tensor, *operands)

    def next_gamma(self) -> str:
        """The name of the next site's norm weight."""
        self.sites += 1
        return f"site{self.sites - 1}.gamma"

    def norm(self, stream: Node, name: str) -> Node:
        """A norm with one rounding."""
        gamma = 1 + 0.25 * self.builder.normal(name, self.hidden)
        return self.call(roles.NORMS["triton"], stream, self.builder.attribute(name, gamma.to(self.dtype)), EPS)

    def linear(self, name: str, x: Node, outputs: int, inputs: int, scale: float = INPUT_SCALE) -> Node:
        """A quantised layer of this rank's own weight [outputs, inputs], with scales of its own."""
        if self.plan.quantiser != GIVEN_SCALE:
            form = Form(self.plan.quantiser)
            factor = (
                self.builder.attribute(f"{name}.factor", torch.tensor(6 / scale)) if takes_scale(form.name) else None
            )
            pair = self.builder.quantised(x, inputs, factor, form)
            return self.builder.made_linear(name, (*pair, factor), (outputs, inputs), form, self.plan.dtype)
        values = self.builder.normal(name, outputs, inputs, per_rank=True)
        codes = self.builder.attribute(f"{name}.weight", (values * 112).clamp(-448, 448).to(FP8))
        scales = [
            self.builder.attribute(f"{name}.{part}", torch.tensor(value))
            for part, value in (("input_scale", scale), ("weight_scale", 1 / 112 / inputs**0.5))
        ]
        return self.call(own.fp8_linear.default, x, codes, None, *scales)

    def attention(self, name: str, x: Node) -> Node:
        """Causal attention over this rank's heads, and the output projection."""
        sizes = [heads * HEAD_DIM // self.world_size for heads in (HEADS, KV_HEADS, KV_HEADS)]
        if self.plan.merged:
            joint = self.linear(f"{name}.qkv", x, sum(sizes), self.hidden)
            parts = self.call(aten.split_with_sizes.default, joint, sizes, -1)
            projected = [self.call(operator.getitem, parts, index) for index in range(3)]
        else:
            scales = (INPUT_SCALE, INPUT_SCALE * (1.5 if self.plan.k_differs else 1.0), INPUT_SCALE)
            projected = [
                self.linear(f"{name}.{part}", x, size, self.hidden, scale)
                for part, size, scale in zip("qkv", sizes, scales, strict=True)
            ]
        heads = [
            self.call(aten.view.default, each, [1, -1, size // HEAD_DIM, HEAD_DIM])
            for each, size in zip(projected, sizes, strict=True)
        ]
        turned = [self.call(aten.transpose.int, each, 1, 2) for each in heads]
        mixed = self.call(aten.scaled_dot_product_attention.default, *turned, None, 0.0, True, enable_gqa=True)  # noqa: FBT003
        back = self.call(aten.transpose.int, mixed, 1, 2)
        flat = self.call(aten.reshape.default, back, [-1, sizes[0]])
        return self.linear(f"{name}.o", flat, self.hidden, sizes[0])

    def feed_forward(self, name: str, x: Node) -> Node:
        """Gate, up and down projections."""
        width = self.intermediate // self.world_size
        if self.plan.merged:
            parts = self.call(aten.chunk.default, self.linear(f"{name}.gate_up", x, 2 * width, self.hidden), 2, -1)
            gate, up = (self.call(operator.getitem, parts, index) for index in (0, 1))
        else:
            gate, up = (self.linear(f"{name}.{part}", x, width, self.hidden) for part in ("gate", "up"))
        product = self.call(aten.mul.Tensor, self.call(aten.silu.default, gate), up)
        return self.linear(f"{name}.down", product, self.hidden, width)
