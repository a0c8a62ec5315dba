"""Passes that are wrong in ways that no output and no count shows at once: each is one lapse of a right pass."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from typing_extensions import override

from fusecheck.graph import nodes, roles
from fusecheck.graph.config import SharedConfig
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.quant_fusion import FuseQuant, QuantSite, Reader
from fusecheck.graph.structure import has_effect
from fusecheck.graph.transform import RefusedError, TransformInfo

aten = torch.ops.aten
own = torch.ops.fusecheck

# Work that is left behind --------------------------------------------------------------------------------------------


class ReduceLeftBehindView(FuseNorm):
    """The plain sum over ranks stays, behind a view that nobody reads."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        plain = nodes.call(self.graph, site.all_reduce.target, (x, site.strategy), site.all_reduce)  # type: ignore[arg-type]
        nodes.call(self.graph, aten.view.default, (plain, [-1]), site.all_reduce)
        return super().emit(site, x)


class AddLeft(FuseNorm):
    """Sum over ranks and residual add stay beside the fused operator, for nobody."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        plain = nodes.call(self.graph, site.all_reduce.target, (x, site.strategy), site.all_reduce)  # type: ignore[arg-type]
        nodes.call(self.graph, aten.add.Tensor, (site.residual, plain), site.add)
        return super().emit(site, x)


class NormLeft(FuseNorm):
    """A second norm of the fused sum is computed, for nobody."""

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        with self.graph.inserting_before(residual.next):
            weight = nodes.clone_attribute(self.graph, site.weight)
            nodes.call(self.graph, site.norm.target, (residual, weight, site.eps), site.norm)  # type: ignore[arg-type]
        super().redirect(site, norm, residual)


class ReduceOfZero(FuseNorm):
    """A sum over ranks that somebody reads and that changes nothing: its result is multiplied by zero and added."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        plain = nodes.call(self.graph, site.all_reduce.target, (x, site.strategy), site.all_reduce)  # type: ignore[arg-type]
        nothing = nodes.call(self.graph, aten.mul.Tensor, (plain, 0.0), site.add)
        same = nodes.call(self.graph, aten.add.Tensor, (site.residual, nothing), site.add)
        return super().emit(replace(site, residual=same), x)


class QuantLeft(FuseQuant):
    """The fused operator without codes stays beside the one with them, for nobody."""

    @override
    def remove_dead(self, site: QuantSite, results: list[Node]) -> None:
        """Leave everything."""


# Side effects ---------------------------------------------------------------------------------------------------------


class WritesDropped(FuseNorm):
    """Whatever writes in place and returns to nobody is taken for dead."""

    @override
    def candidates(self) -> list[Node]:
        found = super().candidates()
        for node in list(self.graph.nodes):
            if has_effect(node) and not node.users:
                self.graph.erase_node(node)
        return found


class WritesAdded(FuseNorm):
    """The residual is scaled in place, by one, so that no value changes."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        nodes.call(self.graph, aten.mul_.Tensor, (site.residual, 1.0), site.add)
        return super().emit(site, x)


# Loaded tensors -------------------------------------------------------------------------------------------------------


class ScalesRounded(FuseQuant):
    """Scales are rounded to powers of two where they lie, while the pass runs."""

    @override
    def check_scale(self, reader: Reader, norm: torch.Tensor) -> float:
        super().check_scale(reader, norm)
        scale = nodes.attribute(self.gm, reader.scale)
        assert scale is not None
        scale.copy_(torch.exp2(torch.floor(torch.log2(scale))))
        return float(scale)


class WeightsRounded(FuseNorm):
    """Norm weights are rounded to FP8 where they lie."""

    @override
    def check_weight(self, site: NormSite) -> None:
        super().check_weight(site)
        weight = nodes.attribute(self.gm, site.weight)
        if weight is not None:
            weight.copy_(weight.to(torch.float8_e4m3fn).to(weight.dtype))


class WeightsReplaced(FuseQuant):
    """Under a layer's weight's name there is afterwards another tensor."""

    @override
    def feed(self, reader: Reader, codes: Node) -> None:
        weight = nodes.argument(reader.node, 1) if roles.is_linear(reader.node) else None
        tensor = nodes.attribute(self.gm, weight)
        super().feed(reader, codes)
        if isinstance(weight, Node) and tensor is not None:
            path, _, leaf = str(weight.target).rpartition(".")
            changed = tensor.clone()
            changed.view(torch.uint8)[0, 0] ^= 1
            setattr(self.gm.get_submodule(path), leaf, changed)


# What nodes say of themselves -----------------------------------------------------------------------------------------


class StaticMeta(FuseNorm):
    """New nodes say the example's token count where the graph is open."""

    @override
    def rewrite(self, site: NormSite) -> None:
        known = set(self.graph.nodes)
        super().rewrite(site)
        for node in set(self.graph.nodes) - known:
            value = nodes.value(node)
            if value is not None and node.target is operator.getitem:
                sizes = [int(size.node.hint) if hasattr(size, "node") else size for size in value.shape]
                node.meta["val"] = value.new_empty(sizes)


class StridedMeta(FuseQuant):
    """The codes are said to be stored column by column."""

    @override
    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        made = super().result(site, fused, index, outputs)
        value = nodes.value(made)
        if index == outputs - 2 and value is not None:
            made.meta["val"] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        return made


class DeviceMeta(FuseNorm):
    """New nodes are said to be on the device `meta`, as a traced replacement leaves them."""

    @override
    def run(self) -> TransformInfo:
        known = set(self.graph.nodes)
        info = super().run()
        for node in set(self.graph.nodes) - known:
            value = nodes.value(node)
            if value is not None and node.target is operator.getitem:
                node.meta["val"] = torch.empty(site_shape(value), dtype=value.dtype, device="meta")
        return info


def site_shape(value: torch.Tensor) -> list[int]:
    """A fake tensor's shape with its symbols' examples."""
    return [int(size.node.hint) if hasattr(size, "node") else size for size in value.shape]


class DtypeMeta(FuseQuant):
    """The codes are said to be what the norm was."""

    @override
    def result(self, site: QuantSite, fused: Node, index: int, outputs: int) -> Node:
        made = super().result(site, fused, index, outputs)
        norms = nodes.getitems(site.fused, 0)
        if index == outputs - 2 and norms:
            made.meta["val"] = nodes.value(norms[0])
        return made


# Chance ---------------------------------------------------------------------------------------------------------------


class HashOrder(FuseNorm):
    """Sites are rewritten in the order of a set of names, which differs from process to process."""

    @override
    def agree(self, sites: dict[str, NormSite], info: Any) -> dict[str, NormSite]:
        kept = super().agree(sites, info)
        return {name: kept[name] for name in set(kept)}


class HashChoice(FuseNorm):
    """Once all ranks agree, a site is left alone after all if its name's hash is odd."""

    @override
    def agree(self, sites: dict[str, NormSite], info: Any) -> dict[str, NormSite]:
        return {name: site for name, site in super().agree(sites, info).items() if hash(name) % 2}


_seen: set[str] = set()


class Remembering(FuseNorm):
    """Sites of a weight and shape that were seen in an earlier graph are taken for done."""

    @override
    def match(self, node: Node) -> NormSite:
        site = super().match(node)
        key = f"{site.weight} {self.gm.graph._len} {site.eps}"
        if key in _seen:
            raise RefusedError("done")
        _seen.add(key)
        return site


# Nothing ------------------------------------------------------------------------------------------------------------


def nothing(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Match nothing."""
    del shared
    return gm


class WrongName(FuseNorm):
    """Looks for an operator that no graph has any more."""

    @override
    def candidates(self) -> list[Node]:
        return [node for node in self.graph.nodes if str(node.target) == "auto_deploy.rmsnorm_of_last_year"]


_counted: dict[str, int] = {}


def remembers(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse, but not in a third graph whose first norm has the name of the first: as if it were done."""
    key = str(sum(node.op == "call_function" for node in gm.graph.nodes))
    _counted[key] = _counted.get(key, 0) + 1
    # Each graph is given once to be rewritten and once to be rewritten again.
    return gm if _counted[key] > 2 else FuseNorm.apply(gm, shared)
