"""Judging one rank's call by a declared dataflow, or finding the known dataflow that explains it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from fusecheck.dataflow import DATAFLOWS, Dataflow, dataflow
from fusecheck.errors import UsageError
from fusecheck.interface import RankOutputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.layouts import Layout
from fusecheck.stages.layout import judge_layout
from fusecheck.testing.call import Call, laid_out
from fusecheck.verdict import Stage, Tally, judge_rows

CPU_BLOCK, GPU_BLOCK = 2**18, 2**26
"""Elements judged at a time, so that intermediates stay in cache, or in bounds."""
SAMPLED = 8
"""Rows by which a dataflow is tried before all rows are."""


def tallies(call: Call, flow: Dataflow, rows: range) -> list[Tally]:
    """Judge some rows of a call, in blocks; a tally for each stage that has an output."""
    merged: dict[Stage, Tally] = {}
    scales = None
    if "scale_out" in call.outputs:
        layout, stored = _scale_out(call, flow.quant(call.quantiser))
        scales = layout.read(stored)
        merged[Stage.LAYOUT] = judge_layout(layout, stored, None)
    size = CPU_BLOCK if call.partials[0].device.type == "cpu" else GPU_BLOCK
    step = max(1, size // call.shape[1])
    for start in range(rows.start, rows.stop, step):
        part = range(start, min(start + step, rows.stop))
        for tally in _judge(call, flow, part, scales):
            merged.setdefault(tally.stage, Tally(tally.stage)).add(tally)
    return sorted(merged.values(), key=lambda tally: list(Stage).index(tally.stage))


def agreed(call: Call) -> dict[str, Tensor]:
    """What ranks have to agree on: the outputs, and of a tensor of scales the scales; its padding is each rank's."""
    if "scale_out" not in call.outputs:
        return call.outputs
    layout, stored = _scale_out(call, QuantFlow())
    return call.outputs | {"scale_out": layout.read(stored)}


def _scale_out(call: Call, rules: QuantFlow) -> tuple[Layout, Tensor]:
    made = quantiser(call.quantiser)
    layout = made.layout(*call.shape, rules, call.layout)
    return layout, laid_out(made, layout, call.outputs["scale_out"], "scale_out")


def outside(judged: Iterable[Tally]) -> int:
    """Elements outside their enclosures, over all stages."""
    return sum(tally.outside for tally in judged)


def explanations(call: Call, rows: range, among: Iterable[Dataflow] = ()) -> Iterator[tuple[Dataflow, list[Tally]]]:
    """The known dataflows under which every element of these rows is inside, one after the other, with the tallies."""
    few = range(rows.start, min(rows.stop, rows.start + SAMPLED))
    for flow in among or DATAFLOWS.values():
        if not outside(tallies(call, flow, few)) and not outside(found := tallies(call, flow, rows)):
            yield flow, found


def explaining(call: Call, rows: range) -> list[str]:
    """Their names."""
    return [flow.name for flow, _ in explanations(call, rows)]


def nearest(call: Call, rows: range) -> Dataflow:
    """The known dataflow that leaves the fewest elements of the first rows outside; of several, for the most rows.

    Not the one that leaves the fewest outside in all: a wide enclosure hides a fault, and blames right elements for it.
    """
    few = range(rows.start, min(rows.stop, rows.start + SAMPLED))
    sampled = [(outside(tallies(call, flow, few)), flow) for flow in DATAFLOWS.values()]
    least = min(count for count, _ in sampled)

    def right(flow: Dataflow) -> int:
        return min((tally.shown[0].row for tally in tallies(call, flow, rows) if tally.outside), default=rows.stop)

    alike = [flow for count, flow in sampled if count == least]
    return alike[0] if len(alike) == 1 else max(alike, key=right)


def _judge(call: Call, flow: Dataflow, rows: range, scales: Tensor | None) -> list[Tally]:
    part = slice(rows.start, rows.stop)
    partials = [partial[part] for partial in call.partials]
    operands = Operands(
        partials=partials,
        residual=partials[0] if call.residual_in is None else call.residual_in[part],
        gamma=partials[0][0] if call.gamma is None else call.gamma,
        scale=call.factor,
        eps=0.0 if call.eps is None else float(call.eps),
        weight_bias=float(call.weight_bias),
        op=call.op,
    )
    observed = {name: tensor[part] for name, tensor in call.outputs.items() if name != "scale_out"}
    if not call.op.residual and "residual" in observed:
        observed["total"] = observed.pop("residual")
    if "quant" in observed:
        observed["quant"] = quantiser(call.quantiser).element.unpack(observed["quant"])
    shown = RankOutputs(observed.pop("residual", None), **observed, scale=None if scales is None else scales[part])
    quick = _in_one_pass(flow, operands, shown) if partials[0].is_cuda else None
    return judge_rows(Oracle(flow, operands), shown, rows.start) if quick is None else quick


def _in_one_pass(flow: Dataflow, operands: Operands, shown: RankOutputs) -> list[Tally] | None:
    from fusecheck.onepass import outputs  # only here: on a CPU, judging needs no more than torch and numpy

    return outputs.tallies(flow, operands, shown)


def named(flow: str | Dataflow | None) -> Dataflow | None:
    """A dataflow by its name, or itself; None where none is declared.

    Raises:
        UsageError: no known dataflow has the name, or it is neither a name nor a declaration.
    """
    if not isinstance(flow, (str, Dataflow, type(None))):
        raise UsageError(f"dataflow is {type(flow).__name__}, expected a Dataflow or the name of a known one")
    return dataflow(flow) if isinstance(flow, str) else flow
