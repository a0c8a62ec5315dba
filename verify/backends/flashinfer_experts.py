"""FlashInfer's kernels for a mixture of experts: pattern 6 reduces experts' tokens, pattern 7 gathers their rows.

Both are one-shot alone and add up in the activations' dtype: the terms ascending, the routed factor, the shared
expert, then the ranks ascending. Launched through the legacy functions or the unified API, on the workspace of the
other patterns (`trtllm_moe_allreduce_fusion.cuh`, the same arithmetic from 0.6.13 to 0.7.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusecheck.backends.flashinfer_patterns import nvfp4_refusal, pattern_of
from fusecheck.backends.operands import check_dense
from fusecheck.interface import Rank, RankInputs, Strategy
from fusecheck.operations import GIVEN_SCALE, Collective, Operation
from fusecheck.stages.experts import EXPERT_TENSORS, Experts

if TYPE_CHECKING:
    from fusecheck.problem import Problem

WARP = 256
"""Elements that a warp covers; threads are launched in whole warps, and those beyond a row work on the next one."""
CLUSTERS = (8, 4, 2, 1)
MOST_WARPS = 32
"""Of a block."""
MOST_ELEMENTS = 2**31 - 1
"""Of the experts' tokens, whose offsets are int32."""


def expert_refusal(call: Problem, capability: int | None) -> str:
    """Why the kernel does not compute a call's sum of experts rightly; empty where it does."""
    op, warps = call.op, call.hidden // WARP
    if op.quantiser != "none":
        return _quant_refusal(op, capability)
    if not op.residual:
        return "FlashInfer has no sum of experts without a residual"
    if call.strategy is Strategy.TWOSHOT:
        return f"{op.collective.value} is one-shot alone: give --strategy ONESHOT or AUTO"
    if call.hidden % WARP:
        return f"hidden {call.hidden} is no multiple of {WARP}: threads of a partial warp write into the next row"
    cluster = next(size for size in CLUSTERS if warps % size == 0)
    if warps > MOST_WARPS * cluster:
        return f"hidden {call.hidden}: no block and cluster size covers it"
    return ""


def _quant_refusal(op: Operation, capability: int | None) -> str:
    if op.quantiser == GIVEN_SCALE and op.collective is Collective.MOE_FINALIZE:
        return "MoE finalize with static FP8 (pattern 12) needs a workspace of CuTe DSL, which is not adapted"
    if op.quantiser != "nvfp4":
        return f"FlashInfer has no {op.collective.value} with {op.quantiser}"
    if reason := nvfp4_refusal(capability):
        return reason
    if op.collective is Collective.MOE_FINALIZE:
        return "MoE finalize never sets NVFP4's factor of the tensor: its codes are of whatever the stack holds"
    return "MoE reduction takes NVFP4's factor as a number on the host, which a call here has on the device"


def check_experts(inputs: RankInputs, op: Operation) -> Experts:
    """The experts of a call; the kernels check nothing of them but the dtype of the routes.

    Raises:
        ValueError: a wrong shape, dtype or layout.
    """
    experts = inputs.experts
    if experts is None:
        raise ValueError(f"{op.name} without experts, expected them in RankInputs.experts")
    tokens, hidden = inputs.residual.shape
    native, terms = inputs.residual.dtype, experts.scale.shape[op.collective is Collective.MOE_FINALIZE]
    if op.collective is Collective.MOE_REDUCTION:
        expected = {"tokens": ((terms, tokens, hidden), native), "scale": ((terms, tokens), torch.float32)}
    else:
        rows = {"rows": ((tokens, terms), torch.int32), "scale": ((tokens, terms), native)}
        expected = {"tokens": ((len(experts.tokens), hidden), native), **rows}
    expected["shared"] = ((tokens, hidden), native)
    for name in EXPERT_TENSORS:
        _check_tensor(name, getattr(experts, name), expected.get(name), optional=name == "shared")
    check_dense(experts, [name for name in EXPERT_TENSORS if getattr(experts, name) is not None])
    if experts.tokens.numel() > MOST_ELEMENTS:
        raise ValueError(
            f"experts of {experts.tokens.numel()} elements, expected at most {MOST_ELEMENTS}: int32 offsets"
        )
    return experts


def _check_tensor(
    name: str, tensor: Tensor | None, expected: tuple[tuple[int, ...], torch.dtype] | None, *, optional: bool
) -> None:
    if tensor is None and (optional or expected is None):
        return
    found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
    if found != expected:
        raise ValueError(f"experts' {name} is {found}, expected {expected}")


def operands_of(experts: Experts, op: Operation, inputs: RankInputs) -> dict[str, Any]:
    """The arguments that both APIs have by the same names. A shared expert of zeros stands for none in pattern 6."""
    if op.collective is Collective.MOE_FINALIZE:
        return {
            "expanded_idx_to_permuted_idx": experts.rows,
            "expert_scale_factor": experts.scale,
            "shared_expert_output": experts.shared,
        }
    shared = torch.zeros_like(inputs.residual) if experts.shared is None else experts.shared
    return {
        "moe_reduction_device_num_experts": len(experts.tokens),
        "moe_reduction_scale_input": experts.scale,
        "moe_reduction_active_experts_token_input": experts.tokens,
        "moe_reduction_token_input": shared,
    }


def launch_legacy_experts(
    library: Any, rank: Rank, table: Tensor, inputs: RankInputs, op: Operation, arguments: dict[str, Any]
) -> None:
    """Start the kernel on the current stream; `arguments` are those of the other patterns."""
    experts = check_experts(inputs, op)
    common = _shared_with_others(arguments) | operands_of(experts, op, inputs)
    common |= {"workspace_ptrs": table, "world_rank": rank.index, "world_size": rank.world_size}
    if op.collective is Collective.MOE_FINALIZE:
        library.trtllm_moe_finalize_allreduce_fusion(
            allreduce_in=experts.tokens,
            norm_weight=inputs.gamma,
            eps=inputs.eps,
            routed_scaling_factor=experts.routed_scaling,
            **common,
        )
        return
    tokens, hidden = inputs.residual.shape
    library.trtllm_moe_allreduce_fusion(
        token_num=tokens,
        hidden_dim=hidden,
        rms_gamma=inputs.gamma,
        rms_eps=inputs.eps,
        scale_factor=1.0,
        layout_code=None,
        moe_allreduce_out=None,
        **common,
    )


def launch_unified_experts(
    library: Any, workspace: Any, inputs: RankInputs, op: Operation, arguments: dict[str, Any]
) -> None:
    """The same through the unified API, which never passes a routed factor on."""
    experts = check_experts(inputs, op)
    given = operands_of(experts, op, inputs)
    library.allreduce_fusion(
        input=given.get("moe_reduction_token_input", experts.tokens),
        workspace=workspace,
        pattern=pattern_of(op),
        rms_gamma=inputs.gamma,
        rms_eps=inputs.eps,
        **_shared_with_others(arguments),
        **given,
    )


def _shared_with_others(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the other patterns' arguments, those that these have, too, through either API."""
    names = ("launch_with_pdl", "residual_in", "residual_out", "norm_out", "quant_out", "scale_out", "weight_bias")
    return {name: arguments[name] for name in names}
