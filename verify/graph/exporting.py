"""Exporting a rewritten graph again, once for each form: no export looks at the values of loaded tensors."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fusecheck.graph import nodes
from fusecheck.graph.build import BuiltGraph
from fusecheck.graph.comparison import Graphs
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.inspection import count_roles, tensors_of
from fusecheck.graph.structure import signature

_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


Said = tuple[GraphFinding | None, str]
"""What is wrong, and why nothing could be said."""


class Exports:
    """The exports of one rank, and the forms that it has exported.

    Ranks rewrite alike, so one rank exports each form; which one follows from the order in which forms came.

    Args:
        index: of this rank.
        world_size: of the ranks that take turns.
    """

    def __init__(self, index: int, world_size: int) -> None:
        self._index, self._world_size = index, world_size
        self._turns: dict[str, int] = {}
        self._done: set[str] = set()

    def has_turn(self, agreed: str) -> bool:
        """Whether this rank exports a graph.

        Args:
            agreed: the graph as text, equal on all ranks; all ask in the same order.
        """
        return self._turns.setdefault(agreed, len(self._turns)) % self._world_size == self._index

    def check(self, graphs: Graphs, built: BuiltGraph, tokens: int) -> Said:
        """Export the rewritten graph, and count its operators; where the unfused one cannot be exported, say nothing.

        Args:
            graphs: before and after the passes.
            built: where inputs come from.
            tokens: of the example.
        """
        after = graphs.after
        form = _form(after, built, tokens)
        if form in self._done:
            return None, ""
        wanted = count_roles(after)
        try:
            exported = _export(after, built, tokens)
        except Exception as error:
            try:
                _export(graphs.before, built, tokens)
            except Exception:
                return None, "the unfused graph cannot be exported either"
            told = " ".join(f"{type(error).__name__}: {error}".split())
            return GraphFinding(Check.EXPORT, f"torch.export raised {told[:300]}"), ""
        if (got := count_roles(exported)) != wanted:
            return GraphFinding(Check.EXPORT, f"the exported graph has {got}, expected {wanted}"), ""
        if form is not None:
            self._done.add(form)
        return None, ""


def _form(gm: GraphModule, built: BuiltGraph, tokens: int) -> str | None:
    """All that an export sees of a graph; None for one that calls what a text does not tell apart."""
    if not all(_is_told_by_its_text(gm, node) for node in gm.graph.nodes):
        return None
    example = built.inputs(tokens)
    # Tensors that share memory are no two tensors.
    places: dict[int, int] = {}
    held = [
        f"{name}: {_of(tensor)} {places.setdefault(tensor.untyped_storage().data_ptr(), len(places))}"
        for name, tensor in tensors_of(gm)
    ]
    open_size = f"{built.token_dimension} up to {built.longest}"
    return "\n".join((*signature(gm), *held, *map(_of, example), open_size))


def _is_told_by_its_text(gm: GraphModule, node: Node) -> bool:
    leaves = tree_leaves((node.args, node.kwargs))
    if not all(isinstance(leaf, (Node, *_CONSTANTS)) for leaf in leaves):
        return False
    if node.op == "call_function":
        return isinstance(node.target, _OPERATORS) or node.target is operator.getitem
    return node.op in ("placeholder", "output") or nodes.attribute(gm, node) is not None


def _of(tensor: Tensor) -> str:
    kind = type(tensor).__name__
    return f"{kind} {tensor.dtype} {list(tensor.shape)} {tensor.stride()} {tensor.device} {tensor.requires_grad}"


def _export(gm: GraphModule, built: BuiltGraph, tokens: int) -> GraphModule:
    inputs = built.inputs(tokens)
    shapes: dict[str, Any] | None = None
    if built.token_dimension is not None:
        # Exporting wants an example size that is not special.
        inputs = built.inputs(max(tokens, 3))
        dimension = torch.export.Dim("tokens", min=2, max=built.longest)
        shapes = {"args": tuple({built.token_dimension: dimension} for _ in inputs)}
    exported = torch.export.export(_Wrapped(gm), inputs, dynamic_shapes=shapes, strict=False)
    return cast("GraphModule", exported.graph_module)


class _Wrapped(torch.nn.Module):
    """A graph as a plain module, which is what exporting takes."""

    def __init__(self, rewritten: GraphModule) -> None:
        super().__init__()
        self.rewritten = rewritten

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return self.rewritten(*args)  # type: ignore[no-any-return]
