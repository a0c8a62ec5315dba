"""Layers on codes whose scales were made in the graph: where both come from, and what the layer takes them for."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecheck.errors import UsageError
from fusecheck.graph import nodes, roles
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.fused_ops import RESULTS
from fusecheck.graph.quantised import Form
from fusecheck.operations import GIVEN_SCALE

own = torch.ops.fusecheck

LOADED = ("bias", "scale", "weight_scales", "weight_scale")
"""The loaded tensors of a layer besides its weight; `scale` is the factor of the tensor."""


@dataclass(frozen=True)
class MadeLayer:
    """A layer on codes with scales.

    Attributes:
        node: in the graph.
        form: what it takes its codes for.
        dtype: of its result.
        loaded: its tensors by the names of `LOADED`; None for one that it does not have.
    """

    node: Node
    form: Form
    dtype: str
    loaded: dict[str, Tensor | None]


def made_layers(gm: GraphModule) -> dict[str, MadeLayer]:
    """The layers by the names of their weights."""
    found: dict[str, MadeLayer] = {}
    for node in gm.graph.nodes:
        weight = nodes.named(node, "weight") if roles.calls(node, own.quantized_linear.default) else None
        if isinstance(weight, Node) and weight.op == "get_attr":
            loaded = {name: nodes.attribute(gm, nodes.through_views(nodes.named(node, name))[0]) for name in LOADED}
            found[str(weight.target)] = MadeLayer(node, _form(node), nodes.named(node, "out_dtype"), loaded)
    return found


def _form(node: Node) -> Form:
    form = Form(str(nodes.named(node, "quantiser")), str(nodes.named(node, "layout")))
    try:
        return Form(form.name, form.named)
    except UsageError:  # a name of no quantiser: it raises where it runs
        return form


def check_made(before: GraphModule, after: GraphModule) -> Iterator[GraphFinding]:
    """Such layers are still there, take their codes for what they took them, and get codes and scales of one origin."""
    was, now = made_layers(before), made_layers(after)
    known = {id(tensor) for tensor in (*before.buffers(), *before.parameters())}
    for name, old in was.items():
        layer = now.get(name)
        if layer is None:
            yield GraphFinding(Check.ARGUMENTS, f"the layer of {name} is gone")
            continue
        parts = [("format", old.form, layer.form), ("result dtype", old.dtype, layer.dtype)]
        for what, theirs, mine in parts:
            if theirs != mine:
                yield _wrong(layer.node, f"the layer of {name} has another {what} than before: {mine}, it was {theirs}")
        for part in LOADED:
            if not _same(old.loaded[part], layer.loaded[part], known):
                yield _wrong(layer.node, f"the layer of {name} has another {part} than before")
    for name, layer in now.items():
        yield from (_wrong(layer.node, f"the layer of {name} {said}") for said in _origin(after, layer))


def _same(old: Tensor | None, new: Tensor | None, known: set[int]) -> bool:
    """One tensor or a copy that the pass made; another layer's equal one is another, equal today."""
    if old is None or new is None or old is new:
        return old is new
    return id(new) not in known and old.dtype == new.dtype and old.shape == new.shape and torch.equal(old, new)


def _origin(gm: GraphModule, layer: MadeLayer) -> Iterator[str]:
    """What is wrong with the pair of codes and scales that a layer reads, where a known operator makes one of them."""
    (codes, at), (scales, scales_at) = (_source(layer.node, name) for name in ("codes", "scales"))
    makers = [node for node in (codes, scales) if node is not None and _makes(node) is not None]
    if not makers:
        return
    if codes is not scales or codes is None:
        yield f"reads codes of {codes} and scales of {scales}"
        return
    form, places = _makes(codes) or (Form(""), (0, 1))
    if (at, scales_at) != places:
        yield f"reads results {at} and {scales_at} of {codes.name}, which returns codes and scales as {places}"
    if form != layer.form:
        yield f"takes for {layer.form} what {codes.name} quantises to {form}"
    theirs, mine = nodes.attribute(gm, nodes.through_views(nodes.named(codes, "scale"))[0]), layer.loaded["scale"]
    told = ["none" if each is None else str(each.flatten()[:2].tolist()) for each in (mine, theirs)]
    if told[0] != told[1]:
        yield f"has the factor {told[0]}, its codes are at {told[1]}"


def _source(layer: Node, name: str) -> tuple[Node | None, int]:
    """The node of which a layer reads a result, and which one."""
    source, _ = nodes.through_views(nodes.named(layer, name))
    if isinstance(source, Node) and source.target is operator.getitem and isinstance(source.args[0], Node):
        return source.args[0], int(source.args[1])  # type: ignore[arg-type]
    return (source if isinstance(source, Node) else None), 0


def _makes(node: Node) -> tuple[Form, tuple[int, int]] | None:
    """What a node quantises to, and the places of codes and scales among its results; None where it does not."""
    if roles.calls(node, own.quantize.default):
        return _form(node), (0, 1)
    op = roles.fused_op(node)
    if op is None or not op.returns_quant:
        return None
    returned = [name for name in RESULTS if name in op.returns]
    if op.quantiser == GIVEN_SCALE:
        return Form(op.quantiser), (returned.index("quant"), -1)
    form = Form(op.quantiser, str(nodes.named(node, "layout")))
    return Form(form.name, form.named), (returned.index("quant"), returned.index("scale"))


def _wrong(node: Node, message: str) -> GraphFinding:
    return GraphFinding(Check.ARGUMENTS, message, node=node.name)
