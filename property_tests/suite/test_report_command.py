"""`fusecheck report` and `fusecheck verify`: merged runs, parts that are left out, and one line for every bad input."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from fusecheck.dataflow import DATAFLOWS
from fusecheck.interface import Strategy
from fusecheck.interrupts import Interruption
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.session import console
from fusecheck.parts import asked as asking
from fusecheck.parts import reuse
from fusecheck.parts.agenda import NAMES, Form, Step
from fusecheck.parts.runner import Steps
from fusecheck.property_tests.suite import report_records as made
from fusecheck.property_tests.suite.command_line import refused, run, told
from fusecheck.report import Verdict

SCHEMA = json.loads((resources.files("fusecheck.report") / "result.schema.json").read_text(encoding="utf-8"))


def put(folder: Path, record: dict[str, Any] | str) -> Path:
    """A run directory with this result.json."""
    folder.mkdir()
    text = record if isinstance(record, str) else json.dumps(record)
    (folder / "result.json").write_text(text, encoding="utf-8")
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The record of a run directory, which the schema must allow."""
    record: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    jsonschema.validate(record, SCHEMA)
    return record


def test_runs_are_merged_into_one_comparison_with_the_worst_verdict(tmp_path: Path) -> None:
    good, bad = put(tmp_path / "good", made.kernel()), put(tmp_path / "bad", made.kernel("fail"))
    out, markdown, html = tmp_path / "out", tmp_path / "summary.md", tmp_path / "copy.html"
    code, printed = told("report", good, bad, "--run-dir", out, "--markdown", markdown, "--html", html)
    assert code == 1
    assert "pass good kernel: " in printed
    assert "fail bad kernel: " in printed
    record = read(out)
    assert (record["command"], record["verdict"]) == ("report", "fail")
    assert [finding["run"] for finding in record["findings"]] == ["bad"]
    page = html.read_text(encoding="utf-8")
    assert page == (out / "report.html").read_text(encoding="utf-8")
    assert "Runs compared" in page
    assert '<h1 id="verdict" class="verdict fail">Fail: bad: ' in page
    assert markdown.read_text(encoding="utf-8").startswith("### Fusecheck: Fail: bad: ")
    suites = ET.parse(out / "junit.xml").getroot()
    assert [(suite.get("name"), suite.get("failures")) for suite in suites] == [
        ("fusecheck kernel good", "0"),
        ("fusecheck kernel bad", "1"),
    ]


def test_one_run_can_be_shown_again_and_a_comparison_too(tmp_path: Path) -> None:
    whole = put(tmp_path / "whole", made.verify())
    assert run("report", whole / "result.json", "--run-dir", tmp_path / "first") == 1
    assert run("report", tmp_path / "first", "--run-dir", tmp_path / "second") == 1
    first, second = ((tmp_path / name / "report.html").read_text(encoding="utf-8") for name in ("first", "second"))
    for section in ("verify", "graph", "accuracy", "faults"):
        assert f"whole · {section}" in first
        assert f"first/whole · {section}" in second
    assert len(read(tmp_path / "second")["findings"]) == len(read(tmp_path / "first")["findings"]) == 1


BROKEN: list[tuple[str, dict[str, Any] | str | None, str]] = [
    ("empty", None, "no result.json here"),
    ("nothing", "", "broken or cut off at line 1"),
    ("truncated", json.dumps(made.kernel(), indent=1)[:600], "broken or cut off at line"),
    ("newer", made.kernel() | {"schema": 2}, "schema 2 is of a newer Fusecheck"),
    ("foreign", json.dumps({"results": {"mmlu": 1}}), "not written by fusecheck"),
    ("list", "[1, 2]", "not written by fusecheck"),
    ("deep", "[" * 100_000, "cannot be read as JSON"),
    ("half", {"schema": 1, "command": "kernel"}, "verdict, environment, summary, findings is missing or malformed"),
    ("odd", made.kernel() | {"verdict": "maybe"}, "verdict is missing or malformed"),
    ("parts", made.verify() | {"summary": {"parts": {"graph": 3}}}, "its parts are malformed"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_run_that_cannot_be_read_is_named_in_one_line(
    tmp_path: Path,
    name: str,
    content: dict[str, Any] | str | None,
    message: str,
) -> None:
    folder = tmp_path / name
    if content is None:
        folder.mkdir()
    else:
        put(folder, content)
    complaint = refused("report", folder, "--run-dir", tmp_path / "out")
    assert message in complaint
    assert name in complaint
    assert not (tmp_path / "out").exists()


def test_other_wrong_calls_are_one_line_too(tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "cases.jsonl").touch()
    once = put(tmp_path / "once", made.kernel())
    for arguments, message in (
        (("report", tmp_path / "absent"), "no such run"),
        (("report", unfinished), "the run did not end"),
        (("report", once, once), "is given twice"),
        (("report",), "Missing argument"),
        (("verify", "--budget", "soon"), "--budget 'soon', expected a time"),
        (
            ("verify", "--only", "all"),
            "--only 'all', expected none or of: graph, protocol, invariance, accuracy, faults, latency",
        ),
    ):
        assert message in refused(*arguments)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `fusecheck verify` ask about one kernel at one world size."""
    monkeypatch.setattr(asking, "WORLD_SIZES", (2,))
    monkeypatch.setattr(asking, "LARGER", ())
    monkeypatch.setattr(asking, "DATAFLOWS", {"trtllm": DATAFLOWS["trtllm"]})
    few = Plan(
        tokens=(2,), hidden=(64,), families=("gaussian", "exact"), strategies=(Strategy.ONESHOT,), schedules=False
    )
    monkeypatch.setattr(
        "fusecheck.kernel.plan.Plan", lambda seed, most_elements, whole: replace(few, seed=seed, whole=whole)
    )


def test_verify_writes_one_record_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    out, markdown = tmp_path / "run", tmp_path / "summary.md"
    asked = ("verify", "--only", "none", "--cases", 2)
    code, printed = told(*asked, "--run-dir", out, "--markdown", markdown)
    assert code == 0
    record = read(out)
    assert (record["summary"]["core"]["missing_cells"], record["summary"]["parts"]) == ([], {})
    left = {entry["part"]: entry["reason"] for entry in record["summary"]["not_run"]}
    assert set(left) == set(NAMES)
    page = (out / "report.html").read_text(encoding="utf-8")
    for part, reason in left.items():
        assert f"not run: {part}: {reason}" in printed
        assert reason in page
        assert f"not run: {part}: " in markdown.read_text(encoding="utf-8")
    assert len(list(ET.parse(out / "junit.xml").getroot().iter("skipped"))) == len(NAMES)
    assert "admissible codes per element" in printed


def test_a_second_run_takes_over_what_passed_and_runs_what_is_asked_differently(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch)
    again = ("verify", "--only", "none", "--cases", 2, "--resume", tmp_path)
    assert run(*again[:5], "--run-dir", tmp_path) == 0
    first, journal = read(tmp_path), (tmp_path / "cases.jsonl").read_bytes()
    assert first["summary"]["reused"] == []
    code, said = told(*again)
    assert code == 0
    second = read(tmp_path)
    assert second["summary"] == first["summary"] | {"reused": ["kernel"]}
    assert "of the earlier run: same code, same question" in said
    assert (tmp_path / "cases.jsonl").read_bytes() == journal
    assert run(*again, "--seed", 5) == 0
    assert read(tmp_path)["summary"]["reused"] == []
    assert len((tmp_path / "cases.jsonl").read_bytes()) > len(journal)


def test_a_part_is_taken_over_only_if_it_passed_and_the_same_was_asked_of_the_same_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = ("graph", "--random", "3")
    folder = put(tmp_path / "graph", made.record("graph", "pass", {"graphs": 3}, []))
    assert reuse.recall(folder, asked) is None
    reuse.keep(folder, asked)
    steps = Steps(tmp_path, console, time.monotonic(), Interruption(), resume=True)
    form = Form(asked[1:], 1.0)
    steps.take(Step("graph", form), form, wanted=True)
    assert (steps.reused, steps.verdicts(), steps.not_run) == (["graph"], [Verdict.PASS], [])
    assert reuse.recall(folder, ("graph", "--random", "4")) is None
    (folder / "result.json").write_text(json.dumps(made.record("graph", "fail", {"graphs": 3}, [])))
    assert reuse.recall(folder, asked) is None
    (folder / "result.json").write_text(json.dumps(made.record("graph", "pass", {"graphs": 3}, []))[:100])
    assert reuse.recall(folder, asked) is None
    put(tmp_path / "other", made.record("graph", "pass", {"graphs": 3}, []))
    reuse.keep(tmp_path / "other", asked)
    monkeypatch.setattr(reuse, "code_digest", lambda: "other code")
    assert reuse.recall(tmp_path / "other", asked) is None


def test_what_passed_with_a_kernel_of_ones_own_is_asked_again_once_that_kernel_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "changing_kernel.py"
    code.write_text("ROUNDS = 'once'\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = put(tmp_path / "graph", made.record("graph", "pass", {"graphs": 3}, []))
    asked = "graph", "--backend", "changing_kernel:ROUNDS", "--device", "cpu"
    reuse.keep(folder, asked)
    assert reuse.recall(folder, asked) is not None
    code.write_text("ROUNDS = 'twice'\n")
    assert reuse.recall(folder, asked) is None
    assert reuse.stamp("emulated:trtllm") == ""


def test_a_failing_kernel_leaves_a_page_whose_line_replays_it(tmp_path: Path) -> None:
    arguments: tuple[object, ...] = ("--backend", "emulated:trtllm", "--dataflow", "trtllm-fp32", "--tp", 4)
    arguments += ("--tokens", 5, "--hidden", 256, "--family", "gaussian", "--dtype", "bf16", "--cases", 1)
    assert run("kernel", *arguments, "--run-dir", tmp_path) == 1
    found = read(tmp_path)["findings"][0]
    assert (found["backend"], found["judged_by"]) == ("emulated:trtllm", "trtllm-fp32")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "--backend emulated:trtllm --dataflow trtllm-fp32" in page
    assert "<svg" in page
    failure = next(ET.parse(tmp_path / "junit.xml").getroot().iter("failure"))
    assert found["problem"] in (failure.text or "")
