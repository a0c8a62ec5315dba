"""`fusecheck accuracy` as a user calls it: exit codes, files, plans, and refusals in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from fusecheck.errors import Inconclusive, UsageError
from fusecheck.property_tests.accuracy.console import call
from fusecheck.property_tests.accuracy.made_runs import choice_rows, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 3,000 questions: a baseline, the same again, one that loses 5 %, one at other prompts."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "baseline", {"mmlu_a": choice_rows(3000, lambda i: i % 4 != 0)})
    write_run(folder / "same", {"mmlu_a": choice_rows(3000, lambda i: i % 4 != 0, shift=0.01)})
    write_run(folder / "worse", {"mmlu_a": choice_rows(3000, lambda i: i % 4 != 0 and i % 20 != 1)})
    write_run(folder / "other", {"mmlu_a": choice_rows(3000, lambda i: i % 4 != 0, subject="b")})
    return folder


@pytest.mark.parametrize(
    ("candidate", "arguments", "code", "word"),
    [
        ("same", (), 0, "PASS"),
        ("worse", (), 1, "FAIL"),
        ("other", (), 4, "INVALID"),
        ("same", ("--margin", "mmlu=0.05"), 3, "INCONCLUSIVE"),
    ],
)
def test_the_exit_code_and_the_first_word_are_the_verdict(
    runs: Path, tmp_path: Path, candidate: str, arguments: tuple[str, ...], code: int, word: str
) -> None:
    result = call(["compare", runs / "baseline", runs / candidate, *arguments, "--run-dir", tmp_path])
    assert result.exit_code == code
    assert result.output.startswith(word)


def test_every_file_is_written_and_holds_the_verdict(runs: Path, tmp_path: Path) -> None:
    copies = {name: tmp_path / "copies" / f"x.{name}" for name in ("json", "junit", "markdown")}
    (tmp_path / "copies").mkdir()
    options: list[str | Path] = [part for name, path in copies.items() for part in (f"--{name}", path)]
    result = call(
        ["compare", runs / "baseline", runs / "worse", "--run-dir", tmp_path / "run", "--flips", "2", *options]
    )
    assert result.exit_code == 1
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["schema"], record["command"], record["verdict"]) == (1, "accuracy", "fail")
    assert record["summary"]["tasks"]["mmlu"]["lost"] == 150
    assert record["findings"][0]["stage"] == "accuracy"
    assert copies["json"].read_text() == (tmp_path / "run" / "result.json").read_text()
    assert copies["junit"].read_text() == (tmp_path / "run" / "junit.xml").read_text()
    assert ET.fromstring(copies["junit"].read_text())[0].get("failures") == "1"
    assert copies["markdown"].read_text() == (tmp_path / "run" / "accuracy.md").read_text()
    assert "**FAIL" in copies["markdown"].read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "150 lost" in page
    assert "mmlu: flips by the baseline" in page
    assert len(json.loads((tmp_path / "run" / "accuracy.json").read_text())["flipped"]) == 2


def test_an_invalid_pair_is_inconclusive_in_the_record_and_says_why(runs: Path, tmp_path: Path) -> None:
    assert call(["compare", runs / "baseline", runs / "other", "--run-dir", tmp_path]).exit_code == 4
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["verdict"] == "inconclusive"
    assert record["findings"][0]["stage"] == "validity"
    assert "another prompt" in record["findings"][0]["detail"] or "another doc" in record["findings"][0]["detail"]


def test_three_arms_and_the_noise_run(runs: Path, tmp_path: Path) -> None:
    arms: list[str | Path] = [runs / "baseline", runs / "same", runs / "same", "--noise", runs / "same"]
    result = call(["compare", *arms, "--run-dir", tmp_path])
    # The candidate is the oracle itself, so it cannot be farther from it than the baseline is.
    assert result.exit_code == 0
    assert "distance to the oracle x0.00" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--margin", "mmlu"), r"--margin mmlu: expected TASK=POINTS"),
        (("--margin", "mmlu=-1"), r"--margin mmlu=-1: expected TASK=POINTS"),
        (("--margin", "mmlu=nan"), r"--margin mmlu=nan: expected TASK=POINTS"),
        (("--metric", "mmlu=acc"), r"--metric mmlu=acc: expected TASK=METRIC,FILTER"),
        (("--metric", "mmlu=f1,none"), r"not a 0/1 metric of mmlu; it has acc,none"),
        (("--tasks", "arc"), r"--tasks arc: .* has no such task"),
        (("--tasks", ","), r"--tasks: expected names separated by commas"),
    ],
)
def test_wrong_usage_is_said_in_one_line(runs: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = call(["compare", runs / "baseline", runs / "same", *arguments, "--run-dir", tmp_path])
    assert isinstance(result.exception, UsageError)
    assert re.search(message, str(result.exception))
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize("command", [(), ("--sequential",), ("compare", "baseline", "same")])
@pytest.mark.parametrize("option", ["--json", "--junit", "--markdown"])
def test_a_file_that_could_not_be_written_is_refused_before_the_run(
    runs: Path, tmp_path: Path, command: tuple[str, ...], option: str
) -> None:
    arguments = [part if part.startswith("-") or part == "compare" else runs / part for part in command]
    for place in (tmp_path / "missing" / "file", tmp_path):
        result = call([*arguments, option, place, "--run-dir", tmp_path / "run"])
        assert isinstance(result.exception, UsageError)
        assert re.match(rf"{place}(: there is no folder| is a folder)", str(result.exception))
        assert not (tmp_path / "run").exists()


def test_more_gpus_than_there_are_make_no_failure(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")
    result = call(["--device", "cuda", "--tp", "8", "--backend", "unfused", "--run-dir", tmp_path])
    assert isinstance(result.exception, Inconclusive if torch.cuda.device_count() < 8 else type(None))


def test_arms_of_an_earlier_run_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")
    write_run(tmp_path, {"mmlu_a": choice_rows(8, bool)})
    (tmp_path / "org__model").rename(tmp_path / "unfused")
    result = call(["--quick", "--limit", "4", "--run-dir", tmp_path])
    assert isinstance(result.exception, UsageError)
    assert "unfused: holds an earlier run; give another --run-dir" in str(result.exception)


@pytest.mark.parametrize("mode", [(), ("--sequential",), ("--aa",)])
def test_running_without_lm_eval_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = call([*mode, "--run-dir", tmp_path])
    # What was asked for and cannot be answered here is inconclusive.
    assert isinstance(result.exception, Inconclusive)
    assert "pip install 'fusecheck[eval]'" in str(result.exception)


def test_a_dead_arm_is_a_failure_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")
    from fusecheck.eval.engine import ArmError

    def die(*_: object, **__: object) -> None:
        raise ArmError("rank 1 of the fused arm hung for 60 s")

    monkeypatch.setattr("fusecheck.eval.run.run_arms", die)
    result = call(["--run-dir", tmp_path])
    assert result.exit_code == 1
    assert "FAIL  an arm died before its last answer: rank 1 of the fused arm hung" in result.output
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["verdict"] == "fail"
    assert record["findings"][0]["stage"] == "alive"


def test_one_mode_at_a_time() -> None:
    result = call(["--plan", "--aa"])
    assert isinstance(result.exception, UsageError)


def test_the_plan_names_questions_minutes_and_power() -> None:
    result = call(["--plan", "--tasks", "mmlu,gsm8k", "--expect-flips", "2", "--seconds", "0.06"])
    assert result.exit_code == 0
    cells = [[c.strip() for c in re.split(r"\s{2,}", line.strip())] for line in result.output.splitlines()]
    rows = {c[0]: c for c in cells if c[0] in {"mmlu", "gsm8k"}}
    assert rows["mmlu"][1:] == ["0.5", "2.0%", "5,047", "10.1", "14,042", "0.30", "99%"]
    assert rows["gsm8k"][1:7] == ["2", "2.0%", "403", "0.8", "1,319", "0.97"]


def test_the_operating_characteristics_keep_the_promised_levels() -> None:
    result = call(["--operating-characteristics", "--simulations", "4000", "--seed", "3"])
    assert result.exit_code == 0
    lines = [line for line in result.output.splitlines() if re.search(r"\d/[01]\.", line)]
    defaults = [line for line in lines if re.match(r" ?(MMLU +14,042 +0\.5 +[12]%|GSM8K +1,319 +2 +2%)", line)]
    assert len(defaults) == 3
    for line in defaults:
        passes = [float(p) for p in re.findall(r"([01]\.\d{3})/[01]\.\d{3}/", line)]
        assert passes[0] >= 0.95
        assert passes[2] <= 0.06
    for name in ("TensorRT-LLM", "vLLM", "SGLang", "fusecheck, paired test"):
        assert name in result.output
