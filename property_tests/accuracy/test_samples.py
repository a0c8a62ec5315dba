"""Reading runs: the layouts of several lm-eval versions give one verdict, and a broken file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusecheck.errors import UsageError
from fusecheck.eval.compare import compare
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.samples import read_run
from fusecheck.property_tests.accuracy.made_runs import (
    Layout,
    Row,
    choice_rows,
    edit_rows,
    samples_file,
    text_rows,
    write_run,
)

LAYOUTS: tuple[Layout, ...] = ("0.4.2", "0.4.3", "0.4.13")
BASE = {"mmlu_anatomy": choice_rows(300, lambda i: i % 4 != 0)}
LOSING = {"mmlu_anatomy": choice_rows(300, lambda i: i % 4 != 0 and i % 10 != 1)}
ANSWERS = [(f"so it is {i}", i % 3 > 0) for i in range(200)]


Spoil = Callable[[Path], object]
"""Spoils the run in a folder."""


def judge(a: Path, b: Path) -> Comparison:
    return compare(read_run(a), read_run(b), options=Options())


@pytest.mark.parametrize("old", LAYOUTS)
@pytest.mark.parametrize("new", LAYOUTS)
def test_every_layout_gives_the_same_counts(tmp_path: Path, old: Layout, new: Layout) -> None:
    tasks = {**BASE, "gsm8k": text_rows(ANSWERS)}
    other = {**LOSING, "gsm8k": text_rows([(a + "1", r and i % 20 != 1) for i, (a, r) in enumerate(ANSWERS)])}
    write_run(tmp_path / "a", tasks, layout=old)
    write_run(tmp_path / "b", other, layout=new)
    outcome = judge(tmp_path / "a", tmp_path / "b")
    assert [c for c in outcome.checks if c.state == "invalid"] == []
    counts = {t.endpoint.name: t.judgement.flips for t in outcome.tasks}
    assert (counts["mmlu"].lost, counts["mmlu"].gained, counts["mmlu"].n) == (30, 0, 300)
    lost = sum(i % 3 > 0 and i % 20 == 1 for i in range(200))
    assert (counts["gsm8k"].lost, counts["gsm8k"].gained, counts["gsm8k"].n) == (lost, 0, 200)
    assert counts["gsm8k"].churn == 200 - sum(r for _, r in ANSWERS)
    assert {t.endpoint.name: t.endpoint.filter for t in outcome.tasks} == {"mmlu": "none", "gsm8k": "flexible-extract"}


def test_the_order_of_the_rows_decides_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", BASE)
    write_run(tmp_path / "b", LOSING)
    first = judge(tmp_path / "a", tmp_path / "b")
    edit_rows(tmp_path / "b", "mmlu_anatomy", lambda rows: rows[::-1])
    second = judge(tmp_path / "a", tmp_path / "b")
    assert first.tasks == second.tasks
    assert first.verdict is second.verdict is Verdict.FAIL


def test_two_runs_of_different_tasks_in_one_folder_are_one_run(tmp_path: Path) -> None:
    write_run(tmp_path, BASE)
    write_run(tmp_path, {"gsm8k": text_rows(ANSWERS)}, time="2025-01-02T09-09-09")
    assert set(read_run(tmp_path).tasks) == {"mmlu_anatomy", "gsm8k"}


def test_two_runs_of_one_task_in_one_folder_need_a_choice(tmp_path: Path) -> None:
    write_run(tmp_path, BASE)
    later = write_run(tmp_path, LOSING, time="2025-02-02T09-09-09")
    with pytest.raises(UsageError, match=r"two runs of mmlu_anatomy .* name the results file"):
        read_run(tmp_path)
    assert read_run(later).tasks["mmlu_anatomy"].path.name == "samples_mmlu_anatomy_2025-02-02T09-09-09.jsonl"


def test_a_results_file_named_by_the_user_is_found(tmp_path: Path) -> None:
    path = write_run(tmp_path, BASE)
    renamed = path.rename(path.with_name(path.name.replace("results_", "my-run_")))
    assert set(read_run(tmp_path).tasks) == {"mmlu_anatomy"}
    assert set(read_run(renamed).tasks) == {"mmlu_anatomy"}


def test_a_line_separator_in_an_answer_does_not_end_the_record(tmp_path: Path) -> None:
    write_run(tmp_path, {"gsm8k": text_rows([("one\u2028two\x85three \x1b[31m 7", True), ("8", False)])})
    run = read_run(tmp_path).tasks["gsm8k"]
    assert run.samples[0, "flexible-extract"].response == "one\u2028two\x85three \x1b[31m 7"


def _rows(edit: Callable[[list[Row]], list[Row]]) -> Spoil:
    return lambda folder: edit_rows(folder, "mmlu_anatomy", edit)


def _samples(act: Callable[[Path], object]) -> Spoil:
    return lambda folder: act(samples_file(folder, "mmlu_anatomy"))


def _results(act: Callable[[Path], object]) -> Spoil:
    return lambda folder: act(next(folder.rglob("results_*.json")))


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:-100])


def _edited_prompt(rows: list[Row]) -> list[Row]:
    rows[4]["arguments"]["gen_args_0"]["arg_0"] += " "
    return rows


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_samples(_cut), r"samples_mmlu_anatomy_.*:300: broken JSON .* cut short"),
        (_rows(lambda rows: rows[:-3]), r"297 rows under filter none, expected 300; the file is cut short"),
        (_rows(lambda rows: [*rows[:-1], rows[0]]), r":300: doc_id 0, filter none occurs twice"),
        (
            _rows(lambda rows: [{**r, "acc": 1.0 - r["acc"]} for r in rows]),
            r"acc,none over its rows is 0\.25.*the results file says 0\.75",
        ),
        (_rows(_edited_prompt), r":5: prompt_hash does not fit the prompt beside it"),
        (_samples(Path.unlink), r"no samples file beside it; run lm_eval again with --log_samples"),
        (_samples(lambda path: path.write_text("")), r"no samples in it; run lm_eval again with --log_samples"),
        (_results(Path.unlink), r"1 samples files but no results file"),
        (_results(_cut), r"results_.*: not a JSON file"),
        (_results(lambda path: path.write_text('{"perplexity": 1}')), r"has no object 'results'"),
        (_samples(lambda path: path.write_bytes(b"\xff\xfe{}")), r"not UTF-8 text"),
        (_rows(lambda rows: [{**r, "doc_id": "x"} for r in rows]), r":1: doc_id is 'x', expected an integer"),
        (_samples(lambda path: path.write_text("1\n2\n")), r":1: got int, expected an object a line"),
    ],
)
def test_a_broken_run_is_refused_in_one_line(tmp_path: Path, spoil: Spoil, message: str) -> None:
    write_run(tmp_path, BASE)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message) as refusal:
        read_run(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no results_\*\.json"):
        read_run(tmp_path)


def test_a_broken_arm_record_is_named(tmp_path: Path) -> None:
    place = write_run(tmp_path, BASE).parent
    for text, message in (
        ("{", "not a JSON file"),
        (json.dumps({"schema": 2, "arm": "fused"}), "got schema 2, expected 1"),
        (json.dumps({"schema": 1, "arm": "fused", "fused_calls": "many"}), "fused_calls is 'many', expected int"),
        (json.dumps({"schema": 1}), "has no field 'arm'"),
    ):
        (place / "fusecheck_arm.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_run(tmp_path)


def test_runs_with_other_settings_in_one_folder_need_a_choice(tmp_path: Path) -> None:
    def other_seed(results: dict[str, Any]) -> None:
        results["config"]["fewshot_seed"] = 7

    write_run(tmp_path, BASE)
    write_run(tmp_path, {"gsm8k": text_rows(ANSWERS)}, time="2025-01-02T09-09-09", change=other_seed)
    with pytest.raises(UsageError, match="fewshot_seed 1234 and 7"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["configs", "versions", "n-shot", "n-samples", "group_subtasks"])
def test_a_results_file_with_a_section_of_another_form_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write_run(tmp_path, {"mmlu_a": choice_rows(8, bool)}, change=lambda results: results.update({name: ["x"]}))
    with pytest.raises(UsageError, match=f"'{name}' is a JSON list, expected an object"):
        read_run(tmp_path)
