"""One pass over operands and outputs that a test holds on a GPU: `fusecheck.testing` without its cost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.interface import RankOutputs
from fusecheck.onepass import judge
from fusecheck.onepass.batch import SLOTS, available
from fusecheck.stages.operands import Operands
from fusecheck.verdict import Tally, raw

LEAST_ELEMENTS = 2**20
"""Of fewer the eager judge takes no longer than this one."""

_compiling: dict[tuple[object, ...], threading.Thread] = {}


def tallies(flow: Dataflow, operands: Operands, outputs: RankOutputs) -> list[Tally] | None:
    """The tallies of rows of which every output is shown to be inside; None where the eager judge must look.

    The kernel is compiled in a thread, once for each kind of call; until it is there the eager judge looks.

    Args:
        flow: the declared arithmetic.
        operands: of these rows.
        outputs: the same rows.
    """
    if not _takes(flow, operands, outputs):
        return None
    launch = _launch(flow, operands, outputs)
    constants = judge.constants(flow, outputs.residual.dtype, outputs.residual.shape[1], len(operands.partials))
    key = (outputs.residual.device, outputs.norm is None, outputs.quant is None, *constants.values())
    if not compiled(key, lambda kernel: launch(kernel.warmup, constants)):
        return None
    counts = launch(lambda *given, grid, **known: _kernel()[grid](*given, **known), constants)
    seen: list[int] = counts.tolist()
    elements = outputs.residual.numel()
    return None if judge.in_doubt(seen) else judge.tallies(seen, operands.op, elements)


def _takes(flow: Dataflow, operands: Operands, outputs: RankOutputs) -> bool:
    """Whether the kernel can read these tensors and forms their nominal values."""
    stream, op = outputs.residual, operands.op
    if stream is None or not available(stream.device) or stream.numel() < LEAST_ELEMENTS or outputs.scale is not None:
        return False
    there = (outputs.norm is not None, outputs.quant is not None) == (op.returns_norm, op.returns_quant)
    tensors = [stream, outputs.norm, outputs.quant, operands.residual, operands.gamma, *operands.partials]
    dense = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return there and dense and operands.gamma.dtype == stream.dtype and judge.takes(flow, op, stream.shape[1])


def _launch(flow: Dataflow, operands: Operands, outputs: RankOutputs) -> Callable[..., Tensor]:
    """Give the kernel's arguments to something, and get the counts."""
    stream: Tensor = outputs.residual
    rows, hidden = stream.shape
    norm = stream if outputs.norm is None else outputs.norm
    quant = stream if outputs.quant is None else outputs.quant
    partials = torch.stack(list(operands.partials))
    counts = torch.zeros(SLOTS, dtype=torch.int64, device=stream.device)

    def launch(run: Callable[..., Any], constants: dict[str, Any]) -> Tensor:
        run(
            counts,
            *(raw(tensor) for tensor in (partials, operands.residual, operands.gamma, stream, norm, quant)),
            rows,
            hidden,
            float(operands.eps),
            float(operands.weight_bias),
            judge.factor(flow, operands.scale),
            int(outputs.norm is not None),
            int(outputs.quant is not None),
            grid=(rows,),
            **constants,
        )
        return counts

    return launch


def _kernel() -> Any:
    from fusecheck.onepass import kernels

    return kernels.judge_outputs


def compiled(key: tuple[object, ...], compile_it: Callable[[Any], object]) -> bool:
    """Whether the kernel of this kind is there; its compilation begins with the first question."""
    thread = _compiling.get(key)
    if thread is None:
        device = key[0]

        def work() -> None:
            torch.cuda.set_device(device)  # type: ignore[arg-type]
            compile_it(_kernel())

        thread = _compiling[key] = threading.Thread(target=work, name="fusecheck-compile")
        thread.start()
    return not thread.is_alive()
