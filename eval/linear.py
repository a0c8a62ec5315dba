"""A linear of the evaluated model: E4M3 codes times E4M3 codes, or the same weights with FP8 off."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.eval.checkpoint import LinearWeights


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
        quantised: whether the weight holds E4M3 codes.
        input_scale: of the activations' codes, float32 [1] on the device; None where not quantised.
        input_scale_value: the same as a number, to compare without a device.
    """

    def __init__(self, weights: LinearWeights, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = weights.weight.to(device)
        self.bias = None if weights.bias is None else weights.bias.to(device, torch.float32)
        self.dtype = dtype
        self.input_scale: Tensor | None = None
        self.input_scale_value = weights.input_scale
        self._weight_scale: Tensor | None = None
        if weights.weight_scale is not None:
            self._weight_scale = torch.tensor([weights.weight_scale], dtype=torch.float32, device=device)
            self.input_scale = torch.tensor([weights.input_scale], dtype=torch.float32, device=device)
        # The FP8 product takes sizes in steps of 16 only.
        self._native_product = has_fp8_product(device) and all(size % 16 == 0 for size in self.weight.shape)
        # A CPU has no FP8 product: keep the codes' float32 values, which serve the oracle too.
        self._wide = self.weight.float() if device.type == "cpu" else None

    @property
    def quantised(self) -> bool:
        """Whether the weight holds E4M3 codes."""
        return self._weight_scale is not None

    def from_codes(self, codes: Tensor) -> Tensor:
        """Map E4M3 codes [tokens, in] to [tokens, out] in the activations' dtype.

        Each product of two codes is exact in float32; sums are float32 in the library's order; the result is
        scaled, the bias added, and rounded once.
        """
        assert self._weight_scale is not None
        assert self.input_scale is not None
        if self._native_product:
            return self.native_product(codes)
        product = widen(codes) @ self._float().t()
        return self._rounded(product.mul_(self._weight_scale * self.input_scale))

    def native_product(self, codes: Tensor) -> Tensor:
        """Do the same by the library's FP8 product, which scales before it rounds; a bias is added in float32."""
        assert self._weight_scale is not None
        assert self.input_scale is not None
        out: Tensor = torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self._weight_scale,
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
        if self._weight_scale is not None:
            product = product * self._weight_scale
        return product if self.bias is None else product + self.bias

    def _float(self) -> Tensor:
        return self.weight.float() if self._wide is None else self._wide

    def _rounded(self, x: Tensor) -> Tensor:
        return (x if self.bias is None else x + self.bias).to(self.dtype)
