"""The set-up script decides rightly about torch on every kind of machine."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fusecheck.property_tests.suite.repository.checkout import ROOT


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusecheck_ci_setup", ROOT / "ci" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("driver", [False, True])
@pytest.mark.parametrize("index", ["", "somewhere"])
def test_a_torch_in_the_venv_is_never_touched(setup: ModuleType, driver: bool, index: str) -> None:
    plan = setup.decide(venv_exists=True, venv_torch="2.9.0a0+cu130", base_torch=None, driver=driver, index=index)
    assert plan == setup.Plan(create=False, inherit=False, install_torch=False, check_for_cuda=False)


@pytest.mark.parametrize("driver", [False, True])
def test_a_torch_in_the_base_interpreter_is_inherited(setup: ModuleType, driver: bool) -> None:
    plan = setup.decide(venv_exists=False, venv_torch=None, base_torch="2.8.0+cu128", driver=driver, index="")
    assert plan == setup.Plan(create=True, inherit=True, install_torch=False, check_for_cuda=False)


def test_a_named_index_overrules_the_base_interpreters_torch(setup: ModuleType) -> None:
    plan = setup.decide(venv_exists=False, venv_torch=None, base_torch="2.8.0", driver=False, index="somewhere")
    assert plan == setup.Plan(create=True, inherit=False, install_torch=True, check_for_cuda=True)


@pytest.mark.parametrize("venv_exists", [False, True])
@pytest.mark.parametrize("driver", [False, True])
def test_without_any_torch_the_cuda_build_is_refused_only_where_there_is_no_driver(
    setup: ModuleType, venv_exists: bool, driver: bool
) -> None:
    plan = setup.decide(venv_exists=venv_exists, venv_torch=None, base_torch=None, driver=driver, index="")
    assert plan.create is not venv_exists
    assert plan.install_torch
    assert plan.check_for_cuda is not driver


def _report(*names: str) -> dict[str, object]:
    return {"version": "1", "install": [{"metadata": {"name": name, "version": "1"}} for name in names]}


def test_cuda_packages_are_recognised_in_pips_report(setup: ModuleType) -> None:
    assert setup.cuda_packages(_report("torch", "nvidia-cublas-cu12", "triton", "sympy")) == [
        "nvidia-cublas-cu12",
        "triton",
    ]
    assert setup.cuda_packages(_report("torch", "sympy", "networkx")) == []
    assert setup.cuda_packages({"version": "1", "install": []}) == []


def test_a_cuda_build_stops_the_set_up_with_one_line_that_names_the_remedy(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "pip", _pip_that_would_pull_cuda)
    monkeypatch.setattr(setup.shutil, "which", lambda _name: None)
    with pytest.raises(setup.SetupError, match="TORCH_INDEX") as caught:
        setup.install_torch("", cpu_only=True)
    assert "\n" not in str(caught.value)
    assert "1 CUDA packages (nvidia-nccl-cu13, ...): run `pip install uv` first" in str(caught.value)


def _pip_that_would_pull_cuda(*arguments: str) -> None:
    Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps(_report("torch", "nvidia-nccl-cu13")))


def test_where_uv_is_there_it_installs_the_cpu_build_into_the_venv(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called = tmp_path / "called"
    uv = tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >{called}\n')
    uv.chmod(0o755)
    monkeypatch.setattr(setup, "pip", _pip_that_would_pull_cuda)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    setup.install_torch("", cpu_only=True)
    assert called.read_text() == f"pip install --python {setup.venv_python()} --torch-backend=cpu {setup.TORCH}\n"


def test_pip_shows_what_it_downloads_and_leaves_out_what_is_there_already(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = ["Requirement already satisfied: a", "Collecting b", "  Downloading b-1.whl (2 MB)"]
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said) + 'test "$6" != broken\n')
    python.chmod(0o755)
    monkeypatch.setattr(setup, "venv_python", lambda: str(python))
    setup.pip("install", "b")
    assert capfd.readouterr().out == "setup:   Downloading b-1.whl (2 MB)\n"
    with pytest.raises(setup.SetupError, match="pip install broken failed, see above"):
        setup.pip("install", "broken")


def test_the_index_for_torch_is_passed_on_only_when_named(setup: ModuleType) -> None:
    assert setup.torch_arguments("") == [setup.TORCH]
    assert setup.torch_arguments("where") == [setup.TORCH, "--index-url", "where"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.9.0a0+50eac811a6.nv25.09", (2, 9, 0)), ("23.0.1", (23, 0, 1)), ("", ())],
)
def test_version_numbers_are_read_up_to_the_first_letter(
    setup: ModuleType, text: str, expected: tuple[int, ...]
) -> None:
    assert setup.version_tuple(text) == expected


def test_a_torch_older_than_the_projects_bound_is_refused_and_not_replaced(setup: ModuleType) -> None:
    oldest = setup.oldest_torch((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setup.check_torch("2.13.0+cpu", oldest)
    with pytest.raises(setup.SetupError, match=r"got torch 1\.13\.1, expected 2\.7 or newer"):
        setup.check_torch("1.13.1", oldest)


def test_the_pinned_torch_meets_the_projects_own_bound(setup: ModuleType) -> None:
    oldest = setup.oldest_torch((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert setup.version_tuple(setup.TORCH.removeprefix("torch==")) >= oldest


def test_a_pyproject_without_torch_is_refused(setup: ModuleType) -> None:
    with pytest.raises(setup.SetupError, match="torch>="):
        setup.oldest_torch('dependencies = ["numpy"]')


def test_a_package_is_found_without_importing_it(setup: ModuleType) -> None:
    assert re.match(r"\d+\.\d+", setup.installed_version(sys.executable, "torch"))
    assert setup.installed_version(sys.executable, "no-such-package-here") is None


def test_an_old_python_is_refused_in_one_line(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 1))
    assert setup.main() == 2
    assert re.fullmatch(r"setup: got Python .*, expected 3\.10 or newer: .*\n", capsys.readouterr().err)


def test_an_interpreter_without_the_venv_module_is_named_in_one_line(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ensurepip is not available")

    monkeypatch.setattr(setup.subprocess, "run", failing_run)
    with pytest.raises(setup.SetupError, match="python3-venv"):
        setup.create_venv(inherit=False)


def test_a_venv_made_from_within_a_venv_sees_the_packages_of_that_one(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outer = tmp_path / "outer"
    monkeypatch.setattr(setup, "VENV", tmp_path / "inner")
    monkeypatch.setattr(setup.sys, "prefix", str(outer))
    packages = outer / "site-packages"
    (packages / "planted-1.0.dist-info").mkdir(parents=True)
    (packages / "planted-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    monkeypatch.setattr(setup.sys, "path", [str(packages), *sys.path])
    setup.create_venv(inherit=True)
    assert setup.installed_version(setup.venv_python(), "planted") == "1.0"
