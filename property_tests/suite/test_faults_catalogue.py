"""The catalogue of faults: every entry has a source and a hook that it overrides, and a broken one is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fusecheck import backends
from fusecheck.errors import UsageError
from fusecheck.faults import weak
from fusecheck.faults.catalogue import PATH, catalogue, kernel_faults, load, resolve
from fusecheck.quantflow import QUANT_FLOWS
from fusecheck.quantisers.known import quantiser
from fusecheck.stages import code

ENTRY = """
[[fault]]
id = "XX-01"
title = "a title"
project = "somebody/something"
links = ["https://example.org/1"]
group = "arithmetic"
does = "Something."
hook = "Arithmetic.round_sum"
patch = "fusecheck.faults.sums:KeepsSumWide"
visible = "any"
stage = "residual"
"""


def test_the_catalogue_has_at_least_what_was_promised_in_every_group() -> None:
    groups = Counter(fault.group for fault in catalogue().faults)
    least = {"arithmetic": 25, "quantiser": 60, "protocol": 16, "launcher": 9, "graph": 14}
    assert {name: groups[name] for name in least if groups[name] < least[name]} == {}
    assert groups["suite"] + groups["accuracy"] >= 8
    assert len(catalogue().faults) >= 75


def test_every_quantiser_that_makes_its_scales_has_ten_published_faults_or_more() -> None:
    kinds = Counter(quantiser(fault.quantiser).name for fault in catalogue().faults if fault.quantiser)
    of = {name: sum(n for key, n in kinds.items() if key in (name, f"{name}-64")) for name in QUANT_FLOWS}
    assert {name: count for name, count in of.items() if name != "static-fp8" and count < 10} == {}


def test_each_of_the_thirty_ranked_kinds_has_an_entry() -> None:
    assert {fault.rank for fault in catalogue().select(quick=True)} == set(range(1, 31))
    assert len(catalogue().select(quick=True)) == 30


def test_every_entry_says_what_and_every_one_left_out_names_a_source_and_says_why() -> None:
    assert all(fault.does.endswith(".") for fault in catalogue().faults)
    for entry in catalogue().left_out:
        assert entry.links
        assert entry.reason.endswith(".")


def test_every_weakened_judge_takes_the_calls_of_what_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []

    def fit(owner: Any, name: str, value: Any) -> None:
        weak.check_fit(owner, name, value)
        fitted.append(name)

    monkeypatch.setattr(weak, "_patch", fit)
    faults = [fault for fault in catalogue().faults if fault.patch.startswith(weak.__name__)]
    for fault in faults:
        resolve(fault.patch)()
    assert len(fitted) >= len(faults) >= 10


def test_a_weakened_judge_that_does_not_fit_any_more_is_refused() -> None:
    with pytest.raises(TypeError, match=r"in place of admits_codes.*too many positional arguments"):
        weak.check_fit(code, "admits_codes", lambda got, nominal, lo, hi: got)


def test_no_test_and_no_part_of_the_normal_plan_knows_about_a_fault() -> None:
    sources = [path for path in PATH.parent.rglob("*.py") if PATH not in path.parents]
    ids = {fault.id for fault in catalogue().faults if fault.subject == "kernel"}
    assert len(sources) > 30
    found = {path.name: name for path in sources for name in ids if name in path.read_text(encoding="utf-8")}
    assert found == {}


@pytest.mark.parametrize("name", kernel_faults())
def test_every_kernel_fault_loads_as_a_backend_that_declares_the_right_kernels_dataflow(name: str) -> None:
    backend = backends.backend(f"fusecheck.faults.backend:{name}")
    assert backend.name == f"fault:{name}"
    assert isinstance(backend, type(backends.backend("emulated")))


def test_a_whole_entry_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "catalogue_mine.toml"
    path.write_text(ENTRY)
    assert [fault.id for fault in load(path).faults] == ["XX-01"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('links = ["https://example.org/1"]\n', "", "lacks links"),
        ('["https://example.org/1"]', '["seen somewhere"]', "at least one https:// source"),
        ('hook = "Arithmetic.round_sum"\n', "", "lacks hook"),
        ("Arithmetic.round_sum", "Arithmetic.round_everything", "expected a method of Arithmetic"),
        ("Arithmetic.round_sum", "Arithmetic.cast", "does not override its hook Arithmetic.cast"),
        ("Arithmetic.round_sum", "Lamport.rotate", "expected a subclass of Lamport"),
        ("KeepsSumWide", "Nothing", "cannot be loaded"),
        ('"arithmetic"', '"arithmetics"', "expected one of: arithmetic"),
        ('"arithmetic"', '"graph"', "expected a hook of a pass in the group graph"),
        ('stage = "residual"', 'stage = "residual"\nseverity = 3', "unknown field 'severity'"),
        ('stage = "residual"', 'stage = "residual"\ndataflow = "mine"', "dataflow='mine'"),
    ],
)
def test_an_entry_without_source_or_hook_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    path = tmp_path / "catalogue_mine.toml"
    assert old in ENTRY
    path.write_text("# a comment\n" + ENTRY.replace(old, new))
    with pytest.raises(UsageError) as error:
        load(path)
    assert str(error.value).startswith("catalogue_mine.toml:3: fault XX-01")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_id_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalogue_mine.toml"
    path.write_text(ENTRY + ENTRY)
    with pytest.raises(UsageError, match="XX-01 is there twice"):
        load(path)


def test_an_unknown_id_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown fault 'KA-1', did you mean KA-01, ") as error:
        catalogue().select(ids=["KA-1"])
    assert "\n" not in str(error.value)


def test_an_unknown_group_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown group 'kernel', expected one of: arithmetic, quantiser, protocol"):
        catalogue().select(groups=["kernel"])
