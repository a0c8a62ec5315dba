"""Stand-ins for AutoDeploy's `fuse_collinear_allreduce`: a right one, and lapses of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from typing_extensions import override

from fusecheck.graph import autodeploy, nodes, roles
from fusecheck.graph.collinear import is_plain_add, through_copies
from fusecheck.graph.config import SharedConfig
from fusecheck.property_tests.graph import stand_ins

own = torch.ops.fusecheck

aten = torch.ops.aten


class Merging:
    """Two sums over ranks of one strategy that an add alone reads become one of what their addends add up to."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph

    @classmethod
    def apply(cls, gm: GraphModule, shared: SharedConfig) -> GraphModule:
        """As a pass."""
        del shared
        made = cls(gm)
        for node in list(gm.graph.nodes):
            made.visit(node)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return gm

    def visit(self, node: Node) -> None:
        """Merge at an add, if both of its summands are sums over ranks."""
        if not self.adds(node):
            return
        first, second = (through_copies(nodes.argument(node, at)) for at in (0, 1))
        pair = first, second
        if first is second or not all(roles.is_all_reduce(each) for each in pair):
            return
        if self.unread(node) and self.alike(first, second):
            self.merge(node, first, second)

    def adds(self, node: Node) -> bool:
        """Whether a node is an add that may be moved before the exchange."""
        return is_plain_add(node)

    def unread(self, add: Node) -> bool:
        """Whether nobody but the add reads either sum, or a copy between."""
        for each in add.all_input_nodes:
            source: Any = each
            while isinstance(source, Node):
                if len(source.users) > 1:
                    return False
                source = source.args[0] if not roles.is_all_reduce(source) else None
        return True

    def alike(self, first: Node, second: Node) -> bool:
        """Whether both name one strategy, and have addends of one shape and dtype."""
        values = [nodes.value(nodes.argument(each, 0)) for each in (first, second)]
        forms = {(str(value.shape), value.dtype) for value in values if value is not None}
        return nodes.argument(first, 1) == nodes.argument(second, 1) and len(forms) == 1

    def place(self, add: Node, first: Node, second: Node) -> Node:
        """Before which node the new ones go."""
        del first, second
        return add

    def merge(self, add: Node, first: Node, second: Node) -> None:
        """Add the addends where the sums over ranks were added, and sum over the ranks then."""
        with self.graph.inserting_before(self.place(add, first, second)):
            operands = (nodes.argument(first, 0), nodes.argument(second, 0))
            total = nodes.call(self.graph, aten.add.Tensor, operands, add)
            made = nodes.call(self.graph, own.all_reduce.default, (total, self.strategy(first, second)), add)
        add.replace_all_uses_with(made)

    def strategy(self, first: Node, second: Node) -> Any:
        """Of the one sum."""
        del second
        return nodes.argument(first, 1)


class AnyAdd(Merging):
    """`alpha` of the add is overlooked."""

    @override
    def adds(self, node: Node) -> bool:
        return node.target == aten.add.Tensor and len(node.all_input_nodes) == 2


class ReadElsewhere(Merging):
    """Other readers of the sums are overlooked, so that a sum over ranks is added."""

    @override
    def unread(self, add: Node) -> bool:
        return True


class AnyStrategy(Merging):
    """The second sum's strategy is overlooked."""

    @override
    def alike(self, first: Node, second: Node) -> bool:
        return True


class TooEarly(Merging):
    """The new nodes go where the first sum was, though the second addend may be computed later."""

    @override
    def place(self, add: Node, first: Node, second: Node) -> Node:
        return first


class FirstTwice(Merging):
    """The first addend is added to itself."""

    @override
    def merge(self, add: Node, first: Node, second: Node) -> None:
        super().merge(add, first, first)


class NoneMerged(Merging):
    """Looks for an add that no graph has."""

    @override
    def adds(self, node: Node) -> bool:
        return node.target == aten.add_.Tensor


class Scaled(Merging):
    """The addends are scaled before the exchange and the sum is scaled back, which rounds."""

    @override
    def merge(self, add: Node, first: Node, second: Node) -> None:
        with self.graph.inserting_before(add):
            addends = [nodes.argument(each, 0) for each in (first, second)]
            small = [nodes.call(self.graph, aten.mul.Tensor, (addend, 0.3), add) for addend in addends]
            total = nodes.call(self.graph, aten.add.Tensor, small, add)
            made = nodes.call(self.graph, own.all_reduce.default, (total, self.strategy(first, second)), add)
            whole = nodes.call(self.graph, aten.mul.Tensor, (made, 1 / 0.3), add)
        add.replace_all_uses_with(whole)


class Transform:
    """The right one as AutoDeploy's optimizer calls its own: shapes are left stale, and that is said."""

    @classmethod
    def from_kwargs(cls, **config: Any) -> Transform:
        """See AutoDeploy's `BaseTransform`."""
        assert config["enabled"]
        return cls()

    def __call__(self, gm: GraphModule, cm: object, factory: object, shared_config: Any, idx: int) -> GraphModule:
        """Rewrite, and leave the new nodes without shapes."""
        del cm, factory, idx
        shared = SharedConfig(shared_config.local_rank, shared_config.world_size)
        gm = stand_ins.LIBRARY.enter(Merging.apply(stand_ins.LIBRARY.leave(gm), shared))
        history = {"fuse_collinear_allreduce": SimpleNamespace(has_valid_shapes=False)}
        gm.meta["_autodeploy"] = {"transform_history": history}
        return gm


def fuse_collinear_allreduce(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """The right one through the adapter, in AutoDeploy's operators."""
    return autodeploy.apply("fuse_collinear_allreduce", gm, shared, lambda name: Transform)
