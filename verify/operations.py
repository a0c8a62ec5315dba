"""What a fused call is asked for, as a composition, and the exchange between its ranks.

An operation is collective ∘ residual ∘ norm ∘ quantiser ∘ returned outputs. The libraries' names are names of
compositions: TensorRT-LLM's are those that `Operation.name` forms; FlashInfer's patterns are read as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import ClassVar

from fusecheck.errors import UsageError
from fusecheck.quantflow import QUANT_FLOWS

RETURNED = ("total", "residual", "norm", "quant", "scale")
"""What a call may return, by the fields of `RankOutputs`: sum, residual stream, norm, codes, scales of the codes."""

GIVEN_SCALE = "static-fp8"
"""The quantiser whose scale is an operand; every other one makes its scales and returns them."""

WORLD_SIZES = (1, 2, 4, 8, 16)
"""Ranks of a tensor-parallel group."""


class Collective(str, Enum):
    """What happens between the ranks before the residual is added."""

    NONE = "none"
    ALL_REDUCE = "all-reduce"
    MOE_REDUCTION = "moe-reduction"
    MOE_FINALIZE = "moe-finalize"


_PREFIX = {
    Collective.NONE: "LOCAL_",
    Collective.ALL_REDUCE: "",
    Collective.MOE_REDUCTION: "MOE_REDUCTION_",
    Collective.MOE_FINALIZE: "MOE_FINALIZE_",
}
_NAME = re.compile(
    r"(?P<prefix>LOCAL_|MOE_REDUCTION_|MOE_FINALIZE_)?(?P<residual>RESIDUAL_)?RMS_NORM"
    r"(?P<out>_OUT)?(?:_QUANT_(?P<quantiser>[A-Z0-9_]+))?"
)
_OTHER_NAMES = {
    "NONE": "ALL_REDUCE",
    "MOE_ALLREDUCE_RESIDUAL_RMS_NORM": "MOE_REDUCTION_RESIDUAL_RMS_NORM",
    "MOE_FINALIZE_ALLREDUCE_RESIDUAL_RMS_NORM": "MOE_FINALIZE_RESIDUAL_RMS_NORM",
    "kAllReduce": "ALL_REDUCE",
    "kARResidualRMSNorm": "RESIDUAL_RMS_NORM",
    "kARResidualRMSNormFP8Quant": "RESIDUAL_RMS_NORM_QUANT_FP8",
    "kARResidualRMSNormFP4Quant": "RESIDUAL_RMS_NORM_QUANT_NVFP4",
    "kARResidualRMSNormOutFP8Quant": "RESIDUAL_RMS_NORM_OUT_QUANT_FP8",
    "kARResidualRMSNormOutFP4Quant": "RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4",
    "kMoEReductionARResidualRMSNorm": "MOE_REDUCTION_RESIDUAL_RMS_NORM",
    "kMoEFinalizeARResidualRMSNorm": "MOE_FINALIZE_RESIDUAL_RMS_NORM",
    "kARResidualRMSNormPerTokenGroupFP8PackedQuant": "RESIDUAL_RMS_NORM_QUANT_GROUP_FP8_PACKED",
    "kARResidualRMSNormOutPerTokenGroupFP8PackedQuant": "RESIDUAL_RMS_NORM_OUT_QUANT_GROUP_FP8_PACKED",
    "kARResidualRMSNormDynamicFP8Quant": "RESIDUAL_RMS_NORM_QUANT_DYNAMIC_FP8",
    "kARResidualRMSNormOutDynamicFP8Quant": "RESIDUAL_RMS_NORM_OUT_QUANT_DYNAMIC_FP8",
    "kMoEFinalizeARResidualRMSNormFP8Quant": "MOE_FINALIZE_RESIDUAL_RMS_NORM_QUANT_FP8",
    "kARResidualRMSNormMXFP8Quant": "RESIDUAL_RMS_NORM_QUANT_MXFP8",
    "kARResidualRMSNormOutMXFP8Quant": "RESIDUAL_RMS_NORM_OUT_QUANT_MXFP8",
}
"""TensorRT-LLM's and FlashInfer's names that differ from those formed here."""


@dataclass(frozen=True)
class Operation:
    """A fused operation: what is computed, and which results are returned.

    Attributes:
        collective: how the partial sums meet.
        residual: a residual is added to the sum; the norm reads the result.
        norm: an RMS norm follows.
        quantiser: its name, or `none`.
        returns: which of `RETURNED`, in that order.

    Raises:
        UsageError: no library has such an operation.
    """

    RESIDUAL_RMS_NORM: ClassVar[Operation]
    RESIDUAL_RMS_NORM_QUANT_FP8: ClassVar[Operation]
    RESIDUAL_RMS_NORM_OUT_QUANT_FP8: ClassVar[Operation]

    collective: Collective = Collective.ALL_REDUCE
    residual: bool = True
    norm: bool = True
    quantiser: str = "none"
    returns: tuple[str, ...] = ("residual", "norm")

    def __post_init__(self) -> None:
        if (lacks := self._lacks()) is not None:
            raise UsageError(f"operation {self.name}: no library has one {lacks}; see `fusecheck backends`")

    def _lacks(self) -> str | None:
        if not self.norm and (self.residual or self.quantiser != "none"):
            return "that adds a residual or quantises without a norm"
        if not self.norm and self.collective is not Collective.ALL_REDUCE:
            return "without a norm but the all-reduce"
        return None

    @property
    def returns_norm(self) -> bool:
        """Whether the normalised activations are an output."""
        return "norm" in self.returns

    @property
    def returns_quant(self) -> bool:
        """Whether the codes are an output."""
        return "quant" in self.returns

    @property
    def returns_scale(self) -> bool:
        """Whether the scales of the codes are an output."""
        return "scale" in self.returns

    @property
    def has_experts(self) -> bool:
        """Whether each rank's addend is a sum of experts."""
        return self.collective in (Collective.MOE_REDUCTION, Collective.MOE_FINALIZE)

    @property
    def name(self) -> str:
        """By TensorRT-LLM's pattern, as `RESIDUAL_RMS_NORM_OUT_QUANT_FP8`; `OUT`: the norm is returned, too."""
        if not self.norm:
            return "ALL_REDUCE"
        out = "_OUT" if self.quantiser != "none" and self.returns_norm else ""
        quant = "" if self.quantiser == "none" else f"_QUANT_{_upper(self.quantiser)}"
        return f"{_PREFIX[self.collective]}{'RESIDUAL_' * self.residual}RMS_NORM{out}{quant}"

    @property
    def value(self) -> str:
        """The name, as when operations were members of an enumeration."""
        return self.name

    def __str__(self) -> str:
        return self.name

    @staticmethod
    @lru_cache(maxsize=512)
    def named(name: str) -> Operation:
        """The composition of this name, always the same object; TensorRT-LLM's and FlashInfer's names are known.

        Raises:
            UsageError: it is no name of a composition.
        """
        text = _OTHER_NAMES.get(name, name)
        if text == "ALL_REDUCE":
            return Operation(residual=False, norm=False, returns=("total",))
        found = _NAME.fullmatch(text)
        if found is None or (found["out"] and not found["quantiser"]):
            raise UsageError(
                f"op={name!r}, expected a name such as RESIDUAL_RMS_NORM_OUT_QUANT_FP8; `fusecheck backends` lists them"
            )
        collective = next(kind for kind, prefix in _PREFIX.items() if prefix == (found["prefix"] or ""))
        quantiser = _lower(found["quantiser"]) if found["quantiser"] else "none"
        return compose(collective, residual=bool(found["residual"]), quantiser=quantiser, norm_out=bool(found["out"]))


def compose(collective: Collective, *, residual: bool, quantiser: str, norm_out: bool) -> Operation:
    """The operation with a norm that returns the stream, the codes with their scales, and the norm where asked for."""
    returned = {
        "residual": residual,
        "norm": norm_out or quantiser == "none",
        "quant": quantiser != "none",
        "scale": quantiser not in ("none", GIVEN_SCALE),
    }
    returns = tuple(name for name, there in returned.items() if there)
    return Operation(collective, residual=residual, quantiser=quantiser, returns=returns)


def _upper(quantiser: str) -> str:
    return "FP8" if quantiser == GIVEN_SCALE else quantiser.upper().replace("-", "_")


def _lower(name: str) -> str:
    return GIVEN_SCALE if name == "FP8" else name.lower().replace("_", "-")


STATIC_OPS = tuple(
    Operation.named(name)
    for name in ("RESIDUAL_RMS_NORM", "RESIDUAL_RMS_NORM_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8")
)
"""The first op of the suite: all-reduce, residual, norm, and E4M3 codes by a given scale where asked for."""

for _op in STATIC_OPS:
    setattr(Operation, _op.name, _op)

_MADE = tuple(name for name in QUANT_FLOWS if name != GIVEN_SCALE)

COMPOSITIONS = (
    *STATIC_OPS,
    *(Operation.named(name) for name in ("ALL_REDUCE", "RMS_NORM")),
    *(compose(Collective.ALL_REDUCE, residual=True, quantiser=q, norm_out=out) for q in _MADE for out in (False, True)),
    *(
        Operation.named(f"{moe}_RESIDUAL_RMS_NORM{quant}")
        for moe in ("MOE_REDUCTION", "MOE_FINALIZE")
        for quant in ("", "_QUANT_NVFP4", "_OUT_QUANT_NVFP4")
    ),
    Operation.named("MOE_FINALIZE_RESIDUAL_RMS_NORM_QUANT_FP8"),
    *(compose(Collective.NONE, residual=True, quantiser=q, norm_out=False) for q in QUANT_FLOWS),
    *(Operation.named(f"LOCAL_RMS_NORM_QUANT_{name}") for name in ("DYNAMIC_FP8", "GROUP_FP8")),
)
"""The operations that some library has."""

FusionOp = Operation
"""What plug-ins for the first op call it."""


class Strategy(str, Enum):
    """How the ranks exchange their partial sums."""

    ONESHOT = "ONESHOT"
    TWOSHOT = "TWOSHOT"
    AUTO = "AUTO"
