"""Ctrl-C ends a run soon, with what it has shown so far, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fusecheck.property_tests.suite.launching import marked_environment, mpirun, wait_until_gone

ROOT = Path(__file__).resolve().parents[2]
FUSECHECK = (sys.executable, "-c", "from fusecheck.cli import main; main()")
PATIENCE = 300.0
"""Seconds until a program that should have begun, or ended, is taken for stuck; no measure of how fast it is."""


class Program:
    """A program that is interrupted once it has begun.

    Args:
        command: what to start.
        begun: whether it has come to its cases.
        output: where what it prints goes.
    """

    def __init__(self, command: list[str], begun: Callable[[], bool], output: Path = Path(os.devnull)) -> None:
        self.mark, environment = marked_environment()
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        environment["FUSECHECK_PROFILE"] = "nightly"
        self._begun = begun
        with output.open("w") as printed:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def interrupt(self) -> int:
        """Wait for the first cases, send the one process that was started SIGINT, and wait until all are gone."""
        end = time.monotonic() + PATIENCE
        while not self._begun():
            assert self._process.poll() is None, "it ended before it began"
            assert time.monotonic() < end, "it did not begin"
            time.sleep(0.05)
        self._process.send_signal(signal.SIGINT)
        status = self._process.wait(PATIENCE)
        assert wait_until_gone(self.mark, seconds=PATIENCE) == set()
        return status


def kernel(directory: Path, launcher: list[str]) -> Program:
    """`fusecheck kernel` on small problems, for longer than anybody waits."""
    shape = ["--tokens", "8", "--hidden", "256", "--tp", "2", "--seconds", "600", "--run-dir", str(directory)]
    journal = directory / "cases.jsonl"
    return Program(
        [*launcher, *FUSECHECK, "kernel", *shape], lambda: journal.exists() and journal.read_text().count("pass") > 2
    )


def accuracy(directory: Path, mode: Sequence[str], begun: str) -> Program:
    """`fusecheck accuracy` on four-choice questions; it has begun once the file `begun` is in its directory."""
    asked = ["--tasks", "golden_mmlu", *mode, "--run-dir", str(directory)]
    return Program([*FUSECHECK, "accuracy", *asked], (directory / begun).exists)


def test_an_interrupted_run_says_what_it_has_shown_and_leaves_no_process(tmp_path: Path) -> None:
    with kernel(tmp_path / "local", []) as local, kernel(tmp_path / "mpirun", mpirun(2)) as under_mpirun:
        assert local.interrupt() == 3
        # mpirun ends its processes its own way, and says so.
        assert under_mpirun.interrupt() != 0
    for name in ("local", "mpirun"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (result["verdict"], result["findings"]) == ("inconclusive", [])
        assert result["summary"]["interrupted"]
        assert result["summary"]["cases"] > 2


def graph(directory: Path) -> Program:
    """`fusecheck graph` on more graphs than anybody waits for, with a pass that notes what it gets."""
    seen = directory / "seen"
    (directory / "noting.py").write_text(
        "from fusecheck.graph.passes import fuse_allreduce_residual_rmsnorm_quant_fp8\n"
        "def fuse(gm, shared):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        file.write('x')\n"
        "    return fuse_allreduce_residual_rmsnorm_quant_fp8(gm, shared)\n"
    )
    path = f"import sys; sys.path[:0] = [{str(directory)!r}]; from fusecheck.cli import main; main()"
    options = ["--pass", "noting:fuse", "--only", "random", "--random", "5000", "--no-export"]
    command = [sys.executable, "-c", path, "graph", *options, "--run-dir", str(directory)]
    # Each of two ranks runs the pass a few times on each graph, the next one only when both have answered.
    return Program(command, lambda: seen.exists() and len(seen.read_text()) > 24, directory / "printed")


def faults(directory: Path) -> Program:
    """`fusecheck faults` on one fault at more seeds than anybody waits for."""
    options = ["--fault", "KA-01", "--seeds", "5000", "--legal-cases", "0", "--run-dir", str(directory)]
    command = [sys.executable, "-u", "-c", "from fusecheck.cli import main; main()", "faults", *options]
    printed = directory / "printed"
    return Program(command, lambda: printed.read_text().count("caught in case") > 2, printed)


def test_interrupted_graphs_and_faults_are_reported_up_to_there(tmp_path: Path) -> None:
    for name in ("graph", "faults"):
        (tmp_path / name).mkdir()
    with graph(tmp_path / "graph") as graphs, faults(tmp_path / "faults") as hunt:
        assert (graphs.interrupt(), hunt.interrupt()) == (3, 3)
    for name, figure in (("graph", "graphs"), ("faults", "killed")):
        printed = (tmp_path / name / "printed").read_text()
        assert "Traceback" not in printed
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (result["verdict"], result["findings"]) == ("inconclusive", [])
        assert result["summary"]["interrupted"]
        assert result["summary"][figure] >= 2
        assert "interrupted before the last case" in (tmp_path / name / "junit.xml").read_text()
        assert "Inconclusive: interrupted: " in (tmp_path / name / "report.html").read_text()


def test_an_interrupted_accuracy_run_says_which_arms_and_questions_are_done_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")
    with accuracy(tmp_path / "arms", ["--limit", "28"], "oracle/fusecheck_arm.json") as arms:
        assert arms.interrupt() == 3
    with accuracy(tmp_path / "blocks", ["--sequential", "--block", "14"], "answers_golden_mmlu.jsonl") as blocks:
        assert blocks.interrupt() == 3
    found = {}
    for name in ("arms", "blocks"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (result["verdict"], result["findings"]) == ("inconclusive", [])
        assert result["summary"]["interrupted"]
        assert result["summary"]["headline"].startswith("INCONCLUSIVE  interrupted at: ")
        assert "interrupted" in (tmp_path / name / "report.html").read_text()
        suite = ET.parse(tmp_path / name / "junit.xml").getroot()
        assert suite.get("errors") == "1"
        found[name] = result["summary"]
    assert found["arms"]["finished_arms"] == {"oracle": 28}
    answers = (tmp_path / "blocks" / "answers_golden_mmlu.jsonl").read_text()
    assert found["blocks"]["asked"] == {"golden_mmlu": answers.count("\n")}


def test_interrupted_property_tests_leave_no_process(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "note.py").write_text(
        "from fusecheck.property_tests.kernel.bench import Bench\n"
        "check = Bench.check\n"
        "def noted(self, *arguments):\n"
        "    outcome = check(self, *arguments)\n"
        f"    with open({str(seen)!r}, 'a') as seen:\n"
        "        seen.write('x')\n"
        "    return outcome\n"
        "Bench.check = noted\n"
    )
    test = f"{ROOT}/property_tests/kernel/test_schedule.py"
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import pytest; sys.exit(pytest.main())"
    options = ["-p", "note", "-p", "no:cacheprovider", "--corpus", os.devnull]
    printed = tmp_path / "printed"

    def begun() -> bool:
        # After the second example Hypothesis reads every module, and a Ctrl-C there may leave one of them open.
        return seen.exists() and seen.stat().st_size > 4

    with Program([sys.executable, "-c", path, test, *options], begun, printed) as program:
        assert program.interrupt() == pytest.ExitCode.INTERRUPTED, printed.read_text()[-3000:]
