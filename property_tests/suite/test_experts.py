"""MoE collectives: right kernels conform in every composition, and published faults are found, most by their name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Operation, Problem
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.case.calls import Done
from fusecheck.case.judging import Judge
from fusecheck.case.returned import decoded
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.operations import COMPOSITIONS
from fusecheck.property_tests.suite.family import CPU, Given, emulated
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.stages.experts import Experts
from fusecheck.stages.judgement import Tally

MOE = [op for op in COMPOSITIONS if op.has_experts]
REDUCTION, FINALIZE = (Operation.named(f"MOE_{kind}_RESIDUAL_RMS_NORM") for kind in ("REDUCTION", "FINALIZE"))


def judged(problem: Problem, arithmetic: type[Arithmetic] = Arithmetic, flow: str = "flashinfer") -> list[Tally]:
    """What rank 0 of all finds, whose experts all ranks sum by the arithmetic."""
    declared, source = DATAFLOWS[flow], Inputs(problem, CPU)
    ranks = range(problem.world_size)
    partials = [arithmetic(declared, rank, len(ranks)).sum_experts(source.experts(rank)) for rank in ranks]
    outputs = emulated(problem, declared, source=Given(problem, partials, source.residual()))
    done = Done(problem, declared, source.of_rank(0), decoded(outputs, problem))
    return Judge(LoneRank(world_size=problem.world_size)).tallies(done, range(problem.tokens))


@pytest.mark.parametrize("op", MOE, ids=lambda op: str(op.name))
def test_a_right_kernel_conforms_under_every_dataflow_and_family(op: Operation) -> None:
    for index, flow in enumerate(DATAFLOWS):
        family = ("gaussian", "cancelling", "outliers", "exact")[index % 4]
        problem = Problem(
            op=op, world_size=(2, 4)[index % 2], tokens=5, hidden=256, family=family, seed=index, scale=640
        )
        problem = replace(problem, scale=0.0125) if op.quantiser == "static-fp8" else problem
        tallies = judged(problem, flow=flow)
        assert {tally.stage.value: tally.outside for tally in tallies if tally.outside} == {}, flow
        assert sum(tally.elements for tally in tallies) >= problem.elements


class SumsInFloat(Arithmetic):
    """The sum is kept in float32, where each addition is declared to be rounded (NVIDIA/TensorRT-LLM PR 16778)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        rules = replace(self.dataflow.experts, accumulate="fp32", product_rounded=False)
        return Arithmetic(replace(self.dataflow, experts=rules), self.index, self.world_size).sum_experts(experts)


class ForgetsRoutedFactor(Arithmetic):
    """The caller forgets the routed factor (vllm-project/vllm 43769, sgl-project/sglang 8333)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        return super().sum_experts(replace(experts, routed_scaling=1.0))


class ForgetsSharedExpert(Arithmetic):
    """The shared expert is not added."""

    def sum_experts(self, experts: Experts) -> Tensor:
        return super().sum_experts(replace(experts, shared=None))


class SharedExpertOnEveryRank(Arithmetic):
    """A replicated shared expert is summed once a rank (NVIDIA/TensorRT-LLM 15922)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        total = super().sum_experts(experts)
        return total if experts.shared is None else total + experts.shared * (self.world_size - 1)


class SharedExpertByRoutedFactor(Arithmetic):
    """The shared expert is divided by the routed factor (sgl-project/sglang 28237)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        shared = None if experts.shared is None else experts.shared / experts.routed_scaling
        return super().sum_experts(replace(experts, shared=shared))


class ExpandedForPermuted(Arithmetic):
    """The expanded index is used where the permuted one is meant (flashinfer-ai/flashinfer 2629)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        if experts.rows is None:
            return super().sum_experts(experts)
        plain = torch.arange(experts.rows.numel(), dtype=torch.int32).view(experts.rows.shape)
        return super().sum_experts(replace(experts, rows=torch.where(experts.rows < 0, -1, plain)))


class ReadsMissingRoutes(Arithmetic):
    """A route of -1 is read as the first row (flashinfer-ai/flashinfer 3011)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        rows = None if experts.rows is None else experts.rows.clamp(min=0)
        return super().sum_experts(replace(experts, rows=rows))


class SumsSubgroup(Arithmetic):
    """Only a subgroup of the ranks is summed (sgl-project/sglang 32511)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        total = super().sum_experts(experts)
        return total if self.index < self.world_size // 2 else torch.zeros_like(total)


class SumsTwice(Arithmetic):
    """What was reduced already is reduced again (sgl-project/sglang 20110)."""

    def sum_experts(self, experts: Experts) -> Tensor:
        return super().sum_experts(experts) * self.world_size


class KeepsSubnormals(Arithmetic):
    """Products of float32 are not flushed, where `-use_fast_math` flushes them."""

    def sum_experts(self, experts: Experts) -> Tensor:
        rules = replace(self.dataflow.experts, flush=False)
        return Arithmetic(replace(self.dataflow, experts=rules), self.index, self.world_size).sum_experts(experts)


@pytest.mark.parametrize("op", [REDUCTION, FINALIZE], ids=str)
def test_flushed_subnormals_are_those_of_the_declaration(op: Operation) -> None:
    problem = Problem(op=op, tokens=8, hidden=512, family="subnormal")
    assert not any(tally.outside for flow in ("flashinfer", "trtllm") for tally in judged(problem, flow=flow))
    assert any(tally.outside for tally in judged(problem, KeepsSubnormals))


@pytest.mark.parametrize(
    ("fault", "op", "stage", "told"),
    [
        (SumsInFloat, REDUCTION, "experts", "as if experts summed in float32"),
        (SumsInFloat, FINALIZE, "experts", "as if experts summed in float32"),
        (ForgetsRoutedFactor, FINALIZE, "experts", "as if routed scaling left out"),
        (ForgetsSharedExpert, REDUCTION, "experts", "as if shared expert left out"),
        (SharedExpertOnEveryRank, REDUCTION, "residual", ""),
        (SharedExpertByRoutedFactor, FINALIZE, "residual", ""),
        (ExpandedForPermuted, FINALIZE, "residual", ""),
        (ReadsMissingRoutes, FINALIZE, "residual", ""),
        (SumsSubgroup, FINALIZE, "residual", ""),
        (SumsTwice, REDUCTION, "residual", ""),
    ],
)
def test_a_published_fault_of_experts_is_found(fault: type[Arithmetic], op: Operation, stage: str, told: str) -> None:
    problem = Problem(op=op, world_size=2, tokens=9, hidden=256, seed=4)
    bad = [tally for tally in judged(problem, fault) if tally.outside]
    assert [tally.stage.value for tally in bad] == [stage]
    assert all(told in element.context for element in bad[0].shown)
