"""Lapses that no output shows are found by a named check, and right passes of other kinds are not accused."""

from __future__ import annotations

from typing import Any

import pytest

from fusecheck.graph.cases import GraphCase, Subject, row_cases
from fusecheck.graph.family import FINALIZE
from fusecheck.graph.finalize_fusion import FuseFinalize
from fusecheck.graph.findings import Check
from fusecheck.graph.norm_fusion import FuseNorm
from fusecheck.graph.plan import GraphPlan, SitePlan, made
from fusecheck.graph.results import Status
from fusecheck.graph.run import GraphChecker
from fusecheck.property_tests.graph import (
    honest,
    lapses,
    lapses_of_family,
    lapses_of_state,
    lapses_of_steps,
    lapses_of_values,
)

LAPSES = (lapses, lapses_of_family, lapses_of_state, lapses_of_steps, lapses_of_values)
TWELVE = GraphPlan(sites=(SitePlan(),) * 12)
"""So many sites that two hash seeds decide alike about all of them once in 4096 times."""
TWO_FACTORS = GraphPlan(sites=(SitePlan(readers=(made("nvfp4"),)), SitePlan(readers=(made("nvfp4", scale=4),))))
TWO_SITES = GraphPlan(sites=(SitePlan(readers=(made("group-fp8-32"),)),) * 2)
FOUND: dict[str, tuple[str | GraphPlan, Check]] = {
    "ReduceLeftBehindView": ("F1", Check.ORPHANS),
    "AddLeft": ("F1", Check.ORPHANS),
    "NormLeft": ("F1", Check.ORPHANS),
    "ReduceOfZero": ("F1", Check.COUNTS),
    "QuantLeft": ("F1", Check.ORPHANS),
    "WritesDropped": ("F16", Check.EFFECTS),
    "WritesAdded": ("F1", Check.EFFECTS),
    "ScalesRounded": ("F1", Check.MEMORY),
    "WeightsRounded": ("F1", Check.MEMORY),
    "WeightsReplaced": ("F1", Check.MEMORY),
    "StaticMeta": ("F1", Check.META),
    "StridedMeta": ("F1", Check.META),
    "DeviceMeta": ("F1", Check.META),
    "DtypeMeta": ("F1", Check.META),
    "HashOrder": ("F15", Check.RANKS),
    "HashChoice": (TWELVE, Check.RANKS),
    "Remembering": ("F1", Check.REPEATS),
    "ResidualThroughFp16": ("F1", Check.UNFUSED),
    "ResidualThroughFp8": ("F1", Check.UNFUSED),
    "ResidualClamped": ("F1", Check.UNFUSED),
    "EqualScale": ("F4", Check.ARGUMENTS),
    "UnitScale": ("F1", Check.ARGUMENTS),
    "CodesRequantised": ("F1", Check.ARGUMENTS),
    "WrongName": ("F1", Check.SITES),
    "DefaultDtypeLeft": ("F1", Check.MEMORY),
    "GradientsLeftOff": ("F1", Check.MEMORY),
    "ByAddress": (TWELVE, Check.RANKS),
    "NanLaundered": ("F1-nan", Check.UNFUSED),
    "StaleResidual": ("F1", Check.KERNEL),
    "AlphaIgnored": ("N2-alpha", Check.KERNEL),
    "OtherReaderIgnored": ("N1", Check.KERNEL),
    "BroadcastResidual": ("N3", Check.UNFUSED),
    "FixedEps": ("F1", Check.ARGUMENTS),
    "FixedStrategy": ("D7", Check.ARGUMENTS),
    "NoMeta": ("F1", Check.META),
    "BadScaleValue": ("N8-zero", Check.ARGUMENTS),
    "ViewDropped": ("F6-halves", Check.UNFUSED),
    "AlwaysOutQuant": ("F1", Check.SITES),
    "ScalesOfAnotherSite": (TWO_SITES, Check.ARGUMENTS),
    "OtherGroup": ("F19", Check.ARGUMENTS),
    "PackedReadAsFloat": ("F17-group-fp8-packed", Check.ARGUMENTS),
    "FactorDropped": ("F19-nvfp4", Check.ARGUMENTS),
    "FactorOfAnotherSite": (TWO_FACTORS, Check.ARGUMENTS),
    "OneReaderLeft": ("F19", Check.SITES),
    "OtherLayout": ("F17-nvfp4", Check.ARGUMENTS),
    "StaticForDynamic": ("D11", Check.ARGUMENTS),
    "FirstFormat": ("D10", Check.ARGUMENTS),
    "SplitRows": ("D12", Check.UNFUSED),
    "GatherLeftOut": ("D14", Check.UNFUSED),
    "SharedExpertSkipped": ("N20", Check.KERNEL),
    "ReducedTwice": ("F21", Check.COUNTS),
}
"""The graph that shows each lapse, by its row or whole, and the check that finds it."""
HONEST = [
    *(honest.LastFirst, honest.LastFirstQuant, honest.renamed, honest.cleaned, honest.copied, honest.copied_whole),
    *(honest.OwnScale, honest.ByKeyword, honest.UnreadResults, honest.one_read_each, honest.late),
    *(honest.as_parameters, lapses_of_family.LastFirst, lapses_of_family.SharesFirst),
]
HONEST_ROWS = "F4,F6-halves,F7,F16,F18-nvfp4,F19,F19-nvfp4,F20-nvfp4,D2-residual,D9,D10"


def subject(found: Any) -> Subject:
    """A transform, or a function that is a pass."""
    name = found.__name__
    of_norm = name in ("renamed", "copied", "one_read_each", "late")
    moves: tuple[str, ...] = ()
    if isinstance(found, type):
        name, of_norm = f"{name}.apply", issubclass(found, FuseNorm)
        moves = (FINALIZE,) if issubclass(found, FuseFinalize) else getattr(found, "kinds", ())
    return Subject(f"{found.__module__}:{name}", not of_norm, not of_norm, moves)


@pytest.mark.parametrize(("name", "shown", "check"), [(name, *rest) for name, rest in FOUND.items()])
def test_a_lapse_is_found_by_the_check_that_is_there_for_it(
    quick_checker: GraphChecker, name: str, shown: str | GraphPlan, check: Check
) -> None:
    case = row_cases(2, shown)[0] if isinstance(shown, str) else GraphCase("sites", shown)
    found = next(getattr(module, name) for module in LAPSES if hasattr(module, name))
    result = quick_checker.for_subject(subject(found)).check(case)
    assert check in {finding.check for finding in result.findings}, result.findings
    of_sites = Status.MISSED if name == "WrongName" else Status.AGAINST
    assert result.status() is (of_sites if check is Check.SITES else Status.BROKEN)


@pytest.mark.parametrize("right", HONEST, ids=lambda right: f"{right.__module__.rpartition('.')[2]}.{right.__name__}")
def test_a_right_pass_of_another_kind_is_not_accused(quick_checker: GraphChecker, right: Any) -> None:
    results = quick_checker.for_subject(subject(right)).check_all(row_cases(2, HONEST_ROWS))
    assert [result.findings for result in results] == [[]] * len(results)
