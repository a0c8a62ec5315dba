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


class ReturnsKernel(Kernel):
    """Returns what `wrong` makes of the right outputs."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> Any:
        return self.wrong(super().run(inputs, op=op, strategy=strategy))

    def wrong(self, made: RankOutputs) -> Any:
        return made


class NothingKernel(ReturnsKernel):
    def wrong(self, made: RankOutputs) -> Any:
        return None


class ReturnsNothing(Backend):
    kernel = NothingKernel


class TupleKernel(ReturnsKernel):
    def wrong(self, made: RankOutputs) -> Any:
        return made.residual, made.norm


class ReturnsTuple(Backend):
    kernel = TupleKernel


class FlatKernel(ReturnsKernel):
    def wrong(self, made: RankOutputs) -> Any:
        return RankOutputs(made.residual.float().flatten(), made.norm, made.quant)


class ReturnsFlat(Backend):
    kernel = FlatKernel


class MetaKernel(ReturnsKernel):
    def wrong(self, made: RankOutputs) -> Any:
        return RankOutputs(made.residual.to("meta"), made.norm, made.quant)


class ReturnsMeta(Backend):
    kernel = MetaKernel


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


class DoubleFreeKernel(Kernel):
    def close(self) -> None:
        raise RuntimeError("double free")


class DoubleFree(Backend):
    kernel = DoubleFreeKernel


class FlushingKernel(Kernel):
    """Leaves flush-to-zero on, as a library linked with -ffast-math does."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        torch.set_flush_denormal(True)
        return made


class Flushing(Backend):
    kernel = FlushingKernel
