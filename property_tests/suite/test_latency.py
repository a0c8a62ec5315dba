"""What the latency command makes of times: the gain, the break-even, the prediction, the policy and the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fusecheck import golden
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.graph.config import QUANT_PASS, PolicyKind, load_transforms
from fusecheck.inputs.models import model
from fusecheck.latency import analysis, command
from fusecheck.latency.analysis import Timing
from fusecheck.latency.worker import slowest

PUBLISHED = analysis.PUBLISHED["llama-3.1-8b"]
RECORDED = Path(golden.__path__[0]) / "h200x2" / "latency"


def _timings(gains: dict[int, float]) -> list[dict[str, object]]:
    """Made-up times: the fused call takes 10 us, the separate ones 10 us and the gain."""
    rows = []
    for tokens, gain in gains.items():
        rows += [Timing(tokens, "fused oneshot", (10.0, 10.0)), Timing(tokens, "fused twoshot", (12.0, 12.0))]
        rows += [Timing(tokens, "norm oneshot, quantise", (10.0 + gain,) * 2), Timing(tokens, "unfused", (20.0, 20.0))]
    return [row.to_record() for row in rows]


def test_a_site_takes_the_best_of_each_way() -> None:
    site = analysis.sites(_timings({16: 2.5}))[16]
    assert (site.fused, site.separate, site.unfused, site.gain) == (10.0, 12.5, 20.0, 2.5)


def test_a_token_count_without_one_of_the_ways_is_refused() -> None:
    rows = [row for row in _timings({16: 2.5}) if row["path"] != "unfused"]
    with pytest.raises(UsageError, match="no path that begins with 'unfused'"):
        analysis.sites(rows)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [({1: 2.0, 16: 1.0}, None), ({1: 2.0, 16: 1.0, 64: -1.0, 256: 3.0}, 16), ({1: -1.0, 16: 1.0}, 0)],
)
def test_break_even_is_the_last_count_before_the_first_loss(gains: dict[int, float], expected: int | None) -> None:
    assert analysis.threshold(analysis.sites(_timings(gains))) == expected


def test_the_proposed_policy_is_what_the_graph_passes_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    for gains, enabled, kind, most in (
        ({1: 2.0, 64: 1.0}, True, PolicyKind.ALWAYS, None),
        ({1: 2.0, 64: -1.0}, True, PolicyKind.PER_RANGE, 1),
        ({1: -2.0}, False, PolicyKind.ALWAYS, None),
    ):
        path.write_text(analysis.policy_yaml(analysis.sites(_timings(gains))))
        quant = load_transforms(path)[QUANT_PASS]
        assert (quant.enabled, quant.policy.kind, quant.policy.max_tokens) == (enabled, kind, most)


def test_a_step_changes_by_the_gain_of_every_site_but_the_last_norm() -> None:
    rows = analysis.prediction(analysis.sites(_timings({1: 2.0, 256: 2.0})), model("llama-3.1-8b"), [1, 256], PUBLISHED)
    assert [row["predicted_ms"] for row in rows] == [-0.126, -0.126]
    assert [row["published_ms"] for row in rows] == [-0.10, 2.91]
    words = analysis.reading(rows)
    assert len(words) == 1
    assert "+46.2 us a site" in words[0]


def test_a_concurrency_that_was_not_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="concurrency 2 was not measured"):
        analysis.prediction(analysis.sites(_timings({1: 2.0})), model("llama-3.1-8b"), [2], PUBLISHED)


@pytest.mark.parametrize("name", ["result.json", "pdl.json"])
def test_on_the_h200_pair_fusing_pays_at_every_count_and_predicts_the_published_sign_up_to_16(name: str) -> None:
    timings = json.loads((RECORDED / name).read_text())["summary"]["timings"]
    found = analysis.sites(timings)
    assert analysis.threshold(found) is None
    assert analysis.regressions(found, 0.02) == []
    rows = analysis.prediction(found, model("llama-3.1-8b"), [1, 2, 16, 256], PUBLISHED)
    assert all(-0.15 < row["predicted_ms"] < -0.03 for row in rows)
    assert len(analysis.reading(rows)) == 1


def test_the_slowest_rank_decides_each_replay() -> None:
    assert slowest([{"a": [1.0, 5.0]}, {"a": [3.0, 2.0]}]) == {"a": [3.0, 5.0]}


def test_the_gate_fails_where_the_fused_path_is_slower_by_more_than_allowed(tmp_path: Path) -> None:
    app = typer.Typer()
    command.register(app)
    recorded = tmp_path / "times.json"
    timings = _timings({1: 1.0, 2: 1.0, 16: 1.0, 256: -0.5})
    recorded.write_text(json.dumps({"summary": {"timings": timings, "mode": "eager", "backend": "mine"}}))
    for allowed, code in (("2%", 1), ("0.06", 0)):
        run = CliRunner().invoke(
            app, ["--from", str(recorded), "--max-regression", allowed, "--run-dir", str(tmp_path / allowed)]
        )
        assert run.exit_code == code, run.output
    assert (tmp_path / "2%" / "latency.svg").read_text().startswith("<?xml")
    result = json.loads((tmp_path / "2%" / "result.json").read_text())
    assert result["verdict"] == "fail"
    assert result["summary"]["break_even_tokens"] == 16
    assert [result["summary"][name] for name in ("mode", "backend")] == ["eager", "mine"], "those of the times"


def test_without_gpus_the_measurement_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(Inconclusive, match="0 CUDA GPUs here, 2 needed"):
        command.measure(command.Setting("flashinfer", 2, 64), [1])


@pytest.mark.parametrize(
    "op",
    ["RESIDUAL_RMS_NORM", "ALL_REDUCE", "RESIDUAL_RMS_NORM_QUANT_NVFP4", "RESIDUAL_RMS_NORM_QUANT_GROUP_FP8_PACKED_48"],
)
def test_an_op_that_leaves_no_quantiser_to_a_kernel_of_its_own_is_refused_by_name(op: str) -> None:
    app = typer.Typer()
    command.register(app)
    with pytest.raises(UsageError, match=f"--op {op}, expected an all-reduce with a norm and a quantiser of static"):
        CliRunner().invoke(app, ["--op", op], catch_exceptions=False)


def test_every_published_figure_is_of_static_fp8_and_stands_beside_nothing_else(tmp_path: Path) -> None:
    app = typer.Typer()
    command.register(app)
    recorded = json.loads((RECORDED / "result.json").read_text())
    for op, shown in ((command.STATIC, True), ("RESIDUAL_RMS_NORM_QUANT_DYNAMIC_FP8", False)):
        recorded["summary"]["op"] = op
        path = tmp_path / "times.json"
        path.write_text(json.dumps(recorded))
        printed = CliRunner().invoke(app, ["--from", str(path), "--run-dir", str(tmp_path / op)]).stdout
        assert ("published" in printed) == shown
