"""TensorRT-LLM AutoDeploy's operators and transforms, put through the same checks.

The mapping is by name and schema. It has been exercised here on operators registered under the published schemas;
on TensorRT-LLM itself it has not been run yet. `status` says in one line what this installation allows.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fusecheck.errors import UsageError
from fusecheck.graph.config import NORM_PASS, QUANT_PASS, SharedConfig
from fusecheck.graph.dialect import Dialect, Operator

NAME = "autodeploy"
PACKAGE = "tensorrt_llm"
REGISTRY = "tensorrt_llm._torch.auto_deploy.transform.interface"
OPERATORS = "tensorrt_llm._torch.auto_deploy.custom_ops"
NOT_RUN = "not yet run on TensorRT-LLM"

SCHEMAS = {
    "auto_deploy::trtllm_dist_all_reduce": ("all_reduce", ("t", "strategy")),
    "auto_deploy::torch_rmsnorm": ("torch", ("input", "weight", "eps")),
    "auto_deploy::triton_rms_norm": ("triton", ("input", "weight", "eps")),
    "auto_deploy::flashinfer_rms_norm": ("flashinfer", ("input", "weight", "eps")),
    "tensorrt_llm::static_quantize_e4m3_per_tensor": ("quantize", ("x", "scale")),
    "auto_deploy::trtllm_quant_fp8_linear": (
        "linear",
        ("input", "weight_fp8", "bias", "input_scale", "weight_scale", "out_dtype"),
    ),
    "auto_deploy::trtllm_fp8_prequant_linear": (
        "prequant_linear",
        ("input", "weight_fp8", "bias", "input_scale", "weight_scale", "out_dtype"),
    ),
    "dist::trtllm_fused_allreduce_residual_rmsnorm": (
        "norm",
        ("tensor", "residual", "norm_weight", "eps", "strategy"),
    ),
    "dist::trtllm_fused_allreduce_residual_rmsnorm_quant_fp8": (
        "quant",
        ("tensor", "residual", "norm_weight", "scale", "eps", "strategy"),
    ),
}
"""Operators by qualified name: their role, and their arguments in order."""
OUT_QUANT = "dist::trtllm_fused_allreduce_residual_rmsnorm_out_quant_fp8"
"""Would be the operator that returns norm, codes and residual; no published version has it."""


def installed() -> bool:
    """Whether TensorRT-LLM can be imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def status() -> str:
    """What this installation allows, in one line."""
    if not installed():
        return f"TensorRT-LLM AutoDeploy: {PACKAGE} is not installed, its own transforms were not checked ({NOT_RUN})"
    checked = f"--pass fusecheck.graph.autodeploy:{QUANT_PASS} checks its own"
    return f"TensorRT-LLM AutoDeploy: {PACKAGE} is installed; {checked}"


def find_operator(name: str) -> Operator | None:
    """A registered operator's overload by its qualified name."""
    namespace, _, leaf = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), leaf, None)
    return getattr(packet, "default", None)


def dialect() -> Dialect:
    """The roles on AutoDeploy's operators.

    Raises:
        UsageError: an operator is not registered, or its arguments are not those that the mapping knows.
    """
    if installed():
        importlib.import_module(OPERATORS)
    found: dict[str, Any] = {}
    for name, (role, arguments) in SCHEMAS.items():
        operator = find_operator(name)
        if operator is None:
            raise UsageError(f"operator {name} is not registered: install {PACKAGE}, or use --dialect fusecheck")
        schema: Any = operator._schema  # type: ignore[attr-defined]
        have = tuple(argument.name for argument in schema.arguments)
        if have != arguments:
            raise UsageError(f"operator {name} takes ({', '.join(have)}), the mapping knows ({', '.join(arguments)})")
        found[role] = operator
    return Dialect(
        name=NAME,
        all_reduce=found["all_reduce"],
        norms={flavour: found[flavour] for flavour in ("torch", "triton", "flashinfer")},
        quantize=found["quantize"],
        linear=found["linear"],
        prequant_linear=found["prequant_linear"],
        norm=found["norm"],
        quant=found["quant"],
        out_quant=find_operator(OUT_QUANT),
    )


@dataclass(frozen=True)
class _DistConfig:
    """The part of AutoDeploy's distributed configuration that the fusion transforms read."""

    allreduce_strategy: str
    rank: int
    world_size: int


@dataclass
class _AutoDeployShared:
    """The part of AutoDeploy's shared configuration that the fusion transforms read, in its older and newer shape."""

    local_rank: int
    world_size: int
    dist_config: _DistConfig
    sharding_config: Any = None


def apply(
    key: str, gm: GraphModule, shared: SharedConfig, registry: Callable[[str], Any], strategy: str = "AUTO"
) -> GraphModule:
    """Run a registered transform on a graph.

    Args:
        key: the transform's registered name.
        gm: the graph.
        shared: Fusecheck's side of the shared configuration.
        registry: from a name to a transform class with `from_kwargs`.
        strategy: the all-reduce strategy, which is a literal in AutoDeploy's patterns.
    """
    transform = registry(key).from_kwargs(stage="post_load_fusion", enabled=True)
    dist = _DistConfig(strategy, shared.local_rank, shared.world_size)
    theirs = _AutoDeployShared(shared.local_rank, shared.world_size, dist)
    result = transform._apply(gm, None, None, theirs)
    rewritten = result[0] if isinstance(result, tuple) else result
    rewritten.recompile()
    return rewritten  # type: ignore[no-any-return]


def _registered(key: str) -> Any:
    if not installed():
        raise UsageError(f"transform {key} needs {PACKAGE}, which is not installed")
    importlib.import_module("tensorrt_llm._torch.auto_deploy.transform.library")
    registry = importlib.import_module(REGISTRY).TransformRegistry
    if not registry.has(key):
        raise UsageError(f"this {PACKAGE} registers no transform {key!r}")
    return registry.get(key)


def fuse_allreduce_residual_rmsnorm(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """AutoDeploy's own transform of this name."""
    return apply(NORM_PASS, gm, shared, _registered)


def fuse_allreduce_residual_rmsnorm_quant_fp8(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """AutoDeploy's own transform of this name, where an installation has it."""
    return apply(QUANT_PASS, gm, shared, _registered)
