"""The special values as FlashInfer's kernel was measured to treat them on two H200s; the emulator does as it does.

With `--backend flashinfer --device cuda` the kernel itself is asked, else its emulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from fusecheck.backends.flashinfer_limits import shape_support
from fusecheck.case.run import Outcome, request, run_case
from fusecheck.interface import Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.kernel.special_worker import COLUMN, ROW, TOKENS
from fusecheck.ranks import Pool, values

WORKER = "fusecheck.property_tests.kernel.special_worker:SpecialWorker"
NAN, MOST = 0x7F, 0x7E
Outputs = dict[str, list[list[int]]]


class Asker:
    """Runs special inputs on two ranks, which must agree."""

    def __init__(self, pool: Pool, backend: str) -> None:
        self._pool, self._backend = pool, backend

    @property
    def on_gpu(self) -> bool:
        """Whether the kernel itself is asked."""
        return not self._backend.startswith("emulated")

    def __call__(self, name: str, strategy: str = "ONESHOT", scale: float = 0.013) -> Outputs:
        # The emulation of a flush gives zeros of one sign, which its dataflow leaves open; the chip keeps the sign.
        backend = self._backend if self.on_gpu or name != "negative-zero" else "emulated:trtllm"
        first, second = values(self._pool.call("special", backend, name, strategy, scale, timeout=60.0))
        assert first == second
        outputs: Outputs = first
        return outputs

    def judge(self, problem: Problem) -> Outcome:
        """Run and judge an ordinary Problem."""
        return run_case(self._pool, request(problem, self._backend), timeout=60.0)

    def refusal(self, hidden: int) -> list[str]:
        """What each rank raised at a hidden size; empty where it ran."""
        found: list[str] = values(self._pool.call("refusal", self._backend, hidden, timeout=60.0))
        return found


def others(rows: list[list[int]]) -> list[list[int]]:
    """The rows without anything special."""
    return [row for index, row in enumerate(rows) if index != ROW]


@pytest.fixture(scope="module")
def ask(request: pytest.FixtureRequest) -> Iterator[Asker]:
    name = str(request.config.getoption("--backend"))
    backend = name if name.startswith("flashinfer") else "emulated:flashinfer"
    device = "cuda" if name.startswith("flashinfer") else "cpu"
    with Pool(WORKER, 2, device=device) as pool:
        yield Asker(pool, backend)


@pytest.mark.parametrize(("strategy", "code"), [("ONESHOT", 0x00), ("TWOSHOT", 0x80)])
def test_one_shot_loses_the_sign_of_a_negative_zero_and_two_shot_keeps_it(ask: Asker, strategy: str, code: int) -> None:
    codes = ask("negative-zero", strategy)["quant"]
    assert {c for row in codes for c in row} == {code}


@pytest.mark.parametrize("strategy", ["ONESHOT", "TWOSHOT"])
def test_subnormal_sums_are_flushed_to_zero(ask: Asker, strategy: str) -> None:
    assert {bits & 0x7FFF for row in ask("subnormal", strategy)["residual"] for bits in row} == {0}


@pytest.mark.parametrize("strategy", ["ONESHOT", "TWOSHOT"])
@pytest.mark.parametrize("name", ["nan", "opposite-infinities"])
def test_a_nan_takes_its_whole_row_and_no_other(ask: Asker, name: str, strategy: str) -> None:
    got, clean = ask(name, strategy)["quant"], ask("ordinary", strategy)["quant"]
    assert set(got[ROW]) == {NAN}
    assert others(got) == others(clean)
    assert NAN not in {code for row in clean for code in row}


@pytest.mark.parametrize("strategy", ["ONESHOT", "TWOSHOT"])
def test_an_infinity_becomes_nan_and_the_rest_of_its_row_zero(ask: Asker, strategy: str) -> None:
    got = ask("infinity", strategy)["quant"]
    assert got[ROW][COLUMN] == NAN
    assert {code & 0x7F for index, code in enumerate(got[ROW]) if index != COLUMN} == {0}
    assert others(got) == others(ask("ordinary", strategy)["quant"])


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 0.0, 1e-6])
def test_small_and_zero_scales_saturate_at_448_of_either_sign(ask: Asker, scale: float) -> None:
    outputs = ask("ordinary", scale=scale)
    assert {code for row in outputs["quant"] for code in row} == {MOST, MOST | 0x80}
    signs = [bits >> 15 for row in outputs["norm"] for bits in row]
    assert [code >> 7 for row in outputs["quant"] for code in row] == signs


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 0.0])
def test_a_zero_over_a_scale_that_is_zero_or_flushed_to_it_is_nan(ask: Asker, scale: float) -> None:
    assert set(ask("zero-row", scale=scale)["quant"][ROW]) == {NAN}


def test_an_infinite_scale_gives_zeros_and_a_nan_scale_nans(ask: Asker) -> None:
    assert {code & 0x7F for row in ask("ordinary", scale=math.inf)["quant"] for code in row} == {0}
    assert {code for row in ask("ordinary", scale=math.nan)["quant"] for code in row} == {NAN}


def test_a_negative_scale_flips_the_signs_of_all_codes(ask: Asker) -> None:
    plus, minus = ask("ordinary", scale=0.25)["quant"], ask("ordinary", scale=-0.25)["quant"]
    assert minus == [[code ^ 0x80 for code in row] for row in plus]
    assert len(plus) == TOKENS


@pytest.mark.parametrize("strategy", ["ONESHOT", "TWOSHOT"])
@pytest.mark.parametrize("hidden", [16, 64, 72, 264, 520, 1032, 2880, 5768])
def test_rows_that_end_within_a_warp_are_normalised_rightly(ask: Asker, hidden: int, strategy: str) -> None:
    problem = Problem(tokens=5, hidden=hidden, strategy=Strategy(strategy), seed=hidden)
    assert [finding.line() for finding in ask.judge(problem).findings] == []


def test_a_row_that_no_block_and_cluster_covers_is_refused_by_name(ask: Asker) -> None:
    hidden = 8 * 1025
    assert "no block and cluster size" in shape_support(Problem(hidden=hidden)).reason
    named = ("block", "cluster") if ask.on_gpu else (str(hidden),)
    for raised in ask.refusal(hidden):
        assert all(name in raised.lower() for name in named), raised
