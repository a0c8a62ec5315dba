"""The CI jobs run as they stand, give back the verdict, and the templates call scripts that exist."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from fusecheck.property_tests.suite.repository.checkout import ROOT

TEMPLATES = ("github-actions.yml", "gitlab-ci.yml", "buildkite.yml", "Jenkinsfile")
FAKE = """#!/bin/sh
echo "$@" >>"$CALLS"
while [ $# -gt 0 ]; do
    case $1 in
    verify) code=$VERIFY ;;
    kernel) code=$KERNEL ;;
    report) code=0 ;;
    --run-dir) mkdir -p "$2" && touch "$2/result.json" ;;
    --markdown) echo summary >"$2" ;;
    esac
    shift
done
exit $code
"""


@pytest.mark.parametrize("script", ["cpu.sh", "slurm.sh", "mpirun.sh", "look.sh"])
def test_a_script_is_executable_and_bash_can_read_it(script: str) -> None:
    path = ROOT / "ci" / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_calls_scripts_that_exist_and_keeps_the_files(name: str) -> None:
    text = (ROOT / "ci" / "templates" / name).read_text(encoding="utf-8")
    if name.endswith(".yml"):
        assert isinstance(yaml.safe_load(text), dict)
    called = set(re.findall(r"\bci/\w+\.sh", text))
    assert "ci/cpu.sh" in called
    assert all((ROOT / script).exists() for script in called)
    assert "runs/ci" in text


@pytest.mark.parametrize(
    ("verify", "kernel", "backend", "expected"),
    [
        (0, 0, "", 0),
        (1, 0, "", 1),
        (3, 0, "", 3),
        (0, 1, "a:b", 1),
        (3, 1, "a:b", 1),
        (1, 0, "a:b", 1),
        (0, 3, "a:b", 3),
    ],
)
def test_the_cpu_job_ends_with_the_worst_verdict_and_always_reports(
    tmp_path: Path, verify: int, kernel: int, backend: str, expected: int
) -> None:
    fake, calls, summary = tmp_path / "fusecheck", tmp_path / "calls", tmp_path / "summary"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = {"FUSECHECK": str(fake), "CALLS": str(calls), "GITHUB_STEP_SUMMARY": str(summary), "BACKEND": backend}
    environment |= {"VERIFY": str(verify), "KERNEL": str(kernel), "BUDGET": "5m"}
    done = subprocess.run(
        [ROOT / "ci" / "cpu.sh", tmp_path / "out"], env=os.environ | environment, check=False, timeout=60
    )
    assert done.returncode == expected
    lines = calls.read_text().splitlines()
    assert lines[0].startswith("verify --budget 5m --run-dir")
    assert [line.split()[0] for line in lines] == ["verify", *(["kernel"] if backend else []), "report"]
    assert summary.read_text() == "summary\n"


def test_the_container_builds_by_what_is_there_and_leaves_the_hosts_environment_out() -> None:
    text = (ROOT / "ci" / "Containerfile").read_text(encoding="utf-8")
    python = re.search(r"^FROM \S+/python:3\.(\d+)", text, flags=re.MULTILINE)
    assert python is not None
    assert int(python[1]) >= 10
    assert "make setup" in text
    assert re.search(r"^setup:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {".venv", ".git", "runs"} <= set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
