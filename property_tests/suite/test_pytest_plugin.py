"""The pytest plug-in as users meet it: header, options, verdicts of whole runs, and silence in other people's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import pytest

from fusecheck.errors import UsageError
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.launching import marked_environment, mpirun
from fusecheck.pytest_options import OPTIONS, Settings

ROOT = Path(__file__).resolve().parents[2]
KERNEL = str(ROOT / "property_tests" / "kernel")
PLANTED = "fusecheck.property_tests.suite.planted:tail_lanes"
QUICK = f"{KERNEL}/test_refusal.py::test_a_one_shot_call_beyond_its_buffer_is_refused_or_right"
MAIN = f"{KERNEL}/test_verdict.py::test_every_output_of_any_problem_is_one_that_the_dataflow_allows"
TAKEN = f"{KERNEL}/test_refusal.py::test_what_the_backend_says_it_takes_runs_and_what_it_refuses_raises"
KEPT = f"{KERNEL}/test_kept_cases.py"
Done = subprocess.CompletedProcess[str]


def run(*arguments: str, cwd: Path = ROOT, launcher: list[str] | None = None, path: str = "") -> Done:
    """Run pytest in a process of its own, with the quick profile and without this run's variables."""
    command = [*(launcher or []), sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    _, environment = marked_environment()
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    environment |= {"FUSECHECK_PROFILE": "dev", "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


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
        ({"backend": "fusecheck.property_tests.suite.planted:LANES"}, "lacks name"),
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


def wrong_usage(_folder: Path) -> Done:
    return run(KERNEL, "--case-timeout", "0")


def test_wrong_usage_ends_the_run_with_one_line(done: Done) -> None:
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip() == "ERROR: --case-timeout 0: expected seconds above 0"


def header(folder: Path) -> Done:
    cases = folder / "cases.jsonl"
    cases.write_text(f"{Problem(tokens=3).to_json()}\nbroken\n{Problem(world_size=4).to_json()}\n")
    return run(KEPT, "--cases-from", str(cases), "--corpus", str(folder / "corpus"))


def test_the_header_echoes_the_options_and_skips_broken_lines_loudly(done: Done) -> None:
    assert done.returncode == 0, done.stdout
    for text in ("--backend=emulated --tp=2 --device=cpu", "torch ", "hypothesis profile dev", "1 passed"):
        assert text in done.stdout
    assert "1 kept cases are tried first, 1 are for another --tp" in done.stdout
    assert len(re.findall(r"SKIPPED a broken line, \S+cases.jsonl:2: not JSON", done.stdout)) == 2


def test_a_failure_is_shown_with_its_replay_line_kept_and_tried_first(tmp_path: Path) -> None:
    corpus, report = tmp_path / "corpus.jsonl", tmp_path / "junit.xml"
    options = ["--backend", PLANTED, "--corpus", str(corpus), "--hypothesis-seed", "1"]
    done = run(TAKEN, *options, "--junitxml", str(report))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    kept = json.loads(corpus.read_text())
    line = Problem.from_json(json.dumps(kept["problem"])).to_json()
    assert kept["backend"] == PLANTED
    assert f"fusecheck replay --backend {PLANTED} '{line}'" in done.stdout
    properties = {p.get("name"): p.get("value") for p in ElementTree.parse(report).iter("property")}
    assert properties["replay"] == line
    assert "admissible" in str(properties["finding"])
    with ThreadPoolExecutor(2) as both:
        again = both.submit(run, KEPT, TAKEN, "-x", *options)
        right = both.submit(run, KEPT, "--corpus", str(corpus))
    assert again.result().returncode == pytest.ExitCode.TESTS_FAILED
    assert "test_a_problem_that_failed_once_passes[corpus.jsonl:1]" in again.result().stdout
    assert len(corpus.read_text().splitlines()) == 1
    assert right.result().returncode == 0


def nothing_run(folder: Path) -> Done:
    (folder / "skip_all.py").write_text("import pytest\ndef pytest_runtest_setup(item): pytest.skip('not now')\n")
    lonely = f"{KERNEL}/test_metamorphic.py::test_with_a_residual_of_zero_a_rank_can_bring_the_residual"
    return run(lonely, QUICK, "--tp", "1", "-p", "skip_all", path=str(folder))


def test_a_run_that_leaves_out_and_skips_everything_is_not_green(done: Done) -> None:
    assert "1 skipped, 1 deselected" in done.stdout
    assert "nothing was run, so nothing is verified" in done.stdout
    assert done.returncode != 0


def other_people(folder: Path) -> Done:
    (folder / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        "    for name in ('--backend', '--tp', '--device', '--dataflow', '--corpus'):\n"
        "        parser.addoption(name, default='theirs')\n"
    )
    (folder / "test_theirs.py").write_text(
        "import sys\n"
        "def test_theirs(request):\n"
        "    assert request.config.option.device == 'theirs'\n"
        "    assert 'fusecheck.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'hypothesis'} & set(sys.modules)\n"
    )
    return run("-q", cwd=folder)


def test_other_peoples_tests_keep_their_options_and_do_not_pay_for_torch(done: Done) -> None:
    assert done.returncode == 0, done.stdout
    assert "fusecheck 0" not in done.stdout


def from_anywhere(folder: Path) -> Done:
    name = "fusecheck.property_tests.kernel.test_refusal"
    return run("--pyargs", name, "-k", "one_shot_call_beyond", "--corpus", str(folder / "none"), cwd=folder)


def test_it_runs_from_anywhere_by_package_name(done: Done) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fusecheck ranks: local" in done.stdout


def on_xdist(folder: Path) -> Done:
    return run(f"{KERNEL}/test_layout.py", "-k", "tensor_of", "-n", "2", "--corpus", str(folder / "none"))


def test_each_worker_of_xdist_has_ranks_of_its_own(done: Done) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def under_mpirun(_folder: Path) -> Done:
    return run(TAKEN, MAIN, "--tp", "2", "--corpus", os.devnull, launcher=mpirun(4))


def test_under_mpirun_rank_zero_alone_runs_and_reports(done: Done) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test session starts") == 1
    assert "fusecheck ranks: mpirun" in done.stdout
    assert "2 passed" in done.stdout


def of_three(_folder: Path) -> Done:
    return run(QUICK, "--tp", "2", launcher=mpirun(3))


def test_a_tp_that_does_not_divide_the_mpi_world_is_wrong_usage(done: Done) -> None:
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.count("ERROR: --tp 2 does not divide the MPI world of 3") == 1


RUNS: dict[Callable[..., None], Callable[[Path], Done]] = {
    test_wrong_usage_ends_the_run_with_one_line: wrong_usage,
    test_the_header_echoes_the_options_and_skips_broken_lines_loudly: header,
    test_a_run_that_leaves_out_and_skips_everything_is_not_green: nothing_run,
    test_other_peoples_tests_keep_their_options_and_do_not_pay_for_torch: other_people,
    test_it_runs_from_anywhere_by_package_name: from_anywhere,
    test_each_worker_of_xdist_has_ranks_of_its_own: on_xdist,
    test_under_mpirun_rank_zero_alone_runs_and_reports: under_mpirun,
    test_a_tp_that_does_not_divide_the_mpi_world_is_wrong_usage: of_three,
}
"""The run of pytest that a test looks at. Most of such a run is one process that loads torch, so two go at a time."""


@pytest.fixture(scope="module")
def pending(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[object, Future[Done]]]:
    """The runs of the tests that were chosen, by test."""
    with ThreadPoolExecutor(2) as pool:
        chosen = {getattr(item, "function", None) for item in request.session.items}
        yield {
            test: pool.submit(made, tmp_path_factory.mktemp(made.__name__))
            for test, made in RUNS.items()
            if test in chosen
        }


@pytest.fixture
def done(request: pytest.FixtureRequest, pending: dict[object, Future[Done]]) -> Done:
    """The run of the test that asks."""
    return pending[request.function].result()
