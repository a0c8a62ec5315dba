"""Operands of kernels that read and write dense rows: what is refused before the call, and where its results go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusecheck.backends.unfused import check
from fusecheck.interface import FusionOp, RankInputs, RankOutputs

VECTOR = 16
"""Bytes of one access of the kernels."""


def check_layout(inputs: RankInputs) -> None:
    """Refuse what a kernel would misread that checks neither shapes nor layouts nor the dtype of gamma.

    Raises:
        ValueError: what was got and what was expected, in one line.
    """
    check(inputs)
    check_dense(inputs, ("partial", "residual", "gamma"))


def check_dense(inputs: RankInputs, names: Sequence[str]) -> None:
    """Refuse operands that are not dense rows of aligned vectors.

    Raises:
        ValueError: the first one that is not.
    """
    for name in names:
        tensor = getattr(inputs, name)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous, expected dense rows: call .contiguous()")
        if tensor.data_ptr() % VECTOR:
            raise ValueError(f"{name} is not {VECTOR}-byte aligned: give a tensor of its own storage")


def allocate(inputs: RankInputs, op: FusionOp) -> RankOutputs:
    """Outputs of the op, each [tokens, hidden], dense and uninitialised."""
    shape, device = inputs.partial.shape, inputs.partial.device

    def native() -> torch.Tensor:
        return torch.empty(shape, dtype=inputs.partial.dtype, device=device)

    quant = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) if op.returns_quant else None
    return RankOutputs(residual=native(), norm=native() if op.returns_norm else None, quant=quant)
