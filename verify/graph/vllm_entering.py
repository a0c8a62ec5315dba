"""A graph of Fusecheck's operators as vLLM's passes would see it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph, GraphModule, Node

from fusecheck.graph import nodes
from fusecheck.graph.fused_ops import NAMESPACE
from fusecheck.graph.meta import is_open
from fusecheck.graph.quantised import Form
from fusecheck.graph.vllm_host import GROUP, PARAMETER, overload
from fusecheck.graph.vllm_quantisers import NVFP4, PACKED, Call, call_of

PER_TENSOR = [-1, -1]
aten, own = torch.ops.aten, getattr(torch.ops, NAMESPACE)


class Entering:
    """Fusecheck's graph in vLLM's operators."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph

    def run(self) -> GraphModule:
        """Node by node, then the parameters."""
        for node in list(self.graph.nodes):
            if node.target == own.all_reduce.default:
                self.replace(node, overload("all_reduce"), (nodes.argument(node, 0), GROUP))
            elif node.target in (own.triton_rms_norm.default, own.torch_rmsnorm.default):
                self.norm(node)
            elif node.target == own.gemma_rms_norm.default:
                self.norm(node, gemma=True)
            elif node.target == own.fp8_linear.default:
                self.linear(node)
            elif node.target == own.quantize.default:
                self.made(node)
            elif node.target == own.static_quantize_e4m3_per_tensor.default:
                codes = self.quantise(node, nodes.argument(node, 0), nodes.argument(node, 1))
                for index, made in ((0, codes), (1, nodes.argument(node, 1))):
                    for getitem in nodes.getitems(node, index):
                        getitem.replace_all_uses_with(made)
        self.erase_unread()
        self.parameters()
        self.gm.recompile()
        return self.gm

    def replace(self, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
        """Another call in a node's place."""
        with self.graph.inserting_before(node):
            made = nodes.call(self.graph, target, args, node)
        node.replace_all_uses_with(made)
        return made

    def norm(self, node: Node, *, gemma: bool = False) -> None:
        """Add and norm in one, where the add stood, if the norm reads a plain residual add; else the norm alone."""
        add, weight, eps = (nodes.argument(node, index) for index in range(3))
        operands = _plain_add(add)
        done = add.meta.get("vllm_sum")
        if operands is None or done is not None or weight.op != "get_attr":
            made = self.one_plus(node, weight) if gemma else weight
            self.replace(node, overload("rms_norm"), (done or add, made, eps))
            return
        place = add.next
        made = self.one_plus(place, weight) if gemma else weight
        with self.graph.inserting_before(place):
            pair = nodes.call(self.graph, overload("fused_add_rms_norm"), (*operands, made, eps), node)
            norm, total = (nodes.call(self.graph, operator.getitem, (pair, index), node) for index in (0, 1))
        node.replace_all_uses_with(norm)
        add.replace_all_uses_with(total, delete_user_cb=lambda user: user is not node)
        add.meta["vllm_sum"] = total

    def one_plus(self, before: Node, weight: Node) -> Node:
        """A Gemma norm's weight in float32, plus one."""
        with self.graph.inserting_before(before):
            wide = nodes.call(self.graph, torch.ops.prims.convert_element_type.default, (weight, torch.float32), weight)
            return nodes.call(self.graph, aten.add.Tensor, (wide, 1.0), weight)

    def linear(self, node: Node) -> None:
        """A quantise, and a layer on codes."""
        x, weight, bias, scale, weight_scale, out_dtype = (nodes.argument(node, index) for index in range(6))
        read = nodes.value(x)
        dtype = out_dtype or str(read.dtype if read is not None else torch.bfloat16).removeprefix("torch.")
        codes = x if read is not None and read.dtype is torch.float8_e4m3fn else self.quantise(node, x, scale)
        self.replace(node, own.fp8_prequant_linear.default, (codes, weight, bias, scale, weight_scale, dtype))

    def quantise(self, node: Node, x: Node, scale: Node) -> Node:
        """A functionalised quantise into an empty buffer, before a node."""
        value = nodes.value(x)
        assert value is not None
        with self.graph.inserting_before(node):
            buffer = self.buffer(x, self.sizes(x, value), torch.float8_e4m3fn)
            arguments = {"result": buffer, "input": x, "scale": scale, "group_shape": PER_TENSOR}
            made = _called(self.graph, x, auto_functionalized, (overload("static_scaled_fp8_quant"),), arguments)
            return nodes.call(self.graph, operator.getitem, (made, 1), x)

    def made(self, node: Node) -> None:
        """A functionalised quantise that makes its scales, if vLLM has one to this form."""
        x, factor, name, layout = (nodes.argument(node, index) for index in range(4))
        call, said = call_of(Form(name, layout)), node.meta.get("val")
        if call is None or said is None:
            return
        with self.graph.inserting_before(node):
            codes = self.buffer(x, self.sizes(x, said[0]), said[0].dtype)
            given = {"input": x, call.codes: codes, call.scales: self.scales(x, said[1], call)} | call.options
            given |= {call.factor: factor} if call.factor else {}
            target = overload(call.role)
            # In the schema's order, as functionalising leaves them: the pattern matcher compares keywords in order.
            given = {argument.name: given[argument.name] for argument in target._schema.arguments}
            both = _called(self.graph, x, auto_functionalized, (target,), given)
        for index in (0, 1):
            for getitem in nodes.getitems(node, index):
                with self.graph.inserting_before(getitem):
                    result = nodes.call(self.graph, operator.getitem, (both, index + 1), getitem)
                    if index and call.role == NVFP4:
                        result = nodes.call(self.graph, aten.view.dtype, (result, torch.uint8), getitem)
                        result = nodes.call(self.graph, aten.view.default, (result, [-1]), getitem)
                getitem.replace_all_uses_with(result)
                self.graph.erase_node(getitem)
        self.graph.erase_node(node)

    def scales(self, x: Node, like: torch.Tensor, call: Call) -> Node:
        """An empty buffer of scales: by rows, by columns, packed by columns of whole fours, or in tiles."""
        if call.role == NVFP4:
            value = nodes.value(x)
            assert value is not None
            tokens = functools.reduce(functools.partial(self.count, x, operator.mul), self.sizes(x, value)[:-1])
            return self.buffer(x, [self.aligned(x, tokens, 128), -(-int(value.shape[-1]) // 64)], torch.int32)
        rows, columns = self.sizes(x, like)
        if call.role == PACKED:
            options = {"dtype": like.dtype, "device": like.device}
            shape, strides = [rows, columns], [1, self.aligned(x, rows, 4)]
            return _called(self.graph, x, aten.empty_strided.default, (shape, strides), options)
        if not call.options.get("dummy_is_scale_transposed"):
            return self.buffer(x, [rows, columns], like.dtype)
        turned = self.buffer(x, [columns, rows], like.dtype)
        return nodes.call(self.graph, aten.permute.default, (turned, [-1, -2]), x)

    def aligned(self, x: Node, size: Node | int, to: int) -> Node | int:
        """A size rounded up to a multiple."""
        for compute, by in ((operator.add, to - 1), (operator.floordiv, to), (operator.mul, to)):
            size = self.count(x, compute, size, by)
        return size

    def count(self, x: Node, compute: Callable[..., Any], size: Node | int, by: Node | int) -> Node | int:
        """What comes of sizes, which are nodes where they are open."""
        is_open = isinstance(size, Node) or isinstance(by, Node)
        return nodes.call(self.graph, compute, (size, by), x) if is_open else int(compute(size, by))

    def buffer(self, x: Node, shape: list[Node | int], dtype: torch.dtype) -> Node:
        """An empty tensor on the device of `x`."""
        value = nodes.value(x)
        assert value is not None
        options = {"dtype": dtype, "device": value.device, "pin_memory": False}
        return _called(self.graph, x, aten.empty.memory_format, (shape,), options)

    def sizes(self, x: Node, like: torch.Tensor) -> list[Node | int]:
        """The sizes of a buffer."""
        return [self.open_size(x, at, size) if is_open(size) else size for at, size in enumerate(like.shape)]

    def open_size(self, x: Node, dimension: int, size: Any) -> Node:
        """An open size, read from an input that has it: vLLM's graphs get it as an input of its own."""
        for node in self.graph.nodes:
            known = nodes.value(node) if node.op == "placeholder" else None
            sizes = [str(each) for each in known.shape] if known is not None else []
            if str(size) in sizes:
                return nodes.call(self.graph, aten.sym_size.int, (node, sizes.index(str(size))), node)
        return nodes.call(self.graph, aten.sym_size.int, (x, dimension), x)

    def erase_unread(self) -> None:
        """What was replaced, and reads of it."""
        gone = {own.all_reduce.default, own.triton_rms_norm.default, own.torch_rmsnorm.default}
        gone |= {own.gemma_rms_norm.default, own.fp8_linear.default, own.static_quantize_e4m3_per_tensor.default}
        for node in reversed(self.graph.nodes):
            replaced = node.target in gone or "vllm_sum" in node.meta
            of_replaced = node.target is operator.getitem and node.args[0].target in gone
            if not node.users and (replaced or of_replaced):
                self.graph.erase_node(node)
            node.meta.pop("vllm_sum", None)

    def parameters(self) -> None:
        """Every loaded tensor becomes an input after the others."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        after, known = places[-1], dict[str, Node]()
        for node in [node for node in self.graph.nodes if node.op == "get_attr"]:
            name, tensor = str(node.target), nodes.attribute(self.gm, node)
            if tensor is None:
                continue
            if name not in known:
                with self.graph.inserting_after(after):
                    after = known[name] = self.graph.placeholder(name.replace(".", "_"))
                after.meta.update(node.meta)
                after.meta[PARAMETER] = (name, tensor)
            node.replace_all_uses_with(known[name])
            self.graph.erase_node(node)


def _plain_add(node: object) -> tuple[Node, Node] | None:
    """The summed tensor and the residual of a residual add as vLLM has it: the sum over ranks first."""
    if not isinstance(node, Node) or node.target != aten.add.Tensor or node.kwargs:
        return None
    values = [nodes.value(each) for each in node.args]
    if any(value is None for value in values) or node.args[0] is node.args[1]:
        return None
    left, right = values
    assert left is not None
    assert right is not None
    if left.dtype != right.dtype or left.dim() != right.dim():
        return None
    if any(str(mine) != str(theirs) for mine, theirs in zip(left.shape, right.shape, strict=True)):
        return None
    first, second = node.args
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    reduced = nodes.through_views(second)[0]
    summed = isinstance(reduced, Node) and reduced.target == overload("all_reduce")
    return (second, first) if summed else (first, second)


def _called(graph: Graph, like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """Insert a call with keywords, and compute its meta value in the fake mode of `like`."""
    node = graph.call_function(target, args, kwargs)
    nodes.set_value(node, like)
    return node
