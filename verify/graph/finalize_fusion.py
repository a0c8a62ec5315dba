"""A rank's sum of experts moves into the fused operator that sums it over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fusecheck.graph import nodes, roles
from fusecheck.graph.config import FINALIZE_PASS
from fusecheck.graph.family import fused_operation
from fusecheck.graph.transform import RefusedError, Transform
from fusecheck.operations import Operation

own = torch.ops.fusecheck


@dataclass(frozen=True)
class FinalizeSite:
    """A fused operator that reads a sum of experts.

    Attributes:
        fused: the node, of any quantiser.
        finalize: the sum, which nobody else reads.
        op: what both become.
    """

    fused: Node
    finalize: Node
    op: Operation


class FuseFinalize(Transform[FinalizeSite]):
    """`fuse_moe_finalize_allreduce`."""

    name = FINALIZE_PASS

    def candidates(self) -> list[Node]:
        """The fused operators whose addend is a sum of experts."""
        return [
            node
            for node in self.graph.nodes
            if roles.fused_op(node) is not None and roles.is_finalize(nodes.argument(node, 0))
        ]

    def match(self, node: Node) -> FinalizeSite:
        """See `Transform.match`."""
        finalize, fused = nodes.argument(node, 0), roles.fused_op(node)
        assert fused is not None
        if len(finalize.users) != 1:
            raise RefusedError(f"{finalize.name} has {len(finalize.users)} readers")
        op = fused_operation(fused.quantiser, norm_out=fused.returns_norm, experts=True)
        if op is None:
            raise RefusedError(f"no library sums experts in {fused.name}")
        return FinalizeSite(node, finalize, op)

    def decision(self, site: FinalizeSite) -> str:
        """See `Transform.decision`."""
        return f"{site.op.value} {site.finalize.name}"

    def rewrite(self, site: FinalizeSite) -> None:
        """See `Transform.rewrite`."""
        old, finalize = site.fused, site.finalize
        names = [argument.name for argument in nodes.schema_of(old).arguments]
        given = {name: nodes.named(old, name) for name in names}
        tokens, scale, rows, shared, factor = (nodes.argument(finalize, at) for at in range(5))
        args = (tokens, *(given[name] for name in ("residual", "weight")), given.get("scale"))
        args += (given["eps"], given["strategy"], site.op.value, given.get("layout", ""), given["weight_bias"])
        with self.graph.inserting_before(old):
            made = nodes.call(self.graph, own.fused.default, (*args, scale, rows, shared, factor), old)
        old.replace_all_uses_with(made)  # both return the same results in the same order
        self.graph.erase_node(old)
        self.graph.erase_node(finalize)
