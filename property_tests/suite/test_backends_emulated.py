"""The emulated kernel in real processes, against numpy; what it takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import SENTINEL
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.interface import FusionOp, Limits, RankInputs, Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.backend_calls import (
    Call,
    Outputs,
    as_bytes,
    e4m3_codes,
    float32,
    floats,
    kernel,
    normalised,
    residual_in_rank_order,
    rounded,
    steps_apart,
)
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.ranks import FailureKind, Pool, culprits, values

BOTH = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
QUANT = FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8
NORM = FusionOp.RESIDUAL_RMS_NORM
CALLS = "fusecheck.property_tests.suite.backend_calls"
SECONDS = 60.0

WORKSPACE = [
    Call(5, 64, seed=1),
    Call(130, 512, seed=2),
    Call(5, 64, QUANT, seed=1),
    Call(130, 512, strategy=Strategy.ONESHOT, seed=2),
    Call(1, 8, NORM, Strategy.TWOSHOT, seed=4),
    Call(17, 2880, dtype="fp16", seed=5, weight_bias=1.0, scale=0.03125),
    Call(2, 360, strategy=Strategy.ONESHOT, dtype="fp16", seed=6, scale=1.0),
    Call(7, 1024, strategy=Strategy.TWOSHOT, seed=7, scale=0.25),
]
"""Tokens, hidden, op, strategy and dtype all change from call to call."""


@pytest.fixture(scope="module", params=[2, 4])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(f"{CALLS}:BackendCalls", request.param) as ranks:
        yield ranks


def run(pool: Pool, name: str, calls: list[Call], reopen_every: int = 0) -> list[Outputs]:
    """Make the calls on all ranks; one rank's outputs, once all are found to be the same."""
    ranks = values(pool.call("run", name, calls, reopen_every, timeout=SECONDS))
    for other in ranks[1:]:
        for call, mine, theirs in zip(calls, ranks[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine), f"the ranks differ: {call}"
    return list(ranks[0])


@pytest.mark.parametrize("name", DATAFLOWS)
def test_every_dataflow_computes_what_numpy_does_and_the_same_on_every_rank(pool: Pool, name: str) -> None:
    flow = DATAFLOWS[name]
    returned = run(pool, f"emulated:{name}", WORKSPACE)
    for call, outputs in zip(WORKSPACE, returned, strict=True):
        assert ("norm" in outputs, "quant" in outputs) == (call.op.returns_norm, call.op.returns_quant)
        observed = floats(outputs, "residual", call.dtype)
        if flow.order == "rank" or flow.accumulate == "exact":  # float64 adds these values up exactly
            expected = residual_in_rank_order(call, pool.world_size, accumulate=flow.accumulate)
            assert np.array_equal(observed, expected), call
        plain = flow.norm_reads_rounded and flow.statistics is None
        if not call.op.returns_norm or flow.round_normed or flow.round_squares or not plain:
            continue
        norm = floats(outputs, "norm", call.dtype)
        apart = steps_apart(norm, rounded(normalised(observed, call), call.dtype), call.dtype)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.003, "more than the rounding of the mean square can move"
        if call.op.returns_quant and flow.round_norm:
            factor = Arithmetic(flow, 0, 1).reciprocal(torch.tensor([call.scale])).double().numpy()
            divisor = np.float64(np.float32(call.scale))
            scaled = norm / divisor if flow.scaling == "divide" else norm * factor
            assert np.array_equal(outputs["quant"], e4m3_codes(float32(scaled)))


def norm_by_definition(flow: Dataflow, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The norm in float64 with every rounding that the flow declares; and what the quantiser reads. One rank."""
    inputs = call.inputs(0, 1)
    stream = inputs.partial.double().numpy() + inputs.residual.double().numpy()
    read = rounded(stream, call.dtype) if flow.norm_reads_rounded else float32(stream)
    measured = float32(stream) if flow.statistics == "unrounded" else read
    squares = rounded(np.square(measured), call.dtype) if flow.round_squares else np.square(measured)
    normed = read / np.sqrt(squares.mean(-1, keepdims=True) + inputs.eps)
    if flow.round_normed:
        normed = rounded(normed, call.dtype)
    y = normed * (inputs.gamma.double().numpy() + call.weight_bias)
    return rounded(y, call.dtype), rounded(y, call.dtype) if flow.round_norm else y


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", DATAFLOWS)
def test_every_declared_rounding_is_made_and_no_other(name: str, dtype: str) -> None:
    flow, call = DATAFLOWS[name], Call(32, 256, dtype=dtype, seed=3, weight_bias=1.0)
    returned = as_bytes(kernel(name).run(call.inputs(0, 1), op=BOTH, strategy=Strategy.ONESHOT))
    norm, read = norm_by_definition(flow, call)
    # The float64 mean square differs from the kernel's by 1e-6 at most; a rounding that is missing or
    # one too many moves 1 % of the values and more.
    assert (floats(returned, "norm", dtype) != norm).mean() < 0.003
    assert (returned["quant"] != e4m3_codes(float32(read / np.float64(np.float32(call.scale))))).mean() < 0.003


def test_oneshot_and_twoshot_return_the_same_bits(pool: Pool) -> None:
    shapes = [(1, 64), (3, 8), (6, 520), (129, 128)]
    for name in ("trtllm", "flashinfer-fp32", "trtllm-nccl"):
        for strategies in [(Strategy.ONESHOT, Strategy.TWOSHOT), (Strategy.AUTO, Strategy.TWOSHOT)]:
            first, second = (
                run(pool, f"emulated:{name}", [Call(t, h, strategy=s, seed=t) for t, h in shapes]) for s in strategies
            )
            for a, b in zip(first, second, strict=True):
                assert all(np.array_equal(a[output], b[output]) for output in ("residual", "norm", "quant"))


def test_quant_alone_returns_the_codes_of_quant_with_norm(pool: Pool) -> None:
    for name in DATAFLOWS:
        both, quant, norm = run(pool, f"emulated:{name}", [Call(9, 256, op, seed=3) for op in (BOTH, QUANT, NORM)])
        assert set(quant) == {"residual", "quant"}
        assert set(norm) == {"residual", "norm"}
        assert np.array_equal(both["quant"], quant["quant"])
        assert np.array_equal(both["norm"], norm["norm"])


@pytest.mark.parametrize("strategy", [Strategy.ONESHOT, Strategy.TWOSHOT])
def test_token_counts_may_change_from_call_to_call_with_fresh_data(pool: Pool, strategy: Strategy) -> None:
    world_size = pool.world_size
    tokens = [200, 1, 1, 200, 3, *range(1, 2 * world_size + 2), 129, 128, 1, 2, 127]
    calls = [Call(t, 64, strategy=strategy, seed=n) for n, t in enumerate(tokens)]
    for call, outputs in zip(calls, run(pool, "emulated", calls), strict=True):
        expected = residual_in_rank_order(call, world_size, accumulate="native")
        assert np.array_equal(floats(outputs, "residual", call.dtype), expected), call


def test_a_closed_workspace_is_opened_again_clean(pool: Pool) -> None:
    calls = [Call(1 + n % 3, 64, strategy=(Strategy.ONESHOT, Strategy.TWOSHOT)[n % 2], seed=n) for n in range(12)]
    whole, reopened = run(pool, "emulated", calls), run(pool, "emulated", calls, reopen_every=2)
    for a, b in zip(whole, reopened, strict=True):
        assert all(np.array_equal(a[output], b[output]) for output in a)


def test_two_open_workspaces_of_one_size_do_not_share_memory(pool: Pool) -> None:
    calls = [Call(1 + n % 4, 64, strategy=Strategy.ONESHOT, seed=n) for n in range(8)]
    alone, interleaved = (
        run(pool, "emulated", calls),
        values(pool.call("interleave", "emulated", calls, timeout=SECONDS)),
    )
    for a, b in zip(alone, interleaved[0], strict=True):
        assert all(np.array_equal(a[output], b[output]) for output in a)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["trtllm", "flashinfer-fp32"])
def test_negative_zeros_and_subnormals_neither_hang_nor_change(pool: Pool, name: str, dtype: str) -> None:
    patterns = [0x8000, 0x0000, 0x8001, 0x807F, 0x0001, 0x007F, 0x8040]
    calls = [
        Call(3, 64, strategy=s, dtype=dtype, bits=b) for b in patterns for s in (Strategy.ONESHOT, Strategy.TWOSHOT)
    ]
    for call, outputs in zip(calls, run(pool, f"emulated:{name}", calls), strict=True):
        value = call.partials(1)[0].double().numpy() * pool.world_size
        flushed = DATAFLOWS[name].flush_subnormals and dtype == "bf16"
        expected = np.zeros_like(value) if flushed and call.bits not in (0x0000, 0x8000) else value
        assert np.array_equal(floats(outputs, "residual", dtype), expected), call


def test_a_negative_zero_at_any_lane_arrives(pool: Pool) -> None:
    run(pool, "emulated", [Call(1, 8, strategy=Strategy.ONESHOT, bits=0x8000) for _ in range(4)])
    one = kernel()
    for lane in range(16):
        inputs = Call(1, 16, seed=lane).inputs(0, 1)
        inputs.partial.view(torch.int16)[0, lane] = SENTINEL
        outputs = one.run(inputs, op=BOTH, strategy=Strategy.ONESHOT)
        assert torch.equal(outputs.residual, inputs.partial + inputs.residual)


def test_without_canonical_zeros_the_receivers_wait_for_ever() -> None:
    with Pool(f"{CALLS}:BackendCalls", 2) as ranks:
        plug_in = f"{CALLS}:raw_publisher"
        values(ranks.call("run", plug_in, [Call(1, strategy=Strategy.ONESHOT)], timeout=SECONDS))
        replies = ranks.call("run", plug_in, [Call(1, strategy=Strategy.ONESHOT, bits=0x8000)], timeout=1.0)
        assert {failure.kind for failure in culprits(replies)} == {FailureKind.HANG}


def test_a_kept_sign_of_zero_goes_twoshot_and_refuses_oneshot() -> None:
    backend = EmulatedBackend(flow=replace(DATAFLOWS["trtllm"], name="kept", zero_sign="kept"))
    opened = backend.open(LoneRank(world_size=1), Limits(8, 64, torch.bfloat16))
    inputs = Call(2, 64, bits=0x8000).inputs(0, 1)
    inputs.residual.fill_(-0.0)
    outputs = opened.run(inputs, op=BOTH, strategy=Strategy.AUTO)
    assert bool(outputs.residual.signbit().all())
    assert outputs.quant is not None
    assert bool((outputs.quant.view(torch.uint8) == 0x80).all())
    with pytest.raises(ValueError, match="loses the sign of zero"):
        opened.run(inputs, op=BOTH, strategy=Strategy.ONESHOT)


def strided(inputs: RankInputs) -> RankInputs:
    """The same values behind views: a transpose, a step of two, an offset."""
    tokens, hidden = inputs.partial.shape
    wide = torch.full((tokens, 2 * hidden), torch.nan, dtype=inputs.partial.dtype)
    wide[:, ::2] = inputs.residual
    padded = torch.cat((inputs.gamma[:3], inputs.gamma))
    return replace(inputs, partial=inputs.partial.t().contiguous().t(), residual=wide[:, ::2], gamma=padded[3:])


@pytest.mark.parametrize("strategy", [Strategy.ONESHOT, Strategy.TWOSHOT])
def test_views_are_read_as_their_values(strategy: Strategy) -> None:
    inputs = Call(6, 64, seed=1).inputs(0, 1)
    plain = kernel().run(inputs, op=BOTH, strategy=strategy)
    viewed = kernel().run(strided(inputs), op=BOTH, strategy=strategy)
    assert all(np.array_equal(as_bytes(plain)[n], as_bytes(viewed)[n]) for n in ("residual", "norm", "quant"))
    expanded = replace(inputs, partial=inputs.partial[:1].expand(6, 64))
    repeated = replace(inputs, partial=inputs.partial[:1].repeat(6, 1))
    a, b = (kernel().run(i, op=BOTH, strategy=strategy) for i in (expanded, repeated))
    assert torch.equal(a.residual, b.residual)


def test_inputs_stay_as_they_were() -> None:
    inputs = Call(5, 64, bits=0x8000).inputs(0, 1)
    for strategy in (Strategy.ONESHOT, Strategy.TWOSHOT):
        before = [t.clone() for t in (inputs.partial, inputs.residual, inputs.gamma, inputs.scale)]
        kernel("flashinfer").run(inputs, op=BOTH, strategy=strategy)
        for old, new in zip(before, (inputs.partial, inputs.residual, inputs.gamma, inputs.scale), strict=True):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


GOOD = Call(4, 64).inputs(0, 1)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"gamma": GOOD.gamma.float()}, "gamma is torch.float32, expected torch.bfloat16"),
        ({"gamma": GOOD.gamma[:1]}, r"gamma has shape \[1\], expected \[64\]"),
        ({"gamma": GOOD.gamma[None]}, r"gamma has shape \[1, 64\], expected \[64\]"),
        ({"residual": GOOD.residual.half()}, "residual is torch.float16, expected torch.bfloat16"),
        ({"residual": GOOD.residual[:1]}, r"residual has shape \[1, 64\], expected \[4, 64\]"),
        ({"scale": GOOD.scale.bfloat16()}, "scale is torch.bfloat16, expected torch.float32"),
        ({"scale": GOOD.scale.double()}, "scale is torch.float64, expected torch.float32"),
        ({"scale": GOOD.scale[0]}, r"scale has shape \[\], expected \[1\]"),
        ({"scale": GOOD.scale.repeat(64)}, r"scale has shape \[64\], expected \[1\]"),
        ({"partial": GOOD.partial[None]}, "partial has 3 dimensions, expected"),
        ({"partial": GOOD.partial.float()}, "partial is torch.float32, expected torch.bfloat16 or torch.float16"),
        ({"eps": -1e-6}, "eps=-1e-06 is not a finite number"),
        ({"eps": float("nan")}, "eps=nan is not a finite number"),
        ({"weight_bias": float("inf")}, "weight_bias=inf is not a finite number"),
    ],
)
def test_an_operand_that_would_be_misread_is_refused_in_one_line(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        kernel().run(replace(GOOD, **changed), op=BOTH, strategy=Strategy.AUTO)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (Call(65, 64), "65 x 64 exceeds the workspace's 64 x 256"),
        (Call(1, 264), "1 x 264 exceeds the workspace's 64 x 256"),
        (Call(1, 12), "hidden=12 is not a positive multiple of 8"),
    ],
)
def test_a_call_beyond_its_workspace_is_refused(call: Call, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kernel().run(call.inputs(0, 1), op=BOTH, strategy=Strategy.AUTO)


@pytest.mark.parametrize(
    ("tokens", "hidden", "strategy", "told"),
    [
        (1, 8200, Strategy.AUTO, "hidden/8=1025 is odd"),
        (1, 65544, Strategy.AUTO, "hidden=65544 is above 65536"),
        (65, 65536, Strategy.ONESHOT, "one-shot takes 64 MiB"),
    ],
)
def test_what_supports_refuses_the_kernel_refuses_too(tokens: int, hidden: int, strategy: Strategy, told: str) -> None:
    backend = EmulatedBackend()
    support = backend.supports(Problem(world_size=8, tokens=tokens, hidden=hidden, strategy=strategy))
    assert not support.ok
    assert told in support.reason
    if strategy is Strategy.AUTO:
        with pytest.raises(ValueError, match=told):
            backend.open(LoneRank(world_size=1), Limits(tokens, hidden, torch.bfloat16))
    else:
        assert backend.supports(Problem(world_size=8, tokens=tokens, hidden=hidden, strategy=Strategy.AUTO)).ok


def test_what_supports_takes_runs() -> None:
    for hidden in (8, 8184, 8192, 8208, 65536):
        problem = Problem(world_size=1, tokens=2, hidden=hidden, strategy=Strategy.ONESHOT)
        assert EmulatedBackend().supports(problem).ok
        outputs = kernel(tokens=2, hidden=hidden).run(Call(2, hidden).inputs(0, 1), op=BOTH, strategy=problem.strategy)
        assert outputs.residual.shape == (2, hidden)
