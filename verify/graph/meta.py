"""Running a graph with each node's meta value beside what the node returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecheck.graph import nodes
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.interpreter import Run


class MetaCheckedRun(Run):
    """Runs a graph and compares each node's meta value with what the node returned.

    An open size is a symbol in the meta of the inputs; what later nodes say of it is computed for the sizes of this
    run. A node that gives the example's number where the graph is open is wrong, whatever the size of the run.

    Args:
        gm: the graph.
        known: names of nodes that the pass did not make: they may lack a meta value, as they did before.
    """

    def __init__(self, gm: GraphModule, known: set[str]) -> None:
        super().__init__(gm)
        self.known = known
        self.sizes: dict[Any, int] = {}
        self.missing: list[str] = []
        self.wrong: list[str] = []

    @property
    def findings(self) -> list[GraphFinding]:
        """One finding for all missing values, and one for all wrong ones."""
        missing = f"{len(self.missing)} new nodes have no meta value, the first is {self.missing[:1]}"
        wrong = f"{len(self.wrong)} nodes are not what their meta says, the first: {self.wrong[:1]}"
        pairs = ((self.missing, missing), (self.wrong, wrong))
        return [GraphFinding(Check.META, message) for found, message in pairs if found]

    def run_node(self, n: Node) -> Any:
        """Run, then compare."""
        result = super().run_node(n)
        if n.op == "placeholder" and (said := nodes.value(n)) is not None:
            sizes: list[Any] = list(said.shape)
            for mine, other in zip(sizes, result.shape, strict=True):
                if is_open(mine) and mine.node.expr.is_symbol:
                    self.sizes[mine.node.expr] = other
        if n.op == "call_function":
            self._compare(n, n.meta.get("val"), result)
        return result

    def _compare(self, node: Node, said: Any, got: Any) -> None:
        if said is None and node.name not in self.known:
            self.missing.append(node.name)
        if isinstance(said, tuple | list) and isinstance(got, tuple | list):
            if len(said) != len(got):
                self.wrong.append(f"{node.name}: meta has {len(said)} values, returned {len(got)}")
            for mine, other in zip(said, got, strict=False):
                self._compare(node, mine, other)
        if isinstance(said, Tensor) and isinstance(got, Tensor) and not self._agrees(node, said, got):
            self.wrong.append(f"{node.name}: meta {_form(said)}, returned {_form(got)}")

    def _agrees(self, node: Node, said: Tensor, got: Tensor) -> bool:
        if said.dtype != got.dtype or said.dim() != got.dim() or not self._equal(said.shape, got.shape):
            return False
        if node.name in self.known:
            return True
        # The stride of a dimension of one element is nobody's promise.
        counted = [at for at, size in enumerate(got.shape) if size > 1] if got.numel() else []
        said_strides, strides = said.stride(), got.stride()
        same = self._equal([said_strides[at] for at in counted], [strides[at] for at in counted])
        return same and said.device.type == got.device.type and self._open_where_the_operands_are(node, said)

    def _equal(self, said: Any, got: Any) -> bool:
        return all(self._at_this_size(mine) in (None, other) for mine, other in zip(said, got, strict=True))

    def _at_this_size(self, size: Any) -> int | None:
        """What a size is in this run; None where that cannot be known."""
        if not is_open(size):
            return int(size)
        expression = size.node.expr
        if expression in self.sizes:
            return self.sizes[expression]
        found = expression.subs(self.sizes)
        return int(found) if found.is_number else None

    def _open_where_the_operands_are(self, node: Node, said: Tensor) -> bool:
        """Whether a node of the operands' shape leaves open what they leave open."""
        operands = [value for each in node.all_input_nodes if (value := _first(each)) is not None]
        shapes = [value.shape for value in operands if value.dim() == said.dim()]
        if not shapes or not self._equal(said.shape, self._sizes(shapes[0])):
            return True
        return all(is_open(mine) or not is_open(theirs) for mine, theirs in zip(said.shape, shapes[0], strict=True))

    def _sizes(self, shape: Any) -> list[int | None]:
        return [self._at_this_size(size) for size in shape]


def is_open(size: Any) -> bool:
    """Whether a size is a symbol or an expression of one."""
    return isinstance(size, torch.SymInt)


def _first(node: Node) -> Tensor | None:
    """A node's meta tensor, or the first of several."""
    found = node.meta.get("val")
    found = found[0] if isinstance(found, tuple | list) and found else found
    return found if isinstance(found, Tensor) else None


def _form(tensor: Tensor) -> str:
    sizes, strides = ([str(each) for each in listed] for listed in (tensor.shape, tensor.stride()))
    return f"{str(tensor.dtype).removeprefix('torch.')}{sizes} strides {strides} on {tensor.device.type}"
