"""Sums over ranks that are added: a right pass makes one of them, and each lapse is found by a named check."""

from __future__ import annotations

import pytest

from fusecheck.errors import UsageError
from fusecheck.graph import autodeploy
from fusecheck.graph.cases import Subject, pair_cases
from fusecheck.graph.collinear import PAIRS, PairPlan
from fusecheck.graph.findings import Check
from fusecheck.graph.results import Status
from fusecheck.graph.run import GraphChecker

HERE = "fusecheck.property_tests.graph.merging"
WRONG = {
    "AnyAdd": ("CN4", Check.UNFUSED, Status.BROKEN),
    "ReadElsewhere": ("CN1-second", Check.SITES, Status.AGAINST),
    "AnyStrategy": ("CN2", Check.ARGUMENTS, Status.BROKEN),
    "TooEarly": ("C3", Check.RUNS, Status.BROKEN),
    "FirstTwice": ("C1", Check.UNFUSED, Status.BROKEN),
    "Scaled": ("C1", Check.UNFUSED, Status.BROKEN),
    "NoneMerged": ("C1", Check.SITES, Status.MISSED),
}
"""The case that shows each lapse, the check that says so, and what the case then is."""


def subject(name: str) -> Subject:
    """A stand-in as the pass under test."""
    return Subject(f"{HERE}:{name}", after_norm=False, merges=True)


def test_a_right_pass_is_as_expected_on_every_pair(quick_checker: GraphChecker) -> None:
    results = quick_checker.for_subject(subject("Merging.apply")).check_all(pair_cases())
    assert {result.case.name: result.findings for result in results if not result.ok} == {}
    assert all(result.status() is Status.EXPECTED for result in results)
    assert all(result.judged for result in results if PAIRS[result.case.name][1].merges)


def test_a_pass_in_autodeploys_operators_is_judged_alike(quick_checker: GraphChecker) -> None:
    checker = quick_checker.for_subject(subject("fuse_collinear_allreduce"))
    checker.dialect = autodeploy.NAME
    assert [result.findings for result in checker.check_all(pair_cases("C1,C3,CN2,CN3-max"))] == [[]] * 4


@pytest.mark.parametrize("name", WRONG)
def test_a_lapse_is_found_by_the_check_that_is_there_for_it(quick_checker: GraphChecker, name: str) -> None:
    row, check, status = WRONG[name]
    (result,) = quick_checker.for_subject(subject(f"{name}.apply")).check_all(pair_cases(row))
    assert check in {finding.check for finding in result.findings}, result.findings
    assert result.status() is status


def test_plans_of_pairs_survive_json_and_name_what_is_wrong() -> None:
    for _, plan in PAIRS.values():
        assert PairPlan.from_json(plan.to_json()) == plan
    with pytest.raises(UsageError, match="no row is called 'C9'"):
        pair_cases("C9")
