"""What reads a norm: layers with and without codes, routers, outputs, and the ways to see it through views."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from fusecheck.graph import fused_ops  # noqa: F401 - registers the operators
from fusecheck.graph.canvas import FP8, Canvas
from fusecheck.graph.family import takes_scale
from fusecheck.graph.plan import SCALES, ReaderPlan

aten = torch.ops.aten
own = torch.ops.fusecheck
ROUTES = 8
"""Outputs of a router."""


class Readers:
    """Writes the readers of one site's norm.

    Args:
        canvas: the graph.
        prefix: of the names of the site's weights.
    """

    def __init__(self, canvas: Canvas, prefix: str) -> None:
        self.canvas, self.builder, self.prefix = canvas, canvas.builder, prefix
        self.plan, self.hidden = canvas.plan, canvas.plan.hidden
        self.call = canvas.builder.call
        self.pairs: dict[object, tuple[Node, Node, Node | None]] = {}

    def write(self, number: int, reader: ReaderPlan, norm: Node) -> Node | None:
        """One reader; returns what the next site's partial sum is made of, if anything."""
        name = f"{self.prefix}.reader{number}"
        if reader.kind == "capture":
            self.canvas.output(norm)
            return None
        if reader.kind == "e5m2":
            self.canvas.output(self.call(aten._to_copy.default, norm, dtype=torch.float8_e5m2))
            return None
        if reader.kind == "weight":
            self.read_as_weight(name, norm)
            return None
        if reader.kind == "made":
            return self.unview(reader, self.made(name, reader, norm))
        seen = self.view(reader, norm)
        if reader.kind == "router":
            logits = self.call(
                aten.linear.default, seen, self.canvas.weight(f"{name}.router", ROUTES, self.width(reader))
            )
            self.canvas.output(self.call(aten.softmax.int, logits, -1))
            return None
        if reader.kind in ("fp8", "quantize", "dead"):
            found = self.quantized(name, reader, seen)
        else:
            found = self.plain_linear(name, seen, self.width(reader))
        if reader.kind == "dead":
            return None
        return self.unview(reader, found)

    def unview(self, reader: ReaderPlan, found: Node) -> Node:
        """A layer's result in the shape of the activations; of two half rows the sum."""
        if reader.view == "halves":
            pairs = self.call(aten.view.default, found, [*self.canvas.open_shape[:-1], 2, self.hidden])
            return self.call(aten.sum.dim_IntList, pairs, [-2])
        return found if reader.view == "none" else self.call(aten.view.default, found, self.canvas.open_shape)

    def width(self, reader: ReaderPlan) -> int:
        """Columns of what the reader sees."""
        return self.hidden // 2 if reader.view == "halves" else self.hidden

    def view(self, reader: ReaderPlan, norm: Node) -> Node:
        """The norm as the reader sees it."""
        flat = [-1, self.hidden]
        if reader.view == "flat":
            return self.call(aten.view.default, norm, flat)
        if reader.view == "halves":
            return self.call(aten.view.default, norm, [-1, self.hidden // 2])
        if reader.view == "unsqueeze":
            return self.call(aten.unsqueeze.default, norm, 0)
        if reader.view == "chain":
            dense = self.call(aten.contiguous.default, self.call(aten.reshape.default, norm, flat))
            return self.call(aten.view.default, dense, [1, -1, self.hidden])
        return norm

    def read_as_weight(self, name: str, norm: Node) -> None:
        """A layer whose weight is the norm; its input has codes of its own."""
        codes = (self.builder.normal(name, 2, self.hidden) * 50).clamp(-448, 448).to(FP8)
        scales = [self.canvas.scalar(f"{name}.{part}", 0.01) for part in ("input_scale", "weight_scale")]
        source = self.builder.attribute(f"{name}.codes", codes)
        weight = self.call(aten.view.default, norm, [-1, self.hidden])
        self.canvas.output(self.call(own.fp8_linear.default, source, weight, None, *scales, self.plan.dtype))

    def plain_linear(self, name: str, seen: Node, width: int) -> Node:
        """A linear layer without quantisation."""
        return self.call(aten.linear.default, seen, self.canvas.weight(f"{name}.weight", self.hidden, width))

    def quantized(self, name: str, reader: ReaderPlan, seen: Node) -> Node:
        """A linear layer on codes, with its own quantise or a separate one."""
        weight, weight_scale = self.canvas.weight_fp8(f"{name}.weight", self.hidden, self.width(reader))
        bias = self.bias(name) if reader.bias else None
        scale = self.scale(name, reader, seen)
        if reader.kind == "quantize":
            pair = self.call(own.static_quantize_e4m3_per_tensor.default, seen, scale)
            codes, step = (self.call(operator.getitem, pair, index) for index in (0, 1))
            args = (codes, weight, bias, step, weight_scale, self.plan.dtype)
            return self.call(own.fp8_prequant_linear.default, *args)
        linear = getattr(own.fp8_linear.default, "overloadpacket") if reader.packet else own.fp8_linear.default  # noqa: B009
        if reader.keywords:
            return self.call(linear, seen, weight, bias=bias, input_scale=scale, weight_scale=weight_scale)
        return self.call(linear, seen, weight, bias, scale, weight_scale)

    def made(self, name: str, reader: ReaderPlan, norm: Node) -> Node:
        """A linear layer on codes behind a quantise that makes their scales; its weight has the same format.

        The norm is viewed only where it is quantised anew, so that no view is left without a reader.
        """
        form, width = reader.form, self.width(reader)
        key = (form, reader.view)
        if not reader.shared_scale or key not in self.pairs:
            seen = self.view(reader, norm)
            factor = self.scale(name, reader, seen) if takes_scale(form.name) else None
            self.pairs[key] = (*self.builder.quantised(seen, width, factor, form), factor)
        bias = self.bias(name) if reader.bias else None
        sizes = (self.hidden, width)
        return self.builder.made_linear(name, self.pairs[key], sizes, form, self.plan.dtype, bias)

    def bias(self, name: str) -> Node:
        """A layer's bias, [hidden]."""
        return self.builder.attribute(
            f"{name}.bias", self.builder.normal(f"{name}.bias", self.hidden).to(self.canvas.dtype)
        )

    def scale(self, name: str, reader: ReaderPlan, seen: Node) -> Node:
        """The reader's input scale; of NVFP4 the factor that brings such a largest value to the largest of E2M1."""
        value = 6 / SCALES[reader.scale] if reader.quantiser else SCALES[reader.scale]
        kinds: dict[str, Callable[[], Tensor]] = {
            "static": lambda: torch.tensor(value),
            "vector": lambda: torch.full((self.width(reader),), value),
            "bf16": lambda: torch.tensor(value, dtype=torch.bfloat16),
            "zero": lambda: torch.tensor(0.0),
            "negative": lambda: torch.tensor(-value),
            "nan": lambda: torch.tensor(float("nan")),
            "infinite": lambda: torch.tensor(float("inf")),
            "per_rank": lambda: torch.tensor(value * (1 + self.canvas.rank)),
        }
        if reader.scale_kind == "dynamic":
            largest = self.call(aten.amax.default, self.call(aten.abs.default, seen))
            wide = self.call(aten._to_copy.default, largest, dtype=torch.float32)
            return self.call(aten.clamp.default, self.call(aten.div.Tensor, wide, 448.0), 1e-12)
        if reader.shared_scale and not reader.quantiser:
            name = f"{self.prefix}.reader0"
        return self.builder.attribute(f"{name}.input_scale", kinds[reader.scale_kind]())
