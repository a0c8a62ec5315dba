"""The rank's side of `--trace`: every call of the kernel inside the model, judged by the kernel's declaration.

Each site is judged from what its own kernel was given, so that a deviation is reported where it arises and not again at
every site behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.case.returned import mapped, named
from fusecheck.dataflow import Dataflow
from fusecheck.eval.collective import every_rank
from fusecheck.eval.stored_scales import read_scales
from fusecheck.interface import Kernel, Operation, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.oracle import Operands, Oracle
from fusecheck.verdict import Stage, Tally, judge_rows, raw

READERS = "readers"
"""The stage behind the kernel: what was asked of it does not fit those who read its outputs."""


@dataclass(frozen=True)
class Deviation:
    """Where one rank's call left what is allowed.

    Attributes:
        site: the call's number within a forward; two a layer, behind attention and behind the MLP.
        stage: the first stage that failed.
        outside: elements outside.
        elements: elements judged in that stage.
        shown: one of them in words.
        texts: which texts of the batch have such elements.
    """

    site: int
    stage: str
    outside: int
    elements: int
    shown: str
    texts: tuple[int, ...]


class WatchedKernel:
    """A kernel whose calls are judged.

    Attributes:
        due: what the readers of the next call need, where the model tells; see `KernelPath.join`.
        deviations: of all calls so far.
        sites: calls so far.

    Args:
        kernel: the arm's own.
        rank: where it runs.
        flow: its declaration.
        lengths: tokens of each text of the batch.
        width: tokens of a row of the batch, padding included.
    """

    def __init__(self, kernel: Kernel, rank: Rank, flow: Dataflow, lengths: Sequence[int], width: int) -> None:
        self._kernel, self._rank, self._flow = kernel, rank, flow
        self._lengths, self._width = lengths, width
        self.due: Operation | None = None
        self.deviations: list[Deviation] = []
        self.sites = 0

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the kernel, and judge what it returns."""
        partials = every_rank(inputs.partial, self._rank)
        outputs = self._kernel.run(inputs, op=op, strategy=strategy)
        found = self._judge(inputs, partials, op, outputs)
        if found is not None:
            self.deviations.append(found)
        self.sites += 1
        return outputs

    def close(self) -> None:
        """The kernel's owner closes it."""

    def _judge(
        self, inputs: RankInputs, partials: list[Tensor], op: Operation, returned: RankOutputs
    ) -> Deviation | None:
        outputs = returned if returned.scale is None else replace(returned, scale=read_scales(op, returned))
        texts = tuple(range(len(self._lengths)))
        apart = self._differing_texts(outputs)
        if apart:
            elements = outputs.residual.numel()
            return Deviation(self.sites, Stage.AGREE.value, len(apart), elements, "outputs differ from rank 0's", apart)
        failed = self._first_failed(inputs, partials, op, outputs, slice(None))
        if failed is None and self.due is not None and self.due != op:
            told = f"asked for {op.name}, the readers need {self.due.name}"
            return Deviation(self.sites, READERS, 1, 1, told, texts)
        if failed is None:
            return None
        hit = [
            text for text in texts if self._first_failed(inputs, partials, op, outputs, self._rows(text)) is not None
        ]
        element = failed.shown[0] if failed.shown else None
        shown = f"row {element.row}, column {element.column}: {element.got}, {element.admissible}" if element else ""
        return Deviation(self.sites, failed.stage.value, failed.outside, failed.elements, shown, tuple(hit))

    def _rows(self, text: int) -> slice:
        return slice(text * self._width, text * self._width + self._lengths[text])

    def _first_failed(
        self, inputs: RankInputs, partials: list[Tensor], op: Operation, outputs: RankOutputs, rows: slice
    ) -> Tally | None:
        operands = Operands(
            [partial[rows] for partial in partials],
            inputs.residual[rows],
            inputs.gamma,
            float(inputs.scale),
            inputs.eps,
            inputs.weight_bias,
            op,
        )
        tallies = judge_rows(Oracle(self._flow, operands), mapped(outputs, lambda output: output[rows]), 0)
        return next((tally for tally in tallies if tally.outside), None)

    def _differing_texts(self, outputs: RankOutputs) -> tuple[int, ...]:
        """The texts on which this rank's outputs are not rank 0's, NaN being equal to NaN."""
        wrong = torch.zeros(outputs.residual.shape[0], dtype=torch.bool, device=outputs.residual.device)
        for output in named(outputs).values():
            first = every_rank(raw(output), self._rank)[0].view(output.dtype)
            same = (raw(first) == raw(output)) | (first.float().isnan() & output.float().isnan())
            wrong |= ~same.all(-1)
        return tuple(text for text in range(len(self._lengths)) if bool(wrong[self._rows(text)].any()))


def to_records(deviations: Sequence[Deviation]) -> list[dict[str, Any]]:
    """The deviations as values that travel between processes."""
    return [asdict(deviation) for deviation in deviations]
