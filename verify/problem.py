"""Problem: everything that determines a case, as one line of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.formats.binary import NATIVE, Format
from fusecheck.inputs.cells import CALL_STEP
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.gammas import GAMMAS
from fusecheck.operations import WORLD_SIZES, Operation, Strategy
from fusecheck.quantisers.known import quantiser

_SEEDS = 2**63 - 2**63 % CALL_STEP
"""Seeds of calls are taken modulo this, which keeps their remainder by `CALL_STEP`."""


@dataclass(frozen=True)
class Call:
    """An earlier call on the same workspace; it is judged like the Problem's own.

    Attributes:
        tokens: rows of this call.
        hidden: columns, or None for the Problem's.
        op: None for the Problem's.
        strategy: None for the Problem's.
        dtype: None for the Problem's, for which the workspace is opened.
        delayed: the rank that is delayed, or None.
        delay_ms: how long; before the call, or after it when `late`.
        late: the delay comes after the call.
        idle_ms: all ranks pause this long before the call.
        overwrite: the input buffers are overwritten as soon as the call returns.
        reopen: the workspace is closed and opened again before the call.
    """

    tokens: int
    hidden: int | None = None
    op: Operation | None = None
    strategy: Strategy | None = None
    dtype: str | None = None
    delayed: int | None = None
    delay_ms: int = 0
    late: bool = False
    idle_ms: int = 0
    overwrite: bool = False
    reopen: bool = False


@dataclass(frozen=True)
class Problem:
    """One case: the op, its shapes and scalars, and the seed of its data.

    Attributes:
        op: what the fused call returns.
        strategy: how the ranks exchange partial sums.
        dtype: of the activations, `bf16` or `fp16`.
        world_size: ranks of the tensor-parallel group.
        tokens: rows.
        hidden: columns, a multiple of 8.
        eps: added to the mean square.
        scale: the dequantisation scale; rounded to float32.
        gamma: kind of norm weight, a key of `families.GAMMAS`.
        weight_bias: added to gamma in float32.
        family: kind of activations, a key of `families.FAMILIES`.
        seed: of the data; every rank makes the same from it.
        schedule: earlier calls on the same workspace, in order.
        layout: how the scales of the codes lie, where the quantiser has several layouts; empty: its first.

    Raises:
        UsageError: a field is out of its range; the message names field, value and remedy.
    """

    op: Operation = Operation.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
    strategy: Strategy = Strategy.AUTO
    dtype: str = "bf16"
    world_size: int = 2
    tokens: int = 1
    hidden: int = 64
    eps: float = 1e-5
    scale: float = 0.0125
    gamma: str = "spread"
    weight_bias: float = 0.0
    family: str = "gaussian"
    seed: int = 0
    schedule: tuple[Call, ...] = field(default=())
    layout: str = ""

    def __post_init__(self) -> None:
        for dtype in (self.dtype, *(call.dtype for call in self.schedule if call.dtype is not None)):
            _known("dtype", dtype, NATIVE)
        _known("gamma", self.gamma, GAMMAS)
        _known("family", self.family, FAMILIES)
        _require(self.world_size in WORLD_SIZES, "world_size", self.world_size, f"one of {WORLD_SIZES}")
        for tokens in (self.tokens, *(call.tokens for call in self.schedule)):
            _require(_is_count(tokens), "tokens", tokens, "a whole number of at least 1")
        for hidden in (self.hidden, *(call.hidden for call in self.schedule if call.hidden is not None)):
            _require(_is_count(hidden) and hidden % 8 == 0, "hidden", hidden, "a multiple of 8")
        _require(math.isfinite(self.eps) and self.eps >= 0, "eps", self.eps, "a finite number of at least 0")
        _require(math.isfinite(self.weight_bias), "weight_bias", self.weight_bias, "a finite number")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2^63 - 1")
        for call in (Call(self.tokens), *self.schedule):
            name = (call.op or self.op).quantiser
            if name != "none":
                quantiser(name).groups(call.hidden or self.hidden)
        layouts = quantiser(self.op.quantiser).layouts if self.op.returns_scale else ()
        expected = f"one that {self.op.quantiser} has: {', '.join(layouts)}"
        expected = expected if layouts else "none: the operation makes no scales"
        _require(self.layout in ("", *layouts), "layout", self.layout, expected)

    @property
    def format(self) -> Format:
        """The activations' format."""
        return NATIVE[self.dtype]

    @property
    def elements(self) -> int:
        """Tokens * hidden of the last call."""
        return self.tokens * self.hidden

    def calls(self) -> list[tuple[Call, Problem]]:
        """Every call of the schedule as a Problem of its own, the last call last; data are fresh in each."""
        if not self.schedule:
            return [(Call(self.tokens), self)]
        expanded = []
        for index, call in enumerate(self.schedule):
            own = replace(
                self,
                tokens=call.tokens,
                hidden=call.hidden or self.hidden,
                op=call.op or self.op,
                strategy=call.strategy or self.strategy,
                dtype=call.dtype or self.dtype,
                layout=self.layout if call.op in (None, self.op) else "",
                seed=(self.seed + CALL_STEP * (index + 1)) % _SEEDS,
                schedule=(),
            )
            expanded.append((call, own))
        return [*expanded, (Call(self.tokens), replace(self, schedule=()))]

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back; fields at their defaults in a Call are left out."""
        record = {name: getattr(self, name) for name in _by_name(Problem)} | {"op": self.op.name}
        record["schedule"] = [_compact(call) for call in self.schedule]
        for name in ("scale", "eps", "weight_bias"):
            record[name] = _number(record[name])
        for name in ("schedule", "layout"):
            if not record[name]:
                del record[name]
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Problem:
        """Read a replay line.

        Raises:
            UsageError: not JSON, an unknown or missing field, or a value out of range.
        """
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"replay line is not JSON ({error}), expected the line of a finding, whole") from None
        if not isinstance(record, dict):
            raise UsageError(f"replay line is a JSON {type(record).__name__}, expected an object")
        return cls(**_fields(cls, record))


def _compact(call: Call) -> dict[str, Any]:
    record = {f.name: getattr(call, f.name) for f in fields(call) if getattr(call, f.name) != f.default}
    return record | ({"op": call.op.name} if call.op else {})


@cache
def _by_name(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in fields(cls)}


def _fields(cls: type, record: dict[str, Any]) -> dict[str, Any]:
    """Check a JSON record's names and types against a dataclass, and convert it to constructor arguments."""
    expected = _by_name(cls)
    unknown = sorted(set(record) - set(expected))
    if unknown:
        raise UsageError(f"unknown field {unknown[0]!r} in a {cls.__name__}, expected one of: {', '.join(expected)}")
    missing = [n for n, f in expected.items() if f.default is dataclasses.MISSING and n not in record]
    if missing:
        raise UsageError(f"a {cls.__name__} lacks the field {missing[0]!r}")
    return {name: _value(name, value) for name, value in record.items()}


def _value(name: str, value: Any) -> Any:
    if value is None and name in ("hidden", "op", "strategy", "dtype", "delayed"):
        return None
    if name == "schedule":
        _require(isinstance(value, list), name, value, "a list of calls")
        return tuple(Call(**_fields(Call, call)) for call in value)
    if name == "op":
        _require(isinstance(value, str), name, value, "the name of an operation")
        return Operation.named(value)
    if name == "strategy":
        return _strategy(value)
    if name in ("scale", "eps", "weight_bias"):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{name}={value!r}, expected a number") from None
    if name in ("dtype", "gamma", "family", "layout"):
        _require(isinstance(value, str), name, value, "a name")
    elif name in ("late", "overwrite", "reopen"):
        _require(isinstance(value, bool), name, value, "true or false")
    else:
        _require(isinstance(value, int) and not isinstance(value, bool), name, value, "a whole number")
    return value


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def _is_count(x: int) -> bool:
    return isinstance(x, int) and x >= 1


def _strategy(value: object) -> Strategy:
    try:
        return Strategy(value)
    except ValueError:
        choices = ", ".join(each.value for each in Strategy)
        raise UsageError(f"strategy={value!r}, expected one of: {choices}") from None


def _known(name: str, value: str, table: dict[str, Any]) -> None:
    if value not in table:
        raise UsageError(f"unknown {name} {value!r}, expected one of: {', '.join(table)}")


def _require(holds: bool, name: str, value: object, expected: str) -> None:  # noqa: FBT001
    if not holds:
        raise UsageError(f"{name}={value!r}, expected {expected}")
