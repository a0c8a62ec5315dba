"""Lapses that no output shows are found by a named check, and right passes of other kinds are not accused."""

from __future__ import annotations

import pytest

from fusecheck.graph.cases import GraphCase, Subject, row_cases
from fusecheck.graph.findings import Check
from fusecheck.graph.norm_fusion import FuseNorm
from fusecheck.graph.plan import GraphPlan, SitePlan
from fusecheck.graph.results import Status
from fusecheck.graph.run import GraphChecker
from fusecheck.property_tests.graph import honest, lapses, lapses_of_state, lapses_of_steps, lapses_of_values

LAPSES = (lapses, lapses_of_state, lapses_of_steps, lapses_of_values)
FOUND = {
    "ReduceLeftBehindView": Check.ORPHANS,
    "AddLeft": Check.ORPHANS,
    "NormLeft": Check.ORPHANS,
    "ReduceOfZero": Check.COUNTS,
    "QuantLeft": Check.ORPHANS,
    "WritesDropped": Check.EFFECTS,
    "WritesAdded": Check.EFFECTS,
    "ScalesRounded": Check.MEMORY,
    "WeightsRounded": Check.MEMORY,
    "WeightsReplaced": Check.MEMORY,
    "StaticMeta": Check.META,
    "StridedMeta": Check.META,
    "DeviceMeta": Check.META,
    "DtypeMeta": Check.META,
    "HashOrder": Check.RANKS,
    "HashChoice": Check.RANKS,
    "Remembering": Check.REPEATS,
    "ResidualThroughFp16": Check.UNFUSED,
    "ResidualThroughFp8": Check.UNFUSED,
    "ResidualClamped": Check.UNFUSED,
    "EqualScale": Check.ARGUMENTS,
    "UnitScale": Check.ARGUMENTS,
    "CodesRequantised": Check.ARGUMENTS,
    "WrongName": Check.SITES,
    "DefaultDtypeLeft": Check.MEMORY,
    "GradientsLeftOff": Check.MEMORY,
    "ByAddress": Check.RANKS,
    "NanLaundered": Check.UNFUSED,
    "StaleResidual": Check.KERNEL,
    "AlphaIgnored": Check.KERNEL,
    "OtherReaderIgnored": Check.KERNEL,
    "BroadcastResidual": Check.UNFUSED,
    "FixedEps": Check.ARGUMENTS,
    "FixedStrategy": Check.ARGUMENTS,
    "NoMeta": Check.META,
    "BadScaleValue": Check.ARGUMENTS,
    "ViewDropped": Check.UNFUSED,
    "AlwaysOutQuant": Check.SITES,
}
"""The check that finds each lapse."""
ROWS = {
    "WritesDropped": "F16",
    "EqualScale": "F4",
    "HashOrder": "F15",
    "NanLaundered": "F1-nan",
    "AlphaIgnored": "N2-alpha",
    "OtherReaderIgnored": "N1",
    "BroadcastResidual": "N3",
    "FixedStrategy": "D7",
    "BadScaleValue": "N8-zero",
    "ViewDropped": "F6-halves",
}
"""The row that shows it, where the plainest does not."""
TWELVE = GraphCase("twelve", GraphPlan(sites=(SitePlan(),) * 12))
"""So many sites that two hash seeds decide alike about all of them once in 4096 times."""
HONEST = (
    *("LastFirst", "LastFirstQuant", "renamed", "cleaned", "copied", "copied_whole", "OwnScale", "ByKeyword"),
    *("UnreadResults", "one_read_each", "late", "as_parameters"),
)
HONEST_ROWS = "F4,F6-halves,F7,F16,D2-residual"


def subject(module: object, name: str) -> Subject:
    """A pass of a module by name: a transform, or a function."""
    found = getattr(module, name)
    of_norm = isinstance(found, type) and issubclass(found, FuseNorm)
    of_norm |= name in ("renamed", "copied", "nothing", "one_read_each", "late")
    attribute = f"{name}.apply" if isinstance(found, type) else name
    return Subject(f"{found.__module__}:{attribute}", after_norm=not of_norm, quantises=not of_norm)


def row(name: str) -> GraphCase:
    """One edge case."""
    return row_cases(2, name)[0]


@pytest.mark.parametrize(("name", "check"), FOUND.items())
def test_a_lapse_is_found_by_the_check_that_is_there_for_it(
    quick_checker: GraphChecker, name: str, check: Check
) -> None:
    case = TWELVE if name in ("HashChoice", "ByAddress") else row(ROWS.get(name, "F1"))
    module = next(module for module in LAPSES if hasattr(module, name))
    result = quick_checker.for_subject(subject(module, name)).check(case)
    assert check in {finding.check for finding in result.findings}, result.findings
    of_sites = Status.AGAINST if name == "AlwaysOutQuant" else Status.MISSED
    assert result.status() is (of_sites if check is Check.SITES else Status.BROKEN)


@pytest.mark.parametrize("name", HONEST)
def test_a_right_pass_of_another_kind_is_not_accused(quick_checker: GraphChecker, name: str) -> None:
    results = quick_checker.for_subject(subject(honest, name)).check_all(row_cases(2, HONEST_ROWS))
    assert [result.findings for result in results] == [[]] * len(results)
