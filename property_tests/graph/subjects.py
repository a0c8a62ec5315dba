"""Passes that are no passes: they raise, hang, return something else, or leave a graph that is none."""

from __future__ import annotations

import os
import time

from torch.fx import GraphModule

from fusecheck.graph.config import SharedConfig
from fusecheck.graph.passes import fuse_allreduce_residual_rmsnorm_quant_fp8


def raises(gm: GraphModule) -> GraphModule:
    """Raise."""
    raise KeyError("no such node")


def returns_text(gm: GraphModule) -> str:
    """Return something else."""
    return "fused"


def does_not_lint(gm: GraphModule) -> None:
    """Move a node before what it reads."""
    last = next(node for node in reversed(gm.graph.nodes) if node.op == "call_function")
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    first.prepend(last)


def on_one_rank(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse on rank 1 alone, without asking the others."""
    if shared.local_rank != 1:
        return gm
    alone = SharedConfig(local_rank=1, world_size=shared.world_size, transforms=shared.transforms)
    return fuse_allreduce_residual_rmsnorm_quant_fp8(gm, alone)


def asks_on_one_rank(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Enter a collective call on rank 0 alone: the group hangs."""
    if shared.local_rank == 0 and shared.gather is not None:
        shared.gather("alone")
        time.sleep(60)
    return gm


def dies_on_one_rank(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """End the process of rank 1."""
    if shared.local_rank == 1:
        os._exit(7)
    return gm


_sizes: list[int] = []


def dies_at_the_third(gm: GraphModule) -> GraphModule:
    """End the process with the third graph that it is given; each is given several times."""
    inputs = len([node for node in gm.graph.nodes if node.op == "placeholder"])
    if inputs not in _sizes:
        _sizes.append(inputs)
    if len(_sizes) == 3:
        os._exit(7)
    return gm


def dies_on_a_dead_residual(gm: GraphModule) -> GraphModule:
    """End the process on the graph of row F7, and on no other."""
    if any(node.name == "residual_after_site0" for node in gm.graph.nodes):
        os._exit(7)
    return gm


NOT_A_FUNCTION = 3
"""What is named instead of a pass."""
