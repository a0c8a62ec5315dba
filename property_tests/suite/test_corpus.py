"""The corpus file: what is kept, what can be read again, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusecheck.corpus import Kept, keep, read
from fusecheck.errors import UsageError
from fusecheck.problem import Call, Problem


def test_a_kept_problem_is_read_again_whole(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "corpus.jsonl"
    problems = [Problem(tokens=3, schedule=(Call(5, dtype="fp16"),)), Problem(scale=float("inf"))]
    kept = [Kept(problem, "emulated", "test_x") for problem in problems]
    kept.append(Kept(problems[0], "emulated", "test_y", "lone_row", {"row": 2}))
    assert all(keep(path, each) for each in kept)
    assert read(path).kept == kept


def test_the_same_problem_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    assert keep(path, Kept(Problem()))
    assert not keep(path, Kept(Problem()))
    assert len(path.read_text().splitlines()) == 1


def test_a_line_cut_off_at_the_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"problem": {"tok')
    keep(path, Kept(Problem(tokens=9)))
    corpus = read(path)
    assert [kept.problem.tokens for kept in corpus.kept] == [9]
    assert len(corpus.broken) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ('{"tokens": 0}', "tokens=0, expected a whole number of at least 1"),
        ('{"problem": {"hidden": 12}}', "hidden=12, expected a multiple of 8"),
        ('{"problem": {}, "colour": 1}', "unknown field 'colour'"),
        ('{"problem": {}, "parameters": 3}', "parameters=3, expected an object"),
        ('{"problem": 7}', "a JSON int, expected an object"),
    ],
)
def test_a_broken_line_is_named_and_the_rest_is_used(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "corpus.jsonl"
    good = Problem(tokens=2).to_json()
    path.write_text(f"# a comment\n\n{good}\n{line}\n{Problem(tokens=4).to_json()}\n")
    corpus = read(path)
    assert [kept.problem.tokens for kept in corpus.kept] == [2, 4]
    assert [kept.origin for kept in corpus.kept] == ["corpus.jsonl:3", "corpus.jsonl:5"]
    assert len(corpus.broken) == 1
    assert corpus.broken[0].startswith(f"{path}:4: ")
    assert reason in corpus.broken[0]


def test_bytes_that_are_no_text_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xff\xfe\n" + Problem().to_json().encode())
    corpus = read(path)
    assert len(corpus.kept) == 1
    assert len(corpus.broken) == 1


def test_a_file_that_cannot_be_read_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "missing")
