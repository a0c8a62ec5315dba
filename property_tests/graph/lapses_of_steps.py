"""Passes that do one step wrong: a guard that is missing, an argument that is fixed, a view that is lost."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node
from typing_extensions import override

from fusecheck.graph import nodes
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.quant_fusion import FuseQuant, QuantSite, Reader
from fusecheck.graph.transform import RefusedError

aten = torch.ops.aten

# The norm pass --------------------------------------------------------------------------------------------------------


class AlphaIgnored(FuseNorm):
    """An add that scales an operand passes for a plain one."""

    @override
    def residual_add(self, norm: Node) -> Node:
        add = nodes.argument(norm, 0)
        if not isinstance(add, Node) or add.target != aten.add.Tensor:
            raise RefusedError("no add")
        return add


class OtherReaderIgnored(FuseNorm):
    """The sum over ranks may have other readers; they get the sum with the residual."""

    @override
    def check_sole_reader(self, site: NormSite) -> None:
        if site.views:
            super().check_sole_reader(site)
            return
        for user in list(site.all_reduce.users):
            if user is not site.add and user.op == "call_function":
                user.replace_input_with(site.all_reduce, site.add)


class BroadcastResidual(FuseNorm):
    """Shapes are not compared, so that a broadcast residual passes."""

    @override
    def check_layout(self, site: NormSite) -> None:
        if self.meta_of(site.residual, "residual").dtype != self.meta_of(site.norm, "norm").dtype:
            raise RefusedError("dtype")


class FixedEps(FuseNorm):
    """eps is the constant 1e-6."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        return super().emit(replace(site, eps=1e-6), x)


class FixedStrategy(FuseNorm):
    """The strategy is a literal of the replacement."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        return super().emit(replace(site, strategy="AUTO"), x)


class NoMeta(FuseNorm):
    """New nodes have no meta value."""

    @override
    def rewrite(self, site: NormSite) -> None:
        known = set(self.graph.nodes)
        super().rewrite(site)
        for node in set(self.graph.nodes) - known:
            if node.target is operator.getitem:
                node.meta.pop("val", None)


# The quantising pass --------------------------------------------------------------------------------------------------


class BadScaleValue(FuseQuant):
    """Zero, negative and non-finite scales pass."""

    @override
    def check_scale(self, reader: Reader, norm: Tensor) -> float:
        scale = nodes.attribute(self.gm, reader.scale)
        if scale is None or scale.numel() != 1 or scale.dtype is not torch.float32:
            return super().check_scale(reader, norm)
        return 1.0


class ViewDropped(FuseQuant):
    """Views between norm and layer are lost."""

    @override
    def reapply(self, views: tuple[Node, ...], quant: Node, copies: dict[Node, Node]) -> Node:
        del views, copies
        return quant


class AlwaysOutQuant(FuseQuant):
    """The norm is returned whether anybody reads it or not."""

    @override
    def match(self, node: Node) -> QuantSite:
        return replace(super().match(node), mixed=True)
