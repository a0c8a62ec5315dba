"""What the page of `fusecheck protocol` says was verified: the record, one row of it counted again, and SPIN's word."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusecheck.property_tests.suite import spin
from fusecheck.property_tests.suite.protocol_table import record, right_forms, rows
from fusecheck.protocol.check import explore
from fusecheck.protocol.kernels.pull import Pull
from fusecheck.protocol.kernels.twoshot import TwoShot
from fusecheck.protocol.language import RELAXED, Model, Size
from fusecheck.protocol.museum import FULL, KERNELS, MUSEUM

PAGE = Path(__file__).parents[2] / "verify" / "protocol" / "README.md"


def test_the_table_on_the_page_is_that_of_the_record() -> None:
    page = PAGE.read_text(encoding="utf-8")
    on_page = [line for line in page.splitlines() if line.startswith("| `") and "| N=" in line]
    assert on_page == rows()


def test_the_record_has_every_fault_and_every_repaired_form_at_its_sizes() -> None:
    summary = record()
    assert [row["id"] for row in summary["exhibits"]] == [exhibit.name for exhibit in MUSEUM]
    assert summary["killed"] == len(MUSEUM)
    assert summary["false_alarms"] == 0
    for row, exhibit in zip(summary["exhibits"], MUSEUM, strict=True):
        expected = [(str(size), memory) for size in exhibit.sizes for memory in ("sc", "relaxed")]
        assert [(x["size"], x["memory"]) for x in row["repaired"] if x["verdict"] == "pass"] == expected


def test_rows_of_the_record_are_counted_again() -> None:
    recorded = dict(right_forms())["one-shot"]
    for size in FULL:
        for memory in ("sc", "relaxed"):
            again = explore(KERNELS["one-shot"][1], size, memory).to_record()
            row = next(x for x in recorded if (x["size"], x["memory"]) == (str(size), memory))
            assert {key: again[key] for key in ("verdict", "states", "transitions")} == {
                key: row[key] for key in ("verdict", "states", "transitions")
            }


@pytest.mark.skipif(bool(spin.lacking()), reason=spin.lacking() or "SPIN is there")
@pytest.mark.parametrize(
    ("model", "memory", "expected"),
    [
        (TwoShot(), "sc", "pass"),
        (Pull(), "relaxed", "pass"),
        (Pull(acquire=RELAXED), "relaxed", "fail"),
        (Pull(acquire=RELAXED), "sc", "pass"),
    ],
)
def test_spin_has_the_same_verdict(model: Model, memory: str, expected: str) -> None:
    ours, theirs, states = spin.agreement(model, Size(2, 1, 1), memory)
    assert (ours, theirs) == (expected, expected)
    assert states > 0
