"""Shapes of real models by name, from `models.toml`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fusecheck import toml
from fusecheck.errors import UsageError

TABLE = Path(__file__).with_name("models.toml")


@dataclass(frozen=True)
class Model:
    """What a decoder's config says about the sites that the fused op serves.

    Attributes:
        name: as `--model` takes it.
        hidden: elements of a row.
        layers: decoder layers.
        intermediate: width of the MLP, of one expert in a mixture of experts.
        heads: query heads of the attention.
        kv_heads: key and value heads.
        head_dim: width of a head.
        eps: of the RMSNorm.
        dtype: of the activations, `bf16` or `fp16`.
        weight_bias: added to the norm's weight; 1.0 for Gemma.
        experts: of one layer; 0 for a dense model.
    """

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    dtype: str
    weight_bias: float = 0.0
    experts: int = 0

    @property
    def all_reduces(self) -> int:
        """All-reduces of one forward pass: behind the attention and behind the MLP of every layer."""
        return 2 * self.layers

    @property
    def fused_sites(self) -> int:
        """All-reduces whose norm feeds an FP8 linear: all but the last, whose norm feeds the head in bf16."""
        return self.all_reduces - 1


@cache
def models(table: Path = TABLE) -> dict[str, Model]:
    """Read the table of models, by name in the order of the file.

    Raises:
        UsageError: the file is not TOML, or an entry has a missing, unknown or ill-typed field.
    """
    return {name: _model(name, entry, table) for name, entry in toml.read(table).items()}


def model(name: str) -> Model:
    """Look a model up by its name, in any case.

    Raises:
        UsageError: no model has this name; the message offers the nearest ones.
    """
    known = models()
    found = known.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    if near:
        raise UsageError(f"unknown model {name!r}; near it are: {', '.join(near)} (of {len(known)} known)")
    raise UsageError(f"unknown model {name!r}, expected one of: {', '.join(known)}")


def _model(name: str, entry: Any, table: Path) -> Model:
    if not isinstance(entry, dict):
        raise UsageError(f"{table}: {name!r} is a {type(entry).__name__}, expected a table of fields")
    expected = {field.name: field for field in fields(Model) if field.name != "name"}
    unknown = sorted(set(entry) - set(expected))
    if unknown:
        raise UsageError(f"{table}: {name!r} has the unknown field {unknown[0]!r}, expected: {', '.join(expected)}")
    for key, value in entry.items():
        wanted: tuple[type, ...] = {"float": (int, float), "int": (int,), "str": (str,)}[str(expected[key].type)]
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise UsageError(f"{table}: {name!r} has {key}={value!r}, expected a value of type {expected[key].type}")
    try:
        return Model(name=name, **entry)
    except TypeError:
        missing = [key for key in expected if key not in entry and key not in ("weight_bias", "experts")]
        raise UsageError(f"{table}: {name!r} lacks the field {missing[0]!r}") from None
