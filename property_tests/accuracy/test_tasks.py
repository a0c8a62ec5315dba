"""Tasks from local files: limits leave prompts as they are, and broken data is named."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fusecheck.errors import UsageError
from fusecheck.eval import data
from fusecheck.eval.tasks import _allot, prepare

TaskManager = pytest.importorskip(
    "lm_eval.tasks", reason="building prompts needs pip install fusecheck[eval]"
).TaskManager


def test_a_limit_does_not_change_the_prompts_that_it_leaves() -> None:
    with prepare(["gsm8k"], None) as whole:
        everything = {whole.document("gsm8k", i.doc_id): i.args[0] for i in whole.tasks["gsm8k"].instances}
    with prepare(["gsm8k"], None, limit=15) as part:
        chosen = {part.document("gsm8k", i.doc_id): i.args[0] for i in part.tasks["gsm8k"].instances}
    assert len(everything) == 200
    assert len(chosen) == 15
    assert all(everything[doc] == prompt for doc, prompt in chosen.items())


def test_a_limit_is_spread_over_the_subjects() -> None:
    with prepare(["golden_mmlu"], None, limit=33) as prepared:
        counts = [len(task.instances) // 4 for task in prepared.tasks.values()]
    assert len(counts) == 14
    assert sum(counts) == 33
    assert set(counts) == {2, 3}


def refused(tasks: Sequence[str], data_dir: Path | None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught, prepare(tasks, data_dir, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_task_is_refused_with_near_names(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of lm-eval's own tasks those of MMLU and GSM8K are enough: to read them all takes ten seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    assert "golden_mmlu" in refused(["golden_mmlx"], None)


@pytest.mark.parametrize("limit", [57, 60, 100, 200, 5000, 14042, 20000])
def test_shares_add_up_to_the_limit_with_one_each_at_least(limit: int) -> None:
    sizes = {f"small{i}": 100 + i for i in range(54)} | {"law": 1534, "moral": 895, "misc": 783}
    shares = _allot(sizes, limit)
    assert sum(shares.values()) == min(limit, sum(sizes.values()))
    assert all(1 <= shares[name] <= size for name, size in sizes.items())
    assert shares["law"] >= shares["moral"] >= shares["small0"]


def test_no_tasks_or_a_limit_of_nothing_are_refused() -> None:
    assert "no tasks" in refused([], None)
    assert "--limit 0" in refused(["golden_gsm8k"], None, limit=0)


def test_a_missing_data_folder_is_said(tmp_path: Path) -> None:
    assert "no such folder" in refused(["mmlu"], tmp_path / "nowhere")
    assert "no such file; --data expects" in refused(["gsm8k"], tmp_path)


def _rewrite(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
        path.write_bytes(gzip.compress("".join(change(lines)).encode()))

    return apply


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("gsm8k/test.jsonl.gz", lambda p: p.write_bytes(p.read_bytes()[:500]), "not whole JSON lines"),
        ("gsm8k/train.jsonl.gz", _rewrite(lambda _: []), "is empty"),
        ("gsm8k/test.jsonl.gz", _rewrite(lambda rows: ['{"question": "a"}\n', *rows]), "no field 'answer'"),
    ],
)
def test_broken_data_files_are_named(file: str, damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    damage(copy / file)
    told = refused(["gsm8k"], copy)
    assert said in told
    assert file.removesuffix(".gz") in told


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("subject", "../../x", "subject is '../../x', expected a name"),
        ("subject", ["a"], "subject is"),
        ("choices", ["a", "b", "c"], "choices is .* expected four texts"),
        ("choices", "abcd", "choices is 'abcd'"),
        ("answer", 4, "answer is '4', expected 0, 1, 2 or 3"),
        ("answer", "A", "answer is 'A'"),
        ("question", 5, "question is '5', expected a text"),
    ],
)
def test_a_row_of_mmlu_that_holds_something_else_is_refused(field: str, value: Any, said: str, tmp_path: Path) -> None:
    def change(rows: list[str]) -> list[str]:
        return [json.dumps({**json.loads(rows[0]), field: value}) + "\n", *rows[1:]]

    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    _rewrite(change)(copy / "mmlu" / "test.jsonl.gz")
    assert re.search(rf"mmlu/test.jsonl.*a row's {said}", refused(["mmlu"], copy))


def test_a_subject_that_the_data_lack_is_said(tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    for split in ("test", "dev"):
        _rewrite(lambda rows: [r for r in rows if '"anatomy"' in r])(copy / "mmlu" / f"{split}.jsonl.gz")
    assert "lm-eval cannot load mmlu_virology" in refused(["mmlu_virology"], copy)


def test_a_subject_without_examples_is_named(tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    _rewrite(lambda rows: [r for r in rows if '"anatomy"' not in r])(copy / "mmlu" / "dev.jsonl.gz")
    assert "subject 'anatomy' has no dev rows" in refused(["mmlu"], copy)


def test_plain_json_lines_serve_as_well(tmp_path: Path) -> None:
    copy = shutil.copytree(data.EMBEDDED, tmp_path / "data")
    for path in (copy / "gsm8k").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    with prepare(["gsm8k"], copy, limit=3) as prepared:
        assert len(prepared.tasks["gsm8k"].instances) == 3
