"""A plug-in that breaks the interface, or raises, is told so once: which method, got and expected, where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusecheck import backends
from fusecheck.backends import floating
from fusecheck.case.run import Outcome, request, run_case
from fusecheck.errors import UsageError
from fusecheck.interface import FusionOp, Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.command_line import told
from fusecheck.ranks import Pool
from fusecheck.verdict import Stage

BROKEN = "fusecheck.property_tests.suite.broken_kernels:"
BOTH = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
CASE = Problem(op=BOTH, strategy=Strategy.ONESHOT, tokens=4, hidden=64, seed=3)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool("fusecheck.case.worker:CaseWorker", 2) as started:
        yield started


def ask(pool: Pool, name: str, *, fresh: bool = False) -> Outcome:
    return run_case(pool, request(CASE, BROKEN + name, fresh=fresh))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "BoolSupport",
            "BoolSupport: supports returned the bool True, expected a Support; return Support(ok, reason)",
        ),
        (
            "NamedDataflow",
            "NamedDataflow: dataflow returned the str 'trtllm', expected a Dataflow; return one of",
        ),
        ("RaisingSupport", "RaisingSupport: supports raised KeyError (broken_kernels.py:"),
    ],
)
def test_what_the_parent_asks_is_refused_before_anything_runs(name: str, words: str) -> None:
    backend = backends.backend(BROKEN + name)
    asked = backend.dataflow if "Dataflow" in name else backend.supports
    with pytest.raises(UsageError, match=re.escape(words)):
        asked(CASE)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OpensNothing", "open returned None, which has no run and no close; expected a kernel"),
        ("ReturnsNothing", "run returned None, expected a RankOutputs; return RankOutputs(residual, norm, quant)"),
        ("ReturnsTuple", "run returned a tuple, expected a RankOutputs; return RankOutputs(residual, norm, quant)"),
        ("ReturnsFlat", "run returned residual [256] torch.float32, expected [4, 64] torch.bfloat16; return"),
        ("ReturnsMeta", "run returned residual on meta, expected on cpu; return"),
    ],
)
def test_what_a_rank_gets_is_told_once_for_all_ranks(pool: Pool, name: str, words: str) -> None:
    (finding,) = ask(pool, name).findings
    assert finding.stage is Stage.ALIVE
    assert finding.message.startswith("rank 0, 1 ")
    assert words in finding.message
    assert "AssertionError" not in finding.line() + finding.traceback


def test_a_rank_that_raises_is_named_with_method_file_and_line_and_its_traceback(pool: Pool) -> None:
    (finding,) = ask(pool, "Boom").findings
    assert re.fullmatch(r"rank 1 raised RuntimeError in run \(broken_kernels\.py:\d+\): boom", finding.message)
    assert finding.traceback.rstrip().endswith("RuntimeError: boom")


def test_a_raising_rank_is_short_on_the_console_and_whole_in_the_files_and_so_is_what_it_printed(
    tmp_path: Path,
) -> None:
    arguments = ("--backend", BROKEN + "Boom", "--tp", 2, "--cases", 1, "--tokens", 4, "--hidden", 64)
    code, printed = told("kernel", *arguments, "--run-dir", tmp_path)
    assert code == 1
    assert "alive: rank 1 raised RuntimeError in run (broken_kernels.py:" in printed
    assert "Traceback" not in printed
    assert f"a rank printed: {tmp_path}/ranks/tp2-rank1.log" in printed
    assert "tile 7 of 12" in (tmp_path / "ranks" / "tp2-rank1.log").read_text()
    record = json.loads((tmp_path / "result.json").read_text())
    assert "ranks/tp2-rank1.log" in record["summary"]["printed"]
    assert 'raise RuntimeError("boom")' in record["findings"][0]["traceback"]
    for name in ("junit.xml", "report.html"):
        text = (tmp_path / name).read_text().replace("&quot;", '"').replace("&#34;", '"')
        assert 'raise RuntimeError("boom")' in text


@pytest.mark.parametrize(("name", "method"), [("ImportFails", "open"), ("DoubleFree", "close")])
def test_what_another_method_raises_is_said_of_that_method(pool: Pool, name: str, method: str) -> None:
    message = ask(pool, name, fresh=True).findings[0].message
    assert re.match(rf"rank 0, 1 raised \w+ in {method} \(broken_kernels\.py:\d+\): ", message)


def test_flush_to_zero_that_is_left_on_is_a_finding_and_does_not_reach_the_judge(pool: Pool) -> None:
    (first, second) = ask(pool, "Flushing").findings
    assert first.stage is second.stage is Stage.ALIVE
    told = "rank 0 run left flush to zero and denormals are zero switched, expected the floating-point state as it was"
    assert first.message.startswith(told)
    assert ask(pool, "Flushing").findings[0].message.startswith(told)  # each time: it was set back


def test_the_state_is_seen_and_set_back() -> None:
    before = floating.state()
    assert torch.set_flush_denormal(True)
    try:
        assert floating.state().differs(before) == [floating.FLUSH, floating.DENORMALS]
        before.restore()
        assert floating.state().differs(before) == []
        assert float(torch.tensor(1e-40) * 1) > 0
    finally:
        torch.set_flush_denormal(False)


def test_a_run_of_a_plug_in_that_breaks_the_interface_says_so_once(tmp_path: Path) -> None:
    arguments = ("--backend", BROKEN + "ReturnsTuple", "--tp", 2, "--cases", 6, "--run-dir", tmp_path)
    code, printed = told("kernel", *arguments)
    assert (code, printed.count("run returned a tuple")) == (1, 1)
    assert len(json.loads((tmp_path / "result.json").read_text())["findings"]) == 1


def test_pace_of_a_wrong_kernel_shows_the_finding(tmp_path: Path) -> None:
    wrong = "fusecheck.property_tests.suite.honest_kernels:EverySecond"
    arguments = ("--backend", wrong, "--tp", 2, "--tokens", 4, "--hidden", 64, "--seconds", 1, "--run-dir", tmp_path)
    code, printed = told("pace", *arguments)
    assert code == 1
    assert "residual: rank 0 element[0,0]" in printed
