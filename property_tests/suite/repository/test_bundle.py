"""The bundle script: where it finds a toolkit, what it would run, what it packs, and what it refuses in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusecheck.property_tests.suite.repository.checkout import ROOT


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusecheck_ci_bundle", ROOT / "ci" / "bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return module


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that says where it lies."""
    root = tmp_path / "cuda"
    for folder in ("bin", "lib64", "include"):
        (root / folder).mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'release 13.0, V13'\necho '#$ _HERE_={root}/bin' >&2\n")
    nvcc.chmod(0o755)
    (root / "lib64" / "libcudart.so.13").touch()
    (root / "include" / "cublasLt.h").write_text("// its own")
    return root


def test_the_toolkit_is_found_by_variable_by_a_script_on_the_path_and_in_the_wheels(
    bundle: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert bundle.find_cuda() == toolkit
    monkeypatch.delenv("CUDA_HOME")
    caller = tmp_path / "path" / "nvcc"
    caller.parent.mkdir()
    caller.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    caller.chmod(0o755)
    monkeypatch.setenv("PATH", f"{caller.parent}:/usr/bin:/bin")
    assert bundle.find_cuda() == toolkit
    caller.unlink()
    wheels = tmp_path / "site" / "nvidia" / "cu13" / "bin"
    wheels.mkdir(parents=True)
    (wheels / "nvcc").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bundle.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    assert bundle.find_cuda() == wheels.parent


def test_a_dry_run_prints_every_command_and_runs_none(
    bundle: ModuleType,
    toolkit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    work = tmp_path / "work"
    asked = ["--dry-run", "--arch", "9.0a,10.0a", "--version", "0.6.13", "--target-python", "3.12", "--jobs", "3"]
    places = ["--work", str(work), "--out", str(tmp_path / "x.tgz")]
    code = bundle.main([*asked, *places, "--also", "einops==0.8.1"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert not work.exists()
    fetch_here, needs, build, fetch_there, copy, packed = lines
    assert fetch_here.endswith(f"--target {work}/host --no-deps flashinfer-python==0.6.13")
    assert "ninja" in needs
    for wanted in (
        "FLASHINFER_CUDA_ARCH_LIST=9.0a 10.0a",
        f"CUDA_HOME={toolkit}",
        "MAX_JOBS=3",
        f"PYTHONPATH={work}/host",
    ):
        assert wanted in build.replace("'", "")
    assert build.endswith(
        "trtllm_comm:flashinfer.jit.comm:gen_trtllm_comm_module norm:flashinfer.jit.norm:gen_norm_module"
    )
    assert "--python-version 3.12 --implementation cp --only-binary=:all: flashinfer-python==0.6.13" in fetch_there
    assert fetch_there.endswith("einops==0.8.1")
    assert copy == f"cp -r {work}/aot {work}/bundle/flashinfer/data/aot"
    assert packed == f"# then packed into {tmp_path}/x.tgz"


def test_the_archive_holds_the_prebuilt_modules_and_no_sources(
    bundle: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    real = bundle.run
    ran = []

    def run(command: Any) -> None:
        """Do what pip and the compilers would leave; copying is real."""
        ran.append(command.argv)
        if "pip" in command.argv and "--only-binary=:all:" in command.argv:
            for name in (
                "flashinfer/data/csrc/norm.cu",
                "flashinfer/norm.py",
                "flashinfer_python-0.7.dist-info/METADATA",
            ):
                file = tmp_path / "work" / "bundle" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        elif bundle.COMPILE in command.argv:
            assert (tmp_path / "work" / "stand-ins" / "include" / "cublas_v2.h").exists()
            assert not (tmp_path / "work" / "stand-ins" / "include" / "cublasLt.h").exists()
            module = tmp_path / "work" / "aot" / "norm" / "norm.so"
            module.parent.mkdir(parents=True)
            module.touch()
        elif command.argv[0] == "cp":
            real(command)

    monkeypatch.setattr(bundle, "run", run)
    out = tmp_path / "dist" / "out.tgz"
    assert bundle.main(["--modules", "norm", "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    assert len(ran) == 6
    with tarfile.open(out) as archive:
        names = [name for name in archive.getnames() if archive.getmember(name).isfile()]
        told = archive.extractfile("MANIFEST.json")
        assert told is not None
        manifest = json.load(told)
    assert sorted(names) == [
        "MANIFEST.json",
        "flashinfer/data/aot/norm/norm.so",
        "flashinfer/norm.py",
        "flashinfer_python-0.7.dist-info/METADATA",
    ]
    assert (manifest["nvcc"], manifest["modules"], manifest["architectures"]) == ("13.0", ["norm"], ["9.0a"])


def test_modules_are_built_by_the_functions_that_describe_them(
    bundle: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library_under_test.py").write_text(
        "from pathlib import Path\nclass Spec:\n"
        f" jit_library_path = {str(tmp_path / 'made.so')!r}\n"
        " def build(self, verbose): Path(self.jit_library_path).write_text('code')\n"
        "def describe(): return Spec()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (toolkit / "lib64" / "libcudart.so.13").unlink()  # this one could not be loaded
    target = tmp_path / "aot"
    assert bundle.main([bundle.COMPILE, str(toolkit), str(target), "norm:library_under_test:describe"]) == 0
    assert (target / "norm" / "norm.so").read_text() == "code"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arch", "hopper"], "--arch 'hopper', expected a compute capability such as 9.0a"),
        (["--arch", ""], "--arch '', expected"),
        (["--modules", "norm,fmha"], "--modules 'fmha', expected of: trtllm_comm, norm"),
        (["--target-python", "3"], "--target-python '3', expected major and minor such as 3.12"),
        (["--jobs", "0"], "--jobs 0, expected 1 or more"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    bundle: ModuleType, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundle.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ci/bundle.py: ")
    assert told in error
    assert error.count("\n") == 1


def test_a_missing_toolkit_a_wrong_one_and_a_failing_command_are_told(
    bundle: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bundle.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(bundle.BundleError, match="no CUDA toolkit: set CUDA_HOME"):
        bundle.find_cuda()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(bundle.BundleError, match="has no bin/nvcc, expected the root of a CUDA toolkit"):
        bundle.find_cuda()
    with pytest.raises(bundle.BundleError, match="exit 3 of: "):
        bundle.run(bundle.Command((sys.executable, "-c", "raise SystemExit(3)")))
    with pytest.raises(bundle.BundleError, match="cannot run no-such-program: "):
        bundle.run(bundle.Command(("no-such-program",)))
