"""The rank's side of `fusecheck pace`: cases in batches, and what the device can copy."""

from __future__ import annotations

from typing import Any

import torch

from fusecheck.case.worker import CaseWorker

_COPIED = 2**31
"""Bytes of the copied buffer: many times the L2."""


class PaceWorker(CaseWorker):
    """A `CaseWorker` that also measures its device."""

    def run_one_by_one(self, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The cases of a batch through the eager judge, waiting after each."""
        return [self.run(case) for case in cases]

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of the best of ten device-to-device copies; 0 without a GPU."""
        device = self.rank.device
        if device.type != "cuda":
            return 0.0
        source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(10):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            began.record()
            target.copy_(source)
            ended.record()
            ended.synchronize()
            best = min(best, began.elapsed_time(ended) / 1000)
        return 2 * _COPIED / best
