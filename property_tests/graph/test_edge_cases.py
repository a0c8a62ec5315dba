"""Every named edge case, in real ranks: it becomes what it must, and no bit changes."""

from __future__ import annotations

import pytest

from fusecheck.graph.cases import GraphCase, Subject, row_cases
from fusecheck.graph.expectations import expectation
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.rows import ROWS, Row
from fusecheck.graph.run import GraphChecker
from fusecheck.interface import FusionOp

MULTI_RANK = [row for row in ROWS if row.world_size is None]


@pytest.mark.parametrize("row", MULTI_RANK, ids=[row.name for row in MULTI_RANK])
def test_an_edge_case_becomes_what_it_must(checker: GraphChecker, row: Row) -> None:
    result = checker.check(GraphCase(row.name, row.plan, row.title))
    assert result.findings == []
    assert result.left == {}
    assert result.report["elements"] > 0


def test_rows_of_the_family_become_what_they_must_on_four_ranks_too() -> None:
    with GraphChecker(Subject(), 4, timeout=120, tokens=(), export=False) as four:
        results = four.check_all(row_cases(4, "F17-dynamic-fp8,F18-nvfp4,F21,D14"))
    assert [(result.findings, result.left) for result in results] == [([], {})] * 4
    assert all(result.judged for result in results)


def test_on_one_rank_nothing_fuses() -> None:
    (case,) = row_cases(1)
    with GraphChecker(Subject(), 1, timeout=60) as alone:
        result = alone.check(case)
    assert result.findings == []
    assert set(result.outcomes.values()) == {(None, None)}


def test_rows_have_distinct_names_and_cover_every_rule() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    rules = {name.split("-")[0] for name in names}
    assert rules == {
        *(f"F{n}" for n in range(1, 22)),
        *(f"D{n}" for n in range(1, 15)),
        *(f"N{n}" for n in range(1, 22)),
    }


def test_predictions_agree_with_the_rule_that_a_row_is_named_for() -> None:
    norm = FusionOp.RESIDUAL_RMS_NORM
    wanted: dict[str, FusionOp | None] = dict.fromkeys(("N1", "N2", "N3", "N4", "N5", "N6", "N13", "N21"))
    wanted |= dict.fromkeys(("N7", "N8", "N14", "N17", "N18", "D10", "D12"), norm)
    for row in MULTI_RANK:
        rule = row.name.split("-")[0]
        fused = expectation(row.plan, 0, 2).fused
        if rule.startswith("F"):
            assert fused is not None, row.name
            assert fused.returns_quant or fused.has_experts, row.name
        elif rule.startswith(("N19", "N20")):
            assert fused is not None, row.name
            assert not fused.has_experts, row.name
        elif rule in wanted:
            assert fused == wanted[rule], row.name


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_plan_comes_back_from_its_replay_line(row: Row) -> None:
    assert GraphPlan.from_json(row.plan.to_json()) == row.plan
