"""Fusecheck as others install it: editable or as a wheel, beside packages of theirs that are named like our folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections import defaultdict
from pathlib import Path

import pytest

from fusecheck import toml
from fusecheck.case.question import Question
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.repository import pages
from fusecheck.property_tests.suite.repository.checkout import ROOT, python_files, tracked_files

FOLDERS = {"verify": "fusecheck", **{name: f"fusecheck.{name}" for name in ("eval", "golden", "property_tests")}}
STANDING_ALONE = {ROOT / "golden" / "h200x2", ROOT / "golden" / "dumps"}
"""Recordings, each with a script beside them that runs by itself; data, not packages."""


def test_the_list_of_packages_is_that_of_the_folders() -> None:
    listed = toml.read(ROOT / "pyproject.toml")["tool"]["setuptools"]["packages"]
    found = set()
    for path in python_files():
        folder, *rest = path.relative_to(ROOT).parent.parts or ("",)
        if folder in FOLDERS and not STANDING_ALONE & set(path.parents):
            found.add(".".join([FOLDERS[folder], *rest]))
    assert listed == sorted(found)


def test_no_file_is_loaded_as_two_modules() -> None:
    names = defaultdict(set)
    ours = {path.resolve() for path in python_files() if path.name != "__init__.py"}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and name != "__main__" and Path(path).resolve() in ours:
            names[str(Path(path).resolve())].add(module.__name__)
    assert any("test_installed" in path for path in names)
    assert {path: found for path, found in names.items() if len(found) > 1} == {}


def test_helpers_are_imported_from_modules_that_pytest_does_not_load_itself() -> None:
    pattern = re.compile(r"^\s*(?:from|import) fusecheck\.property_tests\S*(?:\.| import )test_", re.MULTILINE)
    assert [path for path in python_files() if pattern.search(path.read_text(encoding="utf-8"))] == []


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel of what git tracks, by their kind."""
    place = tmp_path_factory.mktemp("distributions")
    for path in tracked_files():
        copy = place / "checkout" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    build = "import setuptools.build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    author = ("-c", "user.name=nobody", "-c", "user.email=nobody", "-c", "commit.gpgsign=false")
    for command in (
        ["git", "init", "-q"],
        ["git", "add", "--all", "--force"],
        ["git", *author, "commit", "-qm", "all"],
        [sys.executable, "-c", build],
    ):
        subprocess.run(command, cwd=place / "checkout", check=True, capture_output=True)
    return {"sdist": next(place.glob("*.tar.gz")), "wheel": next(place.glob("*.whl"))}


def test_the_sdist_holds_whatever_git_tracks(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "ci/setup.py", "ci/templates/gitlab-ci.yml"} <= held
    assert {path.relative_to(ROOT).as_posix() for path in tracked_files()} <= held


@pytest.fixture(scope="module")
def installed(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Interpreters: this one, where Fusecheck is editable, and one that has the wheel, and else what this one has."""
    place = tmp_path_factory.mktemp("wheel") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    install = ("-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index")
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([sys.executable, *install, distributions["wheel"]], check=True, env=environment)
    others = [path for path in sys.path if path.endswith("site-packages")]
    purelib = sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)})
    (Path(purelib) / "others.pth").write_text("\n".join(others), encoding="utf-8")
    return {"editable": Path(sys.executable), "wheel": python}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a kernel, and with packages that must not be taken for ours."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"THEIRS = {name!r}\n")
        (tmp_path / name / "cli.py").write_text("raise RuntimeError('this is not Fusecheck')\n")
    (tmp_path / "mykernel.py").write_text(pages.blocks(pages.read(), "python")[0], encoding="utf-8")
    return tmp_path


def _there(python: Path, project: Path, *command: str, path: str | None = None) -> str:
    """What a command of the interpreter's `bin` prints in the project; it has to succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": path} if path else {}
    words = [str(python.parent / command[0]), *command[1:]]
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", [None, "."])
@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_packages_named_like_our_folders_hide_nothing_and_are_not_hidden(
    kind: str, path: str | None, installed: dict[str, Path], project: Path
) -> None:
    python = installed[kind]
    assert "emulated:<dataflow>" in _there(python, project, "fusecheck", "backends", path=path)
    told = "import verify, eval, golden, property_tests, fusecheck.eval, fusecheck.golden, fusecheck.graph as c\n"
    told += "print(verify.THEIRS, eval.THEIRS, golden.THEIRS, property_tests.THEIRS, c.__file__)"
    *theirs, ours = _there(python, project, "python", "-c", told, path=path).split()
    assert theirs == list(FOLDERS)
    assert (ROOT in Path(ours).parents) == (kind == "editable")


@pytest.mark.parametrize(("kind", "path"), [("editable", None), ("wheel", ".")])
def test_a_kernel_in_the_folder_one_stands_in_is_found_and_passes(
    kind: str, path: str | None, installed: dict[str, Path], project: Path
) -> None:
    line = Question(Problem(tokens=2, hidden=64, world_size=2), "mykernel:MyKernel", device="cpu").to_json()
    assert "pass: 1 cases" in _there(installed[kind], project, "fusecheck", "replay", line, path=path)


def test_the_property_tests_run_by_their_installed_name(installed: dict[str, Path], project: Path) -> None:
    name = "fusecheck.property_tests.kernel.test_workspace"
    options = ("-q", "-p", "no:cacheprovider", "--backend", "mykernel:MyKernel")
    assert " passed" in _there(installed["wheel"], project, "python", "-m", "pytest", "--pyargs", name, *options)
