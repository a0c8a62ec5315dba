"""One call as a test holds it: the operands and outputs of one rank, checked before anything is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.formats.element import Element
from fusecheck.operations import GIVEN_SCALE, Collective, Operation, compose
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.layouts import Layout
from fusecheck.quantisers.quantiser import Quantiser

NATIVE = (torch.bfloat16, torch.float16)
"""The dtypes of activations that the family computes in."""


@dataclass(frozen=True)
class Call:
    """What went into one call and what came out of it, on one rank; operands as `conforms` describes them.

    Attributes:
        outputs: those that are there, of `residual`, `norm`, `quant`, `scale_out`.
    """

    partials: tuple[Tensor, ...]
    residual_in: Tensor | None
    gamma: Tensor | None
    scale: Tensor | float | None
    eps: float | None
    weight_bias: float
    outputs: dict[str, Tensor]
    quantiser: str = GIVEN_SCALE
    layout: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, hidden)."""
        tokens, hidden = self.partials[0].shape
        return tokens, hidden

    @property
    def op(self) -> Operation:
        """What was computed, as far as the outputs and operands tell."""
        quantised = self.quantiser if {"quant", "scale_out"} & set(self.outputs) else "none"
        if self.gamma is None and self.residual_in is None:
            return Operation.named("ALL_REDUCE")
        residual, norm_out = self.residual_in is not None, "norm" in self.outputs
        return compose(Collective.ALL_REDUCE, residual=residual, quantiser=quantised, norm_out=norm_out)

    @property
    def factor(self) -> float:
        """The given scale as a kernel reads it; 1 where there is none."""
        return 1.0 if self.scale is None else single("scale", self.scale, self.partials[0].device)

    def detached(self) -> Call:
        """The same call, its tensors out of autograd's sight."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        tensors = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        plain["partials"] = tuple(partial.detach() for partial in self.partials)
        plain["outputs"] = {name: output.detach() for name, output in self.outputs.items()}
        return Call(**plain | tensors)


def single(name: str, value: object, device: torch.device) -> float:
    """One float32, which a kernel reads; a Python number is rounded to it.

    Raises:
        UsageError: it is no number, or not one alone.
    """
    if not isinstance(value, Tensor):
        return torch.tensor(number(name, value), dtype=torch.float32).item()
    if value.numel() != 1:
        raise UsageError(f"{name} has {value.numel()} elements, expected one: the dequantisation scale")
    if value.dtype is not torch.float32:
        raise UsageError(f"{name} is {value.dtype}, expected torch.float32")
    if value.device != device and value.device.type != "cpu":
        raise UsageError(f"{name} is on {value.device}, expected {device}, where the activations are")
    return value.item()


def number(name: str, value: object) -> float:
    """A number that is no tensor.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, Real):
        raise UsageError(f"{name} is {type(value).__name__}, expected a number")
    return float(value)


def laid_out(made: Quantiser, layout: Layout, stored: Tensor, name: str) -> Tensor:
    """A tensor of scales in the form that its layout has here.

    Bytes may come in a dtype of their own; a swizzled storage in any shape, as vLLM and FlashInfer return it.

    Raises:
        UsageError: the tensor, which the message calls `name`, is not one of this layout.
    """
    own = torch.float8_e4m3fn if made.name == "nvfp4" else torch.float8_e8m0fnu
    if layout.dtype is torch.uint8 and stored.dtype is own:
        stored = stored.view(torch.uint8)
    if len(layout.shape) == 1 and stored.is_contiguous() and stored.dtype in (torch.uint8, torch.int32):
        stored = stored.view(torch.uint8).reshape(-1)
    try:
        layout.slots(stored)
    except ValueError as error:
        raise UsageError(f"{name}: {error}, for layout {layout.name}") from None
    return stored


def code_dtypes(element: Element) -> tuple[torch.dtype, ...]:
    """The dtypes that hold codes of this element: its own, where this torch has it, or their bits."""
    own = "float8_e4m3fn" if element.bits == 8 else "float4_e2m1fn_x2"
    return (*((getattr(torch, own),) if hasattr(torch, own) else ()), torch.uint8)


def check(call: Call) -> None:
    """Refuse a call that cannot be judged.

    Raises:
        UsageError: the argument's name, what was got, what was expected.
    """
    _check_partials(call.partials)
    if not call.outputs:
        raise UsageError("got no output, expected at least one of residual=, norm=, quant=")
    device, native, (tokens, hidden) = call.partials[0].device, call.partials[0].dtype, call.shape
    wide = {"residual_in": call.residual_in} | {name: call.outputs.get(name) for name in ("residual", "norm")}
    for name, tensor in wide.items():
        _check_tensor(name, tensor, (tokens, hidden), (native,), device)
    _check_quantised(call, device)
    _check_tensor("gamma", call.gamma, (hidden,), (native, torch.float32), device)
    _check_present(call)
    for name, value in (("eps", 0.0 if call.eps is None else call.eps), ("weight_bias", call.weight_bias)):
        if not math.isfinite(number(name, value)):
            raise UsageError(f"{name}={value}, expected a finite number")
    if call.scale is not None:
        single("scale", call.scale, device)


def _check_partials(partials: Sequence[Tensor]) -> None:
    if not partials:
        raise UsageError("partials is empty, expected a tensor a rank; one tensor where there is no collective")
    for index, partial in enumerate(partials):
        if not isinstance(partial, Tensor):
            raise UsageError(f"partials[{index}] is {type(partial).__name__}, expected a tensor [tokens, hidden]")
        if partial.ndim != 2 or not partial.numel():
            raise UsageError(f"partials[{index}] has shape {list(partial.shape)}, expected [tokens, hidden], not empty")
        if partial.dtype not in NATIVE:
            raise UsageError(f"partials[{index}] is {partial.dtype}, expected {either(NATIVE)}")
        _check_tensor(f"partials[{index}]", partial, tuple(partials[0].shape), (partials[0].dtype,), partials[0].device)


def _check_tensor(
    name: str,
    got: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if got is None:
        return
    if not isinstance(got, Tensor):
        raise UsageError(f"{name} is {type(got).__name__}, expected a tensor")
    if tuple(got.shape) != shape:
        raise UsageError(f"{name} has shape {list(got.shape)}, expected {list(shape)}, as partials has")
    if got.dtype not in dtypes:
        raise UsageError(f"{name} is {got.dtype}, expected {either(dtypes)}")
    if got.device != device:
        raise UsageError(f"{name} is on {got.device}, expected {device}, where partials[0] is")


def _check_quantised(call: Call, device: torch.device) -> None:
    """Codes and scales: shapes and dtypes are those of the quantiser."""
    tokens, hidden = call.shape
    if call.quantiser == "none" and not {"quant", "scale_out"} & set(call.outputs):
        return
    made = quantiser(call.quantiser)
    made.groups(hidden)
    codes = tokens, hidden // made.element.per_byte
    _check_tensor("quant", call.outputs.get("quant"), codes, code_dtypes(made.element), device)
    stored = call.outputs.get("scale_out")
    if stored is None:
        return
    if call.quantiser == GIVEN_SCALE:
        raise UsageError("scale_out= beside quantiser static-fp8, which makes no scales; name the one that does")
    if not isinstance(stored, Tensor) or stored.device != device:
        raise UsageError(f"scale_out is {_told(stored)}, expected a tensor on {device}, where partials[0] is")
    laid_out(made, made.layout(tokens, hidden, QuantFlow(), call.layout), stored, "scale_out")


def _told(value: object) -> str:
    return f"on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def _check_present(call: Call) -> None:
    """An output needs the operands that it is made of."""
    for output, needs in (("norm", ("gamma", "eps")), ("quant", ("gamma", "eps")), ("scale_out", ("gamma", "eps"))):
        for need in needs:
            if output in call.outputs and getattr(call, need) is None:
                raise UsageError(f"{need} is missing, expected it beside {output}=: give {need}=")
    if "quant" not in call.outputs:
        return
    if call.quantiser == GIVEN_SCALE and call.scale is None:
        raise UsageError("scale is missing, expected it beside quant=: give scale=, or scale_out= and quantiser=")
    if call.quantiser == "nvfp4" and call.scale is None:
        raise UsageError("scale is missing, expected the factor of the tensor beside quant= of nvfp4: give scale=")
    if call.quantiser != GIVEN_SCALE and "scale_out" not in call.outputs:
        raise UsageError(f"scale_out is missing, expected it beside quant= of {call.quantiser}: give scale_out=")


def either(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes in words."""
    return " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
