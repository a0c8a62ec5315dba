"""The rotary embedding, with the scalings of long contexts, by Hugging Face's formulas (`modeling_rope_utils.py`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusecheck.eval.config import Shape


class Rotary:
    """Angles by position.

    Attributes:
        frequencies: [head_dim / 2], float32, scaled as config.json asks.
        amplitude: what cos and sin are multiplied by; 1 but for yarn.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        plain = 1.0 / (shape.theta**exponents)
        scaling, self.amplitude = shape.rope_scaling, 1.0
        if scaling is None:
            found = plain
        elif scaling["rope_type"] == "linear":
            found = plain / scaling["factor"]
        elif scaling["rope_type"] == "llama3":
            found = _llama3(plain, scaling)
        else:
            found, self.amplitude = _yarn(plain, scaling, shape)
        self.frequencies: Tensor = found.to(device)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [batch, 1, length, head_dim] at these positions [batch, length]."""
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)[:, None]
        return (angles.cos() * self.amplitude).to(dtype), (angles.sin() * self.amplitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding, half-split as in Hugging Face's Llama, to [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Stretch long wavelengths, keep short ones, blend between: Llama 3.1's `rope_scaling`."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    turns = old * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = frequencies * (blend + (1 - blend) / factor)
    return scaled


def _yarn(plain: Tensor, scaling: dict[str, Any], shape: Shape) -> tuple[Tensor, float]:
    """Keep what turns often within the old context, stretch what turns seldom, blend between; and the amplitude."""
    factor, old = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])

    def place(turns: float) -> float:
        """The index of the frequency that turns so often within the old context."""
        return shape.head_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(shape.theta))

    low, high = place(scaling.get("beta_fast") or 32.0), place(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, shape.head_dim - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept, _yarn_amplitude(scaling, factor)


def _yarn_amplitude(scaling: dict[str, Any], factor: float) -> float:
    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return growth(over) / growth(under) if over and under else growth(1.0)
