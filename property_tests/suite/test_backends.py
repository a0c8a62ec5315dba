"""Backends are found by name, by entry point and by `package.module:attribute`, or refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from fusecheck import backends
from fusecheck.errors import UsageError
from fusecheck.interface import Backend
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.backend_calls import Call
from fusecheck.ranks import Pool, values

EXAMPLE = "fusecheck.property_tests.suite.example_backend:ExampleBackend"

Install = Callable[[str, str], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Pretend that a package offers a backend by an entry point."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(backends, "entry_points", lambda group: [p for p in points if p.group == group])

    def add(name: str, value: str) -> None:
        points.append(EntryPoint(name, value, backends.ENTRY_POINTS))
        backends._plug_ins.cache_clear()

    backends._plug_ins.cache_clear()
    yield add
    backends._plug_ins.cache_clear()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of the given source; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def write(source: str) -> str:
        names.append(f"plug_in_under_test_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def refusal(name: str) -> str:
    """The one line with which a backend's name is refused."""
    with pytest.raises(UsageError) as refused:
        backends.backend(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["emulated", "unfused", "emulated:flashinfer-fp32", EXAMPLE])
def test_a_backend_is_found_by_name_variant_or_attribute(name: str) -> None:
    found = backends.backend(name)
    assert isinstance(found, Backend)
    assert found.name == ("example" if name == EXAMPLE else name)


def test_a_variant_of_the_emulator_declares_the_dataflow_of_that_name() -> None:
    assert backends.backend("emulated:vllm-c").dataflow(Problem()).name == "vllm-c"
    assert backends.backend("emulated").dataflow(Problem()).name == "trtllm"
    assert backends.backend("emulated:trtllm").name == "emulated"


def test_an_entry_point_is_listed_unimported_and_loaded_when_asked_for(
    install: Install, module: Callable[[str], str]
) -> None:
    broken = module("raise RuntimeError('no driver\\nhere')")
    install("mine", EXAMPLE)
    install("broken", f"{broken}:Kernel")
    assert set(backends.backends()) == {*backends.BUILT_IN, "mine", "broken"}
    assert broken not in sys.modules
    assert backends.backend("mine").name == "example"
    assert refusal("broken") == (
        f"backend 'broken': importing '{broken}' raised RuntimeError: no driver here; mend or install it"
    )


def test_an_entry_point_may_not_take_a_built_in_name(install: Install) -> None:
    install("emulated", EXAMPLE)
    with pytest.raises(UsageError, match="takes the name of the built-in backend 'emulated'"):
        backends.backends()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("emulatd", "unknown backend 'emulatd', did you mean emulated?"),
        ("emulatd:flashinfer", "did you mean emulated?"),
        ("qqq", "unknown backend 'qqq', expected one of: emulated, unfused"),
        ("", "unknown backend ''"),
        ("emulated:flashinfr", "unknown dataflow 'flashinfr'"),
        ("unfused:fast", "unknown implementation in 'unfused/fast', expected one of: aiter, deepgemm"),
        ("no_such_module_here:Kernel", "importing 'no_such_module_here' raised ModuleNotFoundError"),
        ("fusecheck.errors:Kernel", "module 'fusecheck.errors' has no attribute 'Kernel'"),
        ("fusecheck.errors:", "unknown backend 'fusecheck.errors:'"),
        ("fusecheck.errors:UsageError", "UsageError lacks name (a string), supports, dataflow, open"),
        ("fusecheck.dataflow:DATAFLOWS", "dict lacks name (a string), supports, dataflow, open"),
        ("fusecheck.interface:Support", "Support cannot be made without arguments"),
    ],
)
def test_a_wrong_name_is_refused_with_the_remedy(name: str, told: str, install: Install) -> None:
    assert told in refusal(name)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
        ("def Kernel(): raise OSError('no GPU')", "making it raised OSError: no GPU"),
        ("class Kernel:\n name = 'k'\n def supports(self, problem): ...", "Kernel lacks dataflow, open;"),
        ("class Kernel:\n name = supports = dataflow = open = 3", "lacks name (a string), supports, dataflow, open"),
    ],
)
def test_a_plug_in_that_fails_is_told_in_one_line(source: str, told: str, module: Callable[[str], str]) -> None:
    assert told in refusal(f"{module(source)}:Kernel")


def test_the_example_plug_in_agrees_with_the_emulator_of_its_dataflow() -> None:
    calls = [Call(1, 8, seed=1), Call(12, 512, seed=2), Call(3, 256, seed=3, dtype="fp16")]
    with Pool("fusecheck.property_tests.suite.backend_calls:BackendCalls", 4) as ranks:
        example = values(ranks.call("run", EXAMPLE, calls, timeout=60.0))
        emulated = values(ranks.call("run", "emulated:trtllm-fp32", calls, timeout=60.0))
    for rank in range(4):
        for call, mine, theirs in zip(calls, example[rank], emulated[rank], strict=True):
            assert np.array_equal(mine["residual"], theirs["residual"])
            # Both norms are right; they may differ where the order of the squares decides a rounding.
            assert (mine["norm"] != theirs["norm"]).mean() < 0.003, call
            assert (mine["quant"] != theirs["quant"]).mean() < 0.003, call
