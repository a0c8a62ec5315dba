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
from fusecheck.eval import planted_model
from fusecheck.eval.asked import Asked
from fusecheck.eval.engine import Engine
from fusecheck.eval.planted_arms import to_markdown
from fusecheck.eval.recipe import Form
from fusecheck.eval.run import Job, open_job
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
