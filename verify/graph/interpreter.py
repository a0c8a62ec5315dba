"""Running a graph node by node. torch's interpreter does the same with several context managers around each node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


class Run:
    """One run of a graph; subclasses look at what each node is given and returns.

    Args:
        gm: the graph.
        keep: hold every node's value to the end; otherwise one goes with its last reader.
    """

    def __init__(self, gm: GraphModule, *, keep: bool = False) -> None:
        self.gm = gm
        self.env: dict[Node, Any] = {}
        self._last: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        for node in () if keep else reversed(gm.graph.nodes):
            for read in node.all_input_nodes:
                if read not in seen:
                    seen.add(read)
                    self._last.setdefault(node, []).append(read)

    def run(self, *inputs: Any) -> Any:
        """Run all nodes; returns what the output node holds.

        Raises:
            Exception: whatever a node raises, with the node's name in its message.
        """
        self.env.clear()
        given: Iterator[Any] = iter(inputs)
        with torch.no_grad():
            for node in self.gm.graph.nodes:
                if node.op == "output":
                    return map_arg(node.args[0], self.env.__getitem__)
                try:
                    self.env[node] = next(given) if node.op == "placeholder" else None
                    self.env[node] = self.run_node(node)
                except Exception as error:
                    error.args = (f"{error} (at node {node.name})",)
                    raise
                for read in self._last.get(node, ()):
                    del self.env[read]
        return None

    def run_node(self, n: Node) -> Any:
        """One node's value."""
        if n.op == "placeholder":
            return self.env[n]
        if n.op == "get_attr":
            return self._attribute(str(n.target))
        args, kwargs = map_arg((n.args, n.kwargs), self.env.__getitem__)
        target: Any = n.target
        if n.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return (target if n.op == "call_function" else self._attribute(target))(*args, **kwargs)

    def _attribute(self, name: str) -> Any:
        found: Any = self.gm
        for part in name.split("."):
            found = getattr(found, part)
        return found
