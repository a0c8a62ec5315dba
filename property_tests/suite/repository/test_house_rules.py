"""The repository keeps its own rules: what lies where, what may import what, and what no file may say."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

from fusecheck.property_tests.suite.repository.checkout import ROOT, module_name, python_files, tracked_files

TOP_LEVEL = {
    *("pyproject.toml", "verify", "golden", "property_tests", "eval", "ci"),
    *("README.md", "Makefile", "CONTRIBUTING.md", "LICENSE", "CHANGELOG.md"),
}
LONGEST_MODULE, LONGEST_TEST_MODULE = 350, 450
LEFT_OPEN = re.compile(r"#\s*(TODO|FIXME|XXX)\b|\bNotImplementedError\b")
MACHINE_PATH = re.compile(r"(?<![\w./*])/(?:work|opt|root|home)/")
INDEX_HOST = re.compile(r"\bpypi\.(?:org|python)|\bpythonhosted\.|\bdownload\.pytorch\.")
KERNEL_LIBRARIES = {"flashinfer", "tensorrt_llm", "vllm", "sglang", "aiter"}

LAYERS = (
    {"errors", "interrupts", "plugins"},
    {"toml", "journal", "listed", "quantflow", "declaration", "dataflow", "operations"},
    {"formats"},
    {"numerics"},
    {"quantisers"},
    {"stages"},
    {"oracle"},
    {"interface", "problem", "inputs"},
    {"verdict", "corpus", "ranks", "report", "backends"},
    {"case", "onepass", "manual"},
    {"graph", "invariance", "kernel", "protocol", "testing"},
    {"judge", "latency", "exhaust", "faults", "pytest_options", "pytest_session"},
    {"parts"},
    {"verify_command", "pytest_plugin"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""The modules and packages of `verify`, lowest first: each imports from its own layer and from those below it."""


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _lines_matching(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a tensor file or a compressed one
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{_relative(path)}:{number}: {line.strip()[:100]}")
    return found


def test_the_top_level_holds_what_the_design_lists_and_nothing_else() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_no_module_is_too_long_to_be_one_thing() -> None:
    too_long = {}
    for path in python_files():
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > (LONGEST_TEST_MODULE if path.name.startswith("test_") else LONGEST_MODULE):
            too_long[_relative(path)] = length
    assert too_long == {}


def test_no_module_is_called_utils() -> None:
    assert [name for path in python_files() if "util" in (name := path.stem.lower())] == []


def test_nothing_is_left_open_in_the_code() -> None:
    others = [path for path in python_files() if path != Path(__file__).resolve()]
    assert _lines_matching(LEFT_OPEN, others) == []


def test_no_file_names_a_path_of_one_machine_or_the_host_of_a_package_index() -> None:
    assert _lines_matching(MACHINE_PATH, tracked_files()) == []
    others = [path for path in tracked_files() if path != Path(__file__).resolve()]
    assert _lines_matching(INDEX_HOST, others) == []


def _height(unit: str) -> int:
    return next(height for height, layer in enumerate(LAYERS) if unit in layer)


def _units(path: Path) -> set[str]:
    """The modules and packages directly under `verify` that a file imports."""
    known = set().union(*LAYERS)
    return {
        parts[1] for name in _imports(path) if (parts := name.split("."))[0] == "fusecheck" and len(parts) > 1
    } & known


def test_every_module_of_verify_has_its_layer() -> None:
    units = {path.relative_to(ROOT / "verify").parts[0].removesuffix(".py") for path in (ROOT / "verify").rglob("*.py")}
    assert units - {"__init__"} == set().union(*LAYERS)


def test_imports_point_one_way() -> None:
    upward = set()
    for path in (ROOT / "verify").rglob("*.py"):
        unit = path.relative_to(ROOT / "verify").parts[0].removesuffix(".py")
        if unit != "__init__":
            upward |= {f"{_relative(path)} -> {other}" for other in _units(path) if _height(other) > _height(unit)}
    assert upward == set()


def test_no_two_modules_know_each_other_even_for_their_types() -> None:
    names = {module_name(path): path for path in python_files()}
    modules = {name: path for name, path in names.items() if not name.endswith(".__init__")}  # these pass names on
    imports = {name: _imports(path) & set(modules) - {name} for name, path in modules.items()}
    # A cycle is raised as an error that names its modules.
    assert len(list(graphlib.TopologicalSorter(imports).static_order())) == len(modules)


STANDING_ALONE = ("golden/h200x2/findings/reproduce", "golden/dumps/record.py")
"""Run with nothing but torch and the library, by whoever maintains that; nothing imports them."""


def test_only_the_backends_import_a_kernel_under_test() -> None:
    offenders = [
        _relative(path)
        for path in python_files()
        if KERNEL_LIBRARIES & {name.split(".")[0] for name in _imports(path)}
        and not _relative(path).startswith(("verify/backends/", "property_tests/", *STANDING_ALONE))
    ]
    assert offenders == []


def test_the_rational_oracle_shares_no_code_with_the_oracle_that_it_judges() -> None:
    imports = _imports(ROOT / "property_tests" / "suite" / "rational_oracle.py")
    assert imports
    assert [
        name
        for name in imports
        if name.startswith("fusecheck") and not name.startswith(("fusecheck.dataflow", "fusecheck.property_tests"))
    ] == []


def test_the_entry_points_of_the_build_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert {"setup", "verify", "test", "bench", "clean"} <= targets
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    assert "make test" in run.read_text(encoding="utf-8")
