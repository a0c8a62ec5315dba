"""Bugs around a kernel in a model of the reader's own: which are planted, and on how many starts of the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusecheck.errors import UsageError
from fusecheck.eval import planted_arms, planted_model, run
from fusecheck.eval.arm import ArmRecord
from fusecheck.eval.asked import Asked
from fusecheck.eval.compare import compare
from fusecheck.eval.engine import ArmError, Engine
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.planted_arms import to_markdown
from fusecheck.eval.recipe import Form
from fusecheck.eval.run import Job, open_job
from fusecheck.eval.samples import Run
from fusecheck.eval.tasks import Prepared
from fusecheck.property_tests.accuracy.tiny_models import GOLDEN


class Counted:
    """Starts the ranks of a job, and counts how often."""

    def __init__(self, start: Callable[[Job], Engine]) -> None:
        self.calls, self._start = 0, start

    def __get__(self, job: Job, kind: type[Job]) -> Callable[[], Engine]:
        return lambda: self(job)

    def __call__(self, job: Job) -> Engine:
        self.calls += 1
        return self._start(job)


def test_bugs_are_planted_in_a_model_of_the_readers_own_on_ranks_that_are_started_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Job, "open_engine", counted := Counted(Job.open_engine))
    command = ["planted_model", "nothing", "row_in_32", "--model", str(GOLDEN), "--tasks", "golden_mmlu"]
    monkeypatch.setattr("sys.argv", [*command, "--tp", "1", "--limit", "4", "--json", str(tmp_path / "rows.json")])
    assert planted_model.main() == 0
    assert counted.calls == 1
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [row["first"] for row in rows] == [None, ["layer 0 after attention", "quant"]]
    assert to_markdown(rows) == capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["planted_model", "--model", str(tmp_path / "none"), "--tasks", "golden_mmlu"])
    assert planted_model.main() == 2
    assert "no such folder" in capsys.readouterr().err


def test_arms_that_a_broken_off_run_left_are_taken_where_the_options_are_the_same_and_refused_where_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(*options: str, bug: str = "row_in_32", limit: int = 2) -> tuple[int, str]:
        command = ["planted_model", bug, "--model", str(GOLDEN), "--tasks", "golden_gsm8k", "--tp", "1"]
        monkeypatch.setattr("sys.argv", [*command, "--limit", str(limit), "--run-dir", str(tmp_path), *options])
        return planted_model.main(), capsys.readouterr().err

    ran, really = list[str](), run._run_arm

    def broken_off(job: Job, engine: Engine, prepared: Prepared, arm: str, folder: Path) -> ArmRecord:
        ran.append(arm)
        record = really(job, engine, prepared, arm, folder)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(run, "_run_arm", broken_off)
    code, err = told()
    assert (code, ran) == (3, ["oracle", "unfused", "fused"])
    assert err.endswith("planted_model: interrupted; with the same --run-dir and options it goes on\n")
    code, err = told(limit=3)
    assert code == 2
    assert "its arms were run with limit 2, asked for is 3; give the same options, or another --run-dir" in err
    assert {told(*other)[0] for other in (("--shots", "1"), ("--batch", "8"), ("--backend", "unfused"))} == {2}
    assert (told()[0], ran[3:]) == (0, ["fused"])
    assert {each.name for each in tmp_path.glob("*/*")} == {"oracle", "unfused", "fused"}
    (tmp_path / "asked.json").unlink()
    code, err = told(bug="nothing")
    assert code == 2
    assert "does not say what its arms were run with" in err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--tp", "0"), 2, "--tp 0: expected at least 1"),
        (("--shots", "-1"), 2, "--shots -1: expected at least 0"),
        (("--batch", "0"), 2, "--batch 0: expected at least 4"),
        (("--limit", "0"), 2, "--limit 0: expected at least 1"),
        (("--tasks", ","), 2, "--tasks: expected names"),
        (("--virtual",), 2, "virtual ranks share a GPU, got --device cpu"),
        (("--device", "cuda"), 3, "CUDA GPUs here"),
        (("--json", "/nowhere/rows.json"), 2, "there is no folder /nowhere"),
        (("--run-dir", __file__), 2, "cannot be written"),
    ],
)
def test_what_cannot_run_is_said_in_one_line_before_anything_runs(
    options: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", ["planted_model", "--model", str(GOLDEN), *options])
    assert planted_model.main() == code
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("planted_model: ")
    assert err.count("\n") == 1


def test_a_bug_after_which_the_runs_are_no_pair_has_a_row_too_and_one_that_kills_the_ranks_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_pair(*runs: Run, options: Options) -> Comparison:
        outcome = compare(*runs, options=options)
        return replace(
            outcome, verdict=Verdict.INVALID, reason="no pair", tasks=(), oracle=None, pooled_flips=(0, 0, 0)
        )

    def dies(*_: object) -> None:
        raise ArmError("rank 0 died")

    monkeypatch.setattr(planted_arms, "compare", no_pair)
    command = ["planted_model", "row_in_32", "--model", str(GOLDEN), "--tasks", "golden_mmlu", "--tp", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--limit", "1", "--json", str(tmp_path / "rows.json")])
    assert planted_model.main() == 0
    [row] = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert (row["verdict"], row["questions"], row["first"]) == ("invalid", 0, ["layer 0 after attention", "quant"])
    assert row["trace"].startswith("no pair; first deviating site")
    assert "|  |  |  |  |  | invalid |" in capsys.readouterr().out
    monkeypatch.setattr(run, "_run_arm", dies)
    assert planted_model.main() == 1
    assert capsys.readouterr().err.endswith("planted_model: an arm died before its last answer: rank 0 died\n")


@pytest.mark.parametrize(
    ("activations", "fits"),
    [("static-fp8", "first_scale"), ("dynamic-fp8", "token_neighbour"), ("group-fp8", "group_shifted")],
)
def test_only_bugs_that_can_show_in_a_checkpoint_are_planted_unasked(activations: str, fits: str) -> None:
    names = planted_model.fitting(replace(open_job(Asked(GOLDEN, 1)), form=Form(activations)))
    assert {"nothing", "row_in_32", "eps_1e3", fits} <= set(names)
    assert len({"first_scale", "token_neighbour", "group_shifted"} & set(names)) == 1


def test_a_bug_that_would_change_nothing_in_a_model_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "hf_quant_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    weights = load_file(GOLDEN / "model.safetensors")
    alike = {
        name: torch.full_like(each, 0.5) if name.endswith("input_scale") else each for name, each in weights.items()
    }
    save_file(alike, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"behind each norm have one scale in .*: the bug would change nothing"):
        open_job(Asked(tmp_path, tp=1, backend="fusecheck.eval.spoiled:first_scale__emulated"))
    assert "first_scale" not in planted_model.fitting(open_job(Asked(tmp_path, tp=1, backend="emulated")))
