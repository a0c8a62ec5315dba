"""The record of several seeds: runs of parts of the catalogue add up, and `golden/faults_seeds.json` is a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.faults import record
from fusecheck.faults.catalogue import catalogue
from fusecheck.faults.results import Alarm, Report, Result

GOLDEN = Path(__file__).parents[2] / "golden" / "faults_seeds.json"
SEEDS = ["0", "1", "2", "3", "4"]


def report(seed: int, cases: dict[str, int], *, survivors: tuple[str, ...] = ()) -> Report:
    """A run of these faults at one seed."""
    results = [
        Result(catalogue().fault(name), cases=count, stages=[] if name in survivors else ["quant"])
        for name, count in cases.items()
    ]
    made = Report((seed,), {seed: results})
    made.legal["emulated:trtllm", seed] = 48
    return made


def test_runs_add_up_fault_by_fault_and_seed_by_seed_and_the_latest_counts(tmp_path: Path) -> None:
    path = tmp_path / "seeds.json"
    record.add(path, report(0, {"KA-01": 1, "KP-01": 40}))
    record.add(path, report(1, {"KA-01": 3}))
    made = record.add(path, report(0, {"KP-01": 20, "GT-01": 5}))
    assert made == json.loads(path.read_text(encoding="utf-8"))
    assert {name: {seed: cell["cases"] for seed, cell in row.items()} for name, row in made["faults"].items()} == {
        "KA-01": {"0": 1, "1": 3},
        "KP-01": {"0": 20},
        "GT-01": {"0": 5},
    }
    assert made["summary"]["median_cases_until_caught"] == 4
    assert (made["summary"]["runs"], made["summary"]["killed"], made["summary"]["legal_cases"]) == (4, 4, 96)
    assert {name: group["runs"] for name, group in made["groups"].items() if group["runs"]} == {
        "arithmetic": 2,
        "protocol": 1,
        "graph": 1,
    }


def test_a_record_passes_only_with_the_whole_catalogue_at_every_seed_and_nothing_amiss(tmp_path: Path) -> None:
    whole = {fault.id: 1 for fault in catalogue().faults}
    assert record.add(tmp_path / "part.json", report(0, {"KA-01": 1}))["verdict"] == "inconclusive"
    path = tmp_path / "whole.json"
    assert record.add(path, report(0, whole))["verdict"] == "pass"
    assert record.add(path, report(1, {"KA-01": 2}))["verdict"] == "inconclusive"
    assert record.add(path, report(1, whole))["verdict"] == "pass"
    assert record.add(path, report(1, {"KA-02": 400}, survivors=("KA-02",)))["verdict"] == "fail"
    assert record.add(path, report(1, {"KA-02": 7}))["verdict"] == "pass"
    rejecting = report(1, {})
    rejecting.alarms.append(Alarm("emulated:trtllm", 1, "quant: ..."))
    assert record.add(path, rejecting)["verdict"] == "fail"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 9, "command": "faults", "faults": {}}'])
def test_a_file_that_is_no_record_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "seeds.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="expected a record of `fusecheck faults`") as error:
        record.read(path)
    assert "\n" not in str(error.value)


def golden() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return made


def test_every_fault_was_caught_at_five_seeds_and_no_right_kernel_was_rejected() -> None:
    made = golden()
    assert made["verdict"] == "pass"
    assert [fault.id for fault in catalogue().faults] == list(made["faults"])
    for name, row in made["faults"].items():
        assert sorted(row) == SEEDS, name
        assert [cell for cell in row.values() if cell["stage"] is None or cell["false_alarms"]] == [], name
    assert {f"emulated:{name}" for name in DATAFLOWS} == set(made["right_kernels"])
    for name, row in made["right_kernels"].items():
        assert sorted(row) == SEEDS, name
        assert all(cell["cases"] > 0 == cell["false_alarms"] for cell in row.values()), name


def test_the_recorded_figures_are_those_of_its_rows() -> None:
    made = golden()
    cells = [cell for row in made["faults"].values() for cell in row.values()]
    assert made["summary"]["runs"] == made["summary"]["killed"] == len(cells)
    assert made["summary"]["median_cases_until_caught"] == median(cell["cases"] for cell in cells)
    assert made["summary"]["most_cases_until_caught"] == max(cell["cases"] for cell in cells)
