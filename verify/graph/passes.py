"""The two transforms by the names that TensorRT-LLM AutoDeploy gives them, and both in their order.

Each takes the graph and what all ranks share, rewrites in place and returns the graph. What was matched and what was
refused, with the reason, is appended to `gm.meta["transform_history"]`.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from fusecheck.graph.config import BOTH_ENABLED, SharedConfig
from fusecheck.graph.dialect import FUSECHECK, Dialect
from fusecheck.graph.norm_fusion import FuseNorm
from fusecheck.graph.quant_fusion import FuseQuant


def fuse_allreduce_residual_rmsnorm(gm: GraphModule, shared: SharedConfig, dialect: Dialect = FUSECHECK) -> GraphModule:
    """Fuse all-reduce + residual add + RMSNorm; on unless the configuration says otherwise."""
    return FuseNorm.apply(gm, shared, dialect)


def fuse_allreduce_residual_rmsnorm_quant_fp8(
    gm: GraphModule, shared: SharedConfig, dialect: Dialect = FUSECHECK
) -> GraphModule:
    """Fold the static E4M3 quantise of a fused norm's readers into the fused operator; opt-in by configuration."""
    return FuseQuant.apply(gm, shared, dialect)


def fuse_both(gm: GraphModule, shared: SharedConfig, dialect: Dialect = FUSECHECK) -> GraphModule:
    """Both transforms in their order, both switched on."""
    shared = replace(shared, transforms={**BOTH_ENABLED, **shared.transforms})
    fuse_allreduce_residual_rmsnorm(gm, shared, dialect)
    return fuse_allreduce_residual_rmsnorm_quant_fp8(gm, shared, dialect)
