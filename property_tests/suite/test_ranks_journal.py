"""The journal: on disk before the case, readable after any death."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecheck.errors import UsageError
from fusecheck.journal import Journal, finished, read, unfinished
from fusecheck.property_tests.suite.repository.checkout import ROOT


def test_cases_are_told_apart_by_whether_they_ended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "cases.jsonl"
    with Journal(path, durable=True) as journal:
        journal.start("a", seed=1)
        journal.end("a", verdict="pass")
        journal.start("b")
    assert unfinished(path) == ["b"]
    assert finished(path) == {"a"}
    assert read(path).started["a"]["seed"] == 1
    assert read(path).ended["a"]["verdict"] == "pass"


def test_a_resumed_run_appends_and_a_repeated_case_counts_from_its_last_start(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    with Journal(path) as journal:
        journal.start("a")
        journal.end("a")
    with Journal(path) as journal:
        journal.start("a")
    assert unfinished(path) == ["a"]


KILLED = """
import os, sys
from pathlib import Path
from fusecheck.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.start("done"); journal.end("done"); journal.start("in flight")
os.kill(os.getpid(), 9)
"""


def test_the_case_in_flight_is_named_after_a_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert unfinished(path) == ["in flight"]


@given(cut=st.integers(0, 10_000))
def test_a_journal_cut_anywhere_is_read_up_to_there_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "cases.jsonl"
    with Journal(path) as journal:
        for name in "abc":
            journal.start(name)
            journal.end(name)
    whole = path.read_bytes()
    cut %= len(whole) + 1
    os.truncate(path, cut)
    record = read(path)
    lines = whole[:cut].split(b"\n")
    assert len(record.started) + len(record.ended) + len(record.broken) == len([line for line in lines if line])
    # All but its newline may be there: then the last line is whole after all.
    assert len(record.broken) <= 1
    for broken in record.broken:
        assert f":{len(lines)}: " in broken
        assert "cut short" in broken
    with Journal(path) as journal:
        journal.start("after")
    assert unfinished(path)[-1] == "after"


def test_a_line_of_another_kind_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b'{"event":"start","case":"a"}\n[1]\n{"event":"other","case":"a"}\n{"event":"end"}\n\xff\n')
    record = read(path)
    assert record.unfinished == ["a"]
    assert [line.split(":")[1] for line in record.broken] == ["2", "3", "4", "5"]


def test_a_journal_that_is_not_there_or_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written"):
        Journal(tmp_path / "file" / "cases.jsonl")
