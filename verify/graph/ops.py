"""The graph's operators, as `torch.ops.fusecheck.*`: CPU and CUDA implementations and fake kernels.

Names, argument order and results follow TensorRT-LLM AutoDeploy's operators where it has them. The schemas of all are
here; those of the family are implemented in `family_ops`, the fused ones in `fused_ops`. `fused` is every composition:
its argument `op` is the operation's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.graph import arithmetic
from fusecheck.graph.context import active
from fusecheck.interface import Strategy
from fusecheck.numerics import sums

NAMESPACE = "fusecheck"
FP8 = torch.float8_e4m3fn
KERNEL_STRATEGIES = tuple(strategy.value for strategy in Strategy)
"""Strategies under which the fused operator is one kernel."""
SEPARATE_STRATEGIES = ("NCCL", "NCCL_SYMMETRIC", "SYMM_MEM", "UB")
"""Strategies under which it is an all-reduce and separate kernels: fused in the graph, not on the device."""
STRATEGIES = KERNEL_STRATEGIES + SEPARATE_STRATEGIES

SCHEMAS = {
    "all_reduce": "(Tensor x, str strategy) -> Tensor",
    "all_reduce_max": "(Tensor x, str strategy) -> Tensor",
    "all_reduce_grouped": "(Tensor x, int group_size, str strategy) -> Tensor",
    "torch_rmsnorm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "triton_rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "flashinfer_rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "gemma_rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "biased_rms_norm": "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    "static_quantize_e4m3_per_tensor": "(Tensor x, Tensor scale) -> (Tensor, Tensor)",
    "fp8_linear": "(Tensor input, Tensor weight_fp8, Tensor? bias=None, Tensor? input_scale=None, "
    "Tensor? weight_scale=None, str? out_dtype=None) -> Tensor",
    "fp8_prequant_linear": "(Tensor input, Tensor weight_fp8, Tensor? bias=None, Tensor? input_scale=None, "
    'Tensor? weight_scale=None, str? out_dtype="bfloat16") -> Tensor',
    "quantize": '(Tensor x, Tensor? scale, str quantiser, str layout="") -> (Tensor, Tensor)',
    "quantized_linear": "(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias, "
    "Tensor? scale, Tensor? weight_scale, str quantiser, str layout, str out_dtype) -> Tensor",
    "moe_finalize": "(Tensor tokens, Tensor scale, Tensor rows, Tensor? shared=None, float routed_scaling=1.)"
    " -> Tensor",
    "reduce_scatter": "(Tensor x, int world_size, str strategy) -> Tensor",
    "all_gather": "(Tensor x, int world_size, str strategy) -> Tensor",
    "shard": "(Tensor x, int world_size) -> Tensor",
    "ar_residual_norm": "(Tensor x, Tensor residual, Tensor weight, float eps, str strategy, float weight_bias=0.)"
    " -> (Tensor, Tensor)",
    "ar_residual_norm_quant_fp8": "(Tensor x, Tensor residual, Tensor weight, Tensor scale, float eps, str strategy, "
    "float weight_bias=0.) -> (Tensor, Tensor)",
    "ar_residual_norm_out_quant_fp8": "(Tensor x, Tensor residual, Tensor weight, Tensor scale, float eps, "
    "str strategy, float weight_bias=0.) -> (Tensor, Tensor, Tensor)",
    "fused": "(Tensor x, Tensor residual, Tensor weight, Tensor? scale, float eps, str strategy, str op, "
    'str layout="", float weight_bias=0., Tensor? expert_scale=None, Tensor? rows=None, Tensor? shared=None, '
    "float routed_scaling=1.) -> Tensor[]",
}

F = TypeVar("F", bound=Callable[..., Any])

_library: Any = cast("Any", torch.library.Library)(NAMESPACE, "DEF")  # untyped in torch
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str) -> Callable[[F], F]:
    """Register a function as an operator's CPU and CUDA implementation."""

    def register(function: F) -> F:
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        return function

    return register


def fake(*names: str) -> Callable[[F], F]:
    """Register a function as the fake kernel of operators: dtypes and shapes without data."""

    def register(function: F) -> F:
        for name in names:
            torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library)
        return function

    return register


def dtype_named(name: str) -> torch.dtype:
    """The dtype that an operator's `out_dtype` names.

    Raises:
        RuntimeError: the name is not a dtype of torch.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise RuntimeError(f"got out_dtype={name!r}, expected the name of a torch dtype, for example 'bfloat16'")
    return found


# Collectives --------------------------------------------------------------------------------------------------------


@implement("all_reduce")
def all_reduce(x: Tensor, strategy: str) -> Tensor:
    """The sum over all ranks, in the precision that the active backend declares; a collective call."""
    context = active()
    return sum_ranks(context.gather(x), context.dataflow)


@implement("all_reduce_max")
def _all_reduce_max(x: Tensor, strategy: str) -> Tensor:
    return torch.stack(active().gather(x)).amax(0)


@implement("all_reduce_grouped")
def _all_reduce_grouped(x: Tensor, group_size: int, strategy: str) -> Tensor:
    context = active()
    first = context.rank.index // group_size * group_size
    members = context.gather(x)[first : first + group_size]
    return sum_ranks(members, context.dataflow)


def sum_ranks(parts: list[Tensor], flow: Dataflow) -> Tensor:
    """The ranks' tensors added as declared, in rank order, in their own dtype; a tensor of its own."""
    return sums.sum_partials(parts, flow, flushing=False).to(parts[0].dtype).clone()


@fake("all_reduce", "all_reduce_max")
def _fake_all_reduce(x: Tensor, strategy: str) -> Tensor:
    return torch.empty_like(x)


@fake("all_reduce_grouped")
def _fake_all_reduce_grouped(x: Tensor, group_size: int, strategy: str) -> Tensor:
    return torch.empty_like(x)


# Norms --------------------------------------------------------------------------------------------------------------

implement("triton_rms_norm")(arithmetic.rms_norm)
implement("flashinfer_rms_norm")(arithmetic.rms_norm)
implement("torch_rmsnorm")(arithmetic.rms_norm_two_roundings)


@implement("gemma_rms_norm")
def _gemma_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return arithmetic.rms_norm(x, weight, eps, bias=1.0)


@implement("biased_rms_norm")
def _biased_rms_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return arithmetic.rms_norm(x, weight, eps) + bias


@fake("triton_rms_norm", "flashinfer_rms_norm", "torch_rmsnorm", "gemma_rms_norm")
def _fake_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@fake("biased_rms_norm")
def _fake_biased_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


# Quantised layers ---------------------------------------------------------------------------------------------------


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of x / scale, dividing or multiplying as the active backend declares."""
    return arithmetic.quantize(x, scale, divide=active().dataflow.scaling == "divide")


@implement("static_quantize_e4m3_per_tensor")
def _static_quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, scale), scale.clone()


@fake("static_quantize_e4m3_per_tensor")
def _fake_static_quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), torch.empty_like(scale)


def _result_dtype(input: Tensor, bias: Tensor | None, out_dtype: str | None) -> torch.dtype:  # noqa: A002
    if out_dtype is not None:
        return dtype_named(out_dtype)
    if input.dtype is not FP8:
        return input.dtype
    if bias is None:
        raise RuntimeError("fp8_linear got float8 input without out_dtype or bias, expected out_dtype to be given")
    return bias.dtype


def _define_linear(name: str, default: str | None) -> None:
    """Give a quantised linear both its kernels; the dispatcher leaves out arguments that equal their default."""
    codes_only = default is not None

    def compute(
        input: Tensor,  # noqa: A002
        weight_fp8: Tensor,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        weight_scale: Tensor | None = None,
        out_dtype: str | None = default,
    ) -> Tensor:
        if codes_only and input.dtype is not FP8:
            raise RuntimeError(f"{name} got {input.dtype} input, expected torch.float8_e4m3fn")
        if input_scale is None or weight_scale is None:
            raise RuntimeError(f"{name} needs input_scale and weight_scale")
        codes = input if input.dtype is FP8 else quantize(input, input_scale)
        dtype = _result_dtype(input, bias, out_dtype)
        return arithmetic.linear_fp8(codes, weight_fp8, bias, input_scale, weight_scale, dtype)

    def describe(input: Tensor, weight_fp8: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:  # noqa: A002
        out_dtype = rest[2] if len(rest) > 2 else default
        return input.new_empty((*input.shape[:-1], weight_fp8.shape[0]), dtype=_result_dtype(input, bias, out_dtype))

    implement(name)(compute)
    fake(name)(describe)


_define_linear("fp8_linear", None)
_define_linear("fp8_prequant_linear", "bfloat16")
