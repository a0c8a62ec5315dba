"""The quantiser inside the fused op: every native value, and the codes against a table made here."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusecheck.interface import FusionOp
from fusecheck.problem import Problem
from fusecheck.property_tests.effort import share
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.strategies import scales

both = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
PATTERNS = 65536


def widest(bench: Bench, dtype: str) -> int:
    """The most values that one row of the backend takes."""
    for hidden in (PATTERNS, 16384, 8192, 4096, 2048):
        if bench.accepts(Problem(world_size=bench.world_size, tokens=2, hidden=hidden, dtype=dtype)):
            return hidden
    return 1024


def sweep(bench: Bench, problem: Problem) -> bytes:
    """Judge the codes of every native value under one scale; which values the norm took, a byte each."""
    seen = np.zeros(PATTERNS, dtype=np.uint8)
    for first in range(0, PATTERNS, problem.hidden):
        answers = bench.ask("sweep", problem, first)
        bench.judge(problem, answers, f"values from {first:#06x}: ")
        seen |= np.frombuffer(answers[0]["seen"], dtype=np.uint8)
    return seen.tobytes()


def exponents(dtype: str) -> tuple[int, int]:
    """Mask of the exponent, and of the mantissa."""
    return (0x7F80, 0x7F) if dtype == "bf16" else (0x7C00, 0x3FF)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@share(4, least=3)
@given(data=st.data())
def test_every_native_value_gets_a_code_that_the_dataflow_allows(bench: Bench, dtype: str, data: st.DataObject) -> None:
    scale = data.draw(scales(), label="scale")
    hidden = widest(bench, dtype)
    problem = Problem(
        op=both, dtype=dtype, world_size=bench.world_size, tokens=2, hidden=hidden, eps=1e-12, scale=scale,
        family="special",
    )  # fmt: skip
    assume(bench.accepts(problem))
    seen = sweep(bench, problem)
    exponent, mantissa = exponents(dtype)
    flushes = bench.dataflow(problem).flush_subnormals
    missing = [
        bits
        for bits in range(PATTERNS)
        if not seen[bits]
        and not (bits & exponent == exponent and bits & mantissa)  # a NaN may lose its payload
        and not (flushes and bits & exponent == 0)
    ]
    assert missing == [], f"{len(missing)} values never reached the quantiser, the first {missing[0]:#06x}"
    nans = [bits for bits in range(PATTERNS) if bits & exponent == exponent and bits & mantissa]
    assert any(seen[bits] for bits in nans), "no NaN reached the quantiser"


MAGNITUDES = [
    (code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10) for code in range(0x7F)
]
"""The value of each code without its sign, written down anew, so that the table of the oracle is not the judge."""


def nearest(quotient: float) -> int:
    """The code of a float32 quotient: nearest, ties to even, saturating."""
    magnitude = abs(quotient)
    upper = bisect.bisect_left(MAGNITUDES, magnitude)
    if upper == len(MAGNITUDES):
        code = upper - 1
    else:
        below, above = magnitude - MAGNITUDES[upper - 1] if upper else math.inf, MAGNITUDES[upper] - magnitude
        code = upper if above < below or (above == below and upper % 2 == 0) else upper - 1
    return code | (0x80 if math.copysign(1.0, quotient) < 0 else 0)


@share(2, least=5)
@given(data=st.data())
def test_the_codes_are_those_of_the_returned_norm(bench: Bench, data: st.DataObject) -> None:
    problem = Problem(
        op=both,
        world_size=bench.world_size,
        tokens=data.draw(st.integers(1, 4), label="tokens"),
        hidden=8 * data.draw(st.integers(1, 32), label="lanes of eight"),
        scale=data.draw(scales(("one", "random", "power", "tie", "amax")), label="scale"),
        seed=data.draw(st.integers(0, 2**32 - 1), label="seed"),
    )
    flow = bench.dataflow(problem)
    assume(bench.accepts(problem) and flow.round_norm and flow.saturate)
    norms, codes = bench.ask("norms_and_codes", problem)[0]
    scale = np.float32(problem.scale)
    reciprocal = np.float32(1) / scale
    for norm, code in zip(norms, codes, strict=True):
        value = np.float32(norm)
        quotients = [value * reciprocal] if flow.scaling != "divide" else []
        quotients += [value / scale] if flow.scaling != "multiply" else []
        if not flow.exact_reciprocal:
            quotients += [value * np.nextafter(reciprocal, np.float32(side)) for side in (0, np.inf)]
        allowed = {nearest(float(quotient)) for quotient in quotients}
        if code not in allowed:
            bench.fail(problem, f"norm {norm} has code {code:#04x}, expected {sorted(map(hex, allowed))}")
