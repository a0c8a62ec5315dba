"""What stands in for vLLM in tests: its ops on CPU tensors, by the schemas of 0.25.1 and 0.33.0.

The schemas are those that the wheels' libraries hold (read 2026-11-29), from `csrc/libtorch_stable/torch_bindings.cpp`.
The arithmetic is that of the kernels' sources, and of the machine code where one kernel quantises by a given scale.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from typing_extensions import Self

from fusecheck.dataflow import DATAFLOWS
from fusecheck.property_tests.suite.flashinfer_stand_in import codes, normed
from fusecheck.quantflow import LEAST_OF_TOKEN
from fusecheck.quantisers.known import quantiser

NORM = "float epsilon, Tensor? scale_ub, Tensor!? residual"
GROUPS = "int group_size, float eps, float fp8_min, float fp8_max"
SCHEMAS = {
    "_C_custom_ar": (
        "meta_size() -> int",
        "init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int",
        "register_buffer(int fa, int[] ipc_tensors) -> ()",
        "all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()",
        "dispose(int fa) -> ()",
    ),
    "_C": (
        "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
        "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor! residual, Tensor weight, "
        "Tensor scale, float epsilon) -> ()",
        f"rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, {NORM}) -> ()",
        f"rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, {NORM}, "
        "int group_size, bool is_scale_transposed) -> ()",
        "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
        "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        f"per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, {GROUPS}, bool scale_ue8m0, "
        "bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
        f"per_token_group_fp8_quant_packed(Tensor input, Tensor! output_q, Tensor! output_s_packed, {GROUPS}) -> ()",
    ),
}


class Vllm:
    """The ops of rank 0 of two; what the other rank holds is in `other`.

    And torch's symmetric memory, whose buffers are in `held` by their addresses.
    """

    schemas: ClassVar[Mapping[str, tuple[str, ...]]] = SCHEMAS

    def __init__(self) -> None:
        self.other = torch.empty(0)
        self.held: dict[int, int] = {}
        self.called: list[str] = []

    def lent(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Self]:
        """Stand in for one test, without a GPU and without peers."""
        libraries = self.register()
        monkeypatch.setattr(symm_mem, "empty", self.empty)
        monkeypatch.setattr(symm_mem, "rendezvous", self.rendezvous)
        monkeypatch.setattr(dist, "barrier", lambda group: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        yield self
        for library in libraries:
            library._destroy()
        assert self.held == {}, "a closed kernel keeps its buffers"

    def register(self) -> list[Any]:
        """Register every op of `schemas` with the method of its name; whoever calls keeps and destroys them."""
        made, make = [], cast("Any", torch.library.Library)
        for namespace, schemas in self.schemas.items():
            library = make(namespace, "FRAGMENT")
            for schema in schemas:
                name = schema.partition("(")[0]
                library.define(schema)
                library.impl(name, self._noted(name), "CompositeExplicitAutograd")
            made.append(library)
        return made

    def _noted(self, name: str) -> Callable[..., object]:
        def called(*arguments: object, **named: object) -> object:
            self.called.append(name)
            done: object = getattr(self, name)(*arguments, **named)
            return done

        return called

    def meta_size(self) -> int:
        return 4096

    def empty(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        made = torch.full((size,), 7, dtype=dtype, device=device)
        self.held[made.data_ptr()] = size
        weakref.finalize(made, self.held.pop, made.data_ptr())
        return made

    def rendezvous(self, buffer: Tensor, group: object) -> SimpleNamespace:
        assert not buffer.any()
        return SimpleNamespace(buffer_ptrs=[buffer.data_ptr(), buffer.data_ptr() + 1])

    def init_custom_ar(self, ipc_tensors: list[int], rank_data: Tensor, rank: int, fully_connected: bool) -> int:
        assert ([address in self.held for address in ipc_tensors], rank, fully_connected) == ([True, False], 0, True)
        self.table = rank_data.view(torch.int64).view(-1, 8)
        return 7

    def register_buffer(self, fa: int, ipc_tensors: list[int]) -> None:
        self.table[0, :2] = torch.tensor(ipc_tensors)

    def all_reduce(self, fa: int, inp: Tensor, out: Tensor, reg_buffer: int, reg_buffer_sz_bytes: int) -> None:
        assert inp.nbytes <= reg_buffer_sz_bytes <= self.held[reg_buffer]
        assert self.table[-1].tolist() == [reg_buffer, reg_buffer + 1, *[0] * 6]
        out.copy_(inp.float() + self.other.float())

    def dispose(self, fa: int) -> None:
        assert fa == 7

    def fused_add_rms_norm(self, given: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
        residual.add_(given)
        given.copy_(normed(residual, weight, epsilon, 0.0))

    def fused_add_rms_norm_static_fp8_quant(
        self, result: Tensor, given: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, epsilon: float
    ) -> None:
        norm = given.clone()
        self.fused_add_rms_norm(norm, residual, weight, epsilon)
        result.copy_(codes(norm.float(), scale))

    def rms_norm_dynamic_per_token_quant(
        self, result: Tensor, given: Tensor, weight: Tensor, scale: Tensor, epsilon: float, scale_ub: Tensor | None,
        residual: Tensor,
    ) -> None:  # fmt: skip
        self.rms_norm_per_block_quant(
            result, given, weight, scale, epsilon, scale_ub, residual, given.shape[-1], is_scale_transposed=False
        )

    def rms_norm_per_block_quant(
        self, result: Tensor, given: Tensor, weight: Tensor, scale: Tensor, epsilon: float, scale_ub: Tensor | None,
        residual: Tensor, group_size: int, is_scale_transposed: bool,
    ) -> None:  # fmt: skip
        assert scale_ub is None
        assert is_scale_transposed or scale.stride(1) == 1
        stream = given.float() + residual.float()
        residual.copy_(stream)
        groups = twice_rounded(stream, weight, epsilon).float().view(len(given), -1, group_size)
        scale.copy_((largest(groups) / 448).clamp(min=LEAST_OF_TOKEN))
        result.copy_(within(groups / scale.unsqueeze(-1), torch.fmin, torch.fmax).flatten(1))

    def static_scaled_fp8_quant(
        self, result: Tensor, given: Tensor, scale: Tensor, group_shape: list[int] | None = None
    ) -> None:
        result.copy_(codes(given.float(), scale))

    def dynamic_per_token_scaled_fp8_quant(
        self, result: Tensor, given: Tensor, scale: Tensor, scale_ub: Tensor | None
    ) -> None:
        scale.copy_((largest(given.float()).unsqueeze(-1) / 448).clamp(min=LEAST_OF_TOKEN))
        result.copy_(within(given.float() / scale, torch.fmin, torch.fmax))

    def per_token_group_fp8_quant(
        self, given: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, fp8_min: float,
        fp8_max: float, scale_ue8m0: bool, dummy_is_scale_transposed: bool, dummy_is_tma_aligned: bool,
    ) -> None:  # fmt: skip
        assert not scale_ue8m0
        groups = given.float().view(len(given), -1, group_size)
        assert (fp8_min, fp8_max) == (-448.0, 448.0)
        output_s.copy_(largest(groups).clamp(min=eps) / fp8_max)
        output_q.copy_(within(groups / output_s.unsqueeze(-1), torch.fmax, torch.fmin).flatten(1))

    def per_token_group_fp8_quant_packed(
        self, given: Tensor, output_q: Tensor, output_s_packed: Tensor, group_size: int, eps: float, fp8_min: float,
        fp8_max: float,
    ) -> None:  # fmt: skip
        name = "group-fp8-packed"
        made, rules = quantiser(name), DATAFLOWS["vllm-c"].quant(name)
        scales = made.scales(given, rules)
        tokens, hidden = given.shape
        made.layout(tokens, hidden, rules, None).write(scales, output_s_packed)
        output_q.view(torch.uint8).copy_(made.codes(given, scales, rules))


def largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, as `fmaxf` finds it: a NaN is passed over."""
    return groups.abs().nan_to_num(0.0, torch.inf).amax(-1)


def within(codes: Tensor, *clamps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Clamped to E4M3, by `fminf` and `fmaxf` in this order: a NaN becomes the bound of the first."""
    for clamp in clamps:
        codes = clamp(codes, torch.tensor(448.0 if clamp is torch.fmin else -448.0))
    return codes


def twice_rounded(stream: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The norm rounded before the product with the weight, and after it."""
    inverse = torch.rsqrt(stream.square().mean(-1, keepdim=True) + epsilon)
    return (stream * inverse).to(weight.dtype) * weight
