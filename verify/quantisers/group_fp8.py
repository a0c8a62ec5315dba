"""E4M3 in groups of a row: a float32 scale for each, or a power of two as a byte, four of them packed into an int32.

DeepGEMM's formats: float32 scales on Hopper, by columns, and packed UE8M0 on Blackwell. FlashInfer's patterns 8 and 9,
vLLM's and SGLang's per-token-group quantisers.
"""

from __future__ import annotations

import torch

from fusecheck.formats.element import E4M3
from fusecheck.quantisers.scaled import Scaled

GROUP = 128
"""What DeepSeek's, Qwen's and GLM's checkpoints use."""


def group_fp8(group: int = GROUP) -> Scaled:
    """With float32 scales."""
    layouts = ("linear", "column-major", "column-major-aligned")
    return Scaled(_name("group-fp8", group), E4M3, group, torch.float32, layouts)


def group_fp8_packed(group: int = GROUP) -> Scaled:
    """With UE8M0 scales, four to an int32."""
    return Scaled(_name("group-fp8-packed", group), E4M3, group, torch.uint8, ("packed",))


def _name(name: str, group: int) -> str:
    return name if group == GROUP else f"{name}-{group}"
