"""The pytest plug-in's front door: wakes up when a run is about the property tests, and is inert otherwise.

Every pytest run on a machine with Fusecheck loads this module, so it imports nothing heavy, and adds no option to
runs that are none of its business: their own `--device` or `--backend` must not clash with ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = "property_tests"
PACKAGE = f"fusecheck.{FOLDER}"
SESSION_PLUGIN = "fusecheck-session"


def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Add the options and the session's hooks if the run is about the property tests."""
    named = early_config.known_args_namespace
    if not is_ours(early_config, args, pyargs=bool(named.pyargs)):
        return
    add_options(parser)
    import fusecheck.pytest_session as pytest_session

    early_config.pluginmanager.register(pytest_session, SESSION_PLUGIN)
    pytest_session.register_profiles()


def is_ours(config: pytest.Config, args: Sequence[str], *, pyargs: bool) -> bool:
    """Whether an argument names the property tests or their parent; without arguments, whether `testpaths` does."""
    here = Path(config.invocation_params.dir)
    paths = [arg.split("::")[0] for arg in args if not arg.startswith("-")]
    if pyargs and any(f"{path}.".startswith(f"{PACKAGE}.") for path in paths):
        return True
    existing = [path for path in (here / path for path in paths) if path.exists()]
    if not existing:
        existing = [config.rootpath / path for path in config.getini("testpaths")] or [here]
    return any(_holds(path.resolve()) for path in existing)


def _holds(path: Path) -> bool:
    """Whether a path is the tests' package, lies in it, or is the directory that it lies in."""
    return any(
        folder.name == FOLDER and (folder / "kernel" / "bench.py").exists()
        for folder in (path, *path.parents, path / FOLDER)
    )


def add_options(parser: pytest.Parser) -> None:
    """Declare the options of the property tests."""
    group = parser.getgroup("fusecheck", "Fusecheck's property tests")
    group.addoption("--backend", default="emulated", metavar="NAME", help="kernel under test (default: %(default)s)")
    group.addoption("--tp", default="2", metavar="N", help="ranks of a tensor-parallel group (default: %(default)s)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where ranks compute (default: cpu)")
    group.addoption("--dataflow", default=None, metavar="NAME", help="judge by this dataflow, not the declared one")
    group.addoption(
        "--case-timeout", default="30", metavar="S", help="seconds until a case is a hang (default: %(default)s)"
    )
    group.addoption(
        "--cases-from", default=None, metavar="FILE", help="try these Problems first: replay lines, one a line"
    )
    group.addoption(
        "--corpus",
        default=None,
        metavar="FILE",
        help="keep failing Problems here (default: property_tests/corpus.jsonl)",
    )
