"""Which operator plays which role in a graph; `ops.SCHEMAS` has their arguments.

Checks and passes see Fusecheck's own operators: a library's graph leaves its language before it is looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.fx import Node

from fusecheck.errors import UsageError
from fusecheck.graph import (
    fused_ops,  # noqa: F401 - registers the operators
    nodes,
)
from fusecheck.interface import FusionOp, Operation

Operator = Callable[..., object]

own = torch.ops.fusecheck

NORMS: dict[str, Operator] = {
    "torch": own.torch_rmsnorm.default,
    "triton": own.triton_rms_norm.default,
    "flashinfer": own.flashinfer_rms_norm.default,
}
"""The plain norms, (x, weight, eps), by flavour: `torch` rounds twice, the others once."""
FUSED: dict[FusionOp, Operator] = {
    FusionOp.RESIDUAL_RMS_NORM: own.ar_residual_norm.default,
    FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8: own.ar_residual_norm_quant_fp8.default,
    FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8: own.ar_residual_norm_out_quant_fp8.default,
}
"""The fused operators that have a name of their own; `fused` is every other."""


def _identities(operator: Operator) -> tuple[int, int]:
    """Of an overload and its packet, which live as long as the process."""
    return id(operator), id(getattr(operator, "overloadpacket", operator))


_NORMS = frozenset(key for norm in NORMS.values() for key in _identities(norm))
_FUSED = {key: op for op, target in FUSED.items() for key in _identities(target)}


def _called(node: object) -> int:
    """The identity of what a node calls, 0 for a node that calls no function."""
    return id(node.target) if isinstance(node, Node) and node.op == "call_function" else 0


def calls(node: object, operator: Operator) -> bool:
    """Whether a node calls this operator, given as an overload; the graph may hold its packet instead."""
    return _called(node) in _identities(operator)


def is_all_reduce(node: object) -> bool:
    """Whether a node is the all-reduce over the tensor-parallel group."""
    return calls(node, own.all_reduce.default)


def is_sum(node: object) -> bool:
    """Whether a node is a sum over the group: the all-reduce, or of rows that stay spread over the ranks."""
    return is_all_reduce(node) or calls(node, own.reduce_scatter.default)


def is_norm(node: object) -> bool:
    """Whether a node is a plain RMSNorm of any flavour."""
    return _called(node) in _NORMS


def weight_bias(node: object) -> float | None:
    """What a norm adds to its weight: nothing, or one for Gemma's; None for a node that is no such norm."""
    return 0.0 if is_norm(node) else 1.0 if calls(node, own.gemma_rms_norm.default) else None


def is_finalize(node: object) -> bool:
    """Whether a node is a rank's sum of experts."""
    return calls(node, own.moe_finalize.default)


def is_linear(node: object) -> bool:
    """Whether a node is a linear layer that quantises its input itself."""
    return calls(node, own.fp8_linear.default)


def fused_op(node: object) -> FusionOp | None:
    """Which fused operation a node is, if any."""
    if isinstance(node, Node) and calls(node, own.fused.default):
        with contextlib.suppress(UsageError):  # a name of none: it raises where it runs
            return Operation.named(str(nodes.named(node, "op")))
    return _FUSED.get(_called(node))
