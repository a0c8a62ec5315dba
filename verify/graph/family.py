"""The family as graphs have it: kinds of quantisers, each moved into the fused operator by a pass of its own.

A new format is a row of `KINDS`: operators, matcher, checks and predictions take its name.
"""

from __future__ import annotations

from fusecheck.errors import UsageError
from fusecheck.operations import COMPOSITIONS, Collective, Operation
from fusecheck.quantflow import known_flows, without_group
from fusecheck.quantisers.known import quantiser

KINDS: dict[str, tuple[str, ...]] = {
    "fp8": ("static-fp8",),
    "dynamic_fp8": ("dynamic-fp8",),
    "group_fp8": ("group-fp8", "group-fp8-packed"),
    "nvfp4": ("nvfp4",),
    "mxfp8": ("mxfp8",),
    "mxfp4": ("mxfp4",),
}
"""The quantisers of each kind, without the size of their groups; at a site of several kinds the first is fused."""
FINALIZE = "moe_finalize"
"""What else a pass may move into the fused operator: a rank's sum of experts."""


def kind_of(name: str) -> str | None:
    """The kind of a quantiser, by its name with or without the size of its groups."""
    return next((kind for kind, names in KINDS.items() if without_group(name) in names), None)


def takes_scale(name: str) -> bool:
    """Whether a quantiser is given a scale of the tensor, as static FP8 and NVFP4 are."""
    return any(flow.given != "none" for flow in known_flows(name).values())


def check_quantiser(name: str, hidden: int | None = None) -> None:
    """Refuse a quantiser that there is not, or that does not divide rows of `hidden` elements.

    Raises:
        UsageError: in one line.
    """
    made = quantiser(name)
    if kind_of(name) is None:
        known = ", ".join(each for names in KINDS.values() for each in names)
        raise UsageError(f"quantiser={name!r} is in no graph, expected one of: {known}")
    if hidden is not None:
        made.groups(hidden)


def fused_operation(quantiser: str, *, norm_out: bool, experts: bool = False) -> Operation | None:
    """The operation that sums over ranks, adds, normalises and quantises, None where no library has it."""
    moe = "MOE_FINALIZE_" if experts else ""
    upper = "FP8" if quantiser == "static-fp8" else quantiser.upper().replace("-", "_")
    quant = "" if quantiser == "none" else f"{'_OUT' * norm_out}_QUANT_{upper}"
    found = Operation.named(f"{moe}RESIDUAL_RMS_NORM{quant}")
    return found if _base(found) in _KNOWN else None


def _base(op: Operation) -> tuple[Collective, str, bool]:
    return op.collective, without_group(op.quantiser), op.returns_norm


_KNOWN = {_base(op) for op in COMPOSITIONS if op.residual and op.norm}
