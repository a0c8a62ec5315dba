"""How small an error of all scales at once is rejected, for every quantiser that makes them and known arithmetic.

The unit is the least there is: one unit in the last place of a float32 scale, one exponent, one step of E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.quantflow import QUANT_FLOWS, QuantFlow
from fusecheck.quantisers.known import QUANTISERS
from fusecheck.quantisers.quantiser import Quantiser

ROWS, COLUMNS = 16, 1024
MOST_STEPS = 8
"""An approximate division may be off by 5u, which is up to five units in the last place."""
FACTORS = {"none": 1.0, "multiplies": 640.0, "divides": 1 / 640}
"""The factor of a tensor whose largest magnitude is about four."""


@dataclass(frozen=True)
class ScaleRow:
    """The smallest uniform error that is rejected.

    Attributes:
        quantiser: its name.
        rules: the arithmetic that is declared, by its name.
        unit: of `steps`.
        steps: from the nominal scale, either way; 0 if none of `MOST_STEPS` is rejected.
        expected: steps from which on an error must be rejected.
    """

    quantiser: str
    rules: str
    unit: str
    steps: int
    expected: int

    @property
    def sharp(self) -> bool:
        """Whether it is rejected from where it must be."""
        return 0 < self.steps <= self.expected


def rows(seed: int = 0) -> Iterator[ScaleRow]:
    """One row for each known arithmetic of each quantiser, on normal activations."""
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(ROWS, COLUMNS, generator=generator).to(torch.bfloat16)
    for name, flows in QUANT_FLOWS.items():
        for flow in flows.values():
            if flow.given != "scale":
                yield _row(QUANTISERS[name], flow, norm)


def _row(quantiser: Quantiser, flow: QuantFlow, norm: Tensor) -> ScaleRow:
    given = FACTORS[flow.given]
    wide = norm.to(torch.float64)
    nominal = quantiser.scales(norm, flow, given)
    ends = quantiser.scale_ends((wide, wide), flow, given)

    def rejected(steps: int) -> bool:
        return all(
            not bool(quantiser.admits(moved(nominal, side * steps, flow), nominal, ends, flow).all())
            for side in (-1, 1)
        )

    found = next((steps for steps in range(1, MOST_STEPS + 1) if rejected(steps)), 0)
    exact = flow.scale_rule in ("divide", "multiply") or nominal.dtype is torch.uint8 or flow.pow2 != "no"
    return ScaleRow(quantiser.name, flow.name, unit(nominal, flow), found, 1 if exact else MOST_STEPS)


def moved(scales: Tensor, steps: int, flow: QuantFlow) -> Tensor:
    """Every scale so many of its least steps up or down: bytes, exponents of powers of two, or last places."""
    if scales.dtype is torch.uint8:
        return (scales.to(torch.int16) + steps).clamp(0, 255).to(torch.uint8)
    if flow.pow2 != "no":
        return torch.ldexp(scales, torch.tensor(steps))
    return (scales.view(torch.int32) + steps).view(torch.float32)


def unit(scales: Tensor, flow: QuantFlow) -> str:
    """What one step is."""
    if flow.pow2 != "no":
        return "exponent"
    return "step of E4M3" if scales.dtype is torch.uint8 else "ulp of float32"
