"""The checks that need no run: names and readers of the rewritten graph against the graph as it was."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fusecheck.graph import nodes
from fusecheck.graph.dialect import Dialect
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.interface import FusionOp

NORM_ARGUMENTS = {"weight": 2, "eps": 3, "strategy": 4}
QUANT_ARGUMENTS = {"weight": 2, "scale": 3, "eps": 4, "strategy": 5}


@dataclass(frozen=True)
class Original:
    """What the graph says about a norm before any rewrite.

    Attributes:
        weight: the tensor itself.
        eps: of the norm.
        strategy: of the collective before it, None where there is none.
    """

    weight: Tensor
    eps: float
    strategy: str | None


@dataclass(frozen=True)
class FusedNode:
    """A fused operator in a rewritten graph.

    Attributes:
        node: in the graph.
        op: which operation.
        gamma: the name of its weight's attribute, None where it is computed.
    """

    node: Node
    op: FusionOp
    gamma: str | None

    def argument(self, name: str) -> object:
        """`weight`, `scale`, `eps` or `strategy` of the node."""
        return nodes.argument(self.node, (QUANT_ARGUMENTS if self.op.returns_quant else NORM_ARGUMENTS)[name])


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that shares tensors and meta values with the original, but no node."""
    graph = Graph()
    result = graph.graph_copy(gm.graph, {})
    if result is not None:
        graph.output(result)
    copy = GraphModule(gm, graph)
    copy.__dict__["is_draft"] = bool(getattr(gm, "is_draft", False))
    return copy


def signature(gm: GraphModule) -> list[str]:
    """Every node in one line, in order; equal for equal graphs."""
    return [f"{node.name} = {node.op} {node.target} {node.args} {node.kwargs}" for node in gm.graph.nodes]


def fused_nodes(gm: GraphModule, dialect: Dialect) -> list[FusedNode]:
    """The fused operators of a graph, in order."""
    found = []
    for node in gm.graph.nodes:
        op = dialect.fused_op(node)
        if op is not None:
            weight = nodes.argument(node, NORM_ARGUMENTS["weight"])
            named = isinstance(weight, Node) and weight.op == "get_attr"
            found.append(FusedNode(node, op, str(weight.target) if named and isinstance(weight, Node) else None))
    return found


def originals(gm: GraphModule, dialect: Dialect) -> dict[str, Original]:
    """What each norm of the unfused graph is, by the name of its weight."""
    found: dict[str, Original] = {}
    for node in gm.graph.nodes:
        weight = nodes.argument(node, 1) if dialect.is_norm(node) else None
        tensor = nodes.attribute(gm, weight)
        if tensor is not None and isinstance(weight, Node):
            found[str(weight.target)] = Original(tensor, nodes.argument(node, 2), _strategy_before(node, dialect))
    return found


def _strategy_before(norm: Node, dialect: Dialect) -> str | None:
    add = nodes.argument(norm, 0)
    for operand in add.all_input_nodes if isinstance(add, Node) else ():
        source, _ = nodes.through_views(operand)
        if dialect.is_all_reduce(source) and isinstance(source, Node):
            return str(nodes.argument(source, 1))
    return None


def count_roles(gm: GraphModule, dialect: Dialect) -> dict[str, int]:
    """How many operators of each role the graph has."""
    roles: Counter[str] = Counter()
    for node in gm.graph.nodes:
        fused = dialect.fused_op(node)
        if fused is not None:
            roles[fused.value] += 1
        roles["all_reduce"] += dialect.is_all_reduce(node)
        roles["norm"] += dialect.is_norm(node)
    return dict(roles)


def check_structure(
    before: GraphModule, after: GraphModule, dialect: Dialect, predecessor: GraphModule
) -> list[GraphFinding]:
    """Arguments and orphans.

    Args:
        before: the unfused graph.
        after: the rewritten one.
        dialect: of both.
        predecessor: what the last pass was given.
    """
    found = list(_arguments(before, after, dialect))
    found += _linear_arguments(before, after, dialect)
    found += [GraphFinding(Check.ORPHANS, message) for message in _orphans(after, predecessor, dialect)]
    return found


def _arguments(before: GraphModule, after: GraphModule, dialect: Dialect) -> Iterator[GraphFinding]:
    known = originals(before, dialect)
    for fused in fused_nodes(after, dialect):
        origin = known.get(fused.gamma or "")
        if origin is None:
            yield _wrong(fused, f"its weight {fused.gamma} is not the weight of a norm of the graph")
            continue
        if nodes.attribute(after, fused.argument("weight")) is not origin.weight:
            yield _wrong(fused, f"weight {fused.gamma} is not the norm's own tensor")
        if fused.argument("eps") != origin.eps:
            yield _wrong(fused, f"eps={fused.argument('eps')}, the norm has {origin.eps}")
        strategy = str(fused.argument("strategy"))
        if strategy.split("<=")[0] != origin.strategy:
            yield _wrong(fused, f"strategy={strategy}, the collective has {origin.strategy}")
        if fused.op.returns_quant:
            yield from _scale(fused, after, dialect)


def _scale(fused: FusedNode, gm: GraphModule, dialect: Dialect) -> Iterator[GraphFinding]:
    """The fused scale must be the input scale of the layers that read the codes: the same tensor, or an equal one."""
    scale = nodes.attribute(gm, fused.argument("scale"))
    if scale is None:
        yield _wrong(fused, "its scale is not an attribute of the graph")
        return
    index = 1 if fused.op.returns_norm else 0
    readers = [user for codes in nodes.getitems(fused.node, index) for user, _ in nodes.terminal_users(codes)]
    layers = [user for user in readers if dialect.is_linear(user) or user.target == dialect.prequant_linear]
    own = [(layer, nodes.attribute(gm, nodes.argument(layer, 3))) for layer in layers]
    for layer, theirs in own:
        if theirs is None or theirs.numel() != 1 or float(theirs) != float(scale.reshape(-1)[0]):
            shown = "none" if theirs is None else theirs.flatten()[:2].tolist()
            yield _wrong(fused, f"scale {scale.flatten()[:2].tolist()}, but {layer.name} dequantises with {shown}")
    if own and all(theirs is not scale for _, theirs in own):
        yield _wrong(fused, "its scale is not the input scale of any layer that reads the codes")
    for user in readers:
        if user not in layers and user.op != "output":
            yield _wrong(fused, f"{user.name} reads the codes but is not an FP8 layer")


def _wrong(fused: FusedNode, message: str) -> GraphFinding:
    return GraphFinding(Check.ARGUMENTS, f"{fused.node.name}: {message}")


def _layers(gm: GraphModule, dialect: Dialect) -> dict[str, tuple[Tensor | None, ...]]:
    """Bias, input scale and weight scale of each FP8 layer, by the name of its weight; computed ones are None."""
    found: dict[str, tuple[Tensor | None, ...]] = {}
    for node in gm.graph.nodes:
        if dialect.is_linear(node) or node.target == dialect.prequant_linear:
            weight = nodes.argument(node, 1)
            if isinstance(weight, Node) and weight.op == "get_attr":
                found[str(weight.target)] = tuple(nodes.attribute(gm, nodes.argument(node, at)) for at in (2, 3, 4))
    return found


def _linear_arguments(before: GraphModule, after: GraphModule, dialect: Dialect) -> list[GraphFinding]:
    """FP8 layers keep their own bias and scales."""
    was, now = _layers(before, dialect), _layers(after, dialect)
    found = [GraphFinding(Check.ARGUMENTS, f"the layer of {name} is gone") for name in was if name not in now]
    for name, tensors in now.items():
        for part, mine, theirs in zip(
            ("bias", "input_scale", "weight_scale"), tensors, was.get(name, ()), strict=False
        ):
            if theirs is not None and mine is not theirs:
                found.append(GraphFinding(Check.ARGUMENTS, f"the layer of {name} has another {part} than before"))
    return found


def _orphans(gm: GraphModule, predecessor: GraphModule, dialect: Dialect) -> Iterable[str]:
    """New nodes that nobody reads, and collectives and norms whose readers the pass took away."""
    had_readers = {node.name for node in predecessor.graph.nodes if node.users}
    known = {node.name for node in predecessor.graph.nodes}
    for node in gm.graph.nodes:
        relevant = (
            node.target is operator.getitem
            or dialect.is_all_reduce(node)
            or dialect.is_norm(node)
            or dialect.fused_op(node) is not None
        )
        if relevant and not node.users and (node.name in had_readers or node.name not in known):
            yield f"{node.name} ({node.target}) has no reader"
