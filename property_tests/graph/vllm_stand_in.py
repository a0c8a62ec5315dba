"""A small pass on vLLM's operators, functionalised as its own: all-reduce, add, norm and quantise become one call."""

from __future__ import annotations

import operator
from typing import Any

from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import GraphModule, Node

from fusecheck.graph import nodes
from fusecheck.graph.config import SharedConfig
from fusecheck.graph.vllm_host import PATTERN_CODES, overload


def fuse(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse every sum over ranks that an add and norm alone reads, with the quantise if it alone reads the norm."""
    for node in list(gm.graph.nodes):
        if shared.world_size > 1 and node.target == overload("fused_add_rms_norm"):
            _fuse(gm, node, shared.world_size)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _fuse(gm: GraphModule, pair: Node, world_size: int) -> None:
    x, residual, weight, eps = (nodes.argument(pair, index) for index in range(4))
    values = [nodes.value(each) for each in (x, weight)]
    reduced = x.target == overload("all_reduce") and len(x.users) == 1
    if not reduced or any(value is None for value in values) or values[0].dtype != values[1].dtype:  # type: ignore[union-attr]
        return
    norms = nodes.getitems(pair, 0)
    quantises = [user for norm in norms for user in norm.users if _is_quantise(user)]
    alone = len(quantises) == 1 and all(len(norm.users) == 1 for norm in norms)
    arguments: dict[str, Any] = {
        "allreduce_in": nodes.argument(x, 0),
        "residual": residual,
        "norm_out": None,
        "quant_out": quantises[0].kwargs["result"] if alone else None,
        "scale_out": None,
        "rms_gamma": weight,
        "rms_eps": eps,
        "pattern_code": PATTERN_CODES["kARResidualRMSNormFP8Quant" if alone else "kARResidualRMSNorm"],
        "world_size": world_size,
        "launch_with_pdl": True,
        "fp32_acc": True,
        "max_token_num": 4096,
        **({"scale_factor": quantises[0].kwargs["scale"]} if alone else {}),
    }
    with gm.graph.inserting_before((quantises[0] if alone else pair).next):
        fused = gm.graph.call_function(auto_functionalized, (overload("fused"),), arguments)
        nodes.set_value(fused, x)
        found = [(1, norms), (2, nodes.getitems(pair, 1))]
        if alone:
            found = [(4, nodes.getitems(quantises[0], 1)), (2, nodes.getitems(pair, 1))]
        for index, readers in found:
            made = nodes.call(gm.graph, operator.getitem, (fused, index), pair)
            for reader in readers:
                reader.replace_all_uses_with(made)


def _is_quantise(node: Node) -> bool:
    return node.target is auto_functionalized and node.args[0] == overload("static_scaled_fp8_quant")


def nothing(gm: GraphModule) -> None:
    """Leave a graph as it is."""
