"""Passes that are right in other ways than Fusecheck's own: other order, other names, copies, cleaned graphs."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from typing_extensions import override

from fusecheck.graph import nodes, roles
from fusecheck.graph.config import SharedConfig
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.quant_fusion import FuseQuant, QuantSite
from fusecheck.graph.structure import copy_graph, has_effect

aten = torch.ops.aten


class LastFirst(FuseNorm):
    """Rewrites the last site first."""

    @override
    def agree(self, sites: dict[str, NormSite], info: Any) -> dict[str, NormSite]:
        kept = super().agree(sites, info)
        return {name: kept[name] for name in reversed(list(kept))}


class LastFirstQuant(FuseQuant):
    """Rewrites the last site first."""

    @override
    def agree(self, sites: dict[str, QuantSite], info: Any) -> dict[str, QuantSite]:
        kept = super().agree(sites, info)
        return {name: kept[name] for name in reversed(list(kept))}


def renamed(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse, and give every node another name, each time another."""
    gm = FuseNorm.apply(gm, shared)
    for number, node in enumerate(gm.graph.nodes):
        if node.op == "call_function":
            node._rename(f"step_{number}_{len(gm.graph.nodes)}")
    return gm


def cleaned(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse, and leave a canonical graph: no dead code, loads at the top."""
    gm = FuseQuant.apply(gm, shared)
    gm.graph.eliminate_dead_code()
    reads = [node for node in gm.graph.nodes if node.op == "get_attr"]
    first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in reads:
        first.prepend(node)
    gm.recompile()
    return gm


def copied(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse a copy, and return it; the graph that was given stays as it is."""
    return FuseNorm.apply(copy_graph(gm), shared)


def copied_whole(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse a copy with tensors of its own."""
    metas = [dict(node.meta) for node in gm.graph.nodes]
    made = copy.deepcopy(gm)
    for node, meta in zip(made.graph.nodes, metas, strict=True):
        node.meta.update(meta)
    made.__dict__["is_draft"] = bool(getattr(gm, "is_draft", False))
    return FuseQuant.apply(made, shared)


class OwnScale(FuseQuant):
    """Gives the kernel a copy of the scale under a name of its own."""

    @override
    def chosen_scale(self, site: QuantSite) -> Node:
        theirs = site.readers[0].scale
        value = nodes.attribute(self.gm, theirs)
        assert value is not None
        name = f"{site.fused.name}_scale"
        if not hasattr(self.gm, name):
            self.gm.register_buffer(name, value.clone())
        made = self.graph.get_attr(name)
        made.meta.update(theirs.meta)
        return made


class ByKeyword(FuseNorm):
    """Names every argument of the fused operator."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        made = super().emit(site, x)
        names = [argument.name for argument in nodes.schema_of(made).arguments]
        made.kwargs = dict(zip(names, made.args, strict=False))
        made.args = ()
        return made


class UnreadResults(FuseNorm):
    """Leaves the results that nobody reads: taking one of several costs nothing."""

    @override
    def rewrite(self, site: NormSite) -> None:
        super().rewrite(site)
        fused = next(node for node in reversed(self.graph.nodes) if roles.fused_op(node) is not None)
        if not nodes.getitems(fused, 1):
            with self.graph.inserting_before(fused.next):
                nodes.call(self.graph, operator.getitem, (fused, 1), fused)


def one_read_each(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse, and let all readers of a loaded tensor share one read of it."""
    gm = FuseNorm.apply(gm, shared)
    first: dict[str, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "get_attr" and first.setdefault(str(node.target), node) is not node:
            node.replace_all_uses_with(first[str(node.target)])
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def late(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse, and move each layer behind everything that does not read it."""
    gm = FuseNorm.apply(gm, shared)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function" and node.users and not has_effect(node):
            order = nodes.positions(gm.graph)
            min(node.users, key=order.__getitem__).prepend(node)
    gm.recompile()
    return gm


def as_parameters(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse, and hold loaded tensors as parameters instead of buffers."""
    gm = FuseQuant.apply(gm, shared)
    for name, tensor in list(gm.named_buffers()):
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        delattr(owner, leaf)
        setattr(owner, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return gm
