"""A workspace of FlashInfer that begins anew, on host memory: as one that was just opened with the same limits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecheck.backends.flashinfer_kernels import LEGACY, LegacyKernel, Options, RenewableKernel, legacy_kernel
from fusecheck.interface import Limits
from fusecheck.property_tests.suite.flashinfer_stand_in import FlashInfer
from fusecheck.property_tests.suite.lone_rank import LoneRank

LARGE, SMALL = Limits(64, 512, torch.float16), Limits(12, 136, torch.bfloat16)
FLAGS = 2 * 256 * 4


class WithMemory(FlashInfer):
    """FlashInfer 0.7.4, as far as it makes a workspace: data, flags, a Lamport buffer and five words of control."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[list[Tensor]] = []

    def modules(self) -> dict[str, ModuleType]:
        made = super().modules()
        cudart = SimpleNamespace(cudaMemset=ctypes.memset)
        vars(made[LEGACY]).update(_initialize_allreduce_fusion_protocol=self.initialise, cudart=cudart)
        return made

    def create(self, *arguments: Any, **options: Any) -> tuple[list[list[int]], Tensor, dict[str, int]]:
        size = 2 * arguments[1] * arguments[2] * arguments[3]
        sizes = size, FLAGS, 3 * size, 20
        self.buffers.append([torch.zeros(each, dtype=torch.uint8) for each in sizes])
        handles = [[buffer.data_ptr(), 0] for buffer in self.buffers[-1][:3]]
        self.held[id(handles)] = self.buffers[-1][0]
        control = self.buffers[-1][3].data_ptr()
        metadata = dict(zip(("buffer_size", "flag_size", "lamport_buffer_size"), sizes, strict=False))
        metadata |= {"max_token_num": arguments[2], "hidden_dim": arguments[3], "lamport_comm_size": size}
        self.initialise(handles, 0, FLAGS, 3 * size, size, use_fp32_lamport=False, control_flag_ptr=control)
        return handles, torch.tensor([*(pointer for each in handles for pointer in each), control]), metadata

    def initialise(
        self, ipc_handles: list[list[int]], tp_rank: int, flag_size: int, lamport_buffer_size: int,
        lamport_comm_size: int, use_fp32_lamport: bool, control_flag_ptr: int,
    ) -> None:  # fmt: skip
        assert not use_fp32_lamport
        ctypes.memset(ipc_handles[1][tp_rank], 0, flag_size)
        zeros = b"\x00\x80" * (lamport_buffer_size // 2)
        ctypes.memmove(ipc_handles[2][tp_rank], zeros, len(zeros))
        ctypes.memset(control_flag_ptr, 0, 20)
        ctypes.memmove(control_flag_ptr + 12, lamport_comm_size.to_bytes(4, "little"), 4)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[WithMemory]:
    yield from WithMemory().lent(monkeypatch)


def test_a_workspace_that_begins_anew_is_as_one_that_was_opened_for_the_same_calls(
    library: WithMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda group: events.append("barrier"))
    monkeypatch.setattr(library, "initialise", _noting(events, library.initialise))
    library.install(monkeypatch)
    used, fresh = (legacy_kernel(Options(), LoneRank(), limits) for limits in (LARGE, SMALL))
    for buffer in library.buffers[0]:
        buffer.fill_(0x2B)
    events.clear()
    assert isinstance(used, RenewableKernel)
    used.renew(SMALL)
    assert events == ["barrier", "initialise", "barrier"]
    for mine, theirs in zip(*library.buffers, strict=True):
        assert torch.equal(mine[: len(theirs)], theirs)
    assert used._metadata == fresh._metadata
    assert used._limits == SMALL
    used.close()
    fresh.close()


def _noting(events: list[str], act: Any) -> Any:
    def noted(*arguments: Any, **options: Any) -> None:
        events.append("initialise")
        act(*arguments, **options)

    return noted


def test_a_release_that_cannot_set_its_protocol_back_has_a_kernel_that_does_not_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FlashInfer().install(monkeypatch)
    kernel = legacy_kernel(Options(), LoneRank(), SMALL)
    assert type(kernel) is LegacyKernel
    assert not hasattr(kernel, "renew")
