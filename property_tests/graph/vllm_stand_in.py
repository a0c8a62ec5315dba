"""A small pass on vLLM's operators, functionalised as its own, and lapses of it that vLLM's users have met."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import GraphModule, Node
from typing_extensions import override

from fusecheck.graph import nodes
from fusecheck.graph.config import SharedConfig
from fusecheck.graph.vllm_host import PATTERN_CODES, overload
from fusecheck.graph.vllm_quantisers import form_of, quantises

aten = torch.ops.aten
IN_PLACE_OF_ADDEND, IN_PLACE_OF_RESIDUAL, CODES, SCALES = 1, 2, 4, 5
"""Which result of the functionalised call is what the operator has written there."""


def nothing(gm: GraphModule) -> None:
    """Leave a graph as it is."""


class Fusing:
    """Every sum over ranks that a norm alone reads is fused, with the quantise if it alone reads the norm.

    A norm without a residual gets zeros for one, as in vLLM.
    """

    patterns: ClassVar[dict[str, str]] = {"static_scaled_fp8_quant": "FP8Quant"}

    def __init__(self, gm: GraphModule, world_size: int) -> None:
        self.graph, self.world_size = gm.graph, world_size

    @classmethod
    def apply(cls, gm: GraphModule, shared: SharedConfig) -> GraphModule:
        """As a pass."""
        made = cls(gm, shared.world_size)
        for node in list(gm.graph.nodes) if shared.world_size > 1 else ():
            if node.target == overload("fused_add_rms_norm"):
                x, residual, weight, eps = (nodes.argument(node, at) for at in range(4))
                made.site(node, x, residual, weight, eps)
            elif node.target == overload("rms_norm"):
                x, weight, eps = (nodes.argument(node, at) for at in range(3))
                made.site(node, x, None, weight, eps)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    def site(self, norm: Node, x: Node, residual: Node | None, weight: Node, eps: float) -> None:
        """Fuse at a norm, with or without its add, if it reads a sum over ranks that nobody else does."""
        if x.target != overload("all_reduce") or len(x.users) != 1 or not self.fits(x, weight):
            return
        normed = [norm] if residual is None else nodes.getitems(norm, 0)
        quantises = [user for each in normed for user in each.users if self.pattern(user) is not None]
        quantise = quantises[0] if len(quantises) == 1 and self.alone(normed) else None
        with self.graph.inserting_before((quantise or norm).next):
            residual = residual or self.no_residual(x)
            arguments = self.arguments(x, residual, weight, eps, quantise)
            fused = self.graph.call_function(auto_functionalized, (overload("fused"),), arguments)
            nodes.set_value(fused, x)
            sums = [] if norm in normed else nodes.getitems(norm, 1)
            for index, readers in self.results(normed, sums, quantise):
                made = nodes.call(self.graph, operator.getitem, (fused, index), norm)
                for reader in readers:
                    reader.replace_all_uses_with(made, delete_user_cb=lambda user: user is not quantise)

    def pattern(self, node: Node) -> str | None:
        """FlashInfer's name of the operation that ends with this quantise; None for another node."""
        names = self.patterns.items() if node.target is auto_functionalized else ()
        return next((f"kARResidualRMSNorm{name}" for role, name in names if node.args[0] == overload(role)), None)

    def fits(self, x: Node, weight: Node) -> bool:
        """Whether the kernel can read the weight: it takes the activations' dtype for granted."""
        values = [nodes.value(each) for each in (x, weight)]
        return len({value.dtype if value is not None else None for value in values}) == 1

    def alone(self, normed: list[Node]) -> bool:
        """Whether nobody but a quantise reads the norm, which a quantising call does not write."""
        return all(len(each.users) == 1 for each in normed)

    def no_residual(self, x: Node) -> Node:
        """What is added where there is no residual."""
        return nodes.call(self.graph, aten.zeros_like.default, (nodes.argument(x, 0),), x)

    def arguments(self, x: Node, residual: Node, weight: Node, eps: float, quantise: Node | None) -> dict[str, Any]:
        """Of the fused call."""
        code = "kARResidualRMSNorm" if quantise is None else str(self.pattern(quantise))
        found = {
            "allreduce_in": nodes.argument(x, 0),
            "residual": residual,
            "norm_out": None,
            "quant_out": None if quantise is None else quantise.kwargs.get("result"),
            "scale_out": None,
            "rms_gamma": weight,
            "rms_eps": eps,
            "pattern_code": PATTERN_CODES[code],
            "world_size": self.world_size,
            "launch_with_pdl": True,
            "fp32_acc": True,
            "max_token_num": 4096,
        }
        return found if quantise is None else found | {"scale_factor": quantise.kwargs.get("scale")}

    def results(self, normed: list[Node], sums: list[Node], quantise: Node | None) -> list[tuple[int, list[Node]]]:
        """Who reads what of the call."""
        if quantise is None:
            return [(IN_PLACE_OF_ADDEND, normed), (IN_PLACE_OF_RESIDUAL, sums)]
        return [(CODES, nodes.getitems(quantise, 1)), (IN_PLACE_OF_RESIDUAL, sums)]


class FusingScales(Fusing):
    """The quantisers that make their scales are fused, too, in groups of 128."""

    patterns: ClassVar = {
        **Fusing.patterns,
        "dynamic_per_token_scaled_fp8_quant": "DynamicFP8Quant",
        "per_token_group_fp8_quant_packed": "PerTokenGroupFP8PackedQuant",
        "scaled_fp4_quant": "FP4Quant",
    }

    @override
    def pattern(self, node: Node) -> str | None:
        return super().pattern(node) if node.kwargs.get("group_size", 128) == 128 else None

    @override
    def arguments(self, x: Node, residual: Node, weight: Node, eps: float, quantise: Node | None) -> dict[str, Any]:
        found = super().arguments(x, residual, weight, eps, quantise)
        if quantise is None or not quantises(quantise):
            return found
        _, call = form_of(quantise)
        codes, scales = (quantise.kwargs[name] for name in (call.codes, call.scales))
        return found | {"quant_out": codes, "scale_out": scales, "scale_factor": quantise.kwargs.get(call.factor)}

    @override
    def results(self, normed: list[Node], sums: list[Node], quantise: Node | None) -> list[tuple[int, list[Node]]]:
        found = super().results(normed, sums, quantise)
        scales = [] if quantise is None else nodes.getitems(quantise, 2)
        return [*found, (SCALES, scales)] if scales else found


# Lapses ---------------------------------------------------------------------------------------------------------------


class AnyWeight(Fusing):
    """A float32 weight is read as if it were the activations' (vLLM issue 48324)."""

    @override
    def fits(self, x: Node, weight: Node) -> bool:
        return True


class UnwrittenResidual(Fusing):
    """A residual that nobody has written to stands in for none (vLLM PR 41767)."""

    @override
    def no_residual(self, x: Node) -> Node:
        return nodes.call(self.graph, aten.empty_like.default, (nodes.argument(x, 0),), x)


class ZerosLikeTheSum(Fusing):
    """The zeros that stand in for no residual take their form from the plain sum over ranks, which so stays alive."""

    @override
    def no_residual(self, x: Node) -> Node:
        return nodes.call(self.graph, aten.zeros_like.default, (x,), x)


class UnwrittenNorm(Fusing):
    """Who reads the norm beside the quantise gets the buffer that a quantising call leaves unwritten."""

    @override
    def alone(self, normed: list[Node]) -> bool:
        return True

    @override
    def results(self, normed: list[Node], sums: list[Node], quantise: Node | None) -> list[tuple[int, list[Node]]]:
        found = super().results(normed, sums, quantise)
        return found if quantise is None else [*found, (IN_PLACE_OF_ADDEND, normed)]


class ResultsSwapped(Fusing):
    """Norm and sum are each looked for where the other is."""

    @override
    def results(self, normed: list[Node], sums: list[Node], quantise: Node | None) -> list[tuple[int, list[Node]]]:
        found = super().results(normed, sums, quantise)
        swapped = {IN_PLACE_OF_ADDEND: IN_PLACE_OF_RESIDUAL, IN_PLACE_OF_RESIDUAL: IN_PLACE_OF_ADDEND}
        return [(swapped.get(index, index), readers) for index, readers in found]


class OtherLimits(Fusing):
    """The codes of a group go up to the largest of another FP8 format."""

    @classmethod
    @override
    def apply(cls, gm: GraphModule, shared: SharedConfig) -> GraphModule:
        for node in gm.graph.nodes:
            if "fp8_max" in node.kwargs:
                node.kwargs = {**node.kwargs, "fp8_min": -240.0, "fp8_max": 240.0}
        return super().apply(gm, shared)
