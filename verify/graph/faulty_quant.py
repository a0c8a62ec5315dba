"""Published mistakes of the quantising pass, each a change of one step of the right one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node
from typing_extensions import override

from fusecheck.graph import nodes, roles
from fusecheck.graph.quant_fusion import LINEAR_SCALE, FuseQuant, QuantSite, Reader
from fusecheck.graph.transform import RefusedError


class FirstScale(FuseQuant):
    """The first reader's scale serves all."""

    @override
    def common_scale(self, readers: tuple[Reader, ...], norm: Tensor) -> float:
        return self.check_scale(readers[0], norm)


class SmallestScale(FuseQuant):
    """The smallest of the readers' scales serves all."""

    @override
    def common_scale(self, readers: tuple[Reader, ...], norm: Tensor) -> float:
        return min(self.check_scale(reader, norm) for reader in readers)

    @override
    def chosen_scale(self, site: QuantSite) -> Node:
        by_value = {float(self._value(reader)): reader.scale for reader in site.readers}
        return by_value[site.value]

    def _value(self, reader: Reader) -> Tensor:
        scale = nodes.attribute(self.gm, reader.scale)
        if scale is None:
            raise RefusedError("dynamic")
        return scale


class NextScale(FuseQuant):
    """The scale of another layer further down is taken."""

    @override
    def chosen_scale(self, site: QuantSite) -> Node:
        layers = [node for node in self.graph.nodes if roles.is_linear(node)]
        scales = [nodes.argument(node, LINEAR_SCALE) for node in layers]
        known = [scale for scale in scales if nodes.attribute(self.gm, scale) is not None]
        others = [scale for scale in known if scale.target != site.readers[0].scale.target]
        return others[0] if others else site.readers[0].scale


class MergedScales(SmallestScale):
    """Different scales are merged to the largest, which the layers then also dequantise with."""

    @override
    def common_scale(self, readers: tuple[Reader, ...], norm: Tensor) -> float:
        return max(self.check_scale(reader, norm) for reader in readers)

    @override
    def feed(self, reader: Reader, codes: Node) -> None:
        if roles.is_linear(reader.node):
            merged = codes
            while not isinstance(scale := nodes.argument(merged, 0), Node) or roles.fused_op(merged) is None:
                merged = scale
            nodes.replace_argument(reader.node, LINEAR_SCALE, nodes.argument(merged, 3))
        super().feed(reader, codes)


class RankLocalScale(FuseQuant):
    """Each rank goes by its own scale."""

    @override
    def agree(self, sites: dict[str, QuantSite], info: Any) -> dict[str, QuantSite]:
        del info
        return sites


class NormForCodes(FuseQuant):
    """With both outputs the layers get the norm."""

    @override
    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        swapped = {0: 1, 1: 0}.get(index, index) if site.mixed else index
        return super().result(site, fused, swapped, outputs)


class MixedIgnored(FuseQuant):
    """The norm is dropped although somebody reads it, who then gets the residual."""

    @override
    def match(self, node: Node) -> QuantSite:
        return replace(super().match(node), mixed=False)

    @override
    def remove_dead(self, site: QuantSite, results: list[Node]) -> None:
        for norm in nodes.getitems(site.fused, 0):
            norm.replace_all_uses_with(results[-1])
        super().remove_dead(site, results)


class ResidualAtOne(FuseQuant):
    """The residual is taken from index 1, where the three-output operator has the codes."""

    @override
    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        return super().result(site, fused, min(index, 1), outputs)


class VectorScale(FuseQuant):
    """A scale per channel is taken for one number."""

    @override
    def check_scale(self, reader: Reader, norm: Tensor) -> float:
        scale = nodes.attribute(self.gm, reader.scale)
        if scale is not None and scale.numel() > 1:
            return float(scale[0])
        return super().check_scale(reader, norm)
