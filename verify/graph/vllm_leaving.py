"""A graph that vLLM's passes have seen, in Fusecheck's operators again."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import GraphModule, Node

from fusecheck.graph import nodes
from fusecheck.graph.fused_ops import NAMESPACE, RESULTS
from fusecheck.graph.quantised import Form
from fusecheck.graph.subject import PassError
from fusecheck.graph.vllm_host import PARAMETER, PATTERN_CODES, STRATEGY, overload
from fusecheck.graph.vllm_quantisers import NVFP4, Call, form_of, made_for, quantises
from fusecheck.operations import Operation

aten, own = torch.ops.aten, getattr(torch.ops, NAMESPACE)
WRITTEN = ("allreduce_in", "residual", "norm_out", "quant_out", "scale_out")
"""Arguments of the fused operator, from the first result of its functionalised call."""


class Leaving:
    """vLLM's graph in Fusecheck's operators."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.buffers: list[Node] = []

    def run(self) -> GraphModule:
        """The parameters, then node by node; buffers that were only written to go."""
        self.parameters()
        for node in list(self.graph.nodes):
            self.one(node)
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self.buffers or node.target == aten.sym_size.int):
                self.graph.erase_node(node)
        self.gm.recompile()
        return self.gm

    def one(self, node: Node) -> None:
        """A node of vLLM's as Fusecheck's; every other stays."""
        if node.target == overload("all_reduce"):
            self.replace(node, own.all_reduce.default, (nodes.argument(node, 0), STRATEGY))
        elif node.target == overload("rms_norm"):
            self.buffers += _gemma(nodes.argument(node, 1))
            self.replace(node, *_norm(*(nodes.argument(node, index) for index in range(3))))
        elif node.target == overload("fused_add_rms_norm"):
            self.add_and_norm(node)
        elif node.target is auto_functionalized and node.args[0] == overload("static_scaled_fp8_quant"):
            self.quantise(node)
        elif node.target is auto_functionalized and node.args[0] == overload("fused"):
            self.fused(node)
        elif quantises(node):
            self.made(node, *form_of(node))

    def parameters(self) -> None:
        """Inputs that are parameters become loaded tensors."""
        for node in [node for node in self.graph.nodes if node.op == "placeholder" and PARAMETER in node.meta]:
            name, tensor = node.meta[PARAMETER]
            nodes.hold(self.gm, name, tensor)
            for user in list(node.users):
                with self.graph.inserting_before(user):
                    read = self.graph.get_attr(name)
                read.meta.update({key: value for key, value in node.meta.items() if key != PARAMETER})
                user.replace_input_with(node, read)
            self.graph.erase_node(node)

    def replace(self, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
        """Another call in a node's place, which says what the node said."""
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args)
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return made

    def add_and_norm(self, node: Node) -> None:
        """The residual add and the norm, each on its own; the sum stands where the pair stood."""
        x, residual, weight, eps = (nodes.argument(node, index) for index in range(4))
        self.buffers += _gemma(weight)
        with self.graph.inserting_before(node):
            total = nodes.call(self.graph, aten.add.Tensor, (residual, x), node)
            target, args = _norm(total, weight, eps)
            norm = nodes.call(self.graph, target, args, node)
        self.results(node, {0: norm, 1: total})

    def quantise(self, node: Node) -> None:
        """The quantise as an operator that returns its codes."""
        arguments = node.kwargs
        with self.graph.inserting_before(node):
            target = own.static_quantize_e4m3_per_tensor.default
            pair = nodes.call(self.graph, target, (arguments["input"], arguments["scale"]), node)
            codes = nodes.call(self.graph, operator.getitem, (pair, 0), node)
        self.buffers += [arguments["result"]]  # type: ignore[list-item]
        self.results(node, {1: codes})

    def made(self, node: Node, form: Form, call: Call) -> None:
        """The quantise that makes its scales as an operator that returns both."""
        with self.graph.inserting_before(node):
            args = (node.kwargs["input"], node.kwargs.get(call.factor), form.name, form.layout)
            pair = nodes.call(self.graph, own.quantize.default, args, node)
            results = {index + 1: nodes.call(self.graph, operator.getitem, (pair, index), node) for index in (0, 1)}
        self.buffers += [each for name in (call.codes, call.scales) for each in made_for(node.kwargs[name])]  # type: ignore[arg-type]
        if call.role == NVFP4:
            self.as_bytes(node, 2, results[2])
        self.results(node, results)

    def as_bytes(self, node: Node, index: int, scales: Node) -> None:
        """Who reads a result's words as bytes in a row gets scales that are that; views between the two go."""
        for getitem in nodes.getitems(node, index):
            getitem.meta.pop("val", None)
            pending = list(getitem.users)
            while pending:
                view = pending.pop()
                if view.target not in (aten.view.dtype, aten.view.default):
                    continue
                pending += view.users
                self.buffers.append(view)
                value = nodes.value(view)
                if value is not None and value.dtype is torch.uint8 and value.dim() == 1:
                    view.replace_all_uses_with(scales)

    def fused(self, node: Node) -> None:
        """The fused operator that `pattern_code` names, and where its results are read."""
        given = {argument.name: argument.default_value for argument in overload("fused")._schema.arguments}
        given |= node.kwargs
        x, residual, norm_out, codes, scales = (given[name] for name in WRITTEN)
        op = _operation(given["pattern_code"])
        operands = x, residual, given["rms_gamma"], given["scale_factor"], given["rms_eps"], STRATEGY, op.name
        with self.graph.inserting_before(node):
            layout = Form(op.quantiser).named if op.returns_scale else ""
            made = nodes.call(self.graph, own.fused.default, (*operands, layout, given["weight_bias"]), node)
            results = [name for name in RESULTS if name in op.returns]
            has = {name: nodes.call(self.graph, operator.getitem, (made, at), node) for at, name in enumerate(results)}
        # Without a buffer of its own the norm takes the place of the addend, else the sum does. Who reads what a call
        # does not write finds what was there.
        if norm_out is not None:
            found = {1: has["residual"], 2: residual, 3: has.get("norm", norm_out)}
        else:
            found = {1: has.get("norm", x), 2: has["residual"]}
        found |= {at: has[name] for at, name in ((4, "quant"), (5, "scale")) if name in has}
        self.buffers += [each for each in (norm_out, codes) if isinstance(each, Node)]
        self.buffers += made_for(scales) if isinstance(scales, Node) else []
        if op.quantiser == "nvfp4":
            self.as_bytes(node, 5, has["scale"])
        self.results(node, found)

    def results(self, node: Node, found: dict[int, Node]) -> None:
        """Give the readers of each result what it is now, with the meta value that the pass gave it; drop the node."""
        for index, made in found.items():
            for getitem in nodes.getitems(node, index):
                if "val" in getitem.meta and made.target is operator.getitem:
                    made.meta["val"] = getitem.meta["val"]
                getitem.replace_all_uses_with(made)
                self.graph.erase_node(getitem)
        if not node.users:
            self.graph.erase_node(node)
        for made in found.values():
            if not made.users and made.target is operator.getitem:
                self.graph.erase_node(made)


def _operation(code: object) -> Operation:
    """What FlashInfer computes under a number.

    Raises:
        PassError: nothing that the graph question knows.
    """
    found = [Operation.named(name) for name, known in PATTERN_CODES.items() if known == code]
    if not found:
        told = ", ".join(f"{known} ({name})" for name, known in PATTERN_CODES.items())
        raise PassError(f"the pass made a call of pattern_code={code}, expected one of: {told}")
    return found[0]


def _gemma(weight: object) -> list[Node]:
    """The float32 copy of a Gemma norm's weight and the copy plus one; empty for a plain weight."""
    if isinstance(weight, Node) and weight.target == aten.add.Tensor and weight.args[1] == 1.0:
        wide = weight.args[0]
        if isinstance(wide, Node) and wide.target == torch.ops.prims.convert_element_type.default:
            return [wide, weight]
    return []


def _norm(x: Node, weight: Node, eps: float) -> tuple[Any, tuple[Any, ...]]:
    """A norm's operator and arguments."""
    if gemma := _gemma(weight):
        return own.gemma_rms_norm.default, (x, gemma[0].args[0], eps)
    return own.triton_rms_norm.default, (x, weight, eps)
