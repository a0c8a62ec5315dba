"""vLLM: its IR and functionalised operators, as its compile passes see them after AOTAutograd.

Sums over ranks name a group and no strategy; residual add and norm are one operator; a quantise writes into a buffer
that it is given, so it stands functionalised in the graph; parameters are inputs. The fused operator is one for all
operations: `pattern_code` says which, and where it writes the norm depends on whether `norm_out` is given.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph, GraphModule, Node

from fusecheck.graph import nodes, vllm_host
from fusecheck.graph.fused_ops import NAMESPACE
from fusecheck.graph.meta import is_open
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.schemas import installed, published, read_on

NAME = "vllm"
GROUP = "tp:0"
"""How vLLM names the tensor-parallel group."""
PER_TENSOR = [-1, -1]
STRATEGY = "AUTO"
PARAMETER = "fusecheck_parameter"
"""Key in the meta of an input that is a parameter: its name and tensor."""
aten, own = torch.ops.aten, getattr(torch.ops, NAMESPACE)
ABSENT = {
    "several readers": "q/k/v and gate/up are one layer in vLLM's models",
    "draft": "the pass sees no draft flag",
    "no meta": "a compiled graph has a meta value on every node",
    "scale": "vLLM's layers load one float32 scale a layer",
    "collective": "this all-reduce is not in vLLM's operators",
}


class Vllm:
    """vLLM's operators."""

    name = NAME

    def ready(self) -> None:
        """See `Library.ready`."""
        vllm_host.register()
        installed(NAME, "vllm")

    def status(self) -> str:
        """See `Library.status`."""
        return f"{vllm_host.status()} (schemas of {read_on(NAME)})"

    def enter(self, gm: GraphModule) -> GraphModule:
        """See `Library.enter`."""
        self.ready()
        return _Entering(gm).run()

    def leave(self, gm: GraphModule) -> GraphModule:
        """See `Library.leave`."""
        return _Leaving(gm).run()

    def speaks(self, gm: GraphModule) -> bool:
        """See `Library.speaks`."""
        overload = published(NAME)["all_reduce"].overload
        return overload is not None and any(node.target == overload for node in gm.graph.nodes)

    def adapt(self, plan: GraphPlan) -> GraphPlan | str:
        """Activations are 2-D, sums over ranks have no strategy, and one layer reads a norm."""
        for site in plan.sites:
            layers = [reader for reader in site.readers if reader.kind in ("fp8", "quantize")]
            if len(layers) > 1:
                return ABSENT["several readers"]
            if not site.norm_meta:
                return ABSENT["no meta"]
        if plan.draft:
            return ABSENT["draft"]
        sites = tuple(
            replace(
                site,
                strategy=STRATEGY,
                norm="triton" if site.norm in ("torch", "flashinfer") else site.norm,
                norm_keywords=False,
                readers=tuple(replace(reader, keywords=False, packet=False) for reader in site.readers),
            )
            for site in plan.sites
        )
        return replace(plan, sites=sites, batched=False)


def _overload(role: str) -> Any:
    found = published(NAME)[role].overload
    assert found is not None, role
    return found


class _Entering:
    """Fusecheck's graph in vLLM's operators."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph

    def run(self) -> GraphModule:
        """Node by node, then the parameters."""
        for node in list(self.graph.nodes):
            if node.target == own.all_reduce.default:
                self.replace(node, _overload("all_reduce"), (nodes.argument(node, 0), GROUP))
            elif node.target in (own.triton_rms_norm.default, own.torch_rmsnorm.default):
                self.norm(node, nodes.argument(node, 1))
            elif node.target == own.gemma_rms_norm.default:
                self.norm(node, self.one_plus(node, nodes.argument(node, 1)))
            elif node.target == own.fp8_linear.default:
                self.linear(node)
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

    def norm(self, node: Node, weight: Node) -> None:
        """Add and norm in one where the norm reads a plain residual add, else the norm alone."""
        add, eps = nodes.argument(node, 0), nodes.argument(node, 2)
        operands = _plain_add(add)
        if operands is None or add.meta.get("vllm_sum") is not None:
            self.replace(node, _overload("rms_norm"), (add.meta.get("vllm_sum") or add, weight, eps))
            return
        with self.graph.inserting_before(node):
            pair = nodes.call(self.graph, _overload("fused_add_rms_norm"), (*operands, weight, eps), node)
            norm, total = (nodes.call(self.graph, operator.getitem, (pair, index), node) for index in (0, 1))
        node.replace_all_uses_with(norm)
        early = {user for user in add.users if user < pair}
        add.replace_all_uses_with(total, delete_user_cb=lambda user: user not in early and user is not node)
        add.meta["vllm_sum"] = total

    def one_plus(self, node: Node, weight: Node) -> Node:
        """A Gemma norm's weight in float32, plus one."""
        with self.graph.inserting_before(node):
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
            shape = [self.open_size(x, at, size) if is_open(size) else size for at, size in enumerate(value.shape)]
            buffer = _called(
                self.graph,
                x,
                aten.empty.memory_format,
                (shape,),
                {"dtype": torch.float8_e4m3fn, "device": value.device, "pin_memory": False},
            )
            arguments = {"result": buffer, "input": x, "scale": scale, "group_shape": PER_TENSOR}
            made = _called(self.graph, x, auto_functionalized, (_overload("static_scaled_fp8_quant"),), arguments)
            return nodes.call(self.graph, operator.getitem, (made, 1), x)

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
    summed = isinstance(reduced, Node) and reduced.target == _overload("all_reduce")
    return (second, first) if summed else (first, second)


def _called(graph: Graph, like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """Insert a call with keywords, and compute its meta value in the fake mode of `like`."""
    node = graph.call_function(target, args, kwargs)
    nodes.set_value(node, like)
    return node


class _Leaving:
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
        if node.target == _overload("all_reduce"):
            self.replace(node, own.all_reduce.default, (nodes.argument(node, 0), STRATEGY))
        elif node.target == _overload("rms_norm"):
            self.replace(node, *_norm(*(nodes.argument(node, index) for index in range(3))))
        elif node.target == _overload("fused_add_rms_norm"):
            self.add_and_norm(node)
        elif node.target is auto_functionalized and node.args[0] == _overload("static_scaled_fp8_quant"):
            self.quantise(node)
        elif node.target is auto_functionalized and node.args[0] == _overload("fused"):
            self.fused(node)

    def parameters(self) -> None:
        """Inputs that are parameters become loaded tensors."""
        for node in [node for node in self.graph.nodes if node.op == "placeholder" and PARAMETER in node.meta]:
            name, tensor = node.meta[PARAMETER]
            _register(self.gm, name, tensor)
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

    def fused(self, node: Node) -> None:
        """The fused operator that `pattern_code` names, and where its results are read."""
        given = {argument.name: argument.default_value for argument in _overload("fused")._schema.arguments}
        given |= node.kwargs
        x, residual, norm_out = given["allreduce_in"], given["residual"], given["norm_out"]
        quantises = given["pattern_code"] == vllm_host.PATTERN_CODES["kARResidualRMSNormFP8Quant"]
        operands = (x, residual, given["rms_gamma"], *([given["scale_factor"]] if quantises else []), given["rms_eps"])
        target = own.ar_residual_norm_quant_fp8 if quantises else own.ar_residual_norm
        with self.graph.inserting_before(node):
            made = nodes.call(self.graph, target.default, (*operands, STRATEGY, given["weight_bias"]), node)
            first, total = (nodes.call(self.graph, operator.getitem, (made, index), node) for index in (0, 1))
        # Without a buffer of its own the norm takes the place of the addend, else the sum does. A quantising call
        # writes no norm: whoever reads it finds what was there.
        found = {1: total, 3: first} if norm_out is not None else {1: first, 2: total}
        if quantises:
            found = {1: total, 3: norm_out, 4: first} if norm_out is not None else {1: x, 2: total, 4: first}
        self.buffers += [each for each in (norm_out, given["quant_out"]) if isinstance(each, Node)]
        self.results(node, found | ({2: residual} if 2 not in found else {}))

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


def _norm(x: Node, weight: Node, eps: float) -> tuple[Any, tuple[Any, ...]]:
    """A norm's operator and arguments; one whose weight is a float32 copy plus one is Gemma's."""
    if isinstance(weight, Node) and weight.target == aten.add.Tensor and weight.args[1] == 1.0:
        wide = weight.args[0]
        if isinstance(wide, Node) and wide.target == torch.ops.prims.convert_element_type.default:
            return own.gemma_rms_norm.default, (x, wide.args[0], eps)
    return own.triton_rms_norm.default, (x, weight, eps)


def _register(gm: GraphModule, name: str, tensor: torch.Tensor) -> None:
    owner: Any = gm
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if not hasattr(owner, leaf):
        owner.register_buffer(leaf, tensor)


def fuse_allreduce_rms(gm: GraphModule, shared: Any) -> GraphModule:
    """VLLM's own `AllReduceFusionPass`, over every range of sizes for which it says that it applies."""
    value = next(nodes.value(node) for node in gm.graph.nodes if node.op == "placeholder")
    assert value is not None
    vllm_host.fusion_pass(shared.world_size, value.dtype, shared.max_tokens)(gm.graph)
    gm.recompile()
    return gm
