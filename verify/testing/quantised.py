"""`assert_quantised`: a quantiser alone, its codes and its scales, from the activations that it read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.operations import GIVEN_SCALE, Collective, Operation
from fusecheck.quantflow import QUANT_FLOWS, QuantFlow, without_group
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.quantiser import Quantiser
from fusecheck.stages.code import Code
from fusecheck.stages.judgement import Tally, judge
from fusecheck.stages.layout import judge_layout
from fusecheck.stages.norm import Norm
from fusecheck.stages.operands import Operands
from fusecheck.stages.residual import Residual
from fusecheck.stages.scale import Scale
from fusecheck.testing.call import NATIVE, code_dtypes, either, laid_out, single
from fusecheck.testing.conformity import NotConforming


class _Activations(Operands):
    """The activations alone, in the place of what a norm is made of."""

    def at(self, row: int, column: int) -> str:
        """What was quantised, for the report line."""
        factors = {GIVEN_SCALE: f" scale={self.scale:.8g}", "nvfp4": f" tensor_scale={self.scale:.8g}"}
        return f"of={float(self.residual[row, column]):.6g}{factors.get(self.op.quantiser, '')}"


def assert_quantised(
    codes: Tensor,
    scale: Tensor | float,
    *,
    of: Tensor,
    format: str,  # noqa: A002 - the field's own word
    tensor_scale: Tensor | float = 1.0,
    flow: str | QuantFlow | None = None,
    layout: str | None = None,
) -> str:
    """Demand that codes and scales are what a quantiser may make of the activations `of`.

    The scale is judged from the activations, the codes from the activations and the scale *as stored*.

    Args:
        codes: [tokens, hidden], float8_e4m3fn or uint8; of four-bit formats uint8 [tokens, hidden / 2].
        scale: as stored, packing and padding included; for `static-fp8` the given dequantisation scale.
        of: what was quantised, [tokens, hidden], bf16 or fp16.
        format: `static-fp8`, `dynamic-fp8`, `group-fp8`, `group-fp8-packed`, `mxfp8`, `nvfp4`, `mxfp4`; a group other
            than 128 as in `group-fp8-64`.
        tensor_scale: NVFP4's factor of the whole tensor, as the kernel was given it, one float32.
        flow: whose arithmetic, of the known ones of this format, or a declaration; None: a known one must explain all.
        layout: of the scales, by name; None: the format's first.

    Returns:
        The name of the arithmetic that explains every element.

    Raises:
        NotConforming: the first element or scale outside, with bits and what is admissible.
        UsageError: an argument that cannot be meant, by name.
    """
    __tracebackhide__ = True
    made = quantiser(format)
    _check(codes, of, made)
    flows = _flows(format, flow)
    failed: list[tuple[int, QuantFlow, list[Tally]]] = []
    for each in flows:
        tallies = _judge(codes, scale, of, made, each, layout, tensor_scale)
        outside = sum(tally.outside for tally in tallies)
        if not outside:
            return each.name
        failed.append((outside, each, tallies))
    _, nearest, tallies = min(failed, key=lambda entry: entry[0])
    first = next(tally for tally in tallies if tally.outside)
    shown = first.shown[0]
    where = f"[{shown.row},{shown.column}] {shown.context}"
    raise NotConforming(
        f"{first.stage.value}: {where} got {shown.got} admissible {shown.admissible}"
        f" ({first.outside} of {first.elements}); judged as {format} by {nearest.name}"
    )


def _check(codes: Tensor, of: Tensor, made: Quantiser) -> None:
    if not isinstance(of, Tensor) or of.ndim != 2 or of.dtype not in NATIVE or not of.numel():
        raise UsageError(
            f"of is {_told(of)}, expected the activations [tokens, hidden], not empty, in {either(NATIVE)}"
        )
    made.groups(of.shape[1])
    shape = (of.shape[0], of.shape[1] // made.element.per_byte)
    dtypes = code_dtypes(made.element)
    if not isinstance(codes, Tensor) or tuple(codes.shape) != shape or codes.dtype not in dtypes:
        raise UsageError(f"codes is {_told(codes)}, expected {list(shape)} {either(dtypes)} of {made.name}")
    if codes.device != of.device:
        raise UsageError(f"codes is on {codes.device}, expected {of.device}, where of is")


def _told(value: object) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _flows(name: str, flow: str | QuantFlow | None) -> list[QuantFlow]:
    """The declarations to judge by.

    Raises:
        UsageError: none of the format has the name.
    """
    if isinstance(flow, QuantFlow):
        return [flow]
    known = QUANT_FLOWS[without_group(name)]
    if flow is not None and flow not in known:
        raise UsageError(f"flow={flow!r} is not known for {name}, expected one of: {', '.join(known)}")
    return list(known.values()) if flow is None else [known[flow]]


def _judge(
    codes: Tensor,
    scale: Tensor | float,
    of: Tensor,
    made: Quantiser,
    flow: QuantFlow,
    layout: str | None,
    tensor_scale: Tensor | float,
) -> list[Tally]:
    """Judge scales and codes from the activations, which stand for the observed norm."""
    tokens, hidden = of.shape
    given = made.name == GIVEN_SCALE
    op = Operation(Collective.NONE, residual=False, quantiser=made.name, returns=("norm", "quant"))
    name, factor = ("scale", scale) if given else ("tensor_scale", tensor_scale)
    operands = _Activations([of], of, of[0], single(name, factor, of.device), 0.0, 0.0, op)
    norm = Norm(DATAFLOWS["unfused"], operands, Residual(DATAFLOWS["unfused"], operands), None)
    # What was quantised is at hand, so it is what was read.
    scales = Scale(operands, made, replace(flow, reads="rounded"), norm, of)
    if given:
        return judge(Code(operands, scales, None), made.element.unpack(codes), 0)
    place = made.layout(tokens, hidden, flow, layout)
    whole = laid_out(made, place, _tensor(scale, of.device), "scale")
    stored, tallies = place.read(whole), [judge_layout(place, whole, None)]
    special = scales.special
    tallies += judge(scales, stored, 0, special)
    each = special.repeat_interleave(scales.size, dim=-1)
    return tallies + judge(Code(operands, scales, stored), made.element.unpack(codes), 0, each)


def _tensor(scale: Tensor | float, device: torch.device) -> Tensor:
    if not isinstance(scale, Tensor):
        raise UsageError(f"scale is {type(scale).__name__}, expected the tensor of scales as it was stored")
    if scale.device != device:
        raise UsageError(f"scale is on {scale.device}, expected {device}, where of is")
    return scale
