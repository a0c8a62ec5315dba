"""What a graph computes, apart from names and order: its expressions, what reaches an output, what it writes."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from fusecheck.graph import nodes

aten = torch.ops.aten
FREE = nodes.VIEWS | {operator.getitem, aten.sym_size.int, aten.alias.default, aten.detach.default}
"""Calls that cost nothing when nobody reads them."""


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that shares tensors and meta values with the original, but no node; compiled when it is called."""
    graph = Graph()
    result = graph.graph_copy(gm.graph, {})
    if result is not None:
        graph.output(result)
    copy = _LazyGraphModule(gm, graph)
    copy.__dict__["is_draft"] = bool(getattr(gm, "is_draft", False))
    return copy


def signature(gm: GraphModule) -> list[str]:
    """Every node in one line, in order; equal for equal graphs."""
    return [f"{node.name} = {node.op} {node.target} {node.args} {node.kwargs}" for node in gm.graph.nodes]


def has_effect(node: Node) -> bool:
    """Whether a node does something besides returning a value: it writes in place, asserts, prints."""
    return node.op == "call_function" and (nodes.mutates(node) or node.is_impure())


def effects(gm: GraphModule) -> Counter[str]:
    """How often each operator with an effect is called."""
    return Counter(str(node.target) for node in gm.graph.nodes if has_effect(node))


def live(gm: GraphModule) -> set[Node]:
    """The nodes from which a path leads to an output or to an effect."""
    found: set[Node] = set()
    pending = [node for node in gm.graph.nodes if node.op == "output" or has_effect(node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def dead_work(gm: GraphModule, predecessor: GraphModule) -> Iterator[Node]:
    """Nodes that compute for nothing, now that the pass has run; reads and views are free."""
    before, kept = live(predecessor), {node.name for node in gm.graph.nodes}
    idle = {node.name for node in predecessor.graph.nodes if _works(node) and node not in before}
    alive = live(gm)
    # What computed for nothing before may do so in another form.
    replaced = len(idle - kept)
    for node in gm.graph.nodes:
        if _works(node) and node not in alive and node.name not in idle:
            replaced -= 1
            if replaced < 0:
                yield node


def _works(node: Node) -> bool:
    return node.op == "call_function" and node.target not in FREE


def expressions(gm: GraphModule) -> Counter[str]:
    """Each live call as the expression that it computes, and how often; names and order leave no trace."""
    alive, digests = live(gm), dict[Node, str]()
    written, inputs = "", 0
    found: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            text, inputs = f"input {inputs}", inputs + 1
        elif node.op == "get_attr":
            tensor = nodes.attribute(gm, node)
            text = f"{node.target}" if tensor is None else f"tensor {id(tensor)}"
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), digests.__getitem__)
            text = f"{node.target} {args} {sorted(kwargs.items())} {written}"
        digests[node] = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        if has_effect(node):
            written = digests[node]
        if node in alive and node.op in ("call_function", "output"):
            found[digests[node]] += 1
    return found
