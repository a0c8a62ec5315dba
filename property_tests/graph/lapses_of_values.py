"""Passes whose values are another format's, or at another scale, and look right on most inputs."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node
from typing_extensions import override

from fusecheck.graph import nodes
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.quant_fusion import FuseQuant, QuantSite, Reader

own = torch.ops.fusecheck

aten = torch.ops.aten


# Precision ------------------------------------------------------------------------------------------------------------


class _Through(FuseNorm):
    """The residual comes back through another format."""

    through = torch.float16

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        dtype = self.meta_of(site.add, "add").dtype
        with self.graph.inserting_before(residual.next):
            there = nodes.call(self.graph, aten.to.dtype, (residual, self.through), site.add)
            back = nodes.call(self.graph, aten.to.dtype, (there, dtype), site.add)
        super().redirect(site, norm, back)


class ResidualThroughFp16(_Through):
    """A bf16 residual comes back through fp16: values beyond 65504 become infinite, small ones zero."""


class ResidualThroughFp8(_Through):
    """The residual comes back through E5M2."""

    through = torch.float8_e5m2


class ResidualClamped(FuseNorm):
    """The residual is held within fp16's range, whatever its dtype."""

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        with self.graph.inserting_before(residual.next):
            held = nodes.call(self.graph, aten.clamp.default, (residual, -65504.0, 65504.0), site.add)
        super().redirect(site, norm, held)


# A quantise that is not the reader's own ------------------------------------------------------------------------------


class EqualScale(FuseQuant):
    """Layers are pointed at another layer's scale, which has the same value today."""

    @override
    def feed(self, reader: Reader, codes: Node) -> None:
        mine = nodes.attribute(self.gm, reader.scale)
        super().feed(reader, codes)
        for node in self.graph.nodes:
            other = nodes.attribute(self.gm, node)
            if mine is None or other is None or other is mine or other.shape != mine.shape:
                continue
            if "input_scale" in str(node.target) and torch.equal(other, mine):
                self._repoint(mine, str(node.target))
                return

    def _repoint(self, mine: torch.Tensor, target: str) -> None:
        for node in list(self.graph.nodes):
            if nodes.attribute(self.gm, node) is mine:
                for user in [user for user in node.users if user.target == own.fp8_prequant_linear.default]:
                    with self.graph.inserting_before(user):
                        clone = self.graph.get_attr(target)
                    clone.meta.update(node.meta)
                    user.replace_input_with(node, clone)


class UnitScale(FuseQuant):
    """The kernel quantises at a scale of the pass's own, and the layers dequantise with theirs."""

    @override
    def chosen_scale(self, site: QuantSite) -> Node:
        theirs = site.readers[0].scale
        value = nodes.attribute(self.gm, theirs)
        assert value is not None
        if not hasattr(self.gm, "common_scale"):
            self.gm.register_buffer("common_scale", value * 1.0000001192092896)
        made = self.graph.get_attr("common_scale")
        made.meta.update(theirs.meta)
        return made


class CodesRequantised(FuseQuant):
    """Codes pass through activations and a second quantise on their way, at the same scale."""

    @override
    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        made = super().result(site, fused, index, outputs)
        if index != outputs - 2:
            return made
        scale = nodes.clone_attribute(self.graph, self.chosen_scale(site))
        wide = nodes.call(self.graph, aten.to.dtype, (made, torch.bfloat16), site.fused)
        back = nodes.call(self.graph, aten.mul.Tensor, (wide, scale), site.fused)
        pair = nodes.call(self.graph, own.static_quantize_e4m3_per_tensor.default, (back, scale), site.fused)
        return nodes.call(self.graph, operator.getitem, (pair, 0), site.fused)
