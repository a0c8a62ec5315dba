"""The parts of `fusecheck verify`: how time is divided among them, and what ends one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.interrupts import Interruption
from fusecheck.kernel.session import console
from fusecheck.parts import asked
from fusecheck.parts.agenda import KERNEL_SECONDS, NAMES, STEPS, Form, Step, divide, duration
from fusecheck.parts.runner import Steps
from fusecheck.property_tests.suite.repository.checkout import ROOT
from fusecheck.report import Verdict

SMALL_VERIFY = """
import sys
from fusecheck.parts import asked
from fusecheck.cli import main
from fusecheck.dataflow import DATAFLOWS
from fusecheck.kernel import plan
from fusecheck.kernel.plan import Plan
if __name__ == "__main__":
    asked.WORLD_SIZES, asked.LARGER = (2,), ()
    asked.DATAFLOWS = {"trtllm": DATAFLOWS["trtllm"]}
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
        (("--cases", "1000000"), "cases.jsonl", set(NAMES)),
        (
            ("--cases", "1", "--only", "graph"),
            "graph/output.txt",
            set(NAMES),
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
    record = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert record["verdict"] == "inconclusive"
    not_run = {entry["part"]: entry["reason"] for entry in record["summary"]["not_run"]}
    if part := record["summary"]["parts"].get("graph"):  # it had begun, and left what it had
        assert part["summary"]["interrupted"]
        not_run["graph"] = "interrupted"
    assert set(not_run) == left_out
    assert not_run["graph"] == "interrupted"
    assert (out / "report.html").exists()


def test_a_part_that_has_no_time_is_left_out_and_one_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    steps = Steps(tmp_path, console, time.monotonic() + 0.5, Interruption())
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
    steps = Steps(tmp_path, console, None, Interruption())
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
    steps = Steps(tmp_path, console, None, Interruption())
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
    kernels = len(DATAFLOWS) * len(asked.WORLD_SIZES + asked.LARGER)
    each = asked.share_of(seconds, kernels)
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
