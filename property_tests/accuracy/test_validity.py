"""Runs that do not make a pair are refused, whatever their scores: never a PASS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusecheck.eval.arm import ArmRecord, write_arm_record
from fusecheck.eval.compare import compare
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.samples import read_run
from fusecheck.property_tests.accuracy.made_runs import Row, choice_rows, edit_rows, samples_file, write_run

ROWS = choice_rows(400, lambda i: i % 4 != 0)
TASKS = {"mmlu_anatomy": ROWS, "mmlu_virology": choice_rows(100, lambda i: i % 4 != 0, subject="virology")}
Change = Callable[[dict[str, Any]], None]


def judge(folder: Path, **options: Any) -> Comparison:
    return compare(read_run(folder / "a"), read_run(folder / "b"), options=Options(**options))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two runs with the same answers, which a gate that looked no further would pass."""
    for name in ("a", "b"):
        write_run(tmp_path / name, TASKS)
    return tmp_path


def test_a_true_pair_passes(pair: Path) -> None:
    outcome = judge(pair)
    assert outcome.verdict is Verdict.INCONCLUSIVE  # 500 questions cannot show 0.5 points
    assert outcome.tasks[0].judgement.questions_needed is not None
    assert [c for c in outcome.checks if c.state == "invalid"] == []


def _rehash(row: Row) -> Row:
    """The record with its hashes made again, as if the engine had been asked this from the start."""
    made = choice_rows(1, lambda _: True)[0]
    keep = {k: v for k, v in row.items() if not k.endswith("_hash")}
    assert set(made) == set(row)
    return keep


def _edit(change: Callable[[Row], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        def edit(rows: list[Row]) -> list[Row]:
            change(rows[7])
            return [_rehash(r) for r in rows]

        edit_rows(folder, "mmlu_virology", edit)

    return spoil


def _other_prompt(row: Row) -> None:
    row["arguments"]["gen_args_0"]["arg_0"] = "Example.\n\n" + row["arguments"]["gen_args_0"]["arg_0"]


def _other_choice_text(row: Row) -> None:
    row["arguments"]["gen_args_2"]["arg_1"] = "C"


def _other_document(row: Row) -> None:
    row["doc"]["choices"][3] = "something else"


def _other_target(row: Row) -> None:
    row["target"] = "1"


def _rows(edit: Callable[[list[Row]], list[Row]]) -> Callable[[Path], None]:
    return lambda folder: edit_rows(folder, "mmlu_virology", edit)


def _swapped(rows: list[Row]) -> list[Row]:
    """Shuffled: the same records, but their doc_ids belong to other documents."""
    return [{**r, "doc_id": rows[-1 - i]["doc_id"]} for i, r in enumerate(rows)]


def _unproven(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in r.items() if not k.endswith("_hash") and k != "arguments"} for r in rows]


def _not_a_number(row: Row) -> None:
    row["filtered_resps"][2][0] = "nan"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_edit(_other_prompt), "mmlu_virology: doc_id 7: another prompt"),
        (_edit(_other_choice_text), "mmlu_virology: doc_id 7: another prompt"),
        (_edit(_other_document), "mmlu_virology: doc_id 7: another doc"),
        (_edit(_other_target), "mmlu_virology: doc_id 7: another target"),
        (_rows(_swapped), "mmlu_virology: doc_id 0: another doc"),
        (_rows(_unproven), "mmlu_virology: doc_id 0: nothing proves it the same prompt"),
        (lambda folder: samples_file(folder, "mmlu_virology").unlink(), "mmlu_virology only in baseline"),
        (_edit(_not_a_number), "mmlu_virology, doc_id 7"),
    ],
)
def test_other_questions_are_refused(pair: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(pair / "b")
    outcome = judge(pair)
    assert outcome.verdict is Verdict.INVALID
    assert message in outcome.reason
    assert outcome.tasks == ()


def test_a_run_with_fewer_questions_is_refused(pair: Path) -> None:
    """Cut short together with its results file, so that the run by itself looks whole."""
    fewer = {**TASKS, "mmlu_virology": TASKS["mmlu_virology"][:60]}
    write_run(pair / "b", fewer, change=_set(("n-samples", "mmlu_virology", "effective"), 60))
    outcome = judge(pair)
    assert outcome.verdict is Verdict.INVALID
    assert "40 records in one arm only, first doc_id 60" in outcome.reason


def _set(path: tuple[str, ...], value: Any) -> Change:
    def change(results: dict[str, Any]) -> None:
        for name in path[:-1]:
            results = results.setdefault(name, {})
        results[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(("versions", "mmlu_anatomy"), 2.0), "mmlu_anatomy: task version 1.0 against 2.0"),
        (_set(("config", "gen_kwargs"), {"max_gen_toks": 9}), "gen_kwargs"),
        (
            _set(("configs", "mmlu_anatomy", "generation_kwargs"), {"temperature": 1}),
            "generation settings",
        ),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    write_run(tmp_path / "a", TASKS, change=_set(("config", "gen_kwargs"), None))

    def changed(results: dict[str, Any]) -> None:
        _set(("config", "gen_kwargs"), None)(results)
        change(results)

    write_run(tmp_path / "b", TASKS, change=changed)
    outcome = judge(tmp_path)
    assert outcome.verdict is Verdict.INVALID
    assert message in outcome.reason


@pytest.mark.parametrize("name", ["lm_eval_version", "transformers_version", "model_name"])
def test_mixed_versions_with_equal_prompts_are_a_warning(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "a", TASKS, change=_set((name,), "0.4.9"))
    write_run(tmp_path / "b", TASKS, change=_set((name,), "0.4.13"))
    outcome = judge(tmp_path)
    assert outcome.verdict is not Verdict.INVALID
    assert any(f"{name} is 0.4.9 against 0.4.13" in w for w in outcome.warnings)


def test_mixed_versions_without_anything_to_compare_are_refused(tmp_path: Path) -> None:
    """The older run logged no requests and the newer one no documents: nothing shows that they are the same."""
    write_run(tmp_path / "a", TASKS, layout="0.4.2")
    write_run(tmp_path / "b", TASKS)
    path = samples_file(tmp_path / "a", "mmlu_anatomy")
    path.write_text(json.dumps([{**r, "arguments": []} for r in json.loads(path.read_text())]))
    outcome = judge(tmp_path)
    assert outcome.verdict is Verdict.INVALID
    assert "nothing proves it the same prompt" in outcome.reason


def test_one_folder_twice_is_refused(pair: Path) -> None:
    outcome = compare(read_run(pair / "a"), read_run(pair / "a"), options=Options())
    assert outcome.verdict is Verdict.INVALID
    assert "same file" in outcome.reason


def test_a_copy_of_the_same_run_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, TASKS, change=lambda r: r.update(date=1.5, start_time=77.25))
    outcome = judge(tmp_path)
    assert outcome.verdict is Verdict.INVALID
    assert "copy of the other" in outcome.reason


def test_a_shared_response_cache_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, TASKS, change=_set(("config", "use_cache"), "cache/one"))
    outcome = judge(tmp_path)
    assert outcome.verdict is Verdict.INVALID
    assert "does not key on the model" in outcome.reason


def test_a_cache_of_ones_own_is_a_warning(pair: Path) -> None:
    write_run(pair / "b", TASKS, change=_set(("config", "use_cache"), "cache/b"))
    outcome = judge(pair)
    assert outcome.verdict is not Verdict.INVALID
    assert any("use_cache=cache/b" in w for w in outcome.warnings)


UNFUSED = ArmRecord(arm="unfused", unfused_calls=640, weights_digest="w", tokenizer_digest="t", truncated={})
FUSED = ArmRecord(arm="fused", fused_calls=640, weights_digest="w", tokenizer_digest="t", truncated={})


def _record(folder: Path, record: ArmRecord) -> None:
    write_arm_record(folder / "org__model", record)


def test_the_records_of_a_true_pair_are_all_ok(pair: Path) -> None:
    _record(pair / "a", UNFUSED)
    _record(pair / "b", FUSED)
    assert [c for c in judge(pair).checks if c.state != "ok"] == []


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"fused_calls": 0}, "which kernels ran"),
        ({}, {"fused_calls": 0, "unfused_calls": 640}, "which kernels ran"),
        ({}, {"unfused_calls": 3}, "which kernels ran"),
        ({"fused_calls": 1}, {}, "which kernels ran"),
        ({"unfused_calls": 0}, {}, "which kernels ran"),
        ({}, {"weights_digest": "other"}, "same weights"),
        ({}, {"tokenizer_digest": "other"}, "same tokenizer"),
        ({}, {"finite": False}, "finite logits"),
        ({"response_cache": "c"}, {}, "response cache"),
    ],
)
def test_a_record_that_contradicts_the_comparison_is_refused(
    pair: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    _record(pair / "a", ArmRecord(**{**UNFUSED.__dict__, **first}))
    _record(pair / "b", ArmRecord(**{**FUSED.__dict__, **second}))
    outcome = judge(pair)
    assert outcome.verdict is Verdict.INVALID
    assert message in outcome.reason


def test_an_oracle_that_answered_other_questions_is_refused(pair: Path) -> None:
    write_run(pair / "oracle", {"mmlu_anatomy": ROWS[:-1], "mmlu_virology": TASKS["mmlu_virology"]})
    runs = [read_run(pair / name) for name in ("a", "b", "oracle")]
    outcome = compare(*runs, options=Options())
    assert outcome.verdict is Verdict.INVALID
    assert outcome.reason.startswith("oracle: same questions")


def test_judging_some_tasks_asks_only_those_to_be_a_pair(pair: Path) -> None:
    write_run(pair / "b", {**TASKS, "arc": ROWS}, time="2025-01-02T03-04-05.678901")
    assert judge(pair).verdict is Verdict.INVALID
    assert judge(pair, tasks=("mmlu",)).verdict is not Verdict.INVALID
