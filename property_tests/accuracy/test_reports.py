"""Reports: the verdict comes first, every format holds the same numbers, and a model's answer stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from fusecheck.eval.compare import compare
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison, Options, TraceFound
from fusecheck.eval.report_blocks import blocks, headline, shorten
from fusecheck.eval.report_files import findings, summary, to_json
from fusecheck.eval.report_text import print_comparison, to_markdown
from fusecheck.eval.samples import read_run
from fusecheck.property_tests.accuracy.made_runs import choice_rows, text_rows, write_run
from fusecheck.property_tests.suite.report_pages import Page
from fusecheck.report import write_result
from fusecheck.report.visible import visible

HOSTILE = "<script>alert(1)</script> | `x` **b** [l](javascript:x) \x1b[2J\x07 \u202e ]]> & \ud800 \ufffe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A losing pair over two tasks, with hostile strings wherever a run can put one."""
    out = tmp_path_factory.mktemp("runs")
    answers = [(f"so {i}", i % 3 > 0) for i in range(300)]
    spoilt = [(f"{HOSTILE}{a}{i % 9}" if i % 9 in (1, 3) else a, r and i % 9 != 1) for i, (a, r) in enumerate(answers)]
    losing = choice_rows(300, lambda i: i % 4 != 0 and i % 10 != 1)
    for name, rows, texts in (("a", choice_rows(300, lambda i: i % 4 != 0), answers), ("b", losing, spoilt)):
        for row in rows:
            row["doc"]["question"] = HOSTILE
        hostile = {"mmlu_anatomy": rows, "mmlu_<b>": choice_rows(80, lambda i: i % 4 != 0), "gsm8k": text_rows(texts)}
        escaped = {task: [{k: v for k, v in r.items() if k != "doc_hash"} for r in rs] for task, rs in hostile.items()}
        _write(out / name, escaped)
    return out


def _write(folder: Path, tasks: dict[str, list[dict[str, object]]]) -> None:
    """As lm-eval does with ensure_ascii off, except for what UTF-8 cannot hold."""
    safe = json.loads(json.dumps(tasks).replace("\\ud800", "\\ufffd"))
    write_run(folder, safe, change=lambda r: r["config"].update(model_args=HOSTILE.replace("\ud800", "")))


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Comparison:
    return compare(read_run(folder / "a"), read_run(folder / "b"), options=Options(flips=40))


def printed(outcome: Comparison, width: int = 160) -> str:
    console = Console(width=width, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        print_comparison(outcome, console, full=True)
        return console.export_text()


def test_the_first_line_is_the_verdict_with_its_numbers(outcome: Comparison) -> None:
    first = printed(outcome).splitlines()[0]
    assert first == headline(outcome).rstrip()
    assert first.startswith("FAIL  ")
    lines = printed(outcome).splitlines()
    mmlu = next(line for line in lines if line.startswith("  FAIL  mmlu"))
    assert re.search(
        r"mmlu 75\.00 -> 67\.11 \(-7\.89 pt, 95% bound -10\.\d\d, margin 0\.50; 30 lost, 0 gained of 380\)", mmlu
    )


def test_a_single_task_has_its_numbers_in_the_first_line(folder: Path) -> None:
    only = compare(read_run(folder / "a"), read_run(folder / "b"), options=Options(tasks=("gsm8k",)))
    assert headline(only).startswith("FAIL  gsm8k 66.67 -> ")


def test_no_control_character_reaches_the_terminal(outcome: Comparison) -> None:
    for width in (60, 160):
        text = printed(outcome, width)
        assert not [c for c in text if (ord(c) < 32 and c != "\n") or c in "\x7f\x9b\u202e"]
    assert "␛[2J" in printed(outcome)


def test_both_answers_stand_side_by_side(outcome: Comparison) -> None:
    kinds = [f.kind for f in outcome.flipped]
    assert "lost" in kinds
    text = printed(outcome)
    assert text.count("─ baseline: ") == text.count("─ candidate: ") == len(outcome.flipped) == 40
    generated = next(f for f in outcome.flipped if f.task == "gsm8k")
    assert generated.first_difference == 0
    assert generated.baseline_text.startswith("so ")
    assert generated.candidate_text.startswith("<script>")


def test_the_churn_is_listed_after_the_lost(folder: Path) -> None:
    only = compare(read_run(folder / "a"), read_run(folder / "b"), options=Options(tasks=("gsm8k",), flips=100))
    kinds = [f.kind for f in only.flipped]
    assert kinds == sorted(kinds, key=["lost", "gained", "churn"].index)
    assert set(kinds) == {"lost", "churn"}
    assert kinds.count("churn") == only.tasks[0].judgement.flips.churn


def test_the_page_holds_every_table_and_every_text_of_a_run_as_text(outcome: Comparison, tmp_path: Path) -> None:
    write_result(tmp_path, "accuracy", outcome.verdict.value, summary(outcome), findings(outcome))
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert "<script>alert(1)</script>" in page.text
    assert page.tags.count("script") == 1
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)
    titles = [block.title for block in blocks(outcome) if block.title != "Warnings"]
    assert len(titles) > 5
    for block in blocks(outcome):
        assert visible(block.title) in page.text or block.title == "Warnings"
        for note in block.notes:
            assert visible(note) in page.text
        for cell in (cell for row in block.rows for cell in row):
            assert visible(cell) in page.text


def test_markdown_has_whole_tables_and_no_markup_of_the_models(outcome: Comparison) -> None:
    text = to_markdown(outcome)
    assert text.startswith("**FAIL  ")
    assert "<script>" not in text
    tables = re.findall(r"(?:^\|.*\|$\n)+", text, flags=re.MULTILINE)
    assert len(tables) > 40
    for table in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1


def junit(outcome: Comparison, folder: Path) -> ET.Element:
    """The suite in the JUnit XML of a run's record."""
    write_result(folder, "accuracy", "fail" if outcome.tasks else "inconclusive", summary(outcome), findings(outcome))
    return ET.parse(folder / "junit.xml").getroot()[0]


def test_junit_has_a_case_for_every_task(outcome: Comparison, tmp_path: Path) -> None:
    suite = junit(outcome, tmp_path)
    cases = {c.get("name"): c for c in suite.findall("testcase")}
    assert set(cases) == {"gsm8k", "mmlu"}
    assert suite.get("failures") == "2"
    assert suite.get("errors") == "0"
    failure = cases["mmlu"].find("failure")
    assert failure is not None
    assert "30 lost, 0 gained of 380" in (failure.text or "")


def test_an_inconclusive_or_invalid_result_is_not_green_in_junit(folder: Path, tmp_path: Path) -> None:
    run = read_run(folder / "a")
    suite = junit(compare(run, run, options=Options()), tmp_path)
    assert suite.get("errors") == "1"
    assert "same file" in (suite.find("testcase/error").get("message") or "")  # type: ignore[union-attr]


def test_json_is_the_same_for_the_same_inputs_and_valid(folder: Path, outcome: Comparison) -> None:
    again = compare(read_run(folder / "a"), read_run(folder / "b"), options=Options(flips=40))
    first, second = (json.dumps(to_json(o), allow_nan=False) for o in (outcome, again))
    assert first == second
    data = json.loads(first)
    assert data["verdict"] == "fail"
    assert data["headline"] == headline(outcome)
    assert data["tasks"][1]["judgement"]["flips"] == {
        "both_right": 255,
        "lost": 30,
        "gained": 0,
        "both_wrong": 95,
        "churn": data["tasks"][1]["judgement"]["flips"]["churn"],
    }
    assert any("path" in arm for arm in data["meta"].values())


def test_the_summary_and_the_findings_agree_with_the_verdict(folder: Path, outcome: Comparison) -> None:
    short = json.loads(json.dumps(summary(outcome), allow_nan=False))
    assert short["tasks"]["mmlu"]["lost"] == 30
    assert short["tasks"]["mmlu"]["verdict"] == "fail"
    assert short["tasks"]["mmlu"]["line"].startswith("FAIL  mmlu 75.00 -> 67.11")
    assert len(short["flipped"]) == len(outcome.flipped) == 40
    assert {"question", "target", "baseline", "candidate", "baseline_text", "candidate_text"} <= set(
        short["flipped"][0]
    )
    assert {f["title"] for f in findings(outcome)} == {"mmlu", "gsm8k"}
    run = read_run(folder / "a")
    assert findings(compare(run, run, options=Options()))[0]["stage"] == "validity"
    assert outcome.verdict is Verdict.FAIL


def test_text_is_made_visible_and_cut_to_length() -> None:
    assert visible("a\x00\x1b\x7f\u202eb\n") == "a␀␛␡\ufffdb\n"
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcd", 4) == "abcd"


def test_a_trace_stands_on_every_page(outcome: Comparison, tmp_path: Path) -> None:
    told = "accuracy changed by -1.23 pt; first deviating site: layer 1 after the MLP, stage scale"
    places = [("layer 1 after the MLP", "scale", 7), ("layer 2 after attention", "code", 5)]
    traced = replace(outcome, trace=TraceFound(told, f"row 3: {HOSTILE}", 8, 9, places))
    block = next(b for b in blocks(traced) if b.title.startswith("Where the fused arm leaves"))
    assert block.rows[1] == ["layer 2 after attention", "code", "5 of 9"]
    write_result(tmp_path, "accuracy", "fail", summary(traced), findings(traced))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for text in (page.text, to_markdown(traced), printed(traced)):
        assert "first deviating site: layer 1 after the MLP, stage scale" in text
    assert "layer 2 after attention" in page.text
    assert not any(b.title.startswith("Where the fused arm leaves") for b in blocks(outcome))
