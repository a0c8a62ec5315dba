"""Ctrl-C in an accuracy run: what is finished is judged, nothing passes for it, and every file is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fusecheck.eval.arm import FUSED, ORACLE, UNFUSED, ArmRecord, write_arm_record
from fusecheck.property_tests.accuracy.console import call
from fusecheck.property_tests.accuracy.made_runs import choice_rows, write_run


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def finish_arm(folder: Path, arm: str, *, lost: bool = False) -> None:
    """Write an arm of 3,000 questions as a run does; of the baseline's right answers `lost` loses one in fifteen."""
    rows = choice_rows(3000, lambda i: i % 4 != 0 and not (lost and i % 20 == 1), shift=0.01 * (arm != UNFUSED))
    write_run(folder / arm, {"mmlu_a": rows})
    write_arm_record(
        folder / arm,
        ArmRecord(
            arm, fused_calls=5 * (arm == FUSED), unfused_calls=5 * (arm == UNFUSED), extra={"questions": len(rows)}
        ),
    )


def interrupted_after(
    monkeypatch: pytest.MonkeyPatch, folder: Path, arms: Sequence[str], *, lost: bool = False
) -> tuple[int, str]:
    """Run the command, with Ctrl-C after these arms; returns the exit code and what it printed."""
    pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")

    def run(*_: object, **__: object) -> None:
        for arm in arms:
            finish_arm(folder, arm, lost=lost and arm == FUSED)
        raise KeyboardInterrupt

    monkeypatch.setattr("fusecheck.eval.run.run_arms", run)
    copies: list[str | Path] = [
        "--json",
        folder / "copy.json",
        "--junit",
        folder / "copy.xml",
        "--markdown",
        folder / "copy.md",
    ]
    result = call(["--run-dir", folder, *copies])
    return result.exit_code, result.output


def test_a_pair_that_is_finished_is_judged_but_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output = interrupted_after(monkeypatch, tmp_path, (ORACLE, UNFUSED, FUSED))
    assert code == 3, output
    assert output.startswith("INCONCLUSIVE  interrupted at: the start; so far: mmlu 75.00 -> 75.00")
    record = json.loads((tmp_path / "copy.json").read_text())
    assert (record["verdict"], record["summary"]["interrupted"]) == ("inconclusive", True)
    assert record["summary"]["tasks"]["mmlu"]["verdict"] == "pass"
    assert ET.parse(tmp_path / "copy.xml").getroot()[0].get("errors") == "1"
    assert "interrupted" in (tmp_path / "copy.md").read_text()


def test_a_pair_that_is_finished_and_failed_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output = interrupted_after(monkeypatch, tmp_path, (ORACLE, UNFUSED, FUSED), lost=True)
    assert code == 1, output
    assert output.startswith("FAIL  interrupted at: the start; so far: mmlu 75.00 -> 70.00")


def test_without_a_pair_the_finished_arms_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output = interrupted_after(monkeypatch, tmp_path, (ORACLE, UNFUSED))
    assert code == 3, output
    assert "interrupted at: the start; finished arms: oracle (3,000 questions), unfused (3,000 questions)" in output
    for name in ("copy.json", "copy.xml", "copy.md", "report.html"):
        assert "interrupted" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "copy.json").read_text())["summary"]["finished_arms"] == {
        ORACLE: 3000,
        UNFUSED: 3000,
    }


def test_an_interrupted_comparison_says_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mmlu_a": choice_rows(8, bool)})
    monkeypatch.setattr("fusecheck.eval.command.compare", interrupt)
    result = call(["compare", tmp_path / "a", tmp_path / "a", "--run-dir", tmp_path / "run"])
    assert result.exit_code == 3
    assert result.output.startswith("INCONCLUSIVE  interrupted at: judging")
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["verdict"], record["summary"]["interrupted"]) == ("inconclusive", True)
