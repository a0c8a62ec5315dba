"""`fusecheck accuracy` on the golden model with real ranks: few questions, and no verdict that they cannot carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusecheck.eval.arm import read_arm_record
from fusecheck.property_tests.accuracy.console import call

pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")


def test_four_arms_on_few_questions_are_a_valid_pair_without_a_pass(tmp_path: Path) -> None:
    result = call(["--tasks", "golden_mmlu,golden_gsm8k", "--limit", "2", "--run-dir", tmp_path, "--flips", "3"])
    assert result.exit_code == 3, result.output
    assert result.output.startswith("INCONCLUSIVE")
    assert "14 questions; the rule needs 2,000" in result.output
    data = json.loads((tmp_path / "accuracy.json").read_text())
    assert {c["state"] for c in data["checks"]} == {"ok"}
    assert "every generated text is the same in both arms" in {c["detail"] for c in data["checks"]}
    assert {t["endpoint"]["name"] for t in data["tasks"]} == {"golden_mmlu", "golden_gsm8k"}
    assert {t["judgement"]["flips"]["lost"] for t in data["tasks"]} == {0}
    tasks = {t["endpoint"]["name"]: t for t in data["tasks"]}
    assert {name: t["source"] for name, t in tasks.items()} == {"golden_mmlu": "vocabulary", "golden_gsm8k": "none"}
    records = {arm: read_arm_record(tmp_path / arm) for arm in ("oracle", "unfused", "fused", "unfused-again")}
    fused, unfused = records["fused"], records["unfused"]
    assert fused is not None
    assert unfused is not None
    assert fused.fused_calls == unfused.unfused_calls > 0
    assert tasks["golden_gsm8k"]["forced"]["golden_gsm8k"]["tokens"] > 100


def test_the_noise_run_needs_no_fused_kernel(tmp_path: Path) -> None:
    result = call(
        ["--aa", "--tasks", "golden_mmlu", "--limit", "28", "--margin", "golden_mmlu=30", "--run-dir", tmp_path]
    )
    assert result.exit_code == 0, result.output
    assert result.output.startswith("PASS")
    assert not (tmp_path / "fused").exists()


def test_a_sequential_run_stops_goes_on_and_does_not_ask_twice(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--sequential", "--tasks", "golden_mmlu", "--limit", "28", "--run-dir", tmp_path]
    first = call([*arguments, "--block", "14"])
    assert first.exit_code == 3, first.output
    assert first.output.startswith("INCONCLUSIVE  golden_mmlu after 28 of 28 questions")
    answers = (tmp_path / "answers_golden_mmlu.jsonl").read_text()
    assert len(answers.splitlines()) == 28
    again = call([*arguments, "--block", "14"])
    assert again.output == first.output
    assert (tmp_path / "answers_golden_mmlu.jsonl").read_text() == answers
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["verdict"] == "inconclusive"
    other = call([*arguments, "--block", "7"])
    assert "another plan" in str(other.exception)
