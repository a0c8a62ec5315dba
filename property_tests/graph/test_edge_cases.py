"""Every named edge case, in real ranks: it becomes what it must, and no bit changes."""

from __future__ import annotations

import pytest

from fusecheck.graph.cases import GraphCase, Subject, row_cases
from fusecheck.graph.plan import GraphPlan, expectation
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
        *(f"F{n}" for n in range(1, 17)),
        *(f"D{n}" for n in range(1, 9)),
        *(f"N{n}" for n in range(1, 17)),
    }


def test_predictions_agree_with_the_rule_that_a_row_is_named_for() -> None:
    quant, norm = FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8, FusionOp.RESIDUAL_RMS_NORM
    wanted: dict[str, set[FusionOp | None]] = {
        "F": {quant, FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8},
        "N1": {None},
        "N2": {None},
        "N3": {None},
    }
    wanted |= {"N4": {None}, "N5": {None}, "N6": {None}, "N7": {norm}, "N8": {norm}, "N13": {None}, "N14": {norm}}
    for row in MULTI_RANK:
        rule = row.name.split("-")[0]
        allowed = wanted["F"] if rule.startswith("F") else wanted.get(rule)
        if allowed is not None:
            assert expectation(row.plan, 0, 2).fused in allowed, row.name


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_plan_comes_back_from_its_replay_line(row: Row) -> None:
    assert GraphPlan.from_json(row.plan.to_json()) == row.plan
