"""FlashInfer's patterns: the number of each operation, the release that has it, and the form of its scales."""

from __future__ import annotations

import re
from dataclasses import replace

from fusecheck.dataflow import Dataflow
from fusecheck.interface import Support
from fusecheck.operations import GIVEN_SCALE, Collective, Operation
from fusecheck.quantflow import QUANT_FLOWS

VECTOR = 8
"""Elements of one access of a thread, bf16 or fp16."""
LANES = 32

GROUPED = "group-fp8-packed"
PATTERNS = {
    "none": (1, 1),
    GIVEN_SCALE: (2, 4),
    "nvfp4": (3, 5),
    GROUPED: (8, 9),
    "dynamic-fp8": (10, 11),
    "mxfp8": (13, 14),
}
"""`AllReduceFusionPattern` by quantiser: without the norm among the outputs, and with it."""
EXPERT_PATTERNS = {Collective.MOE_REDUCTION: 6, Collective.MOE_FINALIZE: 7}
"""The same of the sums of experts."""
SINCE = {"dynamic-fp8": (0, 6, 18), "mxfp8": (0, 7, 4)}
"""By quantiser, the first of the releases tried: 0.6.13, 0.6.18.post1, 0.7.0.post1, 0.7.2.post1, 0.7.4."""
LAYOUTS = {"128x4": 0, "8x4": 1, "linear": 2}
"""`QuantizationSFLayout` by the name of the layout."""
FP4_CAPABILITY = 10


OPERATIONS = tuple(
    Operation.named(name)
    for name in (
        *("RESIDUAL_RMS_NORM", "RESIDUAL_RMS_NORM_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8", "ALL_REDUCE"),
        *(f"RESIDUAL_RMS_NORM_{out}QUANT_DYNAMIC_FP8" for out in ("", "OUT_")),
        *(
            f"RESIDUAL_RMS_NORM_{out}QUANT_GROUP_FP8_PACKED{group}"
            for group in ("", "_32", "_48")
            for out in ("", "OUT_")
        ),
        *(f"RESIDUAL_RMS_NORM_{out}QUANT_MXFP8" for out in ("", "OUT_")),
        *(f"MOE_{collective}_RESIDUAL_RMS_NORM" for collective in ("REDUCTION", "FINALIZE")),
    )
)
"""What the kernel is asked for unless told otherwise: every pattern that runs on Hopper, groups by both paths."""


def family_of(quantiser: str) -> tuple[str, int | None]:
    """A quantiser's name without the size of its groups, and that size where there are groups of a free size."""
    found = re.fullmatch(rf"{GROUPED}(?:-(\d+))?", quantiser)
    return (GROUPED, int(found[1] or 128)) if found else (quantiser, None)


def pattern_of(op: Operation) -> int:
    """The pattern that computes an operation which the kernels have."""
    if op.has_experts:
        return EXPERT_PATTERNS[op.collective]
    return PATTERNS[family_of(op.quantiser)[0]][op.returns_norm] if op.norm else 0


def op_support(op: Operation, hidden: int, version: tuple[int, ...] | None, capability: int | None) -> Support:
    """Whether a release on a chip computes an operation rightly, and why not.

    Args:
        op: the operation.
        hidden: elements of a row.
        version: of flashinfer-python, its numbers; None where it is not known.
        capability: the chip's major compute capability; None where it is not known.
    """
    family, group = family_of(op.quantiser)
    if op.collective is Collective.NONE:
        return Support(ok=False, reason="FlashInfer's fused kernels have no operation without a collective")
    if op.norm and not op.residual:
        return Support(ok=False, reason="FlashInfer has no pattern with a norm and without a residual")
    if family not in PATTERNS:
        return Support(ok=False, reason=f"FlashInfer has no pattern with {op.quantiser}")
    if version is not None and version < SINCE.get(family, ()):
        first = ".".join(map(str, SINCE[family]))
        return Support(ok=False, reason=f"{op.quantiser} came with flashinfer-python {first}")
    if family == "nvfp4" and (reason := nvfp4_refusal(capability)):
        return Support(ok=False, reason=reason)
    if family == "mxfp8" and hidden % 32:
        return Support(ok=False, reason=f"hidden {hidden} is no multiple of 32, the group of MXFP8")
    if group is not None and (hidden % group or group % VECTOR):
        return Support(ok=False, reason=f"groups of {group} in rows of {hidden}, expected a divisor and vectors of 8")
    return Support(ok=True)


def nvfp4_refusal(capability: int | None) -> str:
    """Why no pattern writes NVFP4 on a chip; empty where it does, or where the chip is not known."""
    if capability is None or capability >= FP4_CAPABILITY:
        return ""
    return f"NVFP4 on capability {capability} writes zeros without an error; it needs {FP4_CAPABILITY}"


def shares_memory(group: int) -> bool:
    """Whether the amax of a group goes through shared memory, not by shuffles: NaN then wins over numbers."""
    vectors = group // VECTOR
    return vectors > LANES or bool(vectors & (vectors - 1))


def declared(flow: Dataflow, op: Operation) -> Dataflow:
    """The dataflow with the rules of the path that a group takes."""
    group = family_of(op.quantiser)[1]
    if group is None or not shares_memory(group):
        return flow
    shared = dict(flow.quants) | {GROUPED: QUANT_FLOWS[GROUPED]["flashinfer-shared"]}
    return replace(flow, quants=tuple(shared.items()))
