"""Published mistakes of the first pass, each a change of one step of the right one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from typing_extensions import override

from fusecheck.graph import nodes, roles
from fusecheck.graph.norm_fusion import FuseNorm, NormSite
from fusecheck.graph.transform import RefusedError

aten = torch.ops.aten
own = torch.ops.fusecheck


class Float32Weight(FuseNorm):
    """No check of the weight's dtype: the kernel reads float32 bytes as bf16."""

    @override
    def check_weight(self, site: NormSite) -> None:
        norm, weight = self.meta_of(site.norm, "norm"), self.meta_of(site.weight, "weight")
        if weight.shape[-1:] != norm.shape[-1:]:
            raise RefusedError("shape")


class UnknownNormAccepted(FuseNorm):
    """The guard knows plain norms and lets everything else through, so that a Gemma norm fuses as a plain one."""

    @override
    def candidates(self) -> list[Node]:
        others = [node for node in self.graph.nodes if node.target == own.gemma_rms_norm.default]
        return super().candidates() + [node for node in others if self._near_all_reduce(node)]


class SyntheticResidual(FuseNorm):
    """A norm of the bare sum is fused with uninitialised memory as its residual."""

    @override
    def candidates(self) -> list[Node]:
        bare = [
            node for node in self.graph.nodes if roles.is_norm(node) and roles.is_all_reduce(nodes.argument(node, 0))
        ]
        for norm in bare:
            reduced = nodes.argument(norm, 0)
            with self.graph.inserting_before(norm):
                empty = nodes.call(self.graph, aten.empty_like.default, (reduced,), norm)
                add = nodes.call(self.graph, aten.add.Tensor, (reduced, empty), norm)
            reduced.replace_all_uses_with(
                add, delete_user_cb=lambda user, add=add, empty=empty: user not in (add, empty)
            )
            empty.update_arg(0, nodes.argument(reduced, 0))
        self.order = nodes.positions(self.graph)
        return super().candidates()


class LastReduceMissing(FuseNorm):
    """The last sum over ranks is left to a kernel that does not do it."""

    @override
    def rewrite(self, site: NormSite) -> None:
        last = [node for node in self.graph.nodes if roles.is_all_reduce(node)][-1]
        if site.all_reduce is not last:
            super().rewrite(site)
            return
        site.all_reduce.replace_all_uses_with(nodes.argument(site.all_reduce, 0))
        self.graph.erase_node(site.all_reduce)


class WrongGroup(FuseNorm):
    """A sum over part of the ranks is fused as one over all."""

    @override
    def candidates(self) -> list[Node]:
        for node in list(self.graph.nodes):
            if node.target == own.all_reduce_grouped.default:
                with self.graph.inserting_before(node):
                    args = (node.args[0], node.args[2])
                    whole = nodes.call(self.graph, own.all_reduce.default, args, node)
                node.replace_all_uses_with(whole)
                self.graph.erase_node(node)
        self.order = nodes.positions(self.graph)
        return super().candidates()


class DoubleReduce(FuseNorm):
    """The sum over ranks is taken twice."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        twice = nodes.call(self.graph, own.all_reduce.default, (x, site.strategy), site.all_reduce)
        return super().emit(site, twice)


class ResidualOnEveryRank(FuseNorm):
    """The residual is added before the sum, on every rank."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        early = nodes.call(self.graph, aten.add.Tensor, (x, site.residual), site.add)
        zeros = nodes.call(self.graph, aten.zeros_like.default, (site.residual,), site.add)
        return super().emit(replace(site, residual=zeros), early)


class ResidualDivided(FuseNorm):
    """The residual is divided by the world size on every rank and summed with the rest, which rounds."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        part = nodes.call(self.graph, aten.div.Tensor, (site.residual, 3.0), site.add)
        rest = nodes.call(self.graph, aten.sub.Tensor, (site.residual, part), site.add)
        early = nodes.call(self.graph, aten.add.Tensor, (x, part), site.add)
        return super().emit(replace(site, residual=rest), early)


class RankLocalResidual(FuseNorm):
    """The residual that the kernel adds differs from rank to rank."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        dtype = self.meta_of(site.residual, "residual").dtype
        if not hasattr(self.gm, "shard"):
            self.gm.register_buffer("shard", torch.tensor(1.0 / (1 + self.shared.local_rank), dtype=dtype))
        shard = self.graph.get_attr("shard")
        mode: Any = self.meta_of(site.residual, "residual")
        shard.meta["val"] = mode.fake_mode.from_tensor(self.gm.shard, static_shapes=True)
        local = nodes.call(self.graph, aten.mul.Tensor, (site.residual, shard), site.add)
        return super().emit(replace(site, residual=local), x)


class ResidualInputReturned(FuseNorm):
    """The sum's readers get the residual that went in."""

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        site.norm.replace_all_uses_with(norm)
        del residual
        site.add.replace_all_uses_with(site.residual)


class BroadcastWeight(FuseNorm):
    """A weight that broadcasts is taken for one of `hidden` elements."""

    @override
    def check_weight(self, site: NormSite) -> None:
        if self.meta_of(site.weight, "weight").dtype != self.meta_of(site.norm, "norm").dtype:
            raise RefusedError("dtype")


class OneAddOrder(FuseNorm):
    """Only residual + all-reduce matches."""

    @override
    def operands(self, add: Node) -> tuple[Node, tuple[Node, ...], Node]:
        reduced, views, residual = super().operands(add)
        if nodes.argument(add, 0) is not residual:
            raise RefusedError("order")
        return reduced, views, residual


class BlindToReshape(FuseNorm):
    """A reshape between the collective and the add hides the site."""

    @override
    def operands(self, add: Node) -> tuple[Node, tuple[Node, ...], Node]:
        reduced, views, residual = super().operands(add)
        if views:
            raise RefusedError("reshape")
        return reduced, views, residual


class LiveResidualOnly(FuseNorm):
    """A site whose sum nobody else reads does not match."""

    @override
    def residual_add(self, norm: Node) -> Node:
        add = super().residual_add(norm)
        if len(add.users) == 1:
            raise RefusedError("dead residual")
        return add


class CastDropped(FuseNorm):
    """Casts to float32 before the add are looked through, and lost."""

    @override
    def candidates(self) -> list[Node]:
        for node in list(self.graph.nodes):
            if node.target == aten._to_copy.default and self._casts_sum(node):
                node.replace_all_uses_with(nodes.argument(node, 0))
                self.graph.erase_node(node)
        for node in self.graph.nodes:
            if node.op == "call_function":
                nodes.set_value(node)
        self.order = nodes.positions(self.graph)
        return super().candidates()

    def _casts_sum(self, node: Node) -> bool:
        wide = node.kwargs.get("dtype") is torch.float32
        return wide and any(user.target == aten.add.Tensor for user in node.users)


class ShardedNorm(FuseNorm):
    """Each rank normalises by the mean square of its own slice of the row."""

    @override
    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        hidden = self.meta_of(site.norm, "norm").shape[-1]
        with self.graph.inserting_before(norm.next.next):
            halves = nodes.call(self.graph, aten.unflatten.int, (residual, -1, [2, hidden // 2]), site.norm)
            gamma = nodes.clone_attribute(self.graph, site.weight)
            weight = nodes.call(self.graph, aten.view.default, (gamma, [2, hidden // 2]), site.norm)
            one = nodes.call(self.graph, aten.ones_like.default, (weight,), site.norm)
            row = nodes.call(self.graph, aten.select.int, (one, 0, 0), site.norm)
            local = nodes.call(self.graph, site.norm.target, (halves, row, site.eps), site.norm)  # type: ignore[arg-type]
            scaled = nodes.call(self.graph, aten.mul.Tensor, (local, weight), site.norm)
            flat = nodes.call(self.graph, aten.flatten.using_ints, (scaled, -2, -1), site.norm)
        super().redirect(site, flat, residual)


class ResidualAddedAgain(FuseNorm):
    """One norm flavour takes a branch that adds the residual a second time."""

    @override
    def emit(self, site: NormSite, x: Node) -> Node:
        if site.norm.target != roles.NORMS["flashinfer"]:
            return super().emit(site, x)
        again = nodes.call(self.graph, aten.add.Tensor, (site.residual, site.residual), site.add)
        return super().emit(replace(site, residual=again), x)
