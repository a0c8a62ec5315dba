"""Operands that a kernel would misread: each must be refused with an error, on every rank, and do no harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fusecheck.interface import RankInputs


def _gamma_in_float32(inputs: RankInputs) -> RankInputs:
    return replace(inputs, gamma=inputs.gamma.float())


def _short_gamma(inputs: RankInputs) -> RankInputs:
    return replace(inputs, gamma=inputs.gamma[:-8].clone())


def _scale_in_float64(inputs: RankInputs) -> RankInputs:
    return replace(inputs, scale=inputs.scale.double())


def _scale_in_the_activations_dtype(inputs: RankInputs) -> RankInputs:
    return replace(inputs, scale=inputs.scale.to(inputs.partial.dtype))


def _scale_per_channel(inputs: RankInputs) -> RankInputs:
    return replace(inputs, scale=inputs.scale.expand(len(inputs.gamma)).contiguous())


def _residual_in_float32(inputs: RankInputs) -> RankInputs:
    return replace(inputs, residual=inputs.residual.float())


def _residual_of_the_other_format(inputs: RankInputs) -> RankInputs:
    other = torch.float16 if inputs.residual.dtype is torch.bfloat16 else torch.bfloat16
    return replace(inputs, residual=inputs.residual.to(other))


def _short_residual(inputs: RankInputs) -> RankInputs:
    return replace(inputs, residual=inputs.residual[:-1].clone())


def _narrow_residual(inputs: RankInputs) -> RankInputs:
    return replace(inputs, residual=inputs.residual[:, :-8].contiguous())


def _partial_in_float32(inputs: RankInputs) -> RankInputs:
    return replace(inputs, partial=inputs.partial.float())


def _flat_partial(inputs: RankInputs) -> RankInputs:
    return replace(inputs, partial=inputs.partial.reshape(-1))


SPOILERS: dict[str, Callable[[RankInputs], RankInputs]] = {
    "gamma in float32": _gamma_in_float32,
    "gamma too short": _short_gamma,
    "scale in float64": _scale_in_float64,
    "scale in the activations' dtype": _scale_in_the_activations_dtype,
    "a scale for each channel": _scale_per_channel,
    "residual in float32": _residual_in_float32,
    "residual of the other format": _residual_of_the_other_format,
    "residual with a row missing": _short_residual,
    "residual too narrow": _narrow_residual,
    "partial sums in float32": _partial_in_float32,
    "partial sums in one dimension": _flat_partial,
}
"""How an operand is spoilt, by what is wrong with it."""
