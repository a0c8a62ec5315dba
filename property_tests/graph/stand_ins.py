"""Operators and transforms under the names and schemas that AutoDeploy publishes, standing in for it.

They compute what Fusecheck's own operators compute. Importing this module registers them in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fusecheck.graph import autodeploy, fused_ops
from fusecheck.graph.config import NORM_PASS, QUANT_PASS, SharedConfig
from fusecheck.graph.norm_fusion import FuseNorm
from fusecheck.graph.quant_fusion import FuseQuant

assert fused_ops.NAMESPACE == "fusecheck"
own = torch.ops.fusecheck

LINEAR = (
    "(Tensor input, Tensor weight_fp8, Tensor? bias=None, Tensor? input_scale=None, Tensor? weight_scale=None, "
    "str? out_dtype={}) -> Tensor"
)
NORM = "(Tensor input, Tensor weight, float eps) -> Tensor"
OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "auto_deploy::trtllm_dist_all_reduce": ("(Tensor t, str strategy) -> Tensor", own.all_reduce),
    "auto_deploy::torch_rmsnorm": (NORM, own.torch_rmsnorm),
    "auto_deploy::triton_rms_norm": (NORM, own.triton_rms_norm),
    "auto_deploy::flashinfer_rms_norm": (NORM, own.flashinfer_rms_norm),
    "tensorrt_llm::static_quantize_e4m3_per_tensor": (
        "(Tensor x, Tensor scale) -> (Tensor, Tensor)",
        own.static_quantize_e4m3_per_tensor,
    ),
    "auto_deploy::trtllm_quant_fp8_linear": (LINEAR.format("None"), own.fp8_linear),
    "auto_deploy::trtllm_fp8_prequant_linear": (LINEAR.format('"bfloat16"'), own.fp8_prequant_linear),
    "dist::trtllm_fused_allreduce_residual_rmsnorm": (
        "(Tensor tensor, Tensor residual, Tensor norm_weight, float eps, str strategy) -> (Tensor, Tensor)",
        own.ar_residual_norm,
    ),
    "dist::trtllm_fused_allreduce_residual_rmsnorm_quant_fp8": (
        "(Tensor tensor, Tensor residual, Tensor norm_weight, Tensor scale, float eps, str strategy)"
        " -> (Tensor, Tensor)",
        own.ar_residual_norm_quant_fp8,
    ),
}


def _register(name: str, schema: str, implementation: Callable[..., Any]) -> None:
    torch.library.define(name, schema)

    def positional(*args: Tensor, **kwargs: Any) -> Any:
        return implementation(*args, **kwargs)

    def prequantised(*args: Any, out_dtype: str = "bfloat16") -> Any:
        return implementation(*args[:5], args[5] if len(args) > 5 else out_dtype)

    function = prequantised if "prequant" in name else positional
    torch.library.impl(name, "CompositeExplicitAutograd", function)
    torch.library.register_fake(name, function)


for _name, (_schema, _implementation) in OPERATORS.items():
    if autodeploy.find_operator(_name) is None:
        _register(_name, _schema, _implementation)


class NormTransform:
    """AutoDeploy's transform of the first pass, as far as the adapter sees it."""

    work: type[FuseNorm] | type[FuseQuant] = FuseNorm

    def __init__(self, **config: Any) -> None:
        self.config = config

    @classmethod
    def from_kwargs(cls, **config: Any) -> NormTransform:
        return cls(**config)

    def _apply(self, gm: GraphModule, cm: object, factory: object, shared_config: Any) -> tuple[GraphModule, object]:
        assert self.config == {"stage": "post_load_fusion", "enabled": True}
        assert shared_config.dist_config.allreduce_strategy
        assert cm is factory is None
        both = {name: _enabled() for name in (NORM_PASS, QUANT_PASS)}
        shared = SharedConfig(shared_config.local_rank, shared_config.world_size, transforms=both)
        info = self.work(gm, shared, autodeploy.dialect()).run()
        return gm, info


class QuantTransform(NormTransform):
    """AutoDeploy's transform of the quantising pass, as far as the adapter sees it."""

    work = FuseQuant


def _enabled() -> Any:
    from fusecheck.graph.config import TransformConfig

    return TransformConfig(enabled=True)


REGISTRY = {NORM_PASS: NormTransform, QUANT_PASS: QuantTransform}


def fuse_norm(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """The first pass, through the adapter."""
    return autodeploy.apply(NORM_PASS, gm, shared, REGISTRY.__getitem__)


def fuse_quant(gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """The quantising pass, through the adapter."""
    return autodeploy.apply(QUANT_PASS, gm, shared, REGISTRY.__getitem__)
