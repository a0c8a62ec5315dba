"""Whole models: 2 L sums over ranks, of which 2 L - 1 quantise, and logits that do not change by a bit."""

from __future__ import annotations

import pytest

from fusecheck.errors import UsageError
from fusecheck.graph.cases import GraphCase
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.graph.results import GraphResult
from fusecheck.graph.run import GraphChecker

NORM, QUANT = "RESIDUAL_RMS_NORM", "RESIDUAL_RMS_NORM_QUANT_FP8"

COUNTS = [
    (ModelPlan(layers=1), 1, 1),
    (ModelPlan(layers=2), 1, 3),
    (ModelPlan(layers=3, tokens=4, dynamic=True), 1, 5),
    (ModelPlan(layers=32), 1, 63),
    (ModelPlan(layers=2, merged=False), 1, 3),
    (ModelPlan(layers=2, merged=False, k_differs=True), 2, 2),
    (ModelPlan(layers=2, dtype="float16"), 1, 3),
    (ModelPlan(layers=2, magnitude=1e-3), 1, 3),
    (ModelPlan(layers=2, strategy="TWOSHOT"), 1, 3),
]


def check(checker: GraphChecker, plan: ModelPlan) -> GraphResult:
    """The result of one model, which must be without findings."""
    result = checker.check(GraphCase(plan.model, plan))
    assert result.findings == []
    return result


@pytest.mark.parametrize(("plan", "norms", "quantising"), COUNTS, ids=[plan.to_json() for plan, _, _ in COUNTS])
def test_a_decoder_fuses_at_every_layer_and_keeps_its_logits(
    checker: GraphChecker, plan: ModelPlan, norms: int, quantising: int
) -> None:
    result = check(checker, plan)
    counts = {role: count for role, count in result.report["counts"].items() if count}
    assert counts == {NORM: norms, QUANT: quantising, "norm": 1}
    assert norms + quantising == 2 * plan.layers
    assert result.report["differing"] == 0
    assert result.report["elements"] >= 2 * plan.tokens * 96
    assert result.report["kernel_elements"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_hugging_face_model_fuses_at_every_layer_and_keeps_its_logits(checker: GraphChecker, family: str) -> None:
    pytest.importorskip("transformers", reason="real models need the eval extra")
    result = check(checker, ModelPlan(model=family, layers=2))
    counts = {role: count for role, count in result.report["counts"].items() if count}
    assert counts == {NORM: 1, QUANT: 3, "norm": 5 if family == "qwen3" else 1}
    assert result.report["skipped"] == {}


def test_four_ranks_fuse_alike() -> None:
    from fusecheck.graph.cases import Subject

    with GraphChecker(Subject(), 4, timeout=120, export=False) as four:
        result = check(four, ModelPlan(layers=2))
    assert result.report["differing"] == 0


def test_a_model_must_be_known_and_divide_among_the_ranks(checker: GraphChecker) -> None:
    with pytest.raises(UsageError, match="unknown model 'gpt'"):
        ModelPlan(model="gpt")
    with pytest.raises(UsageError, match="layers 0: expected at least 1"):
        ModelPlan(layers=0)
