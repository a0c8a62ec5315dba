"""The exported graph of the golden model, fused by the project's passes, as an arm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, UNFUSED
from fusecheck.eval.engine import Engine, Next
from fusecheck.eval.worker import EvalRank
from fusecheck.property_tests.accuracy.tiny_models import CONFIG, SoloRank, write_checkpoint


def score(folder: Path, name: str, rows: list[list[int]]) -> tuple[list[np.ndarray], int]:
    """The log-probabilities after each row on two ranks, and the kernel's calls on both."""
    found: dict[int, Next] = {}
    with Engine(folder, 2, device="cpu", vocabulary=CONFIG["vocab_size"], timeout=100) as engine:
        engine.open_arm(FUSED, name, engine.plan, 64)
        engine.last(rows, [[]] * len(rows), lambda i, after: found.__setitem__(i, after))
        counters = engine.close_arm()
    return [found[i].table.astype(np.float64) for i in range(len(rows))], sum(c["calls"] for c in counters)


def test_the_graph_answers_as_the_model_written_by_hand_and_its_kernel_ran(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 2000, n).tolist() for n in (30, 21, 12)]
    graph, calls = score(folder, "fusecheck.eval.exported:emulated", rows)
    hand, expected = score(folder, "emulated", rows)
    # Two sums over ranks a layer, on two ranks, in one batch.
    assert calls == expected == 2 * CONFIG["num_hidden_layers"] * 2
    divergence = [float((np.exp(p) * (p - q)).sum()) for p, q in zip(hand, graph, strict=True)]
    assert max(divergence) < 0.05


def test_a_lone_rank_has_nothing_to_fuse(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rank = EvalRank(SoloRank(), str(folder))
    ids = np.arange(60).reshape(2, 30) + 300
    tables = {}
    for name in ("unfused", "fusecheck.eval.exported:emulated"):
        rank.open_arm(UNFUSED, name, 64)
        scored = rank.score_last(ids, np.array([30, 20]), ids[:, :1])
        assert scored is not None
        tables[name] = scored[0].astype(np.float64)
        calls = rank.close_arm()["calls"]
    assert calls == 0
    one, other = tables.values()
    assert float((np.exp(one) * (one - other)).sum(-1).max()) < 0.05


def test_generation_is_refused(tmp_path: Path) -> None:
    rank = EvalRank(SoloRank(), str(write_checkpoint(tmp_path)))
    rank.open_arm(FUSED, "fusecheck.eval.exported:emulated", 64)
    with pytest.raises(UsageError, match="choose multiple-choice tasks"):
        rank.begin(np.ones((1, 4), np.int64), np.array([4]), 9)
