"""Groups with an infinity, a NaN or a value near the top of the format are in the core plan, and faults show there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from fusecheck import DATAFLOWS
from fusecheck.dataflow import Dataflow
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.special_groups import KINDS
from fusecheck.kernel.core import core_plan
from fusecheck.kernel.table import Case, cells_of
from fusecheck.property_tests.suite.family import emulated, outside
from fusecheck.property_tests.suite.planted_reach import FAULTS, MAKERS
from fusecheck.property_tests.suite.samples import sample_of
from fusecheck.quantflow import QUANT_FLOWS

PLANTED = {"turns-signs": "Inf", "flushes-reciprocals": "large", "lets-nan-win": "NaN"}
"""Faults of quantisers, each with the kind of group that it shows in."""


@cache
def core(quantiser: str, seed: int) -> list[Case]:
    """The core plan of the operations with one quantiser."""
    return core_plan(replace(FAULTS["turns-signs"], quantisers=(quantiser,)).plan(seed), 2)


def declaring(quantiser: str, name: str) -> Dataflow:
    """FlashInfer's dataflow with one arithmetic of one quantiser."""
    return replace(DATAFLOWS["flashinfer-fp32"], quants=((quantiser, QUANT_FLOWS[quantiser][name]),))


@pytest.mark.parametrize("quantiser", MAKERS)
def test_the_core_plan_has_every_kind_of_special_group_in_every_place_and_every_family_once(quantiser: str) -> None:
    cases = core(quantiser, 0)
    places = ("row",) if quantiser == "dynamic-fp8" else ("first", "middle", "last")
    wanted = {f"{kind}, {at} {quantiser} {dtype}" for kind, at, dtype in product(KINDS, places, ("bf16", "fp16"))}
    assert wanted <= {
        value for case in cases for dimension, value in cells_of(case, "") if dimension == "special group"
    }
    families = [case.problem.family for case in cases if case.problem.family != "special-groups"]
    assert len(set(families)) == min(len(families), len(FAMILIES) - 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("quantiser", MAKERS)
def test_a_fault_in_one_kind_of_group_is_found_there_at_every_seed(quantiser: str, seed: int) -> None:
    flow = declaring(
        quantiser, next(name for name, rules in QUANT_FLOWS[quantiser].items() if rules.amax_nan == "drop")
    )
    own = [case.problem for case in core(quantiser, seed) if case.problem.family == "special-groups"]
    for name, kind in PLANTED.items():
        reaching = [p for p in own if any(value.startswith(f"{kind},") for _, value in cells_of(Case(p), ""))]
        assert outside(
            reaching[0], flow, emulated(reaching[0], flow, quantising=dict(FAULTS[name].parts)["quantising"])
        )
        assert not outside(reaching[0], flow, emulated(reaching[0], flow))


def test_large_groups_reach_beyond_2_126_in_bf16_and_beyond_2_15_in_fp16_and_are_finite() -> None:
    for dtype, most in (("bf16", 2.0**126), ("fp16", 2.0**15)):
        peaks = []
        for case in core("mxfp8", 0):
            if case.problem.family == "special-groups" and case.problem.dtype == dtype:
                normed = sample_of(case.problem).normed.abs()
                groups = normed.unflatten(-1, (normed.shape[-1] // 32, 32)).amax(-1)  # type: ignore[no-untyped-call]
                peaks += groups[groups.isfinite()].tolist()
        assert sum(peak > most for peak in peaks) >= 8
        assert sum(peak < 4 for peak in peaks) >= 8
