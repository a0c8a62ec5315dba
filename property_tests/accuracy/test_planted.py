"""Bugs planted in a whole model: each does what its title says, and the gate tells them from the correct kernel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fusecheck.backends import backend
from fusecheck.eval.arm import FUSED, UNFUSED
from fusecheck.eval.gate import Verdict
from fusecheck.eval.planted import PLANTED, kernel_tier, run_planted, to_json
from fusecheck.eval.planted_tiers import table, tiers, to_markdown
from fusecheck.eval.worker import EvalRank
from fusecheck.interface import FusionOp, Limits, RankInputs, Strategy
from fusecheck.property_tests.accuracy.tiny_models import CONFIG, GOLDEN, SoloRank, write_checkpoint

pytest.importorskip("lm_eval")

IN_THE_GRAPH = ("first_scale",)
AT_FOUR_RANKS = ("sums_in_bf16",)


def quantised(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    partial, residual = (torch.randn(64, 64, generator=generator).to(torch.bfloat16) for _ in range(2))
    gamma = torch.full((64,), 3.0, dtype=torch.bfloat16)
    inputs = RankInputs(partial, residual * 5, gamma, torch.tensor([0.018]), 1e-5, 0.0)
    kernel = backend(f"fusecheck.eval.planted:{name}").open(SoloRank(), Limits(64, 64, torch.bfloat16))
    out = kernel.run(inputs, op=FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8, strategy=Strategy.TWOSHOT)
    assert out.quant is not None
    return out.quant.float()


@pytest.mark.parametrize(
    "name", [n for n, p in PLANTED.items() if not p.right and n not in (*IN_THE_GRAPH, *AT_FOUR_RANKS)]
)
def test_a_planted_bug_changes_codes_of_the_correct_kernel(name: str) -> None:
    changed = (quantised(name) != quantised("correct")).float().mean()
    # A skipped rounding moves few codes; eps 1e-4 beside a mean square near 30 none, and shows in no model either.
    assert changed > 0 or name == "eps_1e4"


def test_one_row_in_32_is_wrong_and_no_other() -> None:
    changed = (quantised("row_in_32") != quantised("correct")).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [31, 63]


def test_the_first_scale_for_all_changes_only_models_whose_readers_differ(tmp_path: Path) -> None:
    ids = np.arange(60).reshape(2, 30) + 300
    rank = EvalRank(SoloRank(), str(write_checkpoint(tmp_path)))
    tables = {}
    for name in ("fusecheck.eval.planted:correct", "fusecheck.eval.planted:first_scale"):
        rank.open_arm(FUSED, name, 256)
        scored = rank.score_last(ids, np.array([30, 30]), ids[:, :1])
        assert scored is not None
        tables[name] = scored[0]
        assert rank.close_arm()["calls"] == 2 * CONFIG["num_hidden_layers"]
    right, wrong = tables.values()
    # v_proj's scale is a quarter larger than q_proj's in these checkpoints.
    assert np.abs(right - wrong).max() > 0.01


def test_the_gate_tells_a_wrong_graph_from_a_correct_kernel_and_judges_nothing_on_few_questions(
    tmp_path: Path,
) -> None:
    outcomes = dict(run_planted(["correct", "first_scale"], 28, tmp_path, lambda _: None))
    right, wrong = outcomes["correct"].oracle, outcomes["first_scale"].oracle
    assert right is not None
    assert wrong is not None
    assert right.n == wrong.n == 28
    assert right.ratio < 1.5 < 2.5 < wrong.ratio
    assert wrong.p < 1e-4 < right.p
    # 28 questions are fewer than the rule asks for: no verdict on the log-probabilities, however clear they look.
    assert wrong.verdict is right.verdict is Verdict.INCONCLUSIVE
    assert outcomes["correct"].verdict is Verdict.INCONCLUSIVE
    assert tiers(None, outcomes["correct"]) == []
    assert {arm.name for arm in (tmp_path / "base2").iterdir()} == {"oracle", UNFUSED}
    assert table([to_json(name, outcome, None) for name, outcome in outcomes.items()]).row_count == 2


@pytest.mark.parametrize("name", ["skips_rounding", "eps_1e4", "sums_in_bf16"])
def test_what_the_model_does_not_show_the_kernel_question_does(name: str) -> None:
    wrong = kernel_tier(name)
    assert wrong is not None
    assert wrong.failed > 5
    assert set(wrong.stages) <= {"residual", "norm", "quant", "unfused", "again"}


def test_the_kernel_question_passes_the_right_kernel_of_a_wrong_graph() -> None:
    right = kernel_tier("first_scale")
    assert right is not None
    assert (right.cases > 20, right.failed, right.stages) == (True, 0, ())


def test_the_recorded_table_holds_every_candidate_and_some_tier_catches_every_bug() -> None:
    rows = json.loads((GOLDEN / "planted.json").read_text(encoding="utf-8"))["rows"]
    assert [(r["name"], r["title"], r["right"], r["tp"]) for r in rows] == [
        (name, p.title, p.right, p.tp) for name, p in PLANTED.items()
    ]
    assert {r["questions"] for r in rows} == {2016}
    for row in rows:
        assert bool(row["caught_by"]) != row["right"], row
        assert (row["verdict"] == "fail") == bool({"log-probabilities", "accuracy"} & set(row["caught_by"])), row
    assert sum(r["verdict"] == "fail" for r in rows) >= 5
    assert to_markdown(rows) in (GOLDEN / "README.md").read_text(encoding="utf-8")
