"""All-reduce, residual add and RMSNorm become one operator with two results.

Where rows are spread over the ranks, reduce-scatter, add and norm on this rank's rows, and all-gather are the same.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fusecheck.graph import nodes, roles
from fusecheck.graph.config import NORM_PASS
from fusecheck.graph.transform import RefusedError, Transform, TransformInfo, check_activations, same_shape

own = torch.ops.fusecheck

_add = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class NormSite:
    """Where an all-reduced tensor is added to the residual and normalised.

    Attributes:
        norm: the RMSNorm.
        add: the residual add, which becomes the second result.
        all_reduce: the collective.
        views: between the collective and the add, innermost first.
        residual: the other operand of the add.
        weight: of the norm.
        eps: of the norm.
        strategy: of the collective.
        gathers: of norm and sum, where rows are spread: their readers get the fused operator's results as they are.
    """

    norm: Node
    add: Node
    all_reduce: Node
    views: tuple[Node, ...]
    residual: Node
    weight: Node
    eps: float
    strategy: str
    gathers: tuple[Node, ...] = ()


class FuseNorm(Transform[NormSite]):
    """`fuse_allreduce_residual_rmsnorm`: the pass that makes the nodes which the quantising pass rewrites."""

    name = NORM_PASS

    def candidates(self) -> list[Node]:
        """The norms that read a sum of which a summand is an all-reduce; of two on one sum, the first that fits."""
        return [node for node in self.graph.nodes if roles.is_norm(node) and self._near_all_reduce(node)]

    def _near_all_reduce(self, norm: Node) -> bool:
        add = nodes.argument(norm, 0)
        operands = add.all_input_nodes if isinstance(add, Node) else []
        return any(roles.is_sum(nodes.through_views(each)[0]) for each in operands)

    def find(self, info: TransformInfo) -> dict[str, NormSite]:
        """See `Transform.find`; a sum belongs to one site only."""
        found = super().find(info)
        taken: dict[Node, str] = {}
        for name, site in found.items():
            taken.setdefault(site.add, name)
        return {name: site for name, site in found.items() if taken[site.add] == name}

    def match(self, node: Node) -> NormSite:
        """See `Transform.match`."""
        add = self.residual_add(node)
        reduced, views, residual = self.operands(add)
        weight, eps = nodes.argument(node, 1), nodes.argument(node, 2)
        strategy = self.check_strategy(nodes.named(reduced, "strategy"))
        if not isinstance(weight, Node) or not isinstance(eps, float):
            raise RefusedError("the norm's weight or eps is computed in a way that an argument cannot carry")
        site = NormSite(node, add, reduced, views, residual, weight, eps, strategy, self.gathers(reduced, node, add))
        if not roles.is_all_reduce(reduced):
            self.whole(residual)
        self.check_sole_reader(site)
        self.check_layout(site)
        self.check_weight(site)
        self.check_order(site)
        self.check_unwritten("tensors of the site", nodes.argument(reduced, 0), reduced, residual, add, node)
        return site

    def residual_add(self, norm: Node) -> Node:
        """The plain sum that the norm reads.

        Raises:
            RefusedError: it reads something else.
        """
        add = nodes.argument(norm, 0)
        if not isinstance(add, Node) or add.op != "call_function" or add.target != _add:
            raise RefusedError("the norm does not read a residual add")
        if add.kwargs.get("alpha", 1) != 1:
            raise RefusedError(f"the add scales an operand by alpha={add.kwargs['alpha']}")
        return add

    def operands(self, add: Node) -> tuple[Node, tuple[Node, ...], Node]:
        """The collective, the views after it, and the residual; the summands may stand in either order.

        Raises:
            RefusedError: not exactly one summand is an all-reduce, or the other is not a tensor.
        """
        left, right = nodes.argument(add, 0), nodes.argument(add, 1)
        if left is right:
            raise RefusedError("both summands are the same tensor")
        found = [(*nodes.through_views(each), other) for each, other in ((left, right), (right, left))]
        matches = [entry for entry in found if roles.is_sum(entry[0])]
        if len(matches) != 1:
            raise RefusedError(f"{len(matches)} of the summands are all-reduces")
        reduced, views, residual = matches[0]
        if not isinstance(residual, Node) or not isinstance(reduced, Node):
            raise RefusedError("the other summand is not a tensor")
        return reduced, tuple(reversed(views)), residual

    def gathers(self, reduced: Node, norm: Node, add: Node) -> tuple[Node, ...]:
        """The all-gathers of norm and sum where rows are spread; none where they are not.

        Raises:
            RefusedError: somebody reads this rank's rows, so that they would have to be cut out again.
        """
        if roles.is_all_reduce(reduced):
            return ()
        found = []
        for source in (norm, add):
            users = [user for user in source.users if user is not norm]
            if any(not roles.calls(user, own.all_gather.default) for user in users):
                raise RefusedError(f"somebody reads this rank's rows of {source.name} before they are gathered")
            found += users
        return tuple(found)

    def whole(self, residual: Node) -> Node:
        """The residual of all rows of which a site adds this rank's.

        Raises:
            RefusedError: it is spread over the ranks.
        """
        if not roles.calls(residual, own.shard.default):
            raise RefusedError(f"the residual {residual.name} is spread over the ranks")
        found = nodes.argument(residual, 0)
        assert isinstance(found, Node)
        return found

    def check_sole_reader(self, site: NormSite) -> None:
        """The plain sum over ranks exists nowhere after fusion, so nobody else may read it.

        Raises:
            RefusedError: somebody does.
        """
        for node in (site.all_reduce, *site.views):
            if len(node.users) != 1:
                raise RefusedError(f"{node.name} has {len(node.users)} readers")

    def check_layout(self, site: NormSite) -> None:
        """Shapes and dtypes that the kernel assumes without looking.

        Raises:
            RefusedError: they are different or unknown.
        """
        reduced = self.meta_of(site.views[-1] if site.views else site.all_reduce, "all-reduce")
        residual, norm = self.meta_of(site.residual, "residual"), self.meta_of(site.norm, "norm")
        added = self.meta_of(site.add, "add")
        self.meta_of(nodes.argument(site.all_reduce, 0), "partial sum")
        check_activations(norm)
        for name, other in (("residual", residual), ("all-reduce", reduced), ("sum", added)):
            if other.dtype != norm.dtype:
                raise RefusedError(f"the {name} is {other.dtype}, the norm {norm.dtype}")
            if not same_shape(other, norm):
                raise RefusedError(f"the {name} has shape {tuple(other.shape)}, the norm {tuple(norm.shape)}")
        self.check_policy(norm)

    def check_weight(self, site: NormSite) -> None:
        """The kernel reads `hidden` elements of the activations' dtype.

        Raises:
            RefusedError: the weight is something else.
        """
        weight, norm = self.meta_of(site.weight, "norm weight"), self.meta_of(site.norm, "norm")
        if weight.dtype != norm.dtype:
            raise RefusedError(f"the norm weight is {weight.dtype}, the activations {norm.dtype}")
        if tuple(weight.shape) != (norm.shape[-1],):
            raise RefusedError(f"the norm weight has shape {tuple(weight.shape)}, hidden is {norm.shape[-1]}")

    def check_order(self, site: NormSite) -> None:
        """The weight must exist where the fused operator stands, right after the add.

        Raises:
            RefusedError: it is computed later, perhaps from the sum itself.
        """
        if site.weight.op != "get_attr" and self.order[site.weight] > self.order[site.add]:
            raise RefusedError("the norm weight is computed after the add")

    def decision(self, site: NormSite) -> str:
        """See `Transform.decision`."""
        return f"{site.all_reduce.name} {site.add.name} {site.weight} {site.eps.hex()} {site.strategy}"

    def rewrite(self, site: NormSite) -> None:
        """See `Transform.rewrite`."""
        # An earlier site's rewrite may have replaced the residual since this one was matched.
        site = replace(site, residual=self.operands(site.add)[2])
        spread = None if roles.is_all_reduce(site.all_reduce) else site.residual
        if spread is not None:
            site = replace(site, residual=self.whole(spread))
        with self.graph.inserting_before(site.add.next):
            x = nodes.argument(site.all_reduce, 0)
            for view in site.views:
                x = nodes.call(self.graph, view.target, (x, *view.args[1:]), view)  # type: ignore[arg-type]
            fused = self.emit(site, x)
            norm = nodes.call(self.graph, operator.getitem, (fused, 0), site.norm)
            residual = nodes.call(self.graph, operator.getitem, (fused, 1), site.add)
        self.redirect(site, norm, residual)
        done = [site.norm, site.add, *reversed(site.views), site.all_reduce]
        for gather in site.gathers:
            gather.replace_all_uses_with(nodes.argument(gather, 0))
        done = [*site.gathers, *done]
        if spread is not None and len(spread.users) == 1:
            done.append(spread)
        for node in done:
            self.graph.erase_node(node)
        for node in (norm, residual):
            if not node.users:
                self.graph.erase_node(node)

    def emit(self, site: NormSite, x: Node) -> Node:
        """Insert the fused operator."""
        weight = nodes.clone_attribute(self.graph, site.weight) if site.weight.op == "get_attr" else site.weight
        strategy = self.config.policy.strategy(site.strategy)
        args = (x, site.residual, weight, site.eps, strategy)
        return nodes.call(self.graph, own.ar_residual_norm.default, args, site.norm)

    def redirect(self, site: NormSite, norm: Node, residual: Node) -> None:
        """Give the readers of the old norm and sum the fused operator's results."""
        site.norm.replace_all_uses_with(norm)
        site.add.replace_all_uses_with(residual)
