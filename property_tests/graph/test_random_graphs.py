"""Random decoder graphs: each site becomes what its features predict, in real ranks, and no bit changes."""

from __future__ import annotations

from hypothesis import HealthCheck, event, example, given, settings

from fusecheck.graph.cases import random_case
from fusecheck.graph.expectations import expectation
from fusecheck.graph.plan import GraphPlan, SitePlan, made
from fusecheck.graph.random_graphs import FORMATS, random_plan
from fusecheck.graph.run import GraphChecker
from fusecheck.operations import STATIC_OPS, Collective
from fusecheck.property_tests.graph_strategies import plans

GRAPHS_PER_EXAMPLE = 1.25
"""Graphs are cheap beside kernel cases: profile `ci` checks 100 of them, `fusecheck graph --random 500` more."""
OTHER_TOKENS = 3
GRAPHS = min(2000, round(settings().max_examples * GRAPHS_PER_EXAMPLE))


HALF_BLOCKS = GraphPlan(sites=(SitePlan(readers=(made("nvfp4", view="halves"),)),), hidden=80)
"""Rows of 40 are no whole number of the layer's blocks of 16."""

FLAT = (made("dynamic-fp8", view="flat"), made("dynamic-fp8", view="flat", shared_scale=True))
SHARED_VIEW = GraphPlan(sites=(SitePlan(readers=FLAT),))
"""Two layers on the codes of one quantise: nothing is viewed that nobody reads."""


@example(plan=HALF_BLOCKS)
@example(plan=SHARED_VIEW)
@settings(max_examples=GRAPHS, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=plans())
def test_sites_become_what_their_features_predict(checker: GraphChecker, plan: GraphPlan) -> None:
    drawn = checker.for_subject(checker.subject)
    drawn.tokens = (OTHER_TOKENS,)
    result = drawn.check(random_case("drawn", plan))
    for _, got in result.outcomes.values():
        event(f"site became {got}")
    assert result.findings == [], plan.to_json()


def test_the_seeded_graphs_hold_every_outcome_and_every_kind_of_obstacle() -> None:
    graphs = [random_plan(seed) for seed in range(500)]
    found = [expectation(plan, index, 2) for plan in graphs for index in range(len(plan.sites))]
    outcomes = {each.fused for each in found}
    assert outcomes >= {None, *STATIC_OPS}
    moved = {(op.collective, op.quantiser) for op in outcomes if op is not None}
    assert {name for _, name in moved} >= {"none", "static-fp8", *FORMATS}
    assert {(Collective.MOE_FINALIZE, name) for name in ("none", "static-fp8", "nvfp4")} <= moved
    assert sum(each.fused is not None for each in found) > len(found) / 3
    rules = {rule for each in found for rule in each.rows}
    assert rules >= {
        "D1",
        "D2",
        "D3",
        "D4",
        "D5",
        "D6",
        "N1",
        "N2",
        "N3",
        "N4",
        "N5",
        "N6",
        "N7",
        "N8",
        "N13",
        "N14",
        "N17",
        "D10",
        "D12",
        "D14",
    }


def test_a_seed_is_a_graph() -> None:
    assert random_plan(7) == random_plan(7)
    assert len({random_plan(seed).to_json() for seed in range(50)}) == 50
