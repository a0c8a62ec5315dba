"""`fusecheck graph`: verdicts, exit codes, what it writes, and one line for every wrong call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusecheck.graph.build import build
from fusecheck.graph.plan import GraphPlan, SitePlan
from fusecheck.graph.structure import copy_graph
from fusecheck.property_tests.suite import command_line


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `fusecheck graph` with these arguments."""
    return command_line.run(monkeypatch, "graph", *arguments)


def test_the_own_pass_passes_and_leaves_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.json"
    options = ("--only", "random,models", "--random", 4, "--model", "decoder", "--run-dir", tmp_path / "run")
    assert run(monkeypatch, *options, "--json", copy) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == json.loads(copy.read_text())
    assert (result["schema"], result["command"], result["verdict"], result["findings"]) == (1, "graph", "pass", [])
    assert result["summary"]["graphs"] == 5
    assert result["summary"]["elements"] > 0
    assert "graph: PASS" in capsys.readouterr().out


def test_a_faulty_pass_fails_and_its_replay_line_fails_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty = ("--pass", "fusecheck.graph.faulty_quant:FirstScale.apply", "--run-dir", tmp_path)
    plan = '{"sites":[{"readers":[{},{"scale":4}]},{}]}'
    assert run(monkeypatch, *faulty, "--graph", plan) == 1
    printed = capsys.readouterr().out
    assert "arguments: given:" in printed
    assert f"--graph '{plan}'" in printed
    finding = json.loads((tmp_path / "result.json").read_text())["findings"][0]
    assert run(monkeypatch, *faulty, "--graph", finding["graph"]) == 1
    assert run(monkeypatch, "--graph", finding["graph"], "--run-dir", tmp_path) == 0


def test_an_exported_program_is_a_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = build(GraphPlan(sites=(SitePlan(), SitePlan()), dynamic=False), 0, 2)
    gm = copy_graph(built.module)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(gm, built.inputs(4), strict=False), path)
    assert run(monkeypatch, "--graph", path, "--run-dir", tmp_path) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["summary"]["elements"] > 0


def test_a_policy_from_a_file_leaves_open_graphs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "policy.yaml"
    config.write_text(
        "transforms:\n  fuse_allreduce_residual_rmsnorm_quant_fp8:\n    enabled: true\n"
        "    policy: {kind: per_batch_size, batch_sizes: [4]}\n"
    )
    options = ("--config", config, "--run-dir", tmp_path, "--no-export")
    for plan, operation in (
        ('{"sites":[{},{}]}', "RESIDUAL_RMS_NORM"),
        ('{"dynamic":false}', "RESIDUAL_RMS_NORM_QUANT_FP8"),
    ):
        assert run(monkeypatch, *options, "--graph", plan) == 0
        assert set(json.loads((tmp_path / "result.json").read_text())["summary"]["sites"]) == {operation}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pass", "nowhere"), "pass 'nowhere': expected package.module:function"),
        (("--tp", 3), "--tp 3, expected one of 1, 2, 4"),
        (("--after", "all"), "--after 'all', expected norm or none"),
        (("--produces", "fp4"), "--produces 'fp4', expected quant or norm"),
        (("--only", "some"), "--only 'some', expected one of: rows, random, models"),
        (("--dialect", "latin"), "unknown dialect 'latin'"),
        (("--model", "gpt", "--only", "models"), "unknown model 'gpt'"),
        (("--graph", "model.onnx"), "is neither a finding's JSON line nor a .pt2 file"),
        (("--graph", "absent.pt2"), "model file absent.pt2 does not exist"),
        (("--graph", '{"sites":[{"colour":"red"}]}'), "not a graph plan"),
        (("--backend", "no_such"), "no_such"),
        (("--case-timeout", 0), "--case-timeout 0, expected more than 0"),
        (("--config", "absent.yaml"), "cannot read absent.yaml"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_two(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    assert run(monkeypatch, *arguments, "--run-dir", tmp_path) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_file_that_is_not_a_graph_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pt2"
    path.write_bytes(b"not a program")
    assert run(monkeypatch, "--graph", path, "--run-dir", tmp_path) == 2
    assert "weights.pt2 is not a graph of torch.export.save" in capsys.readouterr().err


def test_no_graph_is_inconclusive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "--only", "random", "--random", 0, "--run-dir", tmp_path) == 3
