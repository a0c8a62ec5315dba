"""The table of releases: what passed, what did not, and how to see it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusecheck.errors import UsageError
from fusecheck.golden.releases import read, table


def record(release: str, verdict: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
    """A record of the kernel question, as far as the table reads it."""
    return {
        "command": "kernel",
        "verdict": verdict,
        "environment": {"packages": {"torch": "2.13.0", "flashinfer-python": release}},
        "summary": {
            "coverage": {
                "kernel": {
                    "bf16 RESIDUAL_RMS_NORM ONESHOT native": 3,
                    "fp16 RESIDUAL_RMS_NORM TWOSHOT native": 4,
                    "bf16 RMS_NORM ONESHOT native": 0,
                    "bf16 RESIDUAL_RMS_NORM_QUANT_FP8 ONESHOT native": 5,
                }
            },
            "subjects": [{"backend": "flashinfer:pdl"}],
        },
        "findings": findings,
    }


def finding(stage: str) -> dict[str, Any]:
    """A finding of the kernel question."""
    problem = json.dumps({"op": "RESIDUAL_RMS_NORM_QUANT_FP8", "tokens": 3})
    return {"stage": stage, "problem": problem, "message": "element[0,1]", "backend": "flashinfer:pdl"}


def test_a_table_has_the_cases_that_passed_the_stages_that_did_not_and_their_replay_lines(tmp_path: Path) -> None:
    wrong = record("0.6.13", "fail", [finding("quant"), finding("again")])
    for name, each in (("old", wrong), ("young", record("0.7.4", "inconclusive", []))):
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    lines = list(table(read(tmp_path)))
    assert lines[0] == "| operation | 0.6.13 flashinfer:pdl | 0.7.4 flashinfer:pdl (inconclusive) |"
    assert "| `RESIDUAL_RMS_NORM` | 7 | 7 |" in lines
    assert "| `RESIDUAL_RMS_NORM_QUANT_FP8` | **again, quant** | 5 |" in lines
    assert not any(line.startswith("| `RMS_NORM`") for line in lines)
    assert "fusecheck replay" in lines[-1]
    assert "--backend flashinfer:pdl" in lines[-1]


@pytest.mark.parametrize("text", ["{", "{}", json.dumps(record("1", "pass", []) | {"command": "graph"})])
def test_what_is_no_record_of_the_kernel_question_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UsageError, match=r"odd\.json: .*; expected what fusecheck kernel --json wrote"):
        read(tmp_path)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no record \*\.json"):
        read(tmp_path)
