"""Operands of kernels that read and write dense rows: what is refused before the call, and where its results go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusecheck.backends.unfused import check
from fusecheck.interface import Rank, RankInputs, RankOutputs
from fusecheck.operations import Operation
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.stages.experts import Experts

VECTOR = 16
"""Bytes of one access of the kernels."""


def check_layout(inputs: RankInputs) -> None:
    """Refuse what a kernel would misread that checks neither shapes nor layouts nor the dtype of gamma.

    Raises:
        ValueError: what was got and what was expected, in one line.
    """
    check(inputs)
    check_dense(inputs, ("partial", "residual", "gamma"))


def check_dense(inputs: RankInputs | Experts, names: Sequence[str]) -> None:
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


def check_gpu_process(name: str, rank: Rank) -> None:
    """Check that a rank is a process of a group, on a GPU of its own.

    Raises:
        ValueError: it is not on a GPU, or has no process group.
    """
    if rank.device.type != "cuda":
        raise ValueError(f"{name} on {rank.device}, expected a CUDA device: give --device cuda")
    if rank.group is None:
        raise ValueError(f"{name} needs a process group, and virtual ranks have none")


def allocate(inputs: RankInputs, op: Operation) -> RankOutputs:
    """Outputs of the op, uninitialised: dense rows, and scales in the layout that the inputs name."""
    shape, device = inputs.partial.shape, inputs.partial.device

    def native() -> torch.Tensor:
        return torch.empty(shape, dtype=inputs.partial.dtype, device=device)

    return RankOutputs(
        residual=native() if op.residual else None,
        norm=native() if op.returns_norm else None,
        quant=torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) if op.returns_quant else None,
        scale=room_for_scales(inputs, op) if op.returns_scale else None,
        total=None if op.norm else native(),
    )


def room_for_scales(inputs: RankInputs, op: Operation) -> torch.Tensor:
    """An uninitialised tensor of scales, packing and padding included."""
    tokens, hidden = inputs.partial.shape
    layout = quantiser(op.quantiser).layout(tokens, hidden, QuantFlow(), inputs.layout or None)
    nbytes = layout.size * layout.slot.itemsize
    storage = torch.empty((nbytes,), dtype=torch.uint8, device=inputs.partial.device)
    return storage.view(layout.dtype).as_strided(layout.shape, layout.strides)
