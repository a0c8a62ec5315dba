"""One call as a test holds it: the operands and outputs of one rank, checked before anything is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.errors import UsageError

NATIVE = (torch.bfloat16, torch.float16)
"""The dtypes of activations that the family computes in."""
CODES = (torch.float8_e4m3fn, torch.uint8)


@dataclass(frozen=True)
class Call:
    """What went into one call and what came out of it, on one rank. Arguments as `conforms` describes them."""

    partials: tuple[Tensor, ...]
    residual_in: Tensor | None
    gamma: Tensor | None
    scale: Tensor | float | None
    eps: float | None
    weight_bias: float
    residual: Tensor | None
    norm: Tensor | None
    quant: Tensor | None
    scale_out: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, hidden)."""
        tokens, hidden = self.partials[0].shape
        return tokens, hidden

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The outputs that were given, by name."""
        named = {name: getattr(self, name) for name in ("residual", "norm", "quant", "scale_out")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def detached(self) -> Call:
        """The same call, its tensors out of autograd's sight."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        tensors = {name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Call(**plain | tensors | {"partials": tuple(partial.detach() for partial in self.partials)})


def check(call: Call) -> None:
    """Refuse a call that cannot be judged.

    Raises:
        UsageError: the argument's name, what was got, what was expected.
    """
    _check_partials(call.partials)
    if not call.outputs:
        raise UsageError("got no output, expected at least one of residual=, norm=, quant=")
    device, native, (tokens, hidden) = call.partials[0].device, call.partials[0].dtype, call.shape
    for name in ("residual_in", "residual", "norm"):
        _check_tensor(name, getattr(call, name), (tokens, hidden), (native,), device)
    _check_tensor("quant", call.quant, (tokens, hidden), CODES, device)
    _check_tensor("gamma", call.gamma, (hidden,), (native, torch.float32), device)
    _check_present(call)
    _check_scale(call, device)


def _check_partials(partials: Sequence[Tensor]) -> None:
    if not partials:
        raise UsageError("partials is empty, expected a tensor a rank; one tensor where there is no collective")
    for index, partial in enumerate(partials):
        if not isinstance(partial, Tensor):
            raise UsageError(f"partials[{index}] is {type(partial).__name__}, expected a tensor [tokens, hidden]")
        if partial.ndim != 2 or not partial.numel():
            raise UsageError(f"partials[{index}] has shape {list(partial.shape)}, expected [tokens, hidden], not empty")
        if partial.dtype not in NATIVE:
            raise UsageError(f"partials[{index}] is {partial.dtype}, expected {_either(NATIVE)}")
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
        raise UsageError(f"{name} is {got.dtype}, expected {_either(dtypes)}")
    if got.device != device:
        raise UsageError(f"{name} is on {got.device}, expected {device}, where partials[0] is")


def _check_present(call: Call) -> None:
    """An output needs the operands that it is made of."""
    for output, needs in (("norm", ("gamma", "eps")), ("quant", ("gamma", "eps"))):
        for need in needs:
            if getattr(call, output) is not None and getattr(call, need) is None:
                raise UsageError(f"{need} is missing, expected it beside {output}=: give {need}=")
    if call.quant is not None and call.scale is None and call.scale_out is None:
        raise UsageError(
            "scale is missing, expected it beside quant=: give scale=, or scale_out= as the kernel stored it"
        )


def _check_scale(call: Call, device: torch.device) -> None:
    if isinstance(call.scale, Tensor):
        if call.scale.numel() != 1:
            raise UsageError(f"scale has {call.scale.numel()} elements, expected one: the dequantisation scale")
        if call.scale.dtype is not torch.float32:
            raise UsageError(f"scale is {call.scale.dtype}, expected torch.float32")
        if call.scale.device != device and call.scale.device.type != "cpu":
            raise UsageError(f"scale is on {call.scale.device}, expected {device}, where partials[0] is")


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
