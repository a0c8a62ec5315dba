"""Passes over the family that are wrong in one step: codes, scales and factors of which one does not belong."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from typing_extensions import override

from fusecheck.graph import nodes, roles
from fusecheck.graph.family import FINALIZE, KINDS
from fusecheck.graph.finalize_fusion import FinalizeSite, FuseFinalize
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.quant_fusion import FuseEveryQuant, QuantSite, Reader
from fusecheck.graph.quantised import Form
from fusecheck.graph.transform import RefusedError
from fusecheck.property_tests.graph.honest import LastFirstQuant

own = torch.ops.fusecheck

aten = torch.ops.aten
MOVES = (*KINDS, FINALIZE)


def layers_of(reader: Reader) -> list[Node]:
    """The layers that read a quantise's codes."""
    return [user for codes in nodes.getitems(reader.node, 0) for user, _ in nodes.terminal_users(codes)]


class ScalesOfAnotherSite(FuseEveryQuant):
    """Every site's layers get the scales of the first site."""

    first: Node | None = None

    @override
    def feed(self, reader: Reader, codes: Node) -> None:
        self.first = self.first or self.scales
        self.scales = self.first
        super().feed(reader, codes)


class OtherGroup(FuseEveryQuant):
    """The kernel quantises in groups of 16, the layers dequantise in their own."""

    @override
    def emit(self, site: QuantSite) -> Node:
        readers = tuple(replace(reader, form=Form("group-fp8-16", "linear")) for reader in site.readers)
        return super().emit(replace(site, readers=readers))


class PackedReadAsFloat(FuseEveryQuant):
    """Layers are told that the packed powers of two are float32."""

    @override
    def feed(self, reader: Reader, codes: Node) -> None:
        layers = layers_of(reader)
        super().feed(reader, codes)
        for layer in layers:
            with self.graph.inserting_before(layer):
                args = (nodes.named(layer, "scales"), torch.float32)
                wide = nodes.call(self.graph, aten.view.dtype, args, layer)
            nodes.replace_argument(layer, 1, wide)
            nodes.replace_argument(layer, 7, reader.form.name.replace("-packed", ""))
            nodes.replace_argument(layer, 8, "linear")


class FactorDropped(FuseEveryQuant):
    """The factor of the tensor is left out of the kernel's call."""

    @override
    def emit(self, site: QuantSite) -> Node:
        return super().emit(replace(site, readers=tuple(replace(reader, given=None) for reader in site.readers)))


class FactorOfAnotherSite(FuseEveryQuant):
    """The factor is the first that the graph has."""

    @override
    def chosen_scale(self, site: QuantSite) -> Node:
        known = [nodes.named(node, "scale") for node in self.graph.nodes if node.target == own.quantize.default]
        others = [scale for scale in known if scale is not None and scale.target != site.readers[0].scale.target]
        return others[-1] if others else site.readers[0].scale


class OneReaderLeft(FuseEveryQuant):
    """Of readers that quantise alike the last is left with the norm and its own quantise."""

    @override
    def readers(self, fused: Node) -> tuple[tuple[Reader, ...], bool]:
        found, mixed = super().readers(fused)
        return (found[:-1], True) if len(found) > 1 else (found, mixed)


class OtherLayout(FuseEveryQuant):
    """The kernel stores its scales row by row, the layers read them swizzled."""

    @override
    def emit(self, site: QuantSite) -> Node:
        readers = tuple(replace(reader, form=replace(reader.form, layout="linear")) for reader in site.readers)
        return super().emit(replace(site, readers=readers))


class StaticForDynamic(FuseEveryQuant):
    """Layers of a dynamic format get the codes that another layer's static scale made."""

    @override
    def feed(self, reader: Reader, codes: Node) -> None:
        super().feed(reader, codes)
        for node in self.graph.nodes:
            if node.target == own.quantize.default:
                for getitem in nodes.getitems(node, 0):
                    getitem.replace_all_uses_with(codes)


class FirstFormat(FuseEveryQuant):
    """Groups that differ between readers are not compared: the first one's serve all."""

    @override
    def common_scale(self, readers: tuple[Reader, ...], norm: torch.Tensor) -> float:
        return super().common_scale(readers[:1], norm)


class SplitRows(FuseEveryQuant):
    """A view that splits rows is looked through, although each half has a scale of its own."""

    @override
    def readers(self, fused: Node) -> tuple[tuple[Reader, ...], bool]:
        found, mixed = super().readers(fused)
        split = [
            Reader(user, views, None, Form("dynamic-fp8", "linear"))
            for norm in nodes.getitems(fused, 0)
            for user, views in nodes.terminal_users(norm)
            if user.target == own.quantize.default and self.kind == "dynamic_fp8"
        ]
        return (tuple(split), False) if split and not found else (found, mixed)


class GatherLeftOut(FuseNorm):
    """Rows that are spread stay spread: readers of the gathered norm get this rank's rows."""

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        super().redirect(site, norm, residual)
        for gather in site.gathers[:1]:
            with self.graph.inserting_before(gather):
                mine = nodes.call(self.graph, own.shard.default, (norm, nodes.argument(gather, 1)), gather)
            gather.replace_all_uses_with(mine)


class SharedExpertSkipped(FuseFinalize):
    """A shared expert that is added to the sum of experts is lost."""

    @override
    def candidates(self) -> list[Node]:
        for node in list(self.graph.nodes):
            if roles.fused_op(node) is None:
                continue
            add = nodes.argument(node, 0)
            if add.target == aten.add.Tensor and roles.is_finalize(add.args[0]):
                node.replace_input_with(add, add.args[0])
                self.graph.erase_node(add)
        return super().candidates()


class ReducedTwice(FuseFinalize):
    """The sum of experts is summed over the ranks before the operator that does so."""

    @override
    def match(self, node: Node) -> FinalizeSite:
        finalize, strategy = nodes.argument(node, 0), nodes.named(node, "strategy")
        with self.graph.inserting_before(node):
            twice = nodes.call(self.graph, own.all_reduce.default, (finalize, strategy), finalize)
        node.replace_input_with(finalize, twice)
        raise RefusedError("left with two sums")


# Right passes -------------------------------------------------------------------------------------------------------


class LastFirst(LastFirstQuant, FuseEveryQuant):
    """Rewrites the last site first, and tries the kinds of quantisers in another order."""

    kinds = tuple(reversed(FuseEveryQuant.kinds))


class SharesFirst(FuseEveryQuant):
    """Makes one quantise of equal ones before it looks at the sites."""

    @override
    def candidates(self) -> list[Node]:
        known: dict[Any, Node] = {}
        for node in list(self.graph.nodes):
            if node.target == own.quantize.default:
                first = known.setdefault((node.args[0], getattr(node.args[1], "target", None), node.args[2:]), node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    self.graph.erase_node(node)
        for getitem in [node for node in self.graph.nodes if node.target is operator.getitem and not node.users]:
            self.graph.erase_node(getitem)
        return super().candidates()
