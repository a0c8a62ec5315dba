"""Passes that are wrong, or no passes at all: each is reported, by a named check, and nothing hangs."""

from __future__ import annotations

import time

import pytest

from fusecheck.errors import UsageError
from fusecheck.faults.catalogue import Fault, catalogue
from fusecheck.faults.run import pass_of
from fusecheck.graph.cases import GraphCase, Subject
from fusecheck.graph.findings import Check
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.graph.plan import GraphPlan, SitePlan
from fusecheck.graph.results import GraphResult, Status, systemic
from fusecheck.graph.rows import ROWS
from fusecheck.graph.run import GraphChecker
from fusecheck.graph.subject import load_pass

HERE = "fusecheck.property_tests.graph"
PLAIN = GraphCase("plain", GraphPlan(sites=(SitePlan(), SitePlan())))
BY_NAME = {row.name: row for row in ROWS}
_DEAD = SitePlan(residual="dead")
GROWING = {"one": (SitePlan(),), "two": (_DEAD, SitePlan()), "three": (_DEAD, _DEAD, SitePlan())}
"""Graphs of two, three and four inputs."""
PROBES = (
    *("F1", "F2", "F4", "F6-reshape", "F6-halves", "F7", "F10-flashinfer", "F14", "D1", "D4", "D7"),
    *("N1", "N2-alpha", "N2-none", "N3", "N3-dtype", "N5", "N5-float32", "N5-single", "N6"),
    *("N7-vector", "N8-zero", "N14"),
)
"""Edge cases that together have every feature once."""


def probe(name: str) -> GraphCase:
    """An edge case by name."""
    return GraphCase(name, BY_NAME[name].plan, BY_NAME[name].title)


@pytest.mark.parametrize("fault", [each for each in catalogue().faults if each.subject == "pass"], ids=lambda f: f.id)
def test_a_published_fault_of_a_pass_is_reported(quick_checker: GraphChecker, fault: Fault) -> None:
    checker = quick_checker.for_subject(pass_of(fault))
    results = (checker.check(probe(name)) for name in PROBES)
    caught = next((result for result in results if not result.ok), None)
    assert caught is not None, f"{fault.id} survived: {fault.title}"
    # The mistake must show in what the pass makes, not in that it falls over.
    assert all(finding.check is not Check.RUNS for finding in caught.findings), caught.findings


def test_the_original_transform_misses_and_breaks_what_its_description_predicts(quick_checker: GraphChecker) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}.original:fuse"))
    names = (
        "F1",
        "F2",
        "F3",
        "F4",
        "F5",
        "F6",
        "F8",
        "F9",
        "F9-packet",
        "F12",
        "F14",
        "D1",
        "D2",
        "D3",
        "D4",
        "N7-bf16",
        "N8-zero",
        "N14",
    )
    results = {name: checker.check(probe(name)) for name in names}
    common = systemic(list(results.values()))
    assert set(common) == {Check.META}
    status = {name: result.status(frozenset(common)) for name, result in results.items()}
    missed = {name for name in names if status[name] is Status.MISSED}
    broken = {name for name in names if status[name] is Status.BROKEN}
    left = {name for name in names if status[name] is Status.LEFT}
    assert missed == {"F3", "F4", "F6", "F9", "F9-packet"}
    assert broken == {"F8", "F14", "N7-bf16", "N8-zero"}
    # Each rank quantises at its own scale and dequantises with it: no value shows that the ranks differ.
    assert {name for name in names if status[name] is Status.AGAINST} == {"N14"}
    assert left == {"D1", "D2"}
    assert [finding.check for finding in results["F8"].findings] == [Check.LINT]
    assert "used before it has been defined" in results["F8"].findings[0].message


@pytest.mark.parametrize(("merged", "quantising"), [(True, 3), (False, 0)])
def test_the_original_transform_needs_merged_layers(
    quick_checker: GraphChecker, *, merged: bool, quantising: int
) -> None:
    checker = quick_checker.for_subject(Subject(f"{HERE}.original:fuse"))
    result = checker.check(GraphCase("decoder", ModelPlan(layers=2, merged=merged)))
    assert result.report["counts"].get("RESIDUAL_RMS_NORM_QUANT_FP8", 0) == quantising
    assert (Check.COUNTS in {finding.check for finding in result.findings}) == (not merged)


@pytest.mark.parametrize(
    ("name", "check", "message"),
    [
        ("raises", Check.RUNS, "the pass raised KeyError: 'no such node'"),
        ("returns_text", Check.RUNS, "the pass returned a str, expected a GraphModule or None"),
        ("does_not_lint", Check.LINT, "the rewritten graph is not sound"),
        ("on_one_rank", Check.RANKS, "rank 0 has"),
    ],
)
def test_what_is_no_pass_is_reported(quick_checker: GraphChecker, name: str, check: Check, message: str) -> None:
    result = quick_checker.for_subject(Subject(f"{HERE}.subjects:{name}")).check(PLAIN)
    assert {finding.check for finding in result.findings} == {check}
    assert any(message in finding.message for finding in result.findings)
    assert result.status() is Status.BROKEN


@pytest.mark.usefixtures("borrowed_ranks")
@pytest.mark.parametrize(
    ("name", "message", "timeout"),
    [("asks_on_one_rank", "hang", 5.0), ("dies_on_one_rank", "exited with status 7", 90.0)],
)
def test_a_rank_that_hangs_or_dies_is_reported_and_the_next_graph_is_checked(
    name: str, message: str, timeout: float
) -> None:
    with GraphChecker(Subject(f"{HERE}.subjects:{name}"), 2, tokens=(), export=False, timeout=timeout) as checker:
        started = time.monotonic()
        result = checker.check(PLAIN)
        assert time.monotonic() - started < timeout + 60
        # A rank whose question was answered by another one's says that the ranks differ, and is right too.
        assert Check.RUNS in {finding.check for finding in result.findings}
        assert any(message in finding.message for finding in result.findings), result.findings
        own = checker.for_subject(Subject())
        own.timeout = 120.0
        assert own.check(PLAIN).ok


@pytest.mark.usefixtures("borrowed_ranks")
def test_of_graphs_that_are_given_together_the_one_that_ends_a_rank_is_reported() -> None:
    dead, third = (Subject(f"{HERE}.subjects:{name}") for name in ("dies_on_a_dead_residual", "dies_at_the_third"))
    with GraphChecker(dead, 2, tokens=(), export=False, timeout=90, lanes=1) as checker:
        assert _ended(checker.check_all([probe("F1"), probe("F7")])) == ["F7"]
        checker = checker.for_subject(third)
        growing = [GraphCase(name, GraphPlan(sites=sites)) for name, sites in GROWING.items()]
        assert _ended(checker.check_all(growing[:2])) == []
        # Alone in new ranks no graph ends one: what happened is said all the same, with what came before.
        results = checker.check_all(growing[1:])
        assert _ended(results) == ["three"]
        assert [case.name for case in results[-1].earlier][-3:] == ["one", "two", "two"]


def _ended(results: list[GraphResult]) -> list[str]:
    return [each.case.name for each in results if any(finding.check is Check.RUNS for finding in each.findings)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "expected package.module:function"),
        ("no_such_module:fuse", "importing no_such_module raised ModuleNotFoundError"),
        (f"{HERE}.subjects:absent", "has no attribute 'absent'"),
        (f"{HERE}.subjects:NOT_A_FUNCTION", "is a int, expected a function of a GraphModule"),
    ],
)
def test_a_name_that_is_no_pass_is_wrong_usage(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_pass(name)
