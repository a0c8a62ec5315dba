"""Operands that a kernel would misread: each must be refused with an error, on every rank, and do no harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusecheck.interface import RankInputs


def _other(tensor: Tensor) -> torch.dtype:
    return torch.float16 if tensor.dtype is torch.bfloat16 else torch.bfloat16


SPOILERS: dict[str, Callable[[RankInputs], RankInputs]] = {
    "gamma in float32": lambda given: replace(given, gamma=given.gamma.float()),
    "gamma too short": lambda given: replace(given, gamma=given.gamma[:-8].clone()),
    "scale in float64": lambda given: replace(given, scale=given.scale.double()),
    "scale in the activations' dtype": lambda given: replace(given, scale=given.scale.to(given.partial.dtype)),
    "a scale for each channel": lambda given: replace(given, scale=given.scale.repeat(len(given.gamma))),
    "residual in float32": lambda given: replace(given, residual=given.residual.float()),
    "residual of the other format": lambda given: replace(given, residual=given.residual.to(_other(given.residual))),
    "residual with a row missing": lambda given: replace(given, residual=given.residual[:-1].clone()),
    "residual too narrow": lambda given: replace(given, residual=given.residual[:, :-8].contiguous()),
    "partial sums in float32": lambda given: replace(given, partial=given.partial.float()),
    "partial sums in one dimension": lambda given: replace(given, partial=given.partial.reshape(-1)),
}
"""How an operand is spoilt, by what is wrong with it."""
