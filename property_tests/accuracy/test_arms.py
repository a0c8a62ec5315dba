"""The arms of a run: the same questions in all, each kernel where it belongs, and what they leave on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, NOISE, ORACLE, UNFUSED, read_arm_record
from fusecheck.eval.asked import Asked
from fusecheck.eval.fold import fold
from fusecheck.eval.run import ARMS, run_arms
from fusecheck.property_tests.accuracy.tiny_models import CONFIG, write_checkpoint

pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def arms(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("arms")
    told: list[str] = []
    asked = Asked(folder, tasks=["golden_mmlu", "golden_gsm8k"], limit=14)
    runs = run_arms(asked, ARMS, out, told.append)
    assert [run.name for run in runs] == list(ARMS)
    last = {line.partition(":")[0]: line for line in told}
    # The word problems are answered once, and once more their reference answers are scored.
    assert list(last.values())[1:] == [f"arm {arm}, 28 questions: 42 texts answered" for arm in ARMS]
    return {run.name: run.folder for run in runs}


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_arms_ask_the_same_questions_and_the_kernels_ran_where_they_belong(arms: dict[str, Path]) -> None:
    hashes, records = {}, {}
    for name, folder in arms.items():
        rows = samples(folder, "golden_gsm8k") + samples(folder, "golden_mmlu_addition")
        hashes[name] = [(r["doc_id"], r["filter"], r["doc_hash"], r["prompt_hash"], r["target_hash"]) for r in rows]
        record = read_arm_record(folder)
        assert record is not None
        records[name] = record
    assert len({json.dumps(h) for h in hashes.values()}) == 1
    # 14 generated answers, each seen through both filters, and 1 of 14 questions on addition.
    assert len(hashes[ORACLE]) == 2 * 14 + 1
    assert {n: (r.fused_calls > 0, r.unfused_calls > 0) for n, r in records.items()} == {
        ORACLE: (False, False),
        UNFUSED: (False, True),
        FUSED: (True, False),
        NOISE: (False, True),
    }
    assert records[FUSED].fused_calls == records[UNFUSED].unfused_calls
    assert records[NOISE].batch_size != records[UNFUSED].batch_size
    assert len({(r.weights_digest, r.tokenizer_digest) for r in records.values()}) == 1
    assert all(r.finite and r.response_cache is None for r in records.values())


def test_arms_keep_full_log_probabilities_and_forced_answers(arms: dict[str, Path]) -> None:
    for name, folder in arms.items():
        kept = np.load(folder / "logprobs_golden_mmlu_flags.npz")
        rows = samples(folder, "golden_mmlu_flags")
        assert kept["logprob"].shape == (len(rows), CONFIG["vocab_size"])
        assert kept["doc_id"].tolist() == [r["doc_id"] for r in rows]
        assert np.abs(np.exp(kept["logprob"].astype(np.float64)).sum(1) - 1).max() < 1e-5
        for row, gold, table in zip(rows, kept["gold"], kept["logprob"], strict=True):
            assert float(row["filtered_resps"][int(row["target"])][0]) == pytest.approx(float(table[gold]), abs=1e-6)
        forced = np.load(folder / "forced_golden_gsm8k.npz")
        assert set(forced["doc_id"]) == {r["doc_id"] for r in samples(folder, "golden_gsm8k")}
        assert (forced["position"] == 0).sum() == 14
        assert np.isfinite(forced["gold_logprob"]).all(), name


def test_the_arms_differ_in_their_kernel_only_a_little(arms: dict[str, Path]) -> None:
    tables = {n: np.load(f / "logprobs_golden_mmlu_trade.npz")["logprob"].astype(np.float64) for n, f in arms.items()}

    def divergence(one: str, other: str) -> float:
        p, q = tables[one], tables[other]
        return float((np.exp(p) * (p - q)).sum(1).mean())

    assert 0 < divergence(ORACLE, FUSED) < 0.5
    assert divergence(UNFUSED, FUSED) < divergence(ORACLE, UNFUSED)


def test_an_unknown_arm_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown arm 'fusd'"):
        run_arms(Asked(folder, 1, tasks=["golden_gsm8k"], limit=1), ["fusd"], tmp_path)


def test_folding_keeps_probability_and_lowers_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.log_softmax(torch.randn(2, 3, 10_000, generator=generator), -1)
    folded_p, folded_q = fold(p).double(), fold(q).double()
    assert folded_p.shape == (3, 4096)
    assert float((folded_p.exp().sum(-1) - 1).abs().max()) < 1e-5
    for column in (7, 4000):
        expected = p[:, column::4096].double().exp().sum(-1).log()
        assert float((folded_p[:, column] - expected).abs().max()) < 1e-5
    assert torch.equal(fold(p[:, :4096]), p[:, :4096])
    whole = (p.double().exp() * (p.double() - q.double())).sum(-1)
    lower = (folded_p.exp() * (folded_p - folded_q)).sum(-1)
    assert bool((lower > 0).all())
    assert bool((lower <= whole).all())
