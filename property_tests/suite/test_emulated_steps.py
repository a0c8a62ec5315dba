"""The emulated kernel's protocol and arithmetic, one step at a time in one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import SENTINEL, Lamport, TwoShot
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.interface import FusionOp, Limits, Strategy
from fusecheck.property_tests.suite.backend_calls import (
    Call,
    e4m3_codes,
    float32,
    kernel,
)
from fusecheck.property_tests.suite.lone_rank import LoneRank

BOTH = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
QUANT = FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8
NORM = FusionOp.RESIDUAL_RMS_NORM


def test_oneshot_leaves_every_third_but_the_last_one_clean() -> None:
    one = kernel(tokens=64, hidden=64)
    for number, tokens in enumerate([64, 1, 1, 64, 2, 30, 30, 1]):
        one.run(Call(tokens, 64, seed=number).inputs(0, 1), op=BOTH, strategy=Strategy.ONESHOT)
        lamport = one._exchanges[Strategy.ONESHOT]
        assert isinstance(lamport, Lamport)
        used = [int((third != SENTINEL).sum()) for third in lamport.bits[0][: 3 * lamport.capacity].view(3, -1)]
        assert used == [tokens * 64 if third == number % 3 else 0 for third in range(3)]
        assert lamport.clear_size(8) == tokens * 64


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_token_shards_cover_every_token_once_with_the_rest_at_the_first_ranks(world_size: int) -> None:
    shots = TwoShot(LoneRank(world_size=1), Limits(1, 8, torch.bfloat16))
    shots.world_size = world_size
    for tokens in range(1, 3 * world_size + 2):
        shards = [shots.token_shard(rank, tokens) for rank in range(world_size)]
        assert [begin for begin, _ in shards] == [0, *(end for _, end in shards[:-1])]
        assert shards[-1][1] == tokens
        sizes = [end - begin for begin, end in shards]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_auto_is_oneshot_up_to_128_tokens_and_twoshot_beyond() -> None:
    for tokens, expected in [(1, Strategy.ONESHOT), (128, Strategy.ONESHOT), (129, Strategy.TWOSHOT)]:
        one = kernel(tokens=tokens, hidden=8)
        one.run(Call(tokens, 8).inputs(0, 1), op=NORM, strategy=Strategy.AUTO)
        assert list(one._exchanges) == [expected]


@pytest.mark.parametrize("flow", [replace(DATAFLOWS["trtllm"], code_of_nan=c) for c in ("nan", "+max", "-max")])
def test_the_cast_is_the_table_and_nan_becomes_what_is_declared(flow: Dataflow) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    ties = torch.tensor([447.99997, 448.0, 456.0, 464.0, 464.00003, 480.0, 1e30, 2**-10, 3 * 2**-10, 2**-9])
    scaled = torch.cat((every, ties, -ties))
    codes = Arithmetic(flow, 0, 1).cast(scaled.clone()).view(torch.uint8).numpy()
    nan = scaled.isnan().numpy()
    assert np.array_equal(codes[~nan], e4m3_codes(scaled.double().numpy()[~nan]))
    assert set(codes[nan].tolist()) == {{"nan": 0x7F, "+max": 0x7E, "-max": 0xFE}[flow.code_of_nan]}


def test_an_unsaturated_cast_makes_nan_beyond_the_tie() -> None:
    arithmetic = Arithmetic(replace(DATAFLOWS["trtllm"], saturate=False), 0, 1)
    codes = arithmetic.cast(torch.tensor([448.0, 464.0, -464.0, 464.00003, -465.0, torch.inf, torch.nan]))
    assert codes.view(torch.uint8).tolist() == [0x7E, 0x7E, 0xFE, 0x7F, 0x7F, 0x7F, 0x7F]


@pytest.mark.parametrize("name", ["trtllm", "flashinfer"])
def test_the_reciprocal_is_rounded_or_within_one_ulp_as_declared(name: str) -> None:
    arithmetic = Arithmetic(DATAFLOWS[name], 0, 1)
    scales = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 2**-8
    got = torch.stack([arithmetic.reciprocal(s.reshape(1))[0] for s in scales]).double().numpy()
    exact = 1 / scales.double().numpy()
    ulp = np.spacing(got.astype(np.float32)).astype(np.float64)
    correct = got == float32(exact)
    assert (np.abs(got - exact) < ulp).all()
    assert correct.all() if name == "trtllm" else 0.2 < correct.mean() < 0.8
    for exponent in (-100, -3, 0, 1, 60):
        assert arithmetic.reciprocal(torch.tensor([2.0**exponent])).item() == 2.0**-exponent


def test_a_fast_math_reciprocal_flushes_subnormals_and_an_exact_one_does_not() -> None:
    fast, exact = Arithmetic(DATAFLOWS["flashinfer"], 0, 1), Arithmetic(DATAFLOWS["trtllm"], 0, 1)
    assert fast.reciprocal(torch.tensor([2.0**-127])).item() == torch.inf
    assert exact.reciprocal(torch.tensor([2.0**-127])).item() == 2.0**127
    assert fast.reciprocal(torch.tensor([2.0**127])).item() == 0
    assert exact.reciprocal(torch.tensor([2.0**127])).item() == 2.0**-127


@pytest.mark.parametrize("hidden", [8, 24, 64, 2880, 4096, 7168, 16384, 65536])
def test_the_mean_square_keeps_to_24_additions_above_any_square(hidden: int) -> None:
    arithmetic = Arithmetic(DATAFLOWS["trtllm"], 0, 1)
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.cat((torch.randn(2, hidden, generator=generator), torch.full((2, hidden), 0.1))).bfloat16().float()
    exact = rows.double().square().mean(-1, keepdim=True)
    got = arithmetic.mean_square(rows.clone(), torch.bfloat16)
    # Depth 24 allows 24 roundings, the division one more; adding in sequence takes ~hidden/4 of them on constant rows.
    assert float(((got.double() - exact).abs() / exact).max()) <= 25 * 2**-24
    for lane in (0, 7, hidden // 2, hidden - 1):
        hot = torch.zeros(1, hidden).index_fill_(1, torch.tensor([lane]), 2.0)
        assert arithmetic.mean_square(hot, torch.bfloat16).item() == np.float32(4) / np.float32(hidden)


def test_any_order_means_a_ring_that_is_the_same_on_every_rank() -> None:
    ring = {tuple(Arithmetic(DATAFLOWS["unfused"], rank, 4).rank_order()) for rank in range(4)}
    assert ring == {(1, 2, 3, 0)}
    assert Arithmetic(DATAFLOWS["trtllm"], 2, 4).rank_order() == [0, 1, 2, 3]


def test_an_unrounded_sum_stays_float32_through_both_protocols() -> None:
    flow = replace(DATAFLOWS["trtllm-fp32"], name="unrounded", round_sum=False)
    opened = EmulatedBackend(flow=flow).open(LoneRank(world_size=1), Limits(8, 64, torch.bfloat16))
    arithmetic = Arithmetic(flow, 0, 2)
    partials = [torch.tensor([[1.0]]).bfloat16(), torch.tensor([[2.0**-12]]).bfloat16()]
    assert arithmetic.total(partials).item() == 1 + 2**-12
    results = [opened.run(Call(8, 64).inputs(0, 1), op=BOTH, strategy=s) for s in (Strategy.ONESHOT, Strategy.TWOSHOT)]
    assert torch.equal(results[0].residual, results[1].residual)


class HalvedMeanSquare(Arithmetic):
    def mean_square(self, read: torch.Tensor, native: torch.dtype) -> torch.Tensor:
        return super().mean_square(read, native) / 2


def test_one_overridden_step_changes_what_comes_after_it_and_nothing_before() -> None:
    faulty = EmulatedBackend(arithmetic=HalvedMeanSquare).open(LoneRank(world_size=1), Limits(4, 64, torch.bfloat16))
    inputs = Call(4, 64).inputs(0, 1)
    right, wrong = (k.run(inputs, op=BOTH, strategy=Strategy.ONESHOT) for k in (kernel(), faulty))
    assert torch.equal(right.residual, wrong.residual)
    assert right.norm is not None
    assert wrong.norm is not None
    assert float((wrong.norm.float() / right.norm.float()).median()) == pytest.approx(2**0.5, rel=0.01)
