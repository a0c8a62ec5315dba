"""A linear of the evaluated model: E4M3 codes times E4M3 codes, or the same weights with FP8 off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.backends.unfused import quantise
from fusecheck.dataflow import dataflow
from fusecheck.eval.checkpoint import LinearWeights
from fusecheck.eval.recipe import BLOCK, Form
from fusecheck.eval.stored_scales import read_scales
from fusecheck.interface import Operation, RankOutputs
from fusecheck.quantisers.known import quantiser

SEPARATE = "vllm"
"""Whose quantisers the model calls where no kernel hands codes on, and the unfused arm everywhere: vLLM's own kernels.

A static scale leaves no choice, and torch ops serve there.
"""

Key = float | str
"""What two linears must have in common to read the same codes: the static scale, or the quantiser's name."""


@dataclass(frozen=True)
class Codes:
    """Quantised activations.

    Attributes:
        codes: float8_e4m3fn [tokens, in].
        scales: what each code is multiplied by, float32 [1], [tokens, 1] or [tokens, groups].
        key: of the linears that may read them.
    """

    codes: Tensor
    scales: Tensor
    key: Key


def has_fp8_product(device: torch.device) -> bool:
    """Say whether `torch._scaled_mm` runs on this device: CUDA from compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""What each E4M3 code stands for, by its bits."""


def widen(codes: Tensor) -> Tensor:
    """Return E4M3 codes as float32; by table on a CPU, where the library's own conversion is several times slower."""
    if codes.device.type != "cpu":
        return codes.float()
    bits = codes.contiguous().view(torch.uint8).view(-1).to(torch.int32)
    return _VALUES.index_select(0, bits).view(codes.shape)


class Linear:
    """One rank's share of a linear, on a device.

    Attributes:
        form: how it is quantised; None where the weight holds no codes.
        input_scale: of the activations' codes, float32 [1] on the device; None where it is not static.
        key: of the codes that it reads; None where it reads none.
    """

    def __init__(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = weights.weight.to(device)
        self.bias = None if weights.bias is None else weights.bias.to(device, torch.float32)
        self.dtype, self.form = dtype, weights.form
        self.input_scale: Tensor | None = None
        self.key: Key | None = None
        self._weight_scale: Tensor | None = None
        if weights.form is not None and weights.weight_scale is not None:
            self._weight_scale = weights.weight_scale.to(device)
            self.key = weights.input_scale if weights.form.static else weights.form.activations
        if weights.input_scale is not None:
            self.input_scale = torch.tensor([weights.input_scale], dtype=torch.float32, device=device)
        # The FP8 product takes sizes in steps of 16 only, and not in every release other scales than one a tensor.
        self._native_product = (
            has_fp8_product(device) and weights.form == Form() and all(size % 16 == 0 for size in self.weight.shape)
        )
        # A CPU has no FP8 product: keep the codes' float32 values, which serve the oracle too.
        self._wide = self._widened() if device.type == "cpu" else None

    @property
    def quantised(self) -> bool:
        """Whether the weight holds E4M3 codes."""
        return self.form is not None

    def quantise(self, x: Tensor) -> Codes:
        """Quantise activations [tokens, in] as this linear reads them, by an op of its own."""
        assert self.form is not None
        assert self.key is not None
        if self.input_scale is not None:
            return Codes(quantise(x, self.input_scale), self.input_scale, self.key)
        made, rules = quantiser(self.form.activations), dataflow(f"unfused/{SEPARATE}").quant(self.form.activations)
        stored = made.scales(x, rules)
        codes = made.codes(x, stored, rules).view(torch.float8_e4m3fn)
        return Codes(codes, made.values(stored, rules).float(), self.key)

    def received(self, outputs: RankOutputs, op: Operation) -> Codes:
        """The codes that a kernel made for this linear."""
        assert self.key is not None
        assert outputs.quant is not None
        if self.input_scale is not None:
            return Codes(outputs.quant, self.input_scale, self.key)
        rules = dataflow(f"unfused/{SEPARATE}").quant(op.quantiser)  # what a stored scale stands for is alike in all
        values = quantiser(op.quantiser).values(read_scales(op, outputs), rules)
        return Codes(outputs.quant, values.float(), self.key)

    def from_codes(self, given: Codes) -> Tensor:
        """Map E4M3 codes [tokens, in] to [tokens, out] in the activations' dtype.

        With one scale a tensor, a token or a channel each product of two codes is exact in float32; sums are float32
        in the library's order; the result is scaled, the bias added, and rounded once. With a scale for each group and
        block the factors are a code times its scale, in float32.
        """
        assert self._weight_scale is not None
        if self._native_product:
            return self.native_product(given)
        x, groups = widen(given.codes), given.scales.shape[-1]
        if self._blocks:
            x = (x.view(len(x), groups, -1) * given.scales[..., None]).view(x.shape)
            return self._rounded(x @ self._float().t())
        return self._rounded((x @ self._float().t()).mul_(self._weight_scale.view(-1) * given.scales))

    def native_product(self, given: Codes) -> Tensor:
        """Do the same by the library's FP8 product, which scales before it rounds; a bias is added in float32."""
        assert self._weight_scale is not None
        out: Tensor = torch._scaled_mm(
            given.codes,
            self.weight.t(),
            scale_a=given.scales,
            scale_b=self._weight_scale.view(1),
            out_dtype=self.dtype if self.bias is None else torch.float32,
        )
        return out if self.bias is None else self._rounded(out)

    def from_native(self, x: Tensor) -> Tensor:
        """Map unquantised activations [tokens, in] through an unquantised weight, in the activations' dtype."""
        if self._wide is not None:
            return self._rounded(x.float() @ self._wide.t())
        product = x @ self.weight.to(self.dtype).t()
        return product if self.bias is None else self._rounded(product.float())

    def from_wide(self, x: Tensor) -> Tensor:
        """Map float32 activations [tokens, in] to float32 [tokens, out]: the same weights, FP8 off."""
        product = x @ self._float().t()
        if self._weight_scale is not None and not self._blocks:
            product = product * self._weight_scale.view(-1)
        return product if self.bias is None else product + self.bias

    @property
    def _blocks(self) -> bool:
        return self.form is not None and self.form.weights == "block"

    def _widened(self) -> Tensor:
        """The weight in float32, [out, in]: its codes' values, times their scales where these differ along a row."""
        wide = self.weight.float()
        if not self._blocks:
            return wide
        assert self._weight_scale is not None
        scales = self._weight_scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        return wide * scales[: wide.shape[0], : wide.shape[1]]

    def _float(self) -> Tensor:
        return self._widened() if self._wide is None else self._wide

    def _rounded(self, x: Tensor) -> Tensor:
        return (x if self.bias is None else x + self.bias).to(self.dtype)
