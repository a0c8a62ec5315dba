"""The operators: schemas, fake kernels, exact layers on codes, and norms by their flavour."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecheck import backends
from fusecheck.dataflow import dataflow
from fusecheck.formats.element import E4M3
from fusecheck.graph import arithmetic
from fusecheck.graph.context import RankContext, tensor_parallel
from fusecheck.graph.fused_ops import resolve
from fusecheck.graph.ops import SCHEMAS
from fusecheck.interface import Strategy
from fusecheck.property_tests.suite.lone_rank import LoneRank

own = torch.ops.fusecheck


@pytest.fixture
def alone() -> Iterator[RankContext]:
    """Operators run as the only rank, on the unfused backend."""
    context = RankContext(LoneRank(world_size=1), backends.backend("unfused"), dataflow("trtllm"))
    with tensor_parallel(context):
        yield context


def activations(*shape: int) -> torch.Tensor:
    """Seeded bf16 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def codes(*shape: int) -> torch.Tensor:
    """Seeded E4M3 values."""
    return (activations(*shape) * 50).to(torch.float8_e4m3fn)


def made(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 codes and scales."""
    codes, scales = own.quantize(x, torch.tensor(0.5), "nvfp4")
    return codes, scales


def arguments() -> dict[str, tuple[object, ...]]:
    """Arguments of every operator."""
    x, residual, weight = activations(3, 16), activations(3, 16), activations(16)
    scale, step = torch.tensor(0.02), torch.tensor(0.5)
    norm, fused = (x, weight, 1e-5), (x, residual, weight)
    return {
        "all_reduce": (x, "AUTO"),
        "all_reduce_max": (x, "AUTO"),
        "all_reduce_grouped": (x, 1, "AUTO"),
        **dict.fromkeys(("torch_rmsnorm", "triton_rms_norm", "flashinfer_rms_norm", "gemma_rms_norm"), norm),
        "biased_rms_norm": (x, weight, weight, 1e-5),
        "static_quantize_e4m3_per_tensor": (x, scale),
        "fp8_linear": (x, codes(8, 16), None, scale, step),
        "fp8_prequant_linear": (codes(3, 16), codes(8, 16), None, scale, step, "float16"),
        "quantize": (x, step, "nvfp4"),
        "quantized_linear": (*made(x), *made(activations(8, 16)), None, step, step, "nvfp4", "", "bfloat16"),
        "moe_finalize": (activations(6, 16), activations(3, 2), torch.tensor([[0, 5], [-1, 1], [2, 2]]).int(), x, 2.5),
        "reduce_scatter": (x, 1, "AUTO"),
        "all_gather": (x, 1, "AUTO"),
        "shard": (x, 1),
        "fused": (*fused, step, 1e-5, "NCCL", "RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4"),
        "ar_residual_norm": (*fused, 1e-5, "AUTO"),
        "ar_residual_norm_quant_fp8": (*fused, scale, 1e-5, "AUTO"),
        "ar_residual_norm_out_quant_fp8": (*fused, scale, 1e-5, "NCCL"),
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_operator_keeps_its_schema_and_its_fake_kernel_agrees(alone: RankContext, name: str) -> None:
    overload = getattr(own, name).default
    given_codes = any(
        isinstance(each, torch.Tensor) and each.dtype is torch.float8_e4m3fn for each in arguments()[name]
    )
    # The schema check compares inputs before and after by arithmetic, which float8 lacks.
    checks = ("test_faketensor",) if given_codes else ("test_schema", "test_faketensor")
    assert torch.library.opcheck(overload, arguments()[name], test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


@given(st.integers(0, 2**16), st.sampled_from((1, 3, 17)), st.sampled_from((8, 40)))
def test_a_layer_on_codes_is_exact_in_any_order(seed: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    drawn = [finite[torch.randint(0, 254, shape, generator=generator)] for shape in ((2, inputs), (outputs, inputs))]
    left, right = (each.view(torch.float8_e4m3fn) for each in drawn)
    one = torch.tensor(1.0)
    got = arithmetic.linear_fp8(left, right, None, one, one, torch.float64)
    order = torch.randperm(inputs, generator=generator)
    again = arithmetic.linear_fp8(left[:, order], right[:, order], None, one, one, torch.float64)
    assert torch.equal(got, again)
    terms = [
        Fraction(E4M3.values[a]) * Fraction(E4M3.values[b])
        for a, b in zip(*(each[0].tolist() for each in drawn), strict=True)
    ]
    assert Fraction(float(got[0, 0])) == sum(terms)


def test_the_separate_quantise_is_the_table(alone: RankContext) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for scale in (1.0, 0.02, 3.7):
        step = torch.tensor(scale)
        got, _ = own.static_quantize_e4m3_per_tensor(every, step)
        scaled = (every.float() * (1.0 / step)).double()
        wanted = E4M3.encode(scaled)
        known = ~scaled.isnan()
        assert torch.equal(got.view(torch.uint8)[known], wanted[known])
        assert bool(E4M3.decode(got.view(torch.uint8))[~known].isnan().all())


def test_norm_flavours_round_once_or_twice() -> None:
    x, weight = activations(64, 256), activations(256)
    once, twice = own.triton_rms_norm(x, weight, 1e-5), own.torch_rmsnorm(x, weight, 1e-5)
    assert torch.equal(once, own.flashinfer_rms_norm(x, weight, 1e-5))
    share = float((once != twice).float().mean())
    assert 0.1 < share < 0.5
    gemma = own.gemma_rms_norm(x, weight - weight, 1e-5)
    assert torch.equal(gemma, own.triton_rms_norm(x, torch.ones_like(weight), 1e-5))


def test_a_layer_on_codes_needs_a_result_dtype(alone: RankContext) -> None:
    scale = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="without out_dtype or bias"):
        own.fp8_linear(codes(2, 8), codes(4, 8), None, scale, scale)
    with pytest.raises(RuntimeError, match=r"fp8_prequant_linear got torch\.bfloat16 input"):
        own.fp8_prequant_linear(activations(2, 8), codes(4, 8), None, scale, scale)
    with pytest.raises(RuntimeError, match="out_dtype='brain'"):
        own.fp8_linear(codes(2, 8), codes(4, 8), None, scale, scale, "brain")


def test_a_collective_outside_a_group_is_refused() -> None:
    with pytest.raises(RuntimeError, match="ran outside"):
        own.all_reduce(activations(2, 8), "AUTO")


def test_a_strategy_with_a_threshold_is_resolved_at_each_call() -> None:
    assert resolve("ONESHOT<=128", 128) is Strategy.ONESHOT
    assert resolve("ONESHOT<=128", 129) is None
    assert resolve("NCCL", 1) is None
    with pytest.raises(RuntimeError, match="got strategy 'LOWPRECISION'"):
        resolve("LOWPRECISION", 1)


def test_the_backend_sees_all_tokens_of_a_batch(alone: RankContext) -> None:
    x, weight = activations(2, 3, 16), activations(16)
    norm, residual = own.ar_residual_norm(x, x, weight, 1e-5, "AUTO")
    flat = own.ar_residual_norm(x.reshape(6, 16), x.reshape(6, 16), weight, 1e-5, "AUTO")
    assert norm.shape == residual.shape == x.shape
    assert torch.equal(norm.reshape(6, 16), flat[0])
    assert sum(alone.calls.values()) == 2
