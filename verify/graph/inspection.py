"""The checks that need no run: names and readers of the rewritten graph against the graph as it was."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecheck.graph import nodes, roles
from fusecheck.graph.collinear import is_merged
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.fused_ops import RESULTS
from fusecheck.graph.made_layers import check_made
from fusecheck.graph.structure import dead_work, effects
from fusecheck.interface import FusionOp
from fusecheck.operations import GIVEN_SCALE

own = torch.ops.fusecheck

PLAIN_ROLES = ("all_reduce", "reduce_scatter", "norm")
"""What is counted besides fused operators."""


@dataclass(frozen=True)
class Original:
    """What the graph says about a norm before any rewrite.

    Attributes:
        weight: the tensor itself.
        eps: of the norm.
        strategy: of the collective before it, None where there is none.
        weight_bias: what it adds to its weight.
    """

    weight: Tensor
    eps: float
    strategy: str | None
    weight_bias: float


@dataclass(frozen=True)
class FusedNode:
    """A fused operator in a rewritten graph.

    Attributes:
        node: in the graph.
        op: which operation.
        site: the name of the norm that it was, None where its weight is none of the graph's.
    """

    node: Node
    op: FusionOp
    site: str | None

    def argument(self, name: str) -> object:
        """An argument of the node by the name in its schema: `weight`, `scale`, `eps`, `strategy` ..."""
        return nodes.named(self.node, name)

    def results(self, name: str) -> list[Node]:
        """The nodes that take one of its results: `norm`, `quant`, `scale` or `residual`."""
        returned = [each for each in RESULTS if each in self.op.returns]
        return nodes.getitems(self.node, returned.index(name)) if name in returned else []


class Sites:
    """Names for the norms of a graph, fused or not, that hold in the rewritten graph too.

    A norm is known by its weight: the attribute's name, or where a pass gave the tensor another name, the tensor. Norms
    that share a weight are told apart by their order.

    Args:
        before: the unfused graph.
    """

    def __init__(self, before: GraphModule) -> None:
        self._found: dict[GraphModule, dict[Node, str]] = {}
        self._weights: dict[str, Tensor] = {}
        for node in before.graph.nodes:
            weight = nodes.argument(node, 1) if roles.weight_bias(node) is not None else None
            if (tensor := nodes.attribute(before, weight)) is not None and isinstance(weight, Node):
                self._weights[str(weight.target)] = tensor

    def of(self, gm: GraphModule) -> dict[Node, str]:
        """The name of each norm and fused node whose weight is a norm's weight; the graph must not change after."""
        if gm not in self._found:
            self._found[gm] = self._named_nodes(gm)
        return self._found[gm]

    def _named_nodes(self, gm: GraphModule) -> dict[Node, str]:
        found: dict[Node, str] = {}
        seen: Counter[str] = Counter()
        for node in gm.graph.nodes:
            fused = roles.fused_op(node) is not None
            if not fused and roles.weight_bias(node) is None:
                continue
            name = self._named(gm, nodes.named(node, "weight") if fused else nodes.argument(node, 1))
            if name is not None:
                found[node] = f"{name}#{seen[name]}" if seen[name] else name
                seen[name] += 1
        return found

    def _named(self, gm: GraphModule, weight: object) -> str | None:
        tensor = nodes.attribute(gm, weight)
        if tensor is None or not isinstance(weight, Node):
            return None
        if str(weight.target) in self._weights:
            return str(weight.target)
        alike = [name for name, known in self._weights.items() if tensor is known or _same_values(tensor, known)]
        return alike[0] if len(alike) == 1 else None


def _same_values(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def fused_nodes(gm: GraphModule, sites: Sites) -> list[FusedNode]:
    """The fused operators of a graph, in order."""
    names = sites.of(gm)
    found = [(node, roles.fused_op(node)) for node in gm.graph.nodes]
    return [FusedNode(node, op, names.get(node)) for node, op in found if op is not None]


def originals(gm: GraphModule, sites: Sites) -> dict[str, Original]:
    """What each norm of the unfused graph is, by its name."""
    found: dict[str, Original] = {}
    for node, name in sites.of(gm).items():
        tensor = nodes.attribute(gm, nodes.argument(node, 1))
        assert tensor is not None
        bias = roles.weight_bias(node)
        assert bias is not None
        found[name] = Original(tensor, nodes.argument(node, 2), _strategy_before(node), bias)
    return found


def _strategy_before(norm: Node) -> str | None:
    add = nodes.argument(norm, 0)
    for operand in (add, *add.all_input_nodes) if isinstance(add, Node) else ():
        source, _ = nodes.through_views(operand)
        if roles.is_sum(source) and isinstance(source, Node):
            return str(nodes.named(source, "strategy"))
    return None


def count_roles(gm: GraphModule) -> dict[str, int]:
    """How many operators of each role the graph has."""
    found: Counter[str] = Counter()
    for node in gm.graph.nodes:
        fused = roles.fused_op(node)
        if fused is not None:
            found[fused.value] += 1
        found["all_reduce"] += roles.is_all_reduce(node)
        if roles.calls(node, own.reduce_scatter.default):
            found["reduce_scatter"] += 1
        if is_merged(node):
            found["merged"] += 1
        found["norm"] += roles.is_norm(node)
    return dict(found)


def check_structure(
    before: GraphModule, after: GraphModule, sites: Sites, predecessor: GraphModule
) -> list[GraphFinding]:
    """Arguments, dead work, collectives and effects.

    Args:
        before: the unfused graph.
        after: the rewritten one.
        sites: the names of its norms.
        predecessor: what the last pass was given.
    """
    found = list(_arguments(before, after, sites))
    found += _linear_arguments(before, after)
    found += check_made(before, after)
    found += [
        GraphFinding(Check.ORPHANS, f"{node.name} ({node.target}) is computed, and nothing reads it", node=node.name)
        for node in dead_work(after, predecessor)
    ]
    found += _effects(predecessor, after)
    return found + _collectives(before, after)


def _effects(predecessor: GraphModule, after: GraphModule) -> list[GraphFinding]:
    """Every write and assertion of the graph that the pass was given is still there, and no other."""
    was, now = effects(predecessor), effects(after)
    gone, new = was - now, now - was
    found = [f"{count} of {was[name]} calls of {name}, which has an effect, are gone" for name, count in gone.items()]
    found += [f"{count} new calls of {name}, which has an effect" for name, count in new.items()]
    return [GraphFinding(Check.EFFECTS, message) for message in found]


def _collectives(before: GraphModule, after: GraphModule) -> list[GraphFinding]:
    """Fusing moves sums over ranks, and adds none."""
    was, now = (
        sum(roles.is_sum(node) or roles.fused_op(node) is not None for node in gm.graph.nodes) for gm in (before, after)
    )
    if now <= was:
        return []
    return [GraphFinding(Check.COUNTS, f"the graph now sums over the ranks {now} times, the unfused one {was} times")]


def _arguments(before: GraphModule, after: GraphModule, sites: Sites) -> Iterator[GraphFinding]:
    known = originals(before, sites)
    for fused in fused_nodes(after, sites):
        origin = known.get(fused.site or "")
        if origin is None:
            yield _wrong(fused, f"its weight {fused.argument('weight')} is not the weight of a norm of the graph")
            continue
        weight = nodes.attribute(after, fused.argument("weight"))
        if weight is None or not (weight is origin.weight or _same_values(weight, origin.weight)):
            yield _wrong(fused, f"weight {fused.site} does not hold the norm's own values")
        if fused.argument("eps") != origin.eps:
            yield _wrong(fused, f"eps={fused.argument('eps')}, the norm has {origin.eps}")
        if fused.argument("weight_bias") != origin.weight_bias:
            yield _wrong(fused, f"weight_bias={fused.argument('weight_bias')}, the norm has {origin.weight_bias}")
        strategy = str(fused.argument("strategy"))
        if strategy.split("<=")[0] != origin.strategy:
            yield _wrong(fused, f"strategy={strategy}, the collective has {origin.strategy}")
        if fused.op.quantiser == GIVEN_SCALE:
            yield from _scale(fused, after)
        elif fused.op.returns_quant:
            yield from _made_codes(fused)


def _scale(fused: FusedNode, gm: GraphModule) -> Iterator[GraphFinding]:
    """The input scale of the layers that read the codes: the same tensor, or an equal one."""
    scale = nodes.attribute(gm, nodes.through_views(fused.argument("scale"))[0])
    if scale is None:
        yield _wrong(fused, "its scale is not an attribute of the graph")
        return
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        yield _wrong(fused, f"its scale holds {_shown(scale)}, expected finite values above 0")
    if scale.dtype is not torch.float32 or scale.numel() != 1:
        yield _wrong(fused, f"its scale is {scale.dtype} {list(scale.shape)}, the kernel reads one float32")
    readers = [user for codes in fused.results("quant") for user, _ in nodes.terminal_users(codes)]
    layers = [user for user in readers if roles.is_linear(user) or user.target == own.fp8_prequant_linear.default]
    held = [(layer, _own_scale(gm, layer)) for layer in layers]
    for layer, theirs in held:
        if theirs is None:
            yield _wrong(fused, f"its codes are at scale {_shown(scale)}, but {layer.name} has no loaded input scale")
        elif not _same_scale(scale, theirs):
            told = f"{_shown(scale)} {list(scale.shape)}, but {layer.name} dequantises with {_shown(theirs)}"
            yield _wrong(fused, f"scale {told} {list(theirs.shape)}")
    if held and not any(theirs is not None and _is_of(scale, theirs) for _, theirs in held):
        yield _wrong(fused, "its scale is not the input scale of any layer that reads the codes")
    for user in readers:
        if user not in layers and user.op != "output":
            yield _wrong(fused, f"{user.name} reads the codes but is not an FP8 layer")


def _made_codes(fused: FusedNode) -> Iterator[GraphFinding]:
    """Codes and scales that the operator made are read by layers on such; `check_made` asks these whose they are."""
    for codes in (*fused.results("quant"), *fused.results("scale")):
        for user, _ in nodes.terminal_users(codes):
            if user.op != "output" and not roles.calls(user, own.quantized_linear.default):
                yield _wrong(fused, f"{user.name} reads {codes.name} but is no layer on codes with scales")


def _same_scale(left: Tensor, right: Tensor) -> bool:
    """Equal in value where both are one number; a NaN is nobody's equal."""
    return left.numel() == right.numel() == 1 and float(left) == float(right)


def _is_of(left: Tensor, right: Tensor) -> bool:
    """One tensor, or one that holds a copy of it."""
    return left is right or left.data_ptr() == right.data_ptr() or _same_values(left.reshape(-1), right.reshape(-1))


def _shown(tensor: Tensor) -> list[float]:
    return tensor.flatten()[:2].tolist()


def _wrong(fused: FusedNode, message: str) -> GraphFinding:
    return GraphFinding(Check.ARGUMENTS, f"{fused.node.name}: {message}", node=fused.node.name)


def _own_scale(gm: GraphModule, layer: Node) -> Tensor | None:
    """A layer's input scale: its own attribute, or that of the separate quantise that hands it on."""
    scale = nodes.argument(layer, 3)
    if isinstance(scale, Node) and scale.target is operator.getitem and scale.args[1] == 1:
        source = scale.args[0]
        if isinstance(source, Node) and source.target == own.static_quantize_e4m3_per_tensor.default:
            scale = nodes.argument(source, 1)
    return nodes.attribute(gm, nodes.through_views(scale)[0])


def _layers(gm: GraphModule) -> dict[str, tuple[Tensor | None, ...]]:
    """Bias, input scale and weight scale of each FP8 layer, by the name of its weight; computed ones are None."""
    found: dict[str, tuple[Tensor | None, ...]] = {}
    for node in gm.graph.nodes:
        if roles.is_linear(node) or node.target == own.fp8_prequant_linear.default:
            weight = nodes.argument(node, 1)
            if isinstance(weight, Node) and weight.op == "get_attr":
                bias, weight_scale = (nodes.attribute(gm, nodes.argument(node, at)) for at in (2, 4))
                found[str(weight.target)] = (bias, _own_scale(gm, node), weight_scale)
    return found


def _linear_arguments(before: GraphModule, after: GraphModule) -> list[GraphFinding]:
    """FP8 layers keep their own bias and scales; another layer's equal scale is another scale, equal today."""
    was, now = _layers(before), _layers(after)
    found = [GraphFinding(Check.ARGUMENTS, f"the layer of {name} is gone") for name in was if name not in now]
    loaded = {id(tensor) for _, tensor in tensors_of(before)}
    for name, parts in now.items():
        for part, mine, theirs in zip(("bias", "input_scale", "weight_scale"), parts, was.get(name, ()), strict=False):
            # A copy that the pass made is as good; another layer's equal tensor is not.
            copied = mine is not None and id(mine) not in loaded and theirs is not None and _same_values(mine, theirs)
            if theirs is not None and mine is not theirs and not copied:
                found.append(GraphFinding(Check.ARGUMENTS, f"the layer of {name} has another {part} than before"))
    return found


def tensors_of(gm: GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The loaded tensors of a graph, by name."""
    yield from gm.named_buffers()
    yield from gm.named_parameters()
