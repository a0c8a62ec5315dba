"""The table of real models is complete, consistent and forgiving about names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusecheck import toml
from fusecheck.errors import UsageError
from fusecheck.formats.binary import NATIVE
from fusecheck.inputs.models import Model, model, models
from fusecheck.operations import WORLD_SIZES


def test_the_table_spans_models_from_1b_to_405b_with_the_odd_sizes_among_them() -> None:
    table = models()
    assert len(table) >= 12
    assert {2880, 7168} <= {entry.hidden for entry in table.values()}
    assert {"llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"} <= set(table)
    assert {entry.weight_bias for entry in table.values()} == {0.0, 1.0}


@pytest.mark.parametrize("entry", models().values(), ids=lambda entry: entry.name)
def test_every_model_is_one_that_a_problem_can_take(entry: Model) -> None:
    assert entry.hidden % 8 == 0
    assert entry.dtype in NATIVE
    assert 0 < entry.eps <= 1e-4
    assert entry.heads % entry.kv_heads == 0
    assert any(entry.heads % size == 0 and entry.intermediate % size == 0 for size in WORLD_SIZES if size > 1)


@pytest.mark.parametrize(("name", "billions"), [("llama-3.2-1b", 1), ("llama-3.1-8b", 7), ("llama-3.1-405b", 400)])
def test_the_shapes_of_a_dense_model_add_up_to_its_size(name: str, billions: float) -> None:
    entry = model(name)
    attention = 2 * entry.hidden * entry.head_dim * (entry.heads + entry.kv_heads)
    total = entry.layers * (attention + 3 * entry.hidden * entry.intermediate)
    assert billions * 0.95 <= total / 1e9 <= billions * 1.05 + 0.2


def test_every_layer_has_two_all_reduces_and_all_but_the_last_norm_feed_fp8() -> None:
    entry = model("llama-3.1-8b")
    assert (entry.all_reduces, entry.fused_sites) == (64, 63)


def test_names_are_taken_in_any_case() -> None:
    assert model("Llama-3.1-8B") is model("llama-3.1-8b")


def test_an_unknown_name_is_answered_with_the_nearest_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'llama3\.1-8b'; near it are: llama-3\.1-8b"):
        model("llama3.1-8b")
    with pytest.raises(UsageError, match=r"expected one of: llama-3\.2-1b, "):
        model("zzzz")


GOOD = """
["tiny"]
hidden = 8
layers = 1
intermediate = 8
heads = 1
kv_heads = 1
head_dim = 8
eps = 1e-5
dtype = "bf16"
"""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (GOOD.replace("hidden = 8\n", ""), "'tiny' lacks the field 'hidden'"),
        (GOOD + "colour = 1\n", "unknown field 'colour'"),
        (GOOD.replace("layers = 1", "layers = true"), "layers=True"),
        (GOOD.replace("eps = 1e-5", 'eps = "small"'), "eps='small'"),
        ("tiny = 3\n", "'tiny' is a int"),
        ("[tiny\n", r"is not TOML: .*line 1"),
    ],
)
def test_a_broken_table_is_named_in_one_line(tmp_path: Path, broken: str, message: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        models(path)
    assert "\n" not in str(caught.value)


def test_a_good_table_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(GOOD, encoding="utf-8")
    assert models(path)["tiny"].fused_sites == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        toml.read(tmp_path / "nowhere.toml")
