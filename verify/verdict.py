"""The stages of judgement over rows of outputs: tallies, and the elements outside their enclosure.

Each stage is judged from the previous *observed* output. Elements equal to the nominal are inside by construction;
the ends are computed for the others only. Every comparison asks "is inside": NaN is never inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import Format
from fusecheck.formats.element import E4M3
from fusecheck.interface import RankOutputs
from fusecheck.numerics import enclosure
from fusecheck.oracle import Oracle, Where

SHOWN = 3
"""Elements that a stage describes; all are counted."""


class Stage(str, Enum):
    """What is judged, in this order; the first stage that fails names the culprit."""

    ALIVE = "alive"
    AGREE = "ranks agree"
    RESIDUAL = "residual"
    NORM = "norm"
    QUANT = "quant"
    UNFUSED = "unfused"
    AGAIN = "again"
    PROPERTY = "property"


@dataclass(frozen=True)
class Element:
    """One element outside its enclosure."""

    row: int
    column: int
    got: str
    admissible: str
    context: str


@dataclass
class Tally:
    """How many elements a stage saw, how many were not the nominal, and how many lay outside."""

    stage: Stage
    elements: int = 0
    off_nominal: int = 0
    outside: int = 0
    shown: list[Element] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Merge another tally of the same stage."""
        self.elements += other.elements
        self.off_nominal += other.off_nominal
        self.outside += other.outside
        self.shown = (self.shown + other.shown)[:SHOWN]

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "stage": self.stage.value,
            "elements": self.elements,
            "off_nominal": self.off_nominal,
            "outside": self.outside,
            "shown": [asdict(element) for element in self.shown],
        }


def raw(x: Tensor) -> Tensor:
    """The bits of a bf16, fp16 or E4M3 tensor, as int16 or uint8."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.uint8)


def differing(got: Tensor, nominal: Tensor) -> Where | None:
    """Where two tensors of one dtype differ in bits; None when nowhere."""
    left, right = raw(got), raw(nominal)
    if torch.equal(left, right):
        return None
    rows, columns = torch.nonzero(left != right, as_tuple=True)
    return rows, columns


def admits(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor, flow: Dataflow) -> Tensor:
    """Which observed values are inside: NaN only where the nominal is NaN; both zeros unless their sign is kept."""
    value = got.to(torch.float64)
    inside = (lo <= value) & (value <= hi)
    if flow.zero_sign == "kept":
        zero = (value == 0) & (nominal == 0)
        inside &= ~zero | (torch.signbit(got) == torch.signbit(nominal))
    return inside | (value.isnan() & nominal.isnan())


def admits_codes(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Which observed codes are inside; NaN of either sign only where a NaN code is admissible."""
    place = E4M3.ordinal(got)
    inside = (lo <= place) & (place <= hi) & ~E4M3.is_nan(got)
    may_be_nan = E4M3.is_nan(nominal) | (hi == 127) | (lo == -127)
    return inside | (E4M3.is_nan(got) & may_be_nan)


def judge_rows(oracle: Oracle, outputs: RankOutputs, first_row: int) -> list[Tally]:
    """Judge the residual, norm and quant stages of some rows.

    Args:
        oracle: of exactly these rows.
        outputs: the same rows of one rank's outputs.
        first_row: their place in the whole, for the report.
    """
    residual = outputs.residual
    tallies = [_judge_values(Stage.RESIDUAL, residual, oracle.residual(), oracle.residual_ends, oracle, first_row)]
    if outputs.norm is not None:

        def norm_ends(where: Where) -> enclosure.Interval:
            return oracle.norm_ends(residual, where)

        tallies.append(_judge_values(Stage.NORM, outputs.norm, oracle.norm(residual), norm_ends, oracle, first_row))
    if outputs.quant is not None:
        tallies.append(_judge_codes(outputs, oracle, first_row))
    return tallies


def _judge_values(
    stage: Stage,
    got: Tensor,
    nominal: Tensor,
    ends: Callable[[Where], enclosure.Interval],
    oracle: Oracle,
    first_row: int,
) -> Tally:
    tally = Tally(stage, elements=got.numel())
    where = differing(got, nominal)
    if where is None:
        return tally
    tally.off_nominal = len(where[0])
    lo, hi = ends(where)
    bad = torch.nonzero(~admits(got[where], nominal[where], lo, hi, oracle.flow))[:, 0]
    tally.outside = len(bad)
    for index in bad[:SHOWN].tolist():
        row, column = int(where[0][index]), int(where[1][index])
        low, high = float(lo[index]), float(hi[index])
        wanted = describe(float(nominal[row, column]), oracle.format) if math.isnan(low + high) else ""
        wanted = wanted or f"{describe(low, oracle.format)}..{describe(high, oracle.format)}"
        context = operands_at(oracle, row, column)
        tally.shown.append(
            Element(first_row + row, column, describe(float(got[row, column]), oracle.format), wanted, context)
        )
    return tally


def _judge_codes(outputs: RankOutputs, oracle: Oracle, first_row: int) -> Tally:
    assert outputs.quant is not None
    got = raw(outputs.quant)
    tally = Tally(Stage.QUANT, elements=got.numel())
    nominal = oracle.codes(outputs.residual, outputs.norm)
    where = differing(got, nominal)
    if where is None:
        return tally
    tally.off_nominal = len(where[0])
    lo, hi = oracle.code_ends(outputs.residual, outputs.norm, where)
    bad = torch.nonzero(~admits_codes(got[where], nominal[where], lo, hi))[:, 0]
    tally.outside = len(bad)
    quotients = oracle.quotient_ends(outputs.residual, outputs.norm, where) if len(bad) else (lo, hi)
    for index in bad[:SHOWN].tolist():
        row, column = int(where[0][index]), int(where[1][index])
        wanted = f"{describe_ordinal(int(lo[index]))}..{describe_ordinal(int(hi[index]))}"
        if E4M3.is_nan(nominal[row, column]):
            wanted = "0x7f (nan)"
        span = f"y/scale in [{float(quotients[0][index]):.6g}, {float(quotients[1][index]):.6g}]"
        context = f"{span}  {operands_at(oracle, row, column)}"
        tally.shown.append(Element(first_row + row, column, describe_code(int(got[row, column])), wanted, context))
    return tally


def describe(value: float, fmt: Format) -> str:
    """A native value with its bits."""
    bits = torch.tensor(value, dtype=torch.float64).to(fmt.dtype).view(torch.int16)
    return f"0x{int(bits) & 0xFFFF:04x} ({value:.6g})"


def describe_code(code: int) -> str:
    """A code with its value."""
    return f"{code:#04x} ({E4M3.values[code]:g})"


def describe_ordinal(index: int) -> str:
    """The code at an E4M3.ordinal; NaN beyond +-126."""
    return "nan" if abs(index) > 126 else f"{E4M3.code_at(index):#04x}"


def operands_at(oracle: Oracle, row: int, column: int) -> str:
    """The inputs of one element, as the report line shows them."""
    operands = oracle.operands
    partials = ", ".join(f"{float(partial[row, column]):.6g}" for partial in operands.partials)
    residual, gamma = float(operands.residual[row, column]), float(operands.gamma[column])
    return f"in=[{partials}] residual={residual:.6g} gamma={gamma:.6g} scale={operands.scale:.8g}"


def admissible_codes(oracle: Oracle, outputs: RankOutputs) -> tuple[int, int]:
    """Over all elements of these rows: the number of admissible codes in total, and of elements."""
    rows, hidden = outputs.residual.shape
    device = outputs.residual.device
    row = torch.arange(rows, device=device).repeat_interleave(hidden)
    where = (row, torch.arange(hidden, device=device).repeat(rows))
    lo, hi = oracle.code_ends(outputs.residual, outputs.norm, where)
    return int((hi - lo + 1).clamp(min=1).sum()), rows * hidden


FALSE_ALARM = 1e-9
"""The chance that a right kernel's call exceeds its budget of off-nominal norms."""


def off_nominal_share(flow: Dataflow, fmt: Format, hidden: int) -> float | None:
    """The chance that a right kernel's norm differs from the nominal, at most, for spread significands.

    Of values whose place between two rounding boundaries is spread evenly, a relative shift d takes the share
    2^(p-1) E[m] d over a boundary, where m is the significand, below 2. The largest legal d is what L4 to L6 allow
    the kernel (L5 enters halved) and what the nominal itself may be off: 2.5 u in its root, 2 u in its products. A
    norm that is rounded twice may change twice. None where the norm reads what is no single value. The derivation is
    on the page of the criterion, `verify/README.md`.
    """
    if not (flow.norm_reads_rounded or flow.order == "rank"):
        return None
    root = (enclosure.kappa(flow, hidden) + enclosure.mean_error(flow, hidden)) / 2 + 0.5 * enclosure.U
    shift = root + enclosure.RSQRT + 2.01 * enclosure.U + 4.5 * enclosure.U
    return min(1.0, shift * 2.0**fmt.precision * (2 if flow.round_normed else 1))


def off_nominal_budget(share: float, elements: int) -> float:
    """How many of so many norms may differ from the nominal: more do in one call of `1 / FALSE_ALARM`.

    Bernstein's inequality for independent events of mean m in all: P(count >= m + t) <= exp(-t^2 / 2(m + t/3)).
    """
    mean, nats = share * elements, -math.log(FALSE_ALARM)
    return mean + nats / 3 + math.sqrt(nats**2 / 9 + 2 * nats * mean)
