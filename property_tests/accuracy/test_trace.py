"""A trace names the first site and stage at which a bug shows, and nothing for a right kernel."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from fusecheck.eval.arm import FUSED
from fusecheck.eval.compare import compare
from fusecheck.eval.outcome import Options
from fusecheck.eval.samples import read_run
from fusecheck.eval.trace import STEADY, Question, Trace, choose, place, prompts, to_json
from fusecheck.eval.trace_rank import Deviation
from fusecheck.eval.worker import EvalRank
from fusecheck.property_tests.accuracy.made_runs import choice_rows, write_run
from fusecheck.property_tests.accuracy.tiny_models import SoloRank, write_checkpoint

LENGTHS = (40, 25)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> EvalRank:
    # v_proj of every layer has a scale of its own: the norm behind an MLP must return codes and norm.
    return EvalRank(SoloRank(), str(write_checkpoint(tmp_path_factory.mktemp("model"))))


def traced(worker: EvalRank, backend: str) -> list[Deviation]:
    worker.open_arm(FUSED, backend, 128)
    ids = np.random.default_rng(0).integers(3, 2000, (2, 40))
    sites, found = worker.trace(ids, np.array(LENGTHS))
    worker.close_arm()
    assert sites == 4
    return [Deviation(**record) for record in found]


@pytest.mark.parametrize("name", ["unfused", "fusecheck.eval.spoiled:nothing__unfused"])
def test_a_right_kernel_keeps_what_it_declares_at_every_site(worker: EvalRank, name: str) -> None:
    assert traced(worker, name) == []


@pytest.mark.parametrize(
    ("kind", "stages", "texts"),
    [
        # Row 31 is the first text's, row 63 the second's: 40 rows and 23 more.
        ("row_in_32", {0: "quant", 1: "quant", 2: "quant"}, (0, 1)),
        ("scale_times_2", {0: "quant", 1: "quant", 2: "quant"}, (0, 1)),
        ("eps_1e3", {0: "quant", 1: "norm", 2: "quant", 3: "norm"}, (0, 1)),
        ("first_scale", {1: "readers"}, (0, 1)),
    ],
)
def test_a_bug_is_named_by_its_first_site_and_stage(
    worker: EvalRank, kind: str, stages: dict[int, str], texts: tuple[int, ...]
) -> None:
    found = traced(worker, f"fusecheck.eval.spoiled:{kind}__unfused")
    assert {deviation.site: deviation.stage for deviation in found} == stages
    assert found[0].texts == texts
    assert all(0 < deviation.outside <= deviation.elements for deviation in found)


def test_sites_are_told_by_layer_and_place() -> None:
    assert [place(site) for site in (0, 3, 34)] == [
        "layer 0 after attention",
        "layer 1 after the MLP",
        "layer 17 after attention",
    ]


def test_the_headline_joins_the_first_site_to_the_questions_that_flipped() -> None:
    questions = [Question("t", i, flipped=i < 3) for i in range(5)]
    first = Deviation(34, "scale", 3, 100, "row 1, column 2: 5, 6..6", (0, 2, 4))
    made = functools.partial(Trace, sites=48, questions=questions)
    wrong = made(first=first, places=[(34, "scale", 3)], flips_there=2)
    assert wrong.headline(-0.0123) == (
        "accuracy changed by -1.23 pt; first deviating site: layer 17 after attention, stage scale; "
        "2 of 3 flipped questions deviate at some site"
    )
    assert to_json(wrong, 0.0)["deviating"] == [{"place": "layer 17 after attention", "stage": "scale", "questions": 3}]
    right = made(first=None, places=[], flips_there=0)
    assert "all 48 sites keep what the kernel declares, on 5 questions (3 flipped)" in right.headline(0.0)


def test_flipped_questions_are_traced_first_with_the_prompts_of_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mmlu_x": choice_rows(400, lambda _: True)})
    write_run(tmp_path / "b", {"mmlu_x": choice_rows(400, lambda i: i not in (17, 230))})
    baseline, candidate = read_run(tmp_path / "a"), read_run(tmp_path / "b")
    questions = choose(compare(baseline, candidate, options=Options()), baseline, candidate)
    assert [(q.doc_id, q.flipped) for q in questions[:2]] == [(17, True), (230, True)]
    assert len(questions) == 2 + STEADY
    assert not any(q.flipped for q in questions[2:])
    assert prompts(questions, baseline)[1].endswith("Question 230?\nAnswer:")
