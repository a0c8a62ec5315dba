"""Your kernel in 30 lines: a backend that Fusecheck loads by `package.module:attribute`.

Run it with `fusecheck kernel --backend fusecheck.property_tests.suite.example_backend:ExampleBackend`.
Yours would call the kernel under test in `run`; this one gathers every rank's partial
sums and does the rest in torch, with the partial sums added up in float32.
"""

import functools
from dataclasses import replace

import torch
import torch.distributed as dist

from fusecheck import (
    DATAFLOWS,
    Dataflow,
    FusionOp,
    Limits,
    Problem,
    Rank,
    RankInputs,
    RankOutputs,
    Strategy,
    Support,
)


class ExampleBackend:
    name = "example"

    def supports(self, problem: Problem) -> Support:
        return Support(problem.hidden <= 8192, f"hidden={problem.hidden} is above 8192")

    def dataflow(self, problem: Problem) -> Dataflow:
        return replace(DATAFLOWS["trtllm-fp32"], name="example", depth=None)  # torch may add squares in any order

    def open(self, rank: Rank, limits: Limits) -> "ExampleKernel":
        return ExampleKernel(rank)


class ExampleKernel:
    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        partials = [torch.empty_like(inputs.partial) for _ in range(self.rank.world_size)]
        dist.all_gather(partials, inputs.partial, group=self.rank.group)
        total = functools.reduce(torch.add, [partial.float() for partial in partials]).to(inputs.partial.dtype)
        residual = total + inputs.residual
        wide = residual.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + inputs.eps)
        norm = (wide * inverse * (inputs.gamma.float() + inputs.weight_bias)).to(residual.dtype)
        quant = (norm.float() * inputs.scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return RankOutputs(residual, norm if op.returns_norm else None, quant if op.returns_quant else None)

    def close(self) -> None: ...
