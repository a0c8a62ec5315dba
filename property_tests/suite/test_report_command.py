"""`fusecheck report` and `fusecheck verify`: merged runs, parts that are left out, and one line for every bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from fusecheck import verify_command
from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.interface import Strategy
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.session import console
from fusecheck.parts import reuse
from fusecheck.parts.agenda import KERNEL_SECONDS, STEPS, Form, Step, divide, duration
from fusecheck.parts.runner import Steps
from fusecheck.property_tests.suite import report_records as made
from fusecheck.property_tests.suite.command_line import run
from fusecheck.property_tests.suite.repository.checkout import ROOT
from fusecheck.report import Verdict

SCHEMA = json.loads((resources.files("fusecheck.report") / "result.schema.json").read_text(encoding="utf-8"))


PARTS = {"graph", "protocol", "invariance", "accuracy", "faults", "latency"}


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


def test_runs_are_merged_into_one_comparison_with_the_worst_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = put(tmp_path / "good", made.kernel()), put(tmp_path / "bad", made.kernel("fail"))
    out, markdown, html = tmp_path / "out", tmp_path / "summary.md", tmp_path / "copy.html"
    assert run(monkeypatch, "report", good, bad, "--run-dir", out, "--markdown", markdown, "--html", html) == 1
    printed = capsys.readouterr().out
    assert "pass  good  kernel: " in printed
    assert "fail  bad  kernel: " in printed
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


def test_one_run_can_be_shown_again_and_a_comparison_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = put(tmp_path / "whole", made.verify())
    assert run(monkeypatch, "report", whole / "result.json", "--run-dir", tmp_path / "first") == 1
    assert run(monkeypatch, "report", tmp_path / "first", "--run-dir", tmp_path / "second") == 1
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


@pytest.mark.parametrize(("name", "content", "told"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_run_that_cannot_be_read_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: dict[str, Any] | str | None,
    told: str,
) -> None:
    folder = tmp_path / name
    if content is None:
        folder.mkdir()
    else:
        put(folder, content)
    assert run(monkeypatch, "report", folder, "--run-dir", tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert told in complaint
    assert name in complaint
    assert not (tmp_path / "out").exists()


def test_other_wrong_calls_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "cases.jsonl").touch()
    once = put(tmp_path / "once", made.kernel())
    for arguments, told in (
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
        assert run(monkeypatch, *arguments) == 2
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1
        assert told in complaint


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `fusecheck verify` ask about one kernel at one world size."""
    monkeypatch.setattr(verify_command, "WORLD_SIZES", (2,))
    monkeypatch.setattr(verify_command, "LARGER", ())
    monkeypatch.setattr(verify_command, "DATAFLOWS", {"trtllm": DATAFLOWS["trtllm"]})
    few = Plan(
        tokens=(2,), hidden=(64,), families=("gaussian", "exact"), strategies=(Strategy.ONESHOT,), schedules=False
    )
    monkeypatch.setattr("fusecheck.kernel.plan.Plan", lambda seed, most_elements: replace(few, seed=seed))


def test_verify_writes_one_record_and_says_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    out, markdown = tmp_path / "run", tmp_path / "summary.md"
    asked = ("verify", "--only", "none", "--cases", 2)
    assert run(monkeypatch, *asked, "--run-dir", out, "--markdown", markdown) == 0
    record = read(out)
    assert (record["summary"]["core"]["missing_cells"], record["summary"]["parts"]) == ([], {})
    left = {entry["part"]: entry["reason"] for entry in record["summary"]["not_run"]}
    assert set(left) == PARTS
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    for part, reason in left.items():
        assert f"not run: {part}: {reason}" in printed
        assert reason in page
        assert f"not run: {part}: " in markdown.read_text(encoding="utf-8")
    assert len(list(ET.parse(out / "junit.xml").getroot().iter("skipped"))) == 5
    assert "admissible codes per element" in printed


def test_a_second_run_takes_over_what_passed_and_runs_what_is_asked_differently(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    again = ("verify", "--only", "none", "--cases", 2, "--resume", tmp_path)
    assert run(monkeypatch, *again[:5], "--run-dir", tmp_path) == 0
    first, journal = read(tmp_path), (tmp_path / "cases.jsonl").read_bytes()
    assert first["summary"]["reused"] == []
    capsys.readouterr()
    assert run(monkeypatch, *again) == 0
    second = read(tmp_path)
    assert second["summary"] == first["summary"] | {"reused": ["kernel"]}
    assert "of the earlier run: same code, same question" in capsys.readouterr().out
    assert (tmp_path / "cases.jsonl").read_bytes() == journal
    assert run(monkeypatch, *again, "--seed", 5) == 0
    assert read(tmp_path)["summary"]["reused"] == []
    assert len((tmp_path / "cases.jsonl").read_bytes()) > len(journal)


def test_a_part_is_taken_over_only_if_it_passed_and_the_same_was_asked_of_the_same_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = ("graph", "--random", "3")
    folder = put(tmp_path / "graph", made.record("graph", "pass", {"graphs": 3}, []))
    assert reuse.recall(folder, asked) is None
    reuse.keep(folder, asked)
    steps = Steps(tmp_path, console, time.monotonic(), resume=True)
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


SMALL_VERIFY = """
import sys
from fusecheck import verify_command
from fusecheck.cli import main
from fusecheck.dataflow import DATAFLOWS
from fusecheck.kernel import plan
from fusecheck.kernel.plan import Plan
if __name__ == "__main__":
    verify_command.WORLD_SIZES, verify_command.LARGER = (2,), ()
    verify_command.DATAFLOWS = {"trtllm": DATAFLOWS["trtllm"]}
    if sys.argv[2] == "--cases" and int(sys.argv[3]) < 9:
        plan.Plan = lambda **_: Plan(tokens=(2,), hidden=(64,), families=("exact",), schedules=False)
    main()
"""


def _heed_interrupts() -> None:
    """A job in the background is started with SIGINT ignored, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("arguments", "begun", "left_out"),
    [
        (("--cases", "1000000"), "cases.jsonl", PARTS),
        (
            ("--cases", "1", "--only", "graph"),
            "graph/output.txt",
            PARTS,
        ),
    ],
    ids=["in the kernel question", "in a part behind it"],
)
def test_ctrl_c_ends_in_seconds_with_a_partial_report(
    tmp_path: Path, arguments: tuple[str, ...], begun: str, left_out: set[str]
) -> None:
    script, out = tmp_path / "small.py", tmp_path / "run"
    script.write_text(SMALL_VERIFY)
    command = [sys.executable, str(script), "verify", *arguments, "--run-dir", str(out)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_interrupts,
    )
    try:
        until = time.monotonic() + 120
        while not ((out / begun).exists() and ((out / begun).stat().st_size or "/" in begun)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, printed
    assert "Traceback" not in printed
    assert time.monotonic() - began < 45  # seconds on an idle machine; tests share theirs
    record = read(out)
    assert record["verdict"] == "inconclusive"
    not_run = {entry["part"]: entry["reason"] for entry in record["summary"]["not_run"]}
    if part := record["summary"]["parts"].get("graph"):  # it had begun, and left what it had
        assert part["summary"]["interrupted"]
        not_run["graph"] = "interrupted"
    assert set(not_run) == left_out
    assert not_run["graph"] == "interrupted"
    assert (out / "report.html").exists()


def test_a_failing_kernel_leaves_a_page_whose_line_replays_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments: tuple[object, ...] = ("--backend", "emulated:trtllm", "--dataflow", "trtllm-fp32", "--tp", 4)
    arguments += ("--tokens", 5, "--hidden", 256, "--family", "gaussian", "--dtype", "bf16", "--cases", 1)
    assert run(monkeypatch, "kernel", *arguments, "--run-dir", tmp_path) == 1
    found = read(tmp_path)["findings"][0]
    assert (found["backend"], found["judged_by"]) == ("emulated:trtllm", "trtllm-fp32")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "--backend emulated:trtllm --dataflow trtllm-fp32" in page
    assert "<svg" in page
    failure = next(ET.parse(tmp_path / "junit.xml").getroot().iter("failure"))
    assert found["problem"] in (failure.text or "")


def test_a_part_that_has_no_time_is_left_out_and_one_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    steps = Steps(tmp_path, console, time.monotonic() + 0.5)
    long, short = Form((), 60.0), Form(("--random", "0"), 0.0)
    steps.take(Step("graph", long), long, wanted=True)
    assert steps.verdicts() == [Verdict.INCONCLUSIVE]
    steps.take(Step("graph", short), short, wanted=True)
    steps.take(Step("faults", long), None, wanted=True)
    reasons = [entry["reason"] for entry in steps.not_run]
    assert reasons[0].startswith("takes about 60 s, ")
    assert "and stopped; give more --budget" in reasons[1]
    assert reasons[2] == "takes about 60 s; give more --budget, or none"
    # A part that began and was not judged is no pass.
    assert (steps.done, steps.verdicts()) == ({}, [Verdict.INCONCLUSIVE])


def test_a_part_that_dies_is_left_out_with_what_it_said_last_and_is_no_pass(tmp_path: Path) -> None:
    steps = Steps(tmp_path, console, None)
    wrong, form = Form(("--tp", "3"), 1.0), Form((), 1.0)
    steps.take(Step("accuracy", form), form, wanted=False)
    assert steps.verdicts() == []
    steps.take(Step("graph", wrong), wrong, wanted=True)
    reasons = {entry["part"]: entry["reason"] for entry in steps.not_run}
    assert "exit code 2: fusecheck: --tp 3, expected one of" in reasons["graph"]
    assert reasons["accuracy"] == "left out by --only"
    assert steps.verdicts() == [Verdict.INCONCLUSIVE]


def test_a_part_whose_needs_are_not_here_is_left_out_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    steps = Steps(tmp_path, console, None)
    for step in STEPS:
        if step.name in ("accuracy", "latency"):
            steps.take(step, step.quick, wanted=True)
    assert ["pip install" in entry["reason"] for entry in steps.not_run] == [True, True]
    assert steps.verdicts() == [Verdict.INCONCLUSIVE]


def test_without_a_budget_every_part_runs_in_its_quick_form() -> None:
    division = divide(STEPS, None)
    assert division.kernel is None
    assert division.forms == {step.name: step.quick for step in STEPS}
    assert KERNEL_SECONDS + sum(step.quick.seconds for step in STEPS if step.name != "latency") <= 240


@pytest.mark.parametrize("budget", [1, 45, 60, 90, 300, 600, 900, 1800, 7200])
def test_a_budget_is_divided_and_never_exceeded(budget: float) -> None:
    division = divide(STEPS[:3], budget)
    assert division.kernel is not None
    assert division.kernel >= min(KERNEL_SECONDS, budget / 2)
    assert division.kernel + sum(form.seconds for form in division.forms.values()) <= budget


@pytest.mark.parametrize("seconds", [5.0, 30.0, 600.0])
def test_the_kernels_share_what_the_kernel_question_gets_less_the_starts_of_their_ranks(seconds: float) -> None:
    kernels = len(DATAFLOWS) * len(verify_command.WORLD_SIZES + verify_command.LARGER)
    each = verify_command._share(seconds, kernels)
    assert 0.4 * seconds < kernels * each < 0.95 * seconds


def test_a_larger_budget_buys_more_parts_then_their_long_forms_then_cases() -> None:
    local = [step for step in STEPS if step.name in ("graph", "accuracy", "faults")]
    assert divide(local, 45).forms == {}
    assert set(divide(local, 300).forms) == {"graph", "accuracy", "faults"}
    assert divide(local, 300).forms == divide(local, None).forms
    assert divide(local, 1800).forms == {step.name: step.full for step in local}
    assert (divide(local, 7200).kernel or 0) > 5000


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_a_budget_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-5m", "5d", "m", "nan", sys.executable])
def test_anything_else_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="expected a time such as 90s"):
        duration(text)
