"""The evaluated model on virtual ranks: tensor parallel on one GPU, in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fusecheck.case.returned import named
from fusecheck.eval.stored_scales import read_scales, store_scales
from fusecheck.eval.worker import EvalRank
from fusecheck.interface import Backend, Kernel, Limits, Operation, RankInputs, RankOutputs, Strategy
from fusecheck.kernel.virtual import MOST_ELEMENTS


class InParts:
    """A kernel whose calls are cut into runs of rows, so that the blocks of all ranks fit on the device at once.

    The operation is one row's business, so that its outputs are the same.
    """

    def __init__(self, kernel: Kernel, rows: int) -> None:
        self._kernel, self._rows = kernel, rows

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the kernel on each part and join the outputs."""
        tokens = inputs.partial.shape[0]
        if tokens <= self._rows:
            return self._kernel.run(inputs, op=op, strategy=strategy)
        parts = []
        for start in range(0, tokens, self._rows):
            window = slice(start, start + self._rows)
            part = replace(inputs, partial=inputs.partial[window], residual=inputs.residual[window])
            parts.append(self._kernel.run(part, op=op, strategy=strategy))
        pieces = [named(part) for part in parts]
        joined: dict[str, Any] = {"residual": None}
        for name in pieces[0]:
            if name == "scale":
                # Where each lies depends on the number of rows.
                scales = torch.cat([read_scales(op, part) for part in parts])
                joined[name] = store_scales(op, scales, inputs.partial.shape[1])
                continue
            # As bytes: not every release of torch joins FP8.
            raw = torch.cat([piece[name].view(torch.uint8) for piece in pieces])
            joined[name] = raw.view(pieces[0][name].dtype)
        return RankOutputs(**joined)

    def close(self) -> None:
        """Close the kernel."""
        self._kernel.close()


class VirtualMember(EvalRank):
    """One virtual rank."""

    def open_kernel(self, made: Backend, limits: Limits) -> Kernel:
        """Open the kernel for as many rows as are resident at once; the separate ops take any number."""
        if getattr(made, "device", None) != "cuda":
            return made.open(self.rank, limits)
        rows = min(limits.max_tokens, MOST_ELEMENTS[self.rank.world_size] // limits.hidden)
        return InParts(made.open(self.rank, replace(limits, max_tokens=rows)), rows)
