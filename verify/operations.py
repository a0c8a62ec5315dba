"""What a fused call is asked for: its outputs, and the exchange between its ranks."""

from __future__ import annotations

from enum import Enum

WORLD_SIZES = (1, 2, 4, 8, 16)
"""Ranks of a tensor-parallel group."""


class FusionOp(str, Enum):
    """What the fused call returns, by TensorRT-LLM's `AllReduceFusionOp` names."""

    RESIDUAL_RMS_NORM = "RESIDUAL_RMS_NORM"
    RESIDUAL_RMS_NORM_QUANT_FP8 = "RESIDUAL_RMS_NORM_QUANT_FP8"
    RESIDUAL_RMS_NORM_OUT_QUANT_FP8 = "RESIDUAL_RMS_NORM_OUT_QUANT_FP8"

    @property
    def returns_norm(self) -> bool:
        """Whether the normalised activations are an output."""
        return self is not FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8

    @property
    def returns_quant(self) -> bool:
        """Whether the E4M3 codes are an output."""
        return self is not FusionOp.RESIDUAL_RMS_NORM


class Strategy(str, Enum):
    """How the ranks exchange their partial sums."""

    ONESHOT = "ONESHOT"
    TWOSHOT = "TWOSHOT"
    AUTO = "AUTO"
