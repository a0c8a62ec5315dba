"""Plug-ins that do not keep the interface, or leave the process as it was not; each by one mistake."""

from __future__ import annotations

from typing import Any

import torch

from fusecheck import FusionOp, Limits, Problem, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.suite.honest_kernels import Backend, Kernel


class BoolSupport(Backend):
    def supports(self, problem: Problem) -> Any:
        return problem.hidden > 0


class NamedDataflow(Backend):
    def dataflow(self, problem: Problem) -> Any:
        return "trtllm"


class RaisingSupport(Backend):
    def supports(self, problem: Problem) -> Any:
        raise KeyError(problem.dtype)


class OpensNothing(Backend):
    def open(self, rank: Rank, limits: Limits) -> Any:
        return None


class ImportFails(Backend):
    def open(self, rank: Rank, limits: Limits) -> Any:
        raise ImportError("libmykernel.so: cannot open shared object file")


class ReturnsNothing(Backend):
    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> Any:
        return None


class ReturnsTuple(Backend):
    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> Any:
        return outputs.residual, outputs.norm


class ReturnsFlat(Backend):
    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> Any:
        return RankOutputs(outputs.residual.float().flatten(), outputs.norm, outputs.quant)


class ReturnsMeta(Backend):
    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> Any:
        return RankOutputs(outputs.residual.to("meta"), outputs.norm, outputs.quant)


class BoomKernel(Kernel):
    """Raises on rank 1, after it has said something."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        if self.rank.index == 1:
            print("tile 7 of 12")
            raise RuntimeError("boom")
        return made


class Boom(Backend):
    kernel = BoomKernel


class Flushing(Backend):
    """Leaves flush-to-zero on, as a library linked with -ffast-math does."""

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> Any:
        torch.set_flush_denormal(True)
        return outputs


class DoubleFreeKernel(Kernel):
    def close(self) -> None:
        raise RuntimeError("double free")


class DoubleFree(Backend):
    kernel = DoubleFreeKernel
