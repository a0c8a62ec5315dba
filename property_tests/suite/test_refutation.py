"""No legal kernel is outside the oracle's bounds, and the run that shows it could have seen one."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.numerics import enclosure
from fusecheck.property_tests.suite import legal_kernels, refutation, sum_refutation
from fusecheck.property_tests.suite.legal_inputs import DISTRIBUTIONS, draw
from fusecheck.property_tests.suite.refutation import SEED, Tally
from fusecheck.property_tests.suite.refuting import Tallies


@pytest.fixture(scope="module")
def tallies() -> Tallies[Tally]:
    torch.set_num_threads(1)
    *_, last = refutation.refute(1_000_000, 1 << 14, SEED)
    return last


@pytest.mark.parametrize("bound", ["any order", "depth declared"])
def test_no_legal_kernel_of_a_million_outputs_is_outside_a_sound_bound(tallies: Tallies[Tally], bound: str) -> None:
    assert tallies.sound[bound].elements >= 1_000_000
    assert tallies.sound[bound].violations == {"residual": 0, "norm": 0, "quotient": 0, "code": 0}


def test_a_bound_without_the_error_of_the_sum_of_squares_is_caught(tallies: Tallies[Tally]) -> None:
    assert tallies.broken["sabotaged"].violations["norm"] > 1000


def test_the_sound_bounds_are_used_well_beyond_a_third_of_their_width(tallies: Tallies[Tally]) -> None:
    assert 0.33 < tallies.sound["depth declared"].reach <= 1


def test_the_swarm_is_varied_so_that_the_bounds_are_tried_on_every_flow_and_distribution() -> None:
    rng = np.random.default_rng(1)
    drawn = [refutation._problem(rng, i, 64)[0] for i in range(400)]
    for name in (
        "accumulate",
        "sum_rounding",
        "order",
        "scaling",
        "round_sum",
        "norm_reads_rounded",
        "round_squares",
        "round_normed",
    ):
        assert len({getattr(flow, name) for flow in drawn}) == (
            3 if name in ("accumulate", "sum_rounding", "scaling") else 2
        ), name


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", DATAFLOWS)
def test_legal_kernels_of_every_named_dataflow_are_inside_on_every_distribution(name: str, distribution: str) -> None:
    rng = np.random.default_rng(3)
    flow, tally = DATAFLOWS[name], Tally()
    inputs = draw(rng, distribution, 4, 8, 256, torch.bfloat16)
    out, depth = legal_kernels.run(inputs, flow, rng)
    declared = flow if flow.depth is None else replace(flow, depth=max(flow.depth, depth))
    refutation.judge(declared, refutation.operands(inputs), out, tally)
    assert (tally.elements, tally.total) == (2048, 0)


def _moved(out: legal_kernels.Outputs, stage: str) -> legal_kernels.Outputs:
    if stage == "residual":
        return replace(out, residual=out.residual * np.float32(1.0078125))
    if stage == "norm":
        return replace(out, unrounded_norm=out.unrounded_norm * np.float32(1.00001))
    if stage == "quotient":
        return replace(out, quotient=out.quotient * np.float32(1.01))
    return replace(out, codes=out.codes ^ np.uint8(1))


@pytest.mark.parametrize("stage", refutation.STAGES)
def test_an_output_that_is_moved_is_counted_at_its_stage(stage: str) -> None:
    rng = np.random.default_rng(5)
    flow = Dataflow("plain", accumulate="fp32")
    inputs = draw(rng, "gaussian", 2, 4, 256, torch.bfloat16)
    out, _ = legal_kernels.run(inputs, flow, rng, "pairwise")
    tally = Tally()
    refutation.judge(flow, refutation.operands(inputs), _moved(out, stage), tally)
    assert tally.violations[stage] > 900


def test_nan_is_never_inside() -> None:
    ends = (torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert refutation._outside(torch.tensor([0.5, float("nan")]), ends) == 1


def test_the_command_reports_and_exits_with_zero_when_nothing_is_refuted(capsys: pytest.CaptureFixture[str]) -> None:
    assert refutation.main(["--checks", "2e5", "--elements", "8192"]) == 0
    assert "norms: sound bounds hold; broken bounds caught" in capsys.readouterr().out


def test_the_command_exits_with_one_when_a_bound_is_refuted(capsys: pytest.CaptureFixture[str]) -> None:
    with refutation.sabotage():
        assert refutation.main(["--checks", "2e5", "--elements", "8192"]) == 1
    assert "sound bounds REFUTED" in capsys.readouterr().out


def test_no_legal_sum_over_ranks_is_outside_and_every_broken_bound_of_sums_is_caught(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refutation.main(["--format", "sums", "--checks", "5e5", "--elements", "1024"]) == 0
    assert "sums: sound bounds hold; broken bounds caught" in capsys.readouterr().out
    with mock.patch.object(enclosure, "TRUNCATION", 1.0):
        *_, last = sum_refutation.refute(200_000, 1024, seed=1)
    assert "native any truncate" in last.verdict()[0]
