"""The fused operators: one kernel of the active backend, or its steps one by one, as the strategy says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecheck.graph import (
    arithmetic,
    family_ops,  # noqa: F401 - registers its operators
    quantised,
)
from fusecheck.graph.context import active
from fusecheck.graph.ops import FP8, NAMESPACE, SEPARATE_STRATEGIES, STRATEGIES, all_reduce, fake, implement, quantize
from fusecheck.graph.quantised import Form
from fusecheck.interface import Operation, RankInputs, Strategy
from fusecheck.operations import GIVEN_SCALE
from fusecheck.stages.experts import Experts, expert_sum

__all__ = ["NAMESPACE", "RESULTS", "resolve"]

RESULTS = ("norm", "quant", "scale", "residual")
"""The order of a fused operator's results, of those that its operation returns."""

_TOKEN_LIMIT = re.compile(r"(?P<name>\w+)<=(?P<tokens>\d+)")


def resolve(strategy: str, tokens: int) -> Strategy | None:
    """The kernel's strategy for this many tokens, or None where the steps run separately.

    `ONESHOT<=128` is resolved at each call: the kernel up to 128 tokens, separate steps above.

    Raises:
        RuntimeError: the strategy is unknown.
    """
    limited = _TOKEN_LIMIT.fullmatch(strategy)
    name = limited["name"] if limited else strategy
    if name not in STRATEGIES:
        raise RuntimeError(f"got strategy {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if name in SEPARATE_STRATEGIES or (limited and tokens > int(limited["tokens"])):
        return None
    return Strategy(name)


@dataclass(frozen=True)
class _Call:
    """What a fused operator was given; the names are those of its schema."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    scale: Tensor | None
    eps: float
    strategy: str
    weight_bias: float = 0.0
    layout: str = ""
    experts: Experts | None = None

    def run(self, op: Operation) -> list[Tensor]:
        """Flatten to [tokens, hidden], run the kernel or the separate steps, and give the outputs x's shape."""
        flat = self.residual.reshape(-1, self.residual.shape[-1])
        chosen = resolve(self.strategy, flat.shape[0])
        found = self._separately(op) if chosen is None else self._kernel(op, chosen, flat)
        return [found[name] for name in RESULTS if name in op.returns]

    def _kernel(self, op: Operation, strategy: Strategy, flat: Tensor) -> dict[str, Tensor]:
        unused = torch.ones(1, dtype=torch.float32, device=flat.device)
        inputs = RankInputs(
            # A kernel that sums experts has no addend of its own to read.
            partial=flat.contiguous() if self.experts is not None else self.x.reshape(flat.shape).contiguous(),
            residual=flat.contiguous(),
            gamma=self.weight,
            scale=unused if self.scale is None else self.scale.reshape(1),
            eps=self.eps,
            weight_bias=self.weight_bias,
            layout=self.layout,
            experts=self.experts,
        )
        outputs = active().fused(inputs, op, strategy)
        # A kernel may hand out its workspace or its operand; an operator's results are fresh tensors.
        found = {
            name: tensor.reshape(*self.residual.shape[:-1], -1).clone()
            for name in ("norm", "quant", "residual")
            if (tensor := getattr(outputs, name)) is not None
        }
        if outputs.scale is not None:
            found["scale"] = quantised.copied(outputs.scale, Form(op.quantiser, self.layout).scales(*flat.shape))
        return found

    def _separately(self, op: Operation) -> dict[str, Tensor]:
        context = active()
        mine = self.x if self.experts is None else expert_sum(self.experts, context.dataflow.experts)
        summed = all_reduce(mine, self.strategy.split("<=")[0]) + self.residual
        norm = arithmetic.rms_norm(summed, self.weight, self.eps, bias=self.weight_bias)
        found = {"norm": norm, "residual": summed}
        if op.quantiser == GIVEN_SCALE:
            assert self.scale is not None
            found["quant"] = quantize(norm, self.scale)
        elif op.returns_quant:
            form = Form(op.quantiser, self.layout)
            found["quant"], found["scale"] = quantised.quantise(norm, self.scale, form, context.dataflow)
        return found


def _results(op: Operation, residual: Tensor, form: Form) -> list[Tensor]:
    """The fake results of an operation."""
    found = {"norm": torch.empty_like(residual), "residual": torch.empty_like(residual)}
    if op.quantiser == GIVEN_SCALE:
        found["quant"] = torch.empty_like(residual, dtype=FP8)
    elif op.returns_quant:
        found["quant"], found["scale"] = form.like(residual)
    return [found[name] for name in RESULTS if name in op.returns]


@implement("fused")
def _fused(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    strategy: str,
    op: str,
    layout: str = "",
    weight_bias: float = 0.0,
    expert_scale: Tensor | None = None,
    rows: Tensor | None = None,
    shared: Tensor | None = None,
    routed_scaling: float = 1.0,
) -> list[Tensor]:
    """Any composition; with experts `x` are the tokens that they made."""
    operation, experts = Operation.named(op), None
    if operation.has_experts:
        if expert_scale is None:
            raise RuntimeError(f"fused {op} got no expert_scale, expected the weights of the experts' tokens")
        experts = Experts(x, expert_scale, rows, shared, routed_scaling)
    return _Call(x, residual, weight, scale, eps, strategy, weight_bias, layout, experts).run(operation)


@fake("fused")
def _fake_fused(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    strategy: str,
    op: str,
    layout: str = "",
    *rest: object,
) -> list[Tensor]:
    operation = Operation.named(op)
    return _results(operation, residual, Form(operation.quantiser, layout))


def _define_static(name: str, op: Operation) -> None:
    """The first op under AutoDeploy's names: the scale is an operand of those that quantise."""

    def given(x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        scale, rest = (rest[0], rest[1:]) if op.returns_quant else (None, rest)
        return tuple(_Call(x, residual, weight, scale, *rest).run(op))

    implement(name)(given)
    fake(name)(lambda x, residual, *rest: tuple(_results(op, residual, Form(op.quantiser))))


_define_static("ar_residual_norm", Operation.RESIDUAL_RMS_NORM)
_define_static("ar_residual_norm_quant_fp8", Operation.RESIDUAL_RMS_NORM_QUANT_FP8)
_define_static("ar_residual_norm_out_quant_fp8", Operation.RESIDUAL_RMS_NORM_OUT_QUANT_FP8)
