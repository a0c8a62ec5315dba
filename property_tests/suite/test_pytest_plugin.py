"""The pytest plug-in as users meet it: header, options, verdicts of whole runs, and silence in other people's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest

from property_tests.suite.launching import marked_environment, mpirun
from verify.errors import UsageError
from verify.problem import Problem
from verify.pytest_session import OPTIONS, Settings

ROOT = Path(__file__).resolve().parents[2]
KERNEL = str(ROOT / "property_tests" / "kernel")
PLANTED = "property_tests.suite.planted:tail_lanes"
QUICK = f"{KERNEL}/test_refusal.py::test_a_one_shot_call_beyond_its_buffer_is_refused_or_right"
MAIN = f"{KERNEL}/test_verdict.py::test_every_output_of_any_problem_is_one_that_the_dataflow_allows"
KEPT = f"{KERNEL}/test_kept_cases.py"


def run(*arguments: str, cwd: Path = ROOT, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own, with the quick profile and without this run's variables."""
    command = [*(launcher or []), sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    _, environment = marked_environment()
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    environment |= {"FUSECHECK_PROFILE": "dev", "PYTHONPATH": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def settings(tmp_path: Path, **options: Any) -> Settings:
    """The options as the plug-in reads them."""
    given = {"backend": "emulated", "tp": "2", "device": "cpu", "case_timeout": "30"} | options
    names = {name: given.get(name) for name in OPTIONS} | {"corpus": given.get("corpus", str(tmp_path / "none"))}
    config = SimpleNamespace(option=SimpleNamespace(**names), rootpath=tmp_path)
    return Settings.of(cast("pytest.Config", config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": "3"}, "--tp 3: expected one of 1, 2, 4, 8, 16"),
        ({"tp": "two"}, "--tp two: expected one of"),
        ({"case_timeout": "0"}, "--case-timeout 0: expected seconds above 0"),
        ({"case_timeout": "-1"}, "expected seconds above 0"),
        ({"case_timeout": "inf"}, "expected seconds above 0"),
        ({"case_timeout": "nan"}, "expected seconds above 0"),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"backend": "property_tests.suite.planted:LANES"}, "lacks name"),
        ({"backend": "no.such.module:thing"}, "importing"),
        ({"dataflow": "nonsense"}, "unknown dataflow 'nonsense'"),
        ({"cases_from": "no/such/file"}, "cannot be read"),
    ],
)
def test_an_option_that_cannot_be_meant_is_wrong_usage(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")) as caught:
        settings(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_cases_are_taken_from_both_files_once(tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "more.jsonl"):
        (tmp_path / name).write_text(Problem(tokens=7).to_json() + "\n" + Problem(hidden=8).to_json() + "\nbroken\n")
    read = settings(tmp_path, corpus=str(tmp_path / "corpus.jsonl"), cases_from=str(tmp_path / "more.jsonl"))
    assert [kept.problem for kept in read.kept] == [Problem(tokens=7), Problem(hidden=8)]
    assert len(read.broken) == 2


def test_wrong_usage_ends_the_run_with_one_line() -> None:
    done = run(KERNEL, "--case-timeout", "0")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --case-timeout 0: expected seconds above 0"


def test_the_header_echoes_the_options_and_skips_broken_lines_loudly(tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text(f"{Problem(tokens=3).to_json()}\nbroken\n{Problem(world_size=4).to_json()}\n")
    done = run(KEPT, "--cases-from", str(cases), "--corpus", str(tmp_path / "corpus"))
    assert done.returncode == 0, done.stdout
    for text in ("--backend=emulated --tp=2 --device=cpu", "torch ", "hypothesis profile dev", "1 passed"):
        assert text in done.stdout
    assert "1 kept cases are tried first, 1 are for another --tp" in done.stdout
    assert done.stdout.count(f"SKIPPED a broken line, {cases}:2: not JSON") == 2


def test_a_failure_is_shown_with_its_replay_line_kept_and_tried_first(tmp_path: Path) -> None:
    corpus, report = tmp_path / "corpus.jsonl", tmp_path / "junit.xml"
    done = run(MAIN, "--backend", PLANTED, "--corpus", str(corpus), "--junitxml", str(report))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    kept = json.loads(corpus.read_text())
    line = Problem.from_json(json.dumps(kept["problem"])).to_json()
    assert kept["backend"] == PLANTED
    assert f"fusecheck replay --backend {PLANTED} '{line}'" in done.stdout
    properties = {p.get("name"): p.get("value") for p in ElementTree.parse(report).iter("property")}
    assert properties["replay"] == line
    assert "admissible" in str(properties["finding"])
    again = run(KEPT, MAIN, "-x", "--backend", PLANTED, "--corpus", str(corpus))
    assert again.returncode == pytest.ExitCode.TESTS_FAILED
    assert "test_a_problem_that_failed_once_passes[corpus.jsonl:1]" in again.stdout
    assert len(corpus.read_text().splitlines()) == 1
    assert run(KEPT, "--corpus", str(corpus)).returncode == 0


def test_a_run_that_skips_everything_is_not_green() -> None:
    lonely = f"{KERNEL}/test_metamorphic.py::test_with_a_residual_of_zero_a_rank_can_bring_the_residual"
    done = run(lonely, "--tp", "1")
    assert "1 skipped" in done.stdout
    assert "nothing was run, so nothing is verified" in done.stdout
    assert done.returncode != 0


def test_other_peoples_tests_keep_their_options_and_do_not_pay_for_torch(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        "    for name in ('--backend', '--tp', '--device', '--dataflow', '--corpus'):\n"
        "        parser.addoption(name, default='theirs')\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n"
        "def test_theirs(request):\n"
        "    assert request.config.option.device == 'theirs'\n"
        "    assert 'verify.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'hypothesis'} & set(sys.modules)\n"
    )
    done = run("-q", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "fusecheck 0" not in done.stdout


def test_it_runs_from_anywhere_by_package_name(tmp_path: Path) -> None:
    name = "property_tests.kernel.test_refusal"
    done = run("--pyargs", name, "-k", "one_shot_call_beyond", "--corpus", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fusecheck ranks: local" in done.stdout


def test_each_worker_of_xdist_has_ranks_of_its_own(tmp_path: Path) -> None:
    done = run(f"{KERNEL}/test_layout.py", "-k", "tensor_of", "-n", "2", "--corpus", str(tmp_path / "none"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_under_mpirun_rank_zero_alone_runs_and_reports() -> None:
    done = run(MAIN, QUICK, "--tp", "2", "--corpus", os.devnull, launcher=mpirun(4))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test session starts") == 1
    assert "fusecheck ranks: mpirun" in done.stdout
    assert "2 passed" in done.stdout


def test_a_tp_that_does_not_divide_the_mpi_world_is_wrong_usage() -> None:
    done = run(QUICK, "--tp", "2", launcher=mpirun(3))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.count("ERROR: --tp 2 does not divide the MPI world of 3") == 1
