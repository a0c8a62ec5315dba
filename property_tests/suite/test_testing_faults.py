"""A test of FlashInfer's manner with `assert_conforms` in place of its criterion: the record holds, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusecheck import DATAFLOWS
from fusecheck.faults.catalogue import catalogue
from fusecheck.property_tests.suite.testing_faults import cases, faults, row, usual_calls

ROOT = Path(__file__).parents[2]
SUMMARY = json.loads((ROOT / "golden" / "faults_testing.json").read_text(encoding="utf-8"))["summary"]
ROWS: dict[str, dict[str, Any]] = {each["id"]: each for each in SUMMARY["rows"]}
UNSEEN = {"KQ-24-mxfp8", "KQ-24-nvfp4", "KQ-24-mxfp4"}
"""Faults of what lies around the outputs, which a test does not hold."""


def test_the_record_is_of_every_fault_that_one_call_computes_and_of_no_false_alarm() -> None:
    assert list(ROWS) == [fault.id for fault in faults()]
    assert SUMMARY["false_alarms"] == 0
    assert SUMMARY["legal_calls"] == 4 * len(DATAFLOWS) * (1 + len(DATAFLOWS["trtllm"].quants))
    page, count = (ROOT / "verify" / "testing" / "README.md").read_text(encoding="utf-8"), SUMMARY["faults"]
    for where in ("usual", "ours"):
        told = [SUMMARY["caught"][f"{judge}_{where}"] for judge in ("original", "conforms")]
        assert f"| {told[0]} of {count} | {told[1]} of {count} |" in page
    assert f"in {SUMMARY['legal_calls']} calls" in page
    assert {mark: sum(each[mark] for each in ROWS.values()) for mark in SUMMARY["caught"]} == SUMMARY["caught"]


def test_assert_conforms_catches_all_that_the_original_criterion_catches_and_all_that_is_there_to_see() -> None:
    for each in ROWS.values():
        assert each["conforms_usual"] >= each["original_usual"], each["id"]
        assert each["conforms_ours"] >= each["original_ours"], each["id"]
    assert {name for name, each in ROWS.items() if not each["conforms_ours"]} == UNSEEN


@pytest.mark.parametrize("name", ["KA-20a", "KQ-15-dynamic-fp8", "KQ-24-mxfp8"])
def test_a_row_comes_out_as_recorded(name: str) -> None:
    assert row(catalogue().fault(name), cases()[name]) == ROWS[name]


@pytest.mark.parametrize("quantiser", ["", "group-fp8-packed"])
def test_a_right_kernel_conforms_with_its_dataflow_and_with_none(quantiser: str) -> None:
    flow = DATAFLOWS["flashinfer-fp32"]
    call = next(usual_calls(quantiser, flow))
    outputs = call.outputs()
    assert call.conforming(outputs, flow)
    assert call.conforming(outputs, None)
    assert call.original(outputs)
