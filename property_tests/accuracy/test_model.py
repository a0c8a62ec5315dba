"""The evaluated model computes what Hugging Face's computes, and the arms differ in one thing only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusecheck.backends import backend
from fusecheck.eval.arm import FUSED, ORACLE, UNFUSED
from fusecheck.eval.checkpoint import Checkpoint, LinearWeights
from fusecheck.eval.engine import BATCHES, CPU_MULTIPLIES, BatchPlan, Engine, Generated, batch_plans, pools
from fusecheck.eval.linear import Codes, Linear, widen
from fusecheck.eval.llama import Cache, Llama
from fusecheck.eval.paths import KernelPath, OraclePath, choose_op
from fusecheck.eval.recipe import Form
from fusecheck.eval.worker import EvalRank
from fusecheck.interface import FusionOp, Limits, RankInputs
from fusecheck.property_tests.accuracy.tiny_models import (
    CONFIG,
    SoloRank,
    hugging_face_model,
    random_tensors,
    write_checkpoint,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3.1": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}
FLOAT32_NOISE = 2e-4
"""Logits of size 10 in float32, sums of a few hundred terms in another order: far below, a wrong formula far above."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path) -> Llama:
    with Checkpoint(folder) as checkpoint:
        return Llama(checkpoint, SoloRank())


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def prompt_logits(model: Llama, path: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model.forward(path, ids, torch.zeros(len(ids), dtype=torch.int64)))


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors", "fp8", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_agrees_with_hugging_face_for_every_family_and_layout(
    family: str, layout: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, layout=layout, **FAMILIES[family])
    theirs = hugging_face_model({**CONFIG, **FAMILIES[family]}, load_file(folder / "model.safetensors"))
    ids = tokens(2, 300)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    got = prompt_logits(load(folder), OraclePath(SoloRank()), ids)
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() < FLOAT32_NOISE


@pytest.mark.parametrize("arm", [ORACLE, UNFUSED])
def test_decoding_step_by_step_gives_the_logits_of_the_whole_text(arm: str, tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path))
    rank = SoloRank()
    kernel = backend("unfused").open(rank, Limits(4096, 64, torch.bfloat16))
    path = OraclePath(rank) if arm == ORACLE else KernelPath(kernel, torch.bfloat16)
    ids, prompt = tokens(3, 12), 7
    lengths = torch.tensor([7, 4, 6])
    whole = prompt_logits(model, path, ids)
    cache = Cache(model.shape.layers)
    model.forward(path, ids[:, :prompt], torch.zeros(3, dtype=torch.int64), cache, capacity=16)
    worst = 0.0
    for step in range(4):
        # Row r continues after its own length, over the padding that the prompt left in the cache.
        place = lengths + step
        fed = ids[torch.arange(3), place][:, None]
        logits = model.logits(model.forward(path, fed, place, cache))[:, 0]
        worst = max(worst, float((logits - whole[torch.arange(3), place]).abs().max()))
    # In FP8 another order of a float32 sum can move a code; the oracle has no codes to move.
    assert worst < (FLOAT32_NOISE if arm == ORACLE else 0.5)


def test_padding_on_the_right_does_not_reach_the_answer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rank = EvalRank(SoloRank(), str(folder))
    rank.open_arm(UNFUSED, "unfused", 4096)
    ids = tokens(2, 9).numpy()
    lengths = np.array([9, 5])
    first = rank.score_last(ids, lengths, ids[:, :2])
    ids[1, 5:] = 77
    again = rank.score_last(ids, lengths, ids[:, :2])
    assert first is not None
    assert again is not None
    assert [part.tolist() for part in first] == [part.tolist() for part in again]


def test_fp8_arms_differ_from_the_oracle_but_stay_close(tmp_path: Path) -> None:
    rank = EvalRank(SoloRank(), str(write_checkpoint(tmp_path)))
    ids, lengths = tokens(8, 40).numpy(), np.full(8, 40)
    tables = {}
    for arm, name in ((ORACLE, ""), (UNFUSED, "unfused"), (FUSED, "emulated")):
        rank.open_arm(arm, name, 4096)
        scored = rank.score_last(ids, lengths, ids[:, :1])
        assert scored is not None
        table, best, picked = scored
        tables[arm] = table
        assert best.tolist() == table.argmax(-1).tolist()
        assert picked[:, 0].tolist() == table[np.arange(8), ids[:, 0]].tolist()
        counters = rank.close_arm()
        assert counters["finite"]
        # Two joins a layer, two layers, one batch; the oracle calls no kernel.
        assert counters["calls"] == (0 if arm == ORACLE else 4)
        assert counters["rows"] == (0 if arm == ORACLE else 4 * 8 * 40)

    def divergence(other: str) -> float:
        p, q = tables[ORACLE].astype(np.float64), tables[other].astype(np.float64)
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    assert 1e-6 < divergence(UNFUSED) < 0.2
    assert 1e-6 < divergence(FUSED) < 0.2
    assert divergence(FUSED) < 2 * divergence(UNFUSED)


def test_two_ranks_answer_as_one_does_within_rounding(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (30, 12, 21)]
    tables: dict[int, list[np.ndarray[Any, Any]]] = {}
    for world_size in (1, 2):
        found: dict[int, np.ndarray[Any, Any]] = {}
        with Engine(folder, world_size, device="cpu", vocabulary=CONFIG["vocab_size"], timeout=60) as engine:
            engine.open_arm(ORACLE, "", engine.plan, 64)
            engine.last(rows, [[]] * 3, lambda i, after, kept=found: kept.__setitem__(i, after.table))  # type: ignore[misc]
            answers = engine.generate(rows, 6, lambda _: False)
            engine.close_arm()
        assert all(len(a.tokens) == 6 and a.truncated for a in answers)
        tables[world_size] = [found[i] for i in range(3)]
    for one, two in zip(tables[1], tables[2], strict=True):
        assert np.abs(one - two).max() < FLOAT32_NOISE


def test_rows_of_several_batches_decode_together_as_they_do_by_themselves(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (30, 12, 21, 9, 9)]
    said: list[list[Generated]] = []
    with Engine(folder, 1, device="cpu", vocabulary=CONFIG["vocab_size"], timeout=60) as engine:
        for pool, room in ((0, 0), (5, 10**6), (5, 3 * 36), (4, 10**6)):
            engine.open_arm(ORACLE, "", BatchPlan(2, 64, pool), 64)
            with mock.patch.object(engine, "call", rooms(engine.call, room)):
                said.append(engine.generate(rows, 6, lambda new: new[-1] % 3 == 0))
            engine.close_arm()
    assert said[1:] == [said[0]] * 3
    assert {len(each.tokens) for each in said[0]} > {6}


def rooms(call: Callable[..., list[Any]], room: int) -> Callable[..., list[Any]]:
    """A GPU's memory on a machine without one."""
    return lambda method, *arguments: [room] if method == "room" else call(method, *arguments)


@pytest.mark.parametrize(
    ("pool", "positions", "together"),
    [(0, 0, [2, 2, 1]), (5, 10**6, [5]), (4, 10**6, [4, 1]), (5, 4 * 36, [4, 1]), (5, 36, [2, 2, 1])],
)
def test_as_many_rows_decode_together_as_the_plan_and_the_memory_allow(
    pool: int, positions: int, together: list[int]
) -> None:
    made = list(pools([30, 12, 21, 9, 9], BatchPlan(2, 64, pool), 6, positions))
    assert [sum(map(len, each)) for each in made] == together
    assert sorted(i for each in made for batch in each for i in batch) == [0, 1, 2, 3, 4]


def test_the_kernel_gets_each_ranks_share_and_the_checkpoints_scale(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    model = load(folder)
    tensors = load_file(folder / "model.safetensors")
    seen: list[RankInputs] = []
    path = KernelPath(backend("unfused").open(SoloRank(), Limits(64, 64, torch.bfloat16)), torch.bfloat16)
    path.tap = seen.append
    model.forward(path, tokens(1, 5), torch.zeros(1, dtype=torch.int64))
    assert len(seen) == 4
    gammas = [
        "layers.0.post_attention_layernorm",
        "layers.1.input_layernorm",
        "layers.1.post_attention_layernorm",
        "norm",
    ]
    for inputs, name in zip(seen, gammas, strict=True):
        assert torch.equal(inputs.gamma, tensors[f"model.{name}.weight"])
        assert inputs.partial.dtype == inputs.residual.dtype == torch.bfloat16
    assert seen[0].scale == tensors["model.layers.0.mlp.gate_proj.input_scale"]
    assert seen[1].scale == tensors["model.layers.1.self_attn.q_proj.input_scale"]


def test_the_op_returns_the_norm_only_where_a_reader_needs_it(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path))
    layer = model.layers[0]
    assert choose_op(()) is FusionOp.RESIDUAL_RMS_NORM
    assert choose_op((layer.gate, layer.up)) is FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8
    # v_proj has another input scale than q_proj in these checkpoints.
    assert choose_op((layer.q, layer.k, layer.v)) is FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8


def test_widening_gives_every_code_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    assert torch.equal(widen(codes).nan_to_num(500.0), codes.float().nan_to_num(500.0))
    assert torch.equal(widen(codes.t()).nan_to_num(500.0), codes.float().t().nan_to_num(500.0))


def test_a_product_of_codes_is_the_exact_sum_rounded_once() -> None:
    tensors = random_tensors(CONFIG, 3, quantised=True)
    name = "model.layers.0.mlp.down_proj"
    scale = float(tensors[f"{name}.weight_scale"])
    weights = LinearWeights(tensors[f"{name}.weight"], Form(), torch.full((1, 1), scale), 0.5)
    linear = Linear(weights, torch.device("cpu"), torch.bfloat16)
    codes = (torch.randn(16, 128, generator=torch.Generator().manual_seed(1)) * 50).to(torch.float8_e4m3fn)
    exact = codes.double() @ tensors[f"{name}.weight"].double().t() * scale * 0.5
    rounded = exact.to(torch.bfloat16)
    got = linear.from_codes(Codes(codes, torch.tensor([0.5]), 0.5))
    # A float32 sum can fall on the other side of a rounding boundary, by one bf16 step and rarely.
    apart = got != rounded
    assert apart.float().mean() < 0.02
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 2e-5).all()


def test_a_large_model_goes_through_a_cpu_in_batches_that_are_done_in_time() -> None:
    usual, large = (batch_plans("cpu", None, multiplies)[0] for multiplies in (10**7, 1_310_000_000))
    assert usual == BATCHES["cpu"][0]
    assert large.rows == 10
    assert large.tokens * 1_310_000_000 <= CPU_MULTIPLIES
    assert batch_plans("cpu", None, 10**12)[0].rows == 4
    assert batch_plans("cuda", None, 1_310_000_000) == BATCHES["cuda"]
    assert batch_plans("cuda", 1024)[0] == BatchPlan(1024, 131072, 4096)


def test_the_products_of_a_token_are_the_elements_of_the_linears(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.shape.multiplies == sum(rows * columns for _, rows, columns in checkpoint.linears())
