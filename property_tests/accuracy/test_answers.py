"""Answers that never came are counted and named; too many, and there is no verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusecheck.errors import UsageError
from fusecheck.eval.answers import is_error
from fusecheck.eval.arm import ArmRecord, write_arm_record
from fusecheck.eval.compare import compare
from fusecheck.eval.endpoints import name_endpoints
from fusecheck.eval.folders import find_runs
from fusecheck.eval.gate import Verdict, decide
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.plan import chance_to_pass, questions_for
from fusecheck.eval.report_blocks import blocks
from fusecheck.eval.samples import read_run
from fusecheck.property_tests.accuracy.console import call
from fusecheck.property_tests.accuracy.made_runs import choice_rows, text_rows, write_run

N = 1319
Answer = Callable[[int], tuple[str, bool]]


def right(i: int) -> tuple[str, bool]:
    return f"so it is {i}", i % 10 != 0


def write_pair(folder: Path, baseline: Answer, candidate: Answer, **options: Any) -> tuple[Path, Path]:
    for name, answer in (("a", baseline), ("b", candidate)):
        write_run(folder / name, {"gsm8k": text_rows([answer(i) for i in range(N)])}, **options)
    return folder / "a", folder / "b"


def judge(folder: Path, baseline: Answer, candidate: Answer) -> Comparison:
    first, second = write_pair(folder, baseline, candidate)
    return compare(read_run(first), read_run(second), options=Options())


def spoiled(count: int, text: str) -> Answer:
    return lambda i: (text, False) if i < count else right(i)


def told(outcome: Comparison) -> tuple[str, str]:
    found = next(c for c in outcome.checks if c.name == "candidate: answers")
    return found.state, found.detail


def test_empty_answers_in_both_arms_are_no_pass_and_exit_code_4(tmp_path: Path) -> None:
    first, second = write_pair(tmp_path, spoiled(300, ""), spoiled(300, ""))
    result = call(["compare", str(first), str(second), "--run-dir", str(tmp_path / "run")])
    assert result.exit_code == 4
    assert "300 and 300 empty" in " ".join(result.output.split())
    assert "22.7% never answered, at most 1% may be" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("count", "text", "named"),
    [
        (26, "", "0 and 26 empty"),
        (33, "Error code: 503 - upstream timed out", "0 and 33 an error's text"),
        (33, "Request timed out.", "0 and 33 an error's text"),
    ],
)
def test_answers_that_never_came_in_one_arm_are_named_and_not_called_worse(
    count: int, text: str, named: str, tmp_path: Path
) -> None:
    outcome = judge(tmp_path, right, spoiled(count, text))
    assert outcome.verdict is Verdict.INVALID
    assert named in outcome.reason


def test_a_few_are_a_warning_that_says_where_the_arms_differ(tmp_path: Path) -> None:
    outcome = judge(tmp_path, right, spoiled(10, " \n"))
    assert outcome.verdict is Verdict.PASS
    assert told(outcome)[0] == "warning"
    assert "0 and 10 empty" in told(outcome)[1]
    assert "the arms differ in answers empty" in told(outcome)[1]


def test_answers_that_the_filter_rejects_are_counted_and_no_reason_to_refuse(tmp_path: Path) -> None:
    def rejected(i: int) -> tuple[str, bool]:
        return ("I would rather not", False) if i < 400 else right(i)

    first, second = write_pair(tmp_path, right, rejected)
    for path in second.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if row["resps"] == [["I would rather not"]]:
                row["filtered_resps"] = ["[invalid]"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = compare(read_run(first), read_run(second), options=Options())
    assert outcome.verdict is Verdict.FAIL
    assert "0 and 400 rejected by the filter" in told(outcome)[1]


def test_cut_answers_are_counted_where_only_one_arm_has_some(tmp_path: Path) -> None:
    first, second = write_pair(tmp_path, right, lambda i: (f"it is {i}", i % 10 != 0))
    for place, arm, cut in ((first, "unfused", {}), (second, "fused", {"gsm8k": 40})):
        fused = int(arm == "fused")
        write_arm_record(place, ArmRecord(arm=arm, fused_calls=fused, unfused_calls=1 - fused, truncated=cut))
    outcome = compare(read_run(first), read_run(second), options=Options())
    assert told(outcome)[0] == "warning"
    assert "0 and 40 cut at the token limit" in told(outcome)[1]


def test_equal_texts_everywhere_are_called_so_and_finite_logits_unknown(tmp_path: Path) -> None:
    outcome = judge(tmp_path, right, right)
    assert "every generated text is the same in both arms; was the fusion really on?" in " ".join(outcome.warnings)
    assert {c.state for c in outcome.checks if "finite logits" in c.name} == {"unknown"}


@pytest.mark.parametrize("text", ["The error: 5 apples too many", "Errors happen", "500 apples", "HTTP is a protocol"])
def test_an_answer_that_speaks_of_errors_is_none_of_them(text: str) -> None:
    assert not is_error(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"error": {"message": "x"}}',
        "<html><body>502",
        "openai.APITimeoutError: x",
        "ReadTimeoutError(...)",
        "HTTP 503",
    ],
)
def test_what_servers_and_clients_say_is_an_error(text: str) -> None:
    assert is_error(text)


@pytest.mark.parametrize(("version", "read"), [("0.4.11", True), ("0.4.9.2", True), ("0.4.12", False)])
def test_a_picked_part_of_a_split_is_read_where_the_release_counts_the_whole(
    version: str, *, read: bool, tmp_path: Path
) -> None:
    def change(results: dict[str, Any]) -> None:
        results["n-samples"]["gsm8k"] = {"original": 9000, "effective": 9000}
        results["lm_eval_version"] = version

    first, _ = write_pair(tmp_path, right, right, change=change)
    if read:
        assert len(read_run(first).tasks["gsm8k"].samples) == 2 * N
    else:
        with pytest.raises(UsageError, match="expected 9000; the file is cut short"):
            read_run(first)


def test_what_is_not_lm_evals_mmlu_keeps_its_own_name(tmp_path: Path) -> None:
    rows = choice_rows(8, lambda _: True)
    names = ["mmlu_pro", "mmlu_redux", "mmlu_anatomy_generative", "mmlu_law", "mmlu_flan_cot_zeroshot_law"]
    write_run(tmp_path / "none", dict.fromkeys(names, rows), groups={})
    assert set(name_endpoints(read_run(tmp_path / "none"))) == set(names)
    write_run(tmp_path / "old", dict.fromkeys(("mmlu_law", "mmlu_anatomy"), rows), groups={})
    assert set(name_endpoints(read_run(tmp_path / "old"))) == {"mmlu"}


def test_a_margin_that_nobody_fixed_is_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, {"arc_easy": choice_rows(8, lambda _: True)})
    result = call(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert isinstance(result.exception, UsageError)
    assert "no margin is known for arc_easy" in str(result.exception)
    assert "give --margin arc_easy=POINTS" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "content"),
    [("r.json", {"accuracy": 0.7, "invalid_rate": 0.0, "latency": 3.1}), ("r.jsonl", {"task": "gsm8k", "accuracy": 1})],
)
def test_scores_of_other_scripts_are_told_which_command_to_run(name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UsageError, match=r"holds a score and no answers.*lm_eval --model local-completions"):
            find_runs(path)


@pytest.mark.parametrize(("n", "margin", "flips"), [(78, 0.02, 0.005), (200, 0.02, 0.05), (1319, 0.02, 0.05)])
def test_the_plan_promises_what_simulated_runs_keep(n: int, margin: float, flips: float) -> None:
    runs = 100_000
    counts = np.random.default_rng(5).multinomial(n, (flips / 2, flips / 2, 1 - flips), size=runs)
    passed = decide(counts[:, 0], counts[:, 1], n, margin=margin, alpha_low=0.05, alpha_high=0.05) == "pass"
    # Five standard deviations of the simulation are below a point.
    assert abs(chance_to_pass(n, margin, flips, alpha=0.05) - passed.mean()) < 0.01


def test_as_many_questions_as_the_plan_asks_for_have_the_power() -> None:
    for margin, flips in ((0.02, 0.005), (0.005, 0.01), (0.02, 0.05)):
        needed = questions_for(margin, flips, alpha=0.05, power=0.8)
        assert (
            chance_to_pass(needed, margin, flips, alpha=0.05)
            >= 0.8
            > chance_to_pass(needed // 2, margin, flips, alpha=0.05)
        )


def test_the_engines_own_rules_stand_beside_the_verdict_on_the_same_runs(tmp_path: Path) -> None:
    # Fifty questions lost of 1,319: 3.8 points, which only the narrowest of the stored-score rules notices.
    outcome = judge(tmp_path, right, lambda i: ("is it 7", False) if i % 26 == 1 else right(i))
    assert outcome.verdict is Verdict.FAIL
    table = next(block for block in blocks(outcome) if "own rules" in block.title)
    said = {row[1]: row[-1] for row in table.rows}
    assert said == {
        "TensorRT-LLM accuracy_core": "rejects",
        "vLLM lm-eval harness": "accepts",
        "vLLM tests/evals/gsm8k": "accepts",
        "SGLang unit tests": "accepts",
    }
