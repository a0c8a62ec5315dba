"""What the installed release of TensorRT-LLM computes, by its number and the environment."""

from __future__ import annotations

import math
import os
import re
from typing import Literal

from fusecheck.backends.packages import release_of

ACCUMULATE = "ALL_REDUCE_FUSION_KERNEL_ACC_FP32"
MERGED_IN, FP32_SINCE = (1, 3, 0, 23), (1, 3, 0, 24)
"""Pull requests 16753 and 16778 were merged while the main branch was called 1.3.0rc23; all that is newer has them."""
ROOM = "TRTLLM_ALLREDUCE_FUSION_WORKSPACE_SIZE"
ROOM_BYTES = 64 << 20
"""Beyond so large a message the op gives the call to NCCL, whatever strategy is asked for."""
PDL = "TRTLLM_ENABLE_PDL"
WITHOUT_MPI = "TLLM_DISABLE_MPI"
"""Set to 1, the library takes torch's process group in the place of MPI; it is read when it is imported."""


def release() -> tuple[float, ...]:
    """The numbers of the installed release, (1, 3, 0, 24) for 1.3.0rc24; beyond all where there is none."""
    text = release_of("tensorrt_llm")
    if text is None:
        return (math.inf,)
    final, _, candidate = text.partition("rc")
    numbers = [float(number) for number in re.findall(r"\d+", final)[:3]]
    return (*numbers, float(re.findall(r"\d+", candidate)[0]) if candidate else math.inf)


def sums() -> Literal["fp32", "native"] | None:
    """How the fused kernel adds up in this release and environment; None where the release does not tell.

    Until pull request 16753 (July 2026) float32 sums were asked for by setting the variable to whatever; since then
    they are the default, and 0 turns them off.
    """
    given, found = os.environ.get(ACCUMULATE), release()
    before: Literal["fp32", "native"] = "native" if given is None else "fp32"
    since: Literal["fp32", "native"] = "native" if given == "0" else "fp32"
    if before == since:
        return since
    return since if found >= FP32_SINCE else before if found < MERGED_IN else None


def room() -> int:
    """Bytes of one rank's addend up to which a call is fused."""
    return int(os.environ.get(ROOM, ROOM_BYTES))


def launches_dependently() -> bool:
    """Whether kernels are launched by programmatic dependent launch: unless it is turned off."""
    return os.environ.get(PDL) != "0"
