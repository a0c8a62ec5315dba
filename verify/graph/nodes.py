"""Reading and writing FX nodes: arguments by position or keyword, users through views, attributes, meta values."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fusecheck.graph.fakes import fakes_of

_aten = torch.ops.aten

VIEWS: frozenset[object] = frozenset(
    {
        _aten.view.default,
        _aten.reshape.default,
        _aten._unsafe_view.default,
        _aten.contiguous.default,
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.flatten.using_ints,
    }
)
"""Operators that keep every element in row-major order, whatever the dtype."""


def is_view(node: Node) -> bool:
    """Whether a node only renames elements, and can be applied to codes as to activations."""
    return node.op == "call_function" and node.target in VIEWS


def argument(node: Node, position: int) -> Any:
    """An argument by its position in the operator's schema, given by position, by keyword or by default.

    Raises:
        LookupError: the operator has no such argument, or it was not given and has no default.
    """
    if position < len(node.args):
        return node.args[position]
    schema = schema_of(node)
    if schema is None or position >= len(schema.arguments):
        raise LookupError(f"{node.name} ({node.target}) has no argument {position}")
    declared = schema.arguments[position]
    if declared.name in node.kwargs:
        return node.kwargs[declared.name]
    if declared.has_default_value():
        return declared.default_value
    raise LookupError(f"{node.name} ({node.target}) lacks its argument {declared.name}")


def named(node: Node, name: str) -> Any:
    """An argument by its name in the operator's schema.

    Raises:
        LookupError: as `argument`.
    """
    schema = schema_of(node)
    names = [] if schema is None else [each.name for each in schema.arguments]
    if name not in names:
        raise LookupError(f"{node.name} ({node.target}) has no argument {name}")
    return argument(node, names.index(name))


def schema_of(node: Node) -> Any:
    """The schema of the operator that a node calls, None where it has none; of a packet, the default overload's."""
    target: Any = node.target
    target = getattr(target, "default", target) if isinstance(target, torch._ops.OpOverloadPacket) else target
    return getattr(target, "_schema", None)


def replace_argument(node: Node, position: int, value: Any) -> None:
    """Set an argument where the node holds it, by position or by keyword."""
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(schema_of(node).arguments[position].name, value)


def mutates(node: Node) -> bool:
    """Whether a node may write to one of its arguments; calls that cannot be looked into do not."""
    schema = schema_of(node) if node.op == "call_function" else None
    return schema is not None and schema.is_mutable


def getitems(node: Node, index: int) -> list[Node]:
    """The users of a node that take output `index` of it."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def only_getitems(node: Node) -> bool:
    """Whether a multi-output node is read through constant getitems alone."""
    return all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)


def terminal_users(source: Node) -> list[tuple[Node, tuple[Node, ...]]]:
    """Each reader of a node that is not a view, with the views between, nearest the source first."""
    found: list[tuple[Node, tuple[Node, ...]]] = []
    pending: list[tuple[Node, tuple[Node, ...]]] = [(source, ())]
    while pending:
        node, views = pending.pop(0)
        for user in node.users:
            if is_view(user) and user.args[:1] == (node,):
                pending.append((user, (*views, user)))
            else:
                found.append((user, views))
    return found


def through_views(node: object) -> tuple[object, tuple[Node, ...]]:
    """What lies under a chain of views of which each is read once, and the views, outermost first."""
    views: list[Node] = []
    while isinstance(node, Node) and is_view(node):
        views.append(node)
        node = node.args[0]
    return node, tuple(views)


def attribute(gm: GraphModule, node: object) -> Tensor | None:
    """The tensor that a `get_attr` node names, else None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found: Any = gm
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def hold(root: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The buffer of a dotted name, registered unless it is there."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if not hasattr(root, leaf):
        root.register_buffer(leaf, tensor)
    found: Tensor = getattr(root, leaf)
    return found


def value(node: object) -> Tensor | None:
    """The fake tensor of a node's `meta["val"]`, else None."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def positions(graph: Graph) -> dict[Node, int]:
    """Where each node stands in the graph."""
    return {node: index for index, node in enumerate(graph.nodes)}


def clone_attribute(graph: Graph, node: Node) -> Node:
    """Read the same attribute again at the insertion point."""
    clone = graph.get_attr(str(node.target))
    clone.meta.update(node.meta)
    return clone


def call(graph: Graph, target: Callable[..., Any], args: Sequence[Any], like: Node) -> Node:
    """Insert a call whose meta value is computed from its arguments'; other meta is taken from `like`."""
    node = graph.call_function(target, tuple(args))
    node.meta.update({key: entry for key, entry in like.meta.items() if key not in ("val", "tensor_meta")})
    set_value(node)
    return node


def set_value(node: Node, like: Node | None = None) -> None:
    """Compute `meta["val"]` by running the node on its arguments' fake tensors, if all of them have one.

    Args:
        node: a call.
        like: a node whose fake mode is taken; left out, that of the operands.
    """
    known = [entry for entry in node.all_input_nodes if "val" not in entry.meta]
    if known:
        return
    target: Any = node.target
    args = torch.fx.node.map_arg(node.args, lambda entry: entry.meta["val"])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda entry: entry.meta["val"])
    mode = _fake_mode([*node.all_input_nodes, *([] if like is None else [like])])
    if (fakes := fakes_of(mode)) is not None:
        node.meta["val"] = fakes.result(target, args, kwargs)
        return
    with mode:
        node.meta["val"] = target(*args, **kwargs)


def aliases(node: Node) -> set[Node]:
    """The nodes that share memory with a node through views, itself among them."""
    base = node
    while is_view(base) and isinstance(base.args[0], Node):
        base = base.args[0]
    found, pending = {base}, [base]
    while pending:
        views = [user for user in pending.pop().users if is_view(user) and user not in found]
        found.update(views)
        pending += views
    return found


def written_to(node: Node) -> Node | None:
    """An operator that may write into the node's memory, if there is one."""
    return next((user for alias in aliases(node) for user in alias.users if mutates(user)), None)


def _fake_mode(known: Sequence[Node]) -> contextlib.AbstractContextManager[object]:
    """The fake mode of the first node that has one."""
    for entry in known:
        mode = getattr(value(entry), "fake_mode", None)
        if mode is not None:
            return cast("contextlib.AbstractContextManager[object]", mode)
    return contextlib.nullcontext()
