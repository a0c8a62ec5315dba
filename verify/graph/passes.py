"""The transforms by the names that TensorRT-LLM AutoDeploy gives them, those of other formats in its manner, and all.

Each takes the graph and what all ranks share, rewrites in place and returns the graph. What was matched and what was
refused, with the reason, is appended to `gm.meta["transform_history"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import GraphModule

from fusecheck.graph.config import ALL_ENABLED, FINALIZE_PASS, NORM_PASS, QUANT_PASSES, SharedConfig
from fusecheck.graph.finalize_fusion import FuseFinalize
from fusecheck.graph.norm_fusion import FuseNorm
from fusecheck.graph.quant_fusion import FuseEveryQuant, FuseQuant, quant_pass

Pass = Callable[..., GraphModule]


def fuse_allreduce_residual_rmsnorm(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fuse all-reduce + residual add + RMSNorm; on unless the configuration says otherwise."""
    return FuseNorm.apply(gm, shared)


def fuse_allreduce_residual_rmsnorm_quant_fp8(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fold the static E4M3 quantise of a fused norm's readers into the fused operator; opt-in by configuration."""
    return FuseQuant.apply(gm, shared)


def fuse_moe_finalize_allreduce(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Fold the sum of experts before a fused all-reduce into the fused operator, where a library has that."""
    return FuseFinalize.apply(gm, shared)


def fuse_allreduce_residual_rmsnorm_family(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Every quantise, then the sums of experts."""
    FuseEveryQuant.apply(gm, shared)
    return FuseFinalize.apply(gm, shared)


def fuse_all(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Norms, quantises and sums of experts in their order, all switched on."""
    shared = replace(shared, transforms={**ALL_ENABLED, **shared.transforms})
    fuse_allreduce_residual_rmsnorm(gm, shared)
    return fuse_allreduce_residual_rmsnorm_family(gm, shared)


OF_KIND: dict[str, Pass] = {name: quant_pass(kind).apply for kind, name in QUANT_PASSES.items()}


def __getattr__(name: str) -> Pass:
    """The passes of the other kinds of quantisers, `fuse_allreduce_residual_rmsnorm_quant_<kind>`."""
    if name in OF_KIND:
        return OF_KIND[name]
    raise AttributeError(name)


__all__ = ["FINALIZE_PASS", "NORM_PASS", "OF_KIND", "fuse_all"]
