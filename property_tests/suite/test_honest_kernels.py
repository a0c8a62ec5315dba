"""A kernel that keeps its word passes, also where the word is a rare one; a faulty one's finding names the fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fusecheck.case import alive
from fusecheck.case.compare import compare_bits, one_nan
from fusecheck.case.run import CHECKS, Outcome, explain, request, run_case
from fusecheck.errors import UsageError
from fusecheck.interface import FusionOp, Strategy, overwritten
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.suite import honest_kernels
from fusecheck.ranks import Pool
from fusecheck.verdict import Stage, Tally

HONEST = "fusecheck.property_tests.suite.honest_kernels:"
BOTH = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
CASE = Problem(op=BOTH, strategy=Strategy.ONESHOT, world_size=4, tokens=9, hidden=520, seed=3)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool("fusecheck.case.worker:CaseWorker", 4) as started:
        yield started


def ask(pool: Pool, name: str, problem: Problem = CASE) -> Outcome:
    case = request(problem, HONEST + name, checks=CHECKS)
    outcome = run_case(pool, case)
    explain(pool, case, outcome)
    return outcome


SCHEDULE = replace(CASE, schedule=(Call(9), Call(3, overwrite=True), Call(9)))


@pytest.mark.parametrize("problem", [CASE, SCHEDULE], ids=["one call", "a schedule that reuses the buffer"])
@pytest.mark.parametrize("name", ["Backend", "InPlace", "AnyOrder"])
def test_a_kernel_that_keeps_its_word_passes_every_check(pool: Pool, name: str, problem: Problem) -> None:
    outcome = ask(pool, name, problem)
    assert outcome.passed, outcome.findings[0].line()


def test_the_example_passes_where_a_nan_has_another_payload_on_a_view(pool: Pool) -> None:
    """Case 04: torch propagates the NaN of another operand in the last columns of a strided row."""
    line = (
        '{"op":"RESIDUAL_RMS_NORM_QUANT_FP8","strategy":"ONESHOT","dtype":"bf16","world_size":4,"tokens":33,"hidden":520,'
        '"eps":1e-05,"scale":90.52631378173828,"gamma":"small","weight_bias":1.0,"family":"special",'
        '"seed":2191828797535983828}'
    )
    assert ask(pool, "Backend", Problem.from_json(line)).passed


def test_payloads_of_nan_are_compared_only_where_a_dataflow_declares_them() -> None:
    for dtype, bits in ((torch.bfloat16, (0x7FC0, -1)), (torch.float8_e4m3fn, (0x7F, 0xFF))):
        integer = torch.int16 if dtype is torch.bfloat16 else torch.uint8
        first, second = (torch.tensor([[1, bit]]).to(integer).view(dtype) for bit in bits)
        counts = []
        for payloads in (False, True):
            tally = Tally(Stage.AGAIN)
            compare_bits(tally, "", first, second, payloads=payloads)
            counts.append(tally.outside)
        assert counts == [0, 1]
        assert torch.equal(one_nan(first).view(integer), one_nan(second).view(integer))


def test_what_is_done_in_place_without_a_word_is_named_with_the_word(pool: Pool) -> None:
    message = ask(pool, "InPlaceUnsaid").findings[0].message
    assert message == (
        "rank 0 partial was changed by the call, expected unchanged; a kernel that works in place declares overwrites; "
        "residual was changed by the call, expected unchanged; a kernel that works in place declares overwrites"
    )


def test_a_word_that_names_no_operand_is_refused() -> None:
    backend = honest_kernels.InPlace()
    backend.overwrites = ("norm",)  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"overwrites is \('norm',\), expected a tuple of: partial, residual"):
        overwritten(backend)


def test_other_bits_at_every_call_are_a_finding_of_the_check_that_saw_them(pool: Pool) -> None:
    finding = next(f for f in ask(pool, "AnyOrderUnsaid").findings if f.stage is Stage.AGAIN)
    assert "check repeat element[" in finding.message
    assert "residual of a second call got" in finding.message
    assert "varies from call to call: " in finding.varies


def test_a_code_that_equals_the_poison_is_wrong_and_not_unwritten(pool: Pool) -> None:
    findings = ask(pool, "Unsaturated", replace(CASE, family="saturating", scale=0.002)).findings
    assert findings[0].stage is Stage.QUANT
    assert "got 0xff (nan)" in findings[0].message
    assert all(finding.stage is not Stage.ALIVE for finding in findings)


def test_what_held_both_poisons_was_not_written(pool: Pool) -> None:
    first = ask(pool, "HalfWritten").findings[0]
    assert first.stage is Stage.ALIVE
    assert "element[0,260] 2340 elements got norm not written admissible written" in first.message
    assert len({poison[2] for poison in alive.POISONS}) == len({poison[1] for poison in alive.POISONS}) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Forgetful", "check layouts element[0,0] residual of a call on partial as a view (padded rows) got"),
        ("OtherExchange", "check strategies element[1,0] the first output of a TWOSHOT call, after ONESHOT got"),
    ],
)
def test_again_says_what_was_done_differently(pool: Pool, name: str, words: str) -> None:
    finding = ask(pool, name).findings[0]
    assert finding.stage is Stage.AGAIN
    assert words in finding.message
    assert finding.varies == "the same in 3 repeats of the call"


def test_a_finding_that_comes_and_goes_says_so(pool: Pool) -> None:
    line = ask(pool, "EverySecond").findings[0].line()
    assert "; varies from call to call: " in line


def test_the_headline_names_the_dataflows_that_explain_every_element(pool: Pool) -> None:
    finding = ask(pool, "NativeSums").findings[0]
    assert finding.line().startswith("residual (computes like trtllm, ")
    assert finding.to_record()["computes_like"][0] == "trtllm"
