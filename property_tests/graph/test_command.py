"""`fusecheck graph`: verdicts, exit codes, what it writes, and one line for every wrong call."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

from fusecheck.graph.build import build
from fusecheck.graph.plan import GraphPlan, SitePlan
from fusecheck.graph.structure import copy_graph
from fusecheck.property_tests.suite import command_line

pytestmark = pytest.mark.usefixtures("borrowed_ranks")
LAPSES = "fusecheck.property_tests.graph.lapses"
ALPHA_IGNORED = ("--pass", f"{LAPSES}_of_steps:AlphaIgnored.apply", "--after", "none", "--produces", "norm")


run, told, refused = (
    partial(command_line.run, "graph"),
    partial(command_line.told, "graph"),
    partial(command_line.refused, "graph"),
)


def test_the_own_pass_passes_and_leaves_its_files(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    options = ("--only", "random,models", "--random", 4, "--model", "decoder", "--run-dir", tmp_path / "run")
    code, said = told(*options, "--json", copy)
    assert (code, "graph: PASS" in said) == (0, True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == json.loads(copy.read_text())
    assert (result["schema"], result["command"], result["verdict"], result["findings"]) == (1, "graph", "pass", [])
    assert result["summary"]["graphs"] == 5
    assert result["summary"]["elements"] > 0


def test_a_faulty_pass_fails_and_its_replay_line_fails_again(tmp_path: Path) -> None:
    faulty = ("--pass", "fusecheck.graph.faulty_quant:FirstScale.apply", "--run-dir", tmp_path)
    plan = '{"sites":[{"readers":[{},{"scale":4}]},{}]}'
    code, printed = told(*faulty, "--graph", plan)
    assert code == 1
    assert "arguments: given:" in printed
    assert f"--graph '{plan}'" in printed
    finding = json.loads((tmp_path / "result.json").read_text())["findings"][0]
    assert run(*faulty, "--graph", finding["graph"]) == 1
    assert run("--graph", finding["graph"], "--run-dir", tmp_path) == 0


def exported(tmp_path: Path, *sites: SitePlan) -> Path:
    """A user's own graph in a file."""
    built = build(GraphPlan(sites=sites, dynamic=False), 0, 2)
    gm = copy_graph(built.module)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(gm, built.inputs(4), strict=False), path)
    return path


def test_an_exported_program_is_a_graph_of_which_something_must_be_judged(tmp_path: Path) -> None:
    path = exported(tmp_path, SitePlan(), SitePlan())
    options = ("--graph", path, "--run-dir", tmp_path, "--no-export")
    nothing = ("--pass", f"{LAPSES}:nothing", "--after", "none")
    assert run(*options, "--expect", "sites=2,all_reduce=0") == 0
    assert json.loads((tmp_path / "result.json").read_text())["summary"]["kernel_elements"] > 0
    code, said = told(*options, *nothing)
    assert (code, "nothing was fused; say --expect sites=0 if that is right" in said) == (3, True)
    assert run(*options, *nothing, "--expect", "sites=0") == 0
    code, said = told(*options, *nothing, "--expect", "sites=2")
    assert (code, "the graph has 0 sites, --expect says 2" in said) == (1, True)
    other = refused(*options, "--dialect", "vllm")
    assert "has no sum over ranks of --dialect vllm: it is of --dialect fusecheck" in other


def test_a_scaled_add_that_is_fused_as_a_plain_one_fails_on_a_users_graph(tmp_path: Path) -> None:
    path = exported(tmp_path, SitePlan(add="alpha"), SitePlan())
    code, said = told(*ALPHA_IGNORED, "--graph", path, "--run-dir", tmp_path, "--no-export")
    assert (code, "kernel: model.pt2" in said) == (1, True)


def test_a_known_gap_is_green_with_its_reason_and_an_unused_waiver_is_named(tmp_path: Path) -> None:
    options = (*ALPHA_IGNORED, "--only", "rows", "--rows", "F1,N2-alpha", "--run-dir", tmp_path, "--no-export")
    assert run(*options) == 1
    file = tmp_path / "waivers.yaml"
    gaps = [("sites:N2-alpha", "issue 12"), ("kernel:N2-alpha", "issue 12"), ("meta:F1", "was mended")]
    file.write_text("".join(f"- waive: {text}\n  why: {why}\n" for text, why in gaps))
    code, shown = told(*options, "--waivers", file)
    assert code == 0
    assert "unused waiver meta:F1: nothing had to be accepted" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    assert {finding["waived"] for finding in result["findings"]} == {"issue 12"}
    assert result["summary"]["rows_waived"] == ["N2-alpha"]


def test_a_replay_line_is_the_whole_question_with_what_came_before(tmp_path: Path) -> None:
    plans = ["{}", '{"sites":[{},{}]}', '{"seed":1}']
    options = ("--pass", f"{LAPSES}:remembers", "--after", "none", "--produces", "norm", "--no-export")
    graphs = [word for plan in plans for word in ("--graph", plan)]
    assert run(*options, *graphs, "--run-dir", tmp_path) == 1
    (finding,) = json.loads((tmp_path / "result.json").read_text())["findings"]
    words = shlex.split(finding["replay"])[2:]
    assert words[-4:] == ["--graph", plans[0], "--graph", plans[2]]
    assert {"--dialect", "--device", "--backend", "--tp", "--no-export"} < set(words)
    assert run(*words, "--run-dir", tmp_path) == 1
    assert run(*words[:-4], *words[-2:], "--run-dir", tmp_path) == 0


def test_a_policy_from_a_file_leaves_open_graphs_alone(tmp_path: Path) -> None:
    config = tmp_path / "policy.yaml"
    config.write_text(
        "transforms:\n  fuse_allreduce_residual_rmsnorm_quant_fp8:\n    stage: post_load_fusion\n    enabled: true\n"
        "    policy: {kind: per_batch_size, batch_sizes: [4]}\n"
    )
    options = ("--config", config, "--run-dir", tmp_path, "--no-export")
    for plan, operation in (
        ('{"sites":[{},{}]}', "RESIDUAL_RMS_NORM"),
        ('{"dynamic":false}', "RESIDUAL_RMS_NORM_QUANT_FP8"),
    ):
        assert run(*options, "--graph", plan) == 0
        assert set(json.loads((tmp_path / "result.json").read_text())["summary"]["sites"]) == {operation}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pass", "nowhere"), "pass 'nowhere': expected package.module:function"),
        (("--tp", 3), "--tp 3, expected one of 1, 2, 4"),
        (("--after", "all"), "--after 'all', expected norm or none"),
        (("--produces", "fp4"), "--produces 'fp4', expected norm, quant, one-sum, all, or some of fp8, dynamic_fp8"),
        (("--produces", "one-sum"), "--produces one-sum --after norm, expected --after none"),
        (("--only", "some"), "--only 'some', expected one of: rows, random, models"),
        (("--dialect", "latin"), "unknown dialect 'latin'"),
        (("--model", "gpt", "--only", "models"), "unknown model 'gpt'"),
        (("--model", "decoder:fp5", "--only", "models"), "quantiser='fp5', expected one of: none, static-fp8"),
        (
            ("--graph", '{"model":"decoder","quantiser":"group-fp8-48"}'),
            "hidden=64, expected a multiple of group-fp8-48",
        ),
        (("--graph", "model.onnx"), "is neither a finding's JSON line nor a .pt2 file"),
        (("--graph", "absent.pt2"), "model file absent.pt2 does not exist"),
        (("--graph", '{"sites":[{"colour":"red"}]}'), "not a graph plan"),
        (("--graph", '{"model":"decoder","depth":3}'), "not a graph plan"),
        (("--graph", '{"pair":{"no":1}}'), "not a graph plan"),
        (("--graph", '{"file":'), "not a graph plan"),
        (("--backend", "no_such"), "no_such"),
        (("--case-timeout", 0), "--case-timeout 0, expected more than 0"),
        (("--config", "absent.yaml"), "cannot read absent.yaml"),
        (("--rows", "F99"), "no row is called 'F99'"),
        (("--waive", "sites:F99", "--why", "known"), "no graph is called 'F99'"),
        (("--waive", "speed", "--why", "known"), "no check is called 'speed'"),
        (("--waive", "sites:F1"), "1 --waive and 0 --why"),
        (("--waive", "sites:", "--why", "known"), "names no row after the colon"),
        (("--waive", "sites:random-one", "--why", "known"), "no graph is called 'random-one'"),
        (("--waivers", "absent.yaml"), "cannot read absent.yaml: No such file or directory; expected YAML"),
        (("--expect", "sites=1"), "--expect is about a .pt2 file"),
        (("--dialect", "autodeploy"), "is not registered: install tensorrt_llm"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_two(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    assert message in refused(*arguments, "--run-dir", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has None, expected a list of entries"),
        ("waive: sites", "has {'waive': 'sites'}"),
        ("- waive: sites:N1\n  why:\n", "has {'waive': 'sites:N1', 'why': None}"),
        ("- waive: [sites]\n  why: known\n", "has {'waive': ['sites'], 'why': 'known'}"),
        ("- waive: sites:N99\n  why: known\n", "no graph is called 'N99'"),
        ("- {waive", "expected YAML: a list of waive: and why:"),
    ],
)
def test_a_file_of_waivers_is_held_to_its_form(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "waivers.yaml"
    file.write_text(text)
    assert message in refused("--waivers", file, "--rows", "F1", "--run-dir", tmp_path)


def test_a_file_that_is_not_a_graph_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt2"
    path.write_bytes(b"not a program")
    assert "weights.pt2 is not a graph of torch.export.save" in refused("--graph", path, "--run-dir", tmp_path)


def test_no_graph_is_inconclusive(tmp_path: Path) -> None:
    assert run("--only", "random", "--random", 0, "--run-dir", tmp_path) == 3
