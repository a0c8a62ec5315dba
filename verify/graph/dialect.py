"""Which operator plays which role in a graph: Fusecheck's own, or TensorRT-LLM AutoDeploy's.

The roles' arguments have the same order in every dialect, so that passes and checks address them by position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from fusecheck.errors import UsageError
from fusecheck.graph import nodes
from fusecheck.graph.fused_ops import NAMESPACE
from fusecheck.interface import FusionOp, Operation

Operator = Callable[..., object]


@dataclass(frozen=True)
class Dialect:
    """The operators of the roles.

    Attributes:
        name: how reports call it.
        all_reduce: (x, strategy).
        norms: (x, weight, eps), by flavour: `torch` rounds twice, the others once.
        quantize: (x, scale) -> (codes, scale).
        linear: (input, weight, bias, input_scale, weight_scale, out_dtype); quantises its input.
        prequant_linear: the same arguments; its input is codes.
        norm: (x, residual, weight, eps, strategy) -> (norm, residual).
        quant: (x, residual, weight, scale, eps, strategy) -> (codes, residual).
        out_quant: the same -> (norm, codes, residual); None where the dialect has none.
        gemma_norm: (x, weight, eps), by one plus the weight.
        composition: any fused operator, by the name of its operation; see `ops.SCHEMAS`, as for the next ones.
        made_quantize: (x, scale, quantiser, layout) -> (codes, scales), of a quantiser that makes its scales.
        made_linear: a layer on such codes.
        moe_finalize: a rank's sum of experts.
        reduce_scatter, all_gather, shard: of rows that are spread over the ranks.
    """

    name: str
    all_reduce: Operator
    norms: dict[str, Operator]
    quantize: Operator
    linear: Operator
    prequant_linear: Operator
    norm: Operator
    quant: Operator
    out_quant: Operator | None
    gemma_norm: Operator | None = None
    composition: Operator | None = None
    made_quantize: Operator | None = None
    made_linear: Operator | None = None
    moe_finalize: Operator | None = None
    reduce_scatter: Operator | None = None
    all_gather: Operator | None = None
    shard: Operator | None = None

    def is_all_reduce(self, node: object) -> bool:
        """Whether a node is the all-reduce over the tensor-parallel group."""
        return calls(node, self.all_reduce)

    def is_sum(self, node: object) -> bool:
        """Whether a node is a sum over the group: the all-reduce, or of rows that stay spread over the ranks."""
        return self.is_all_reduce(node) or calls(node, self.reduce_scatter)

    @cached_property
    def _norms(self) -> frozenset[int]:
        return frozenset(key for norm in self.norms.values() for key in _identities(norm))

    @cached_property
    def _fused(self) -> dict[int, FusionOp]:
        return {key: op for op, target in self.fused.items() for key in _identities(target)}

    def is_norm(self, node: object) -> bool:
        """Whether a node is a plain RMSNorm of any flavour."""
        return _called(node) in self._norms

    def weight_bias(self, node: object) -> float | None:
        """What a norm adds to its weight: nothing, or one for Gemma's; None for a node that is no such norm."""
        return 0.0 if self.is_norm(node) else 1.0 if calls(node, self.gemma_norm) else None

    def is_finalize(self, node: object) -> bool:
        """Whether a node is a rank's sum of experts."""
        return calls(node, self.moe_finalize)

    def is_linear(self, node: object) -> bool:
        """Whether a node is a linear layer that quantises its input itself."""
        return calls(node, self.linear)

    def fused_op(self, node: object) -> FusionOp | None:
        """Which fused operation a node is, if any."""
        if isinstance(node, Node) and calls(node, self.composition):
            with contextlib.suppress(UsageError):  # a name of none: it raises where it runs
                return Operation.named(str(nodes.named(node, "op")))
        return self._fused.get(_called(node))

    @property
    def fused(self) -> dict[FusionOp, Operator]:
        """The fused operators of this dialect."""
        found = {FusionOp.RESIDUAL_RMS_NORM: self.norm, FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8: self.quant}
        return found | ({FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8: self.out_quant} if self.out_quant else {})


def calls(node: object, operator: Operator | None) -> bool:
    """Whether a node calls this operator, given as an overload; the graph may hold its packet instead."""
    return operator is not None and _called(node) in _identities(operator)


def _called(node: object) -> int:
    """The identity of what a node calls, 0 for a node that calls no function."""
    return id(node.target) if isinstance(node, Node) and node.op == "call_function" else 0


def _identities(operator: Operator) -> Iterable[int]:
    """Of an overload and its packet, which live as long as the process."""
    return id(operator), id(getattr(operator, "overloadpacket", operator))


_own = torch.ops.fusecheck

FUSECHECK = Dialect(
    name=NAMESPACE,
    all_reduce=_own.all_reduce.default,
    norms={
        "torch": _own.torch_rmsnorm.default,
        "triton": _own.triton_rms_norm.default,
        "flashinfer": _own.flashinfer_rms_norm.default,
    },
    quantize=_own.static_quantize_e4m3_per_tensor.default,
    linear=_own.fp8_linear.default,
    prequant_linear=_own.fp8_prequant_linear.default,
    norm=_own.ar_residual_norm.default,
    quant=_own.ar_residual_norm_quant_fp8.default,
    out_quant=_own.ar_residual_norm_out_quant_fp8.default,
    gemma_norm=_own.gemma_rms_norm.default,
    composition=_own.fused.default,
    made_quantize=_own.quantize.default,
    made_linear=_own.quantized_linear.default,
    moe_finalize=_own.moe_finalize.default,
    reduce_scatter=_own.reduce_scatter.default,
    all_gather=_own.all_gather.default,
    shard=_own.shard.default,
)
"""Fusecheck's own operators."""
