"""Which model's graph to check, as small JSON, and the counts that follow from its layers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from fusecheck.errors import UsageError
from fusecheck.graph.family import check_quantiser, fused_operation, takes_scale
from fusecheck.interface import FusionOp
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantisers.known import quantiser

DECODER = "decoder"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""Hugging Face families whose tiny models are exported."""


@dataclass(frozen=True)
class ModelPlan:
    """A model of tiny width and real structure.

    Attributes:
        model: `decoder` for Fusecheck's own, or a Hugging Face family.
        layers: decoder layers.
        hidden: columns.
        dtype: of the activations.
        tokens: of the example.
        dynamic: the token count is open.
        merged: q/k/v and gate/up are one layer each (`decoder` only).
        k_differs: k's input scale differs from q's and v's (`decoder`, not merged).
        quantiser: of every layer's input.
        strategy: of the collectives.
        magnitude: of the inputs (`decoder` only).
        seed: of weights and inputs.
    """

    model: str = DECODER
    layers: int = 2
    hidden: int = 64
    dtype: str = "bfloat16"
    tokens: int = 4
    dynamic: bool = True
    merged: bool = True
    k_differs: bool = False
    quantiser: str = GIVEN_SCALE
    strategy: str = "AUTO"
    magnitude: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model != DECODER and self.model not in FAMILIES:
            raise UsageError(f"unknown model {self.model!r}, expected one of: {DECODER}, {', '.join(FAMILIES)}")
        if self.layers < 1:
            raise UsageError(f"layers {self.layers}: expected at least 1")
        check_quantiser(self.quantiser, self.hidden)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelPlan:
        """Read a plan, as `to_json` wrote it; `cases.read_plan` says what is wrong with one."""
        return cls(**json.loads(text))

    def counts(self, *, quant: bool) -> dict[str, int]:
        """Operators of the graph after the passes; `quant` says whether the quantising one ran.

        L layers have 2L sums over ranks. All fuse; all but the last, which feeds the bf16 head, quantise. The first
        layer's norm has no sum before it. Layers whose k has another scale keep their norm.
        """
        differs = self.k_differs and not self.merged and takes_scale(self.quantiser)
        quantising = (2 * self.layers - 1 - (self.layers - 1) * differs) * quant
        operation = fused_operation(self.quantiser, norm_out=False)
        assert operation is not None
        heads = 2 * self.layers * (self.model == "qwen3")  # its norms of q and k
        found = {
            "all_reduce": 0,
            "norm": 1 + heads,
            FusionOp.RESIDUAL_RMS_NORM.value: 2 * self.layers - quantising,
            operation.value: quantising,
        }
        return {role: count for role, count in found.items() if count}


def named_model(text: str, layers: int) -> ModelPlan:
    """The plan of `MODEL` or `MODEL:QUANTISER`, as wide as whole groups need it.

    Raises:
        UsageError: an unknown model or quantiser.
    """
    model, colon, name = text.strip().partition(":")
    if not colon:
        return ModelPlan(model=model, layers=layers)
    check_quantiser(name)
    hidden = math.lcm(ModelPlan.hidden, quantiser(name).group or 1)
    return ModelPlan(model=model, layers=layers, hidden=hidden, quantiser=name)
