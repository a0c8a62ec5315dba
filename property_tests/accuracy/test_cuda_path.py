"""The model on a GPU, without one: devices, shapes and layouts of every op, on tensors that hold no numbers.

PyTorch's `meta` device stands in: nothing can be read from it, so that a step which would wait for the GPU fails here.
The rules of the FP8 product are those that PyTorch itself keeps for CUDA: a row-major times a column-major operand,
sizes in steps of 16, float32 scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fusecheck.backends.operands import check_layout
from fusecheck.backends.unfused import UnfusedKernel
from fusecheck.eval.arm import ORACLE, UNFUSED
from fusecheck.eval.checkpoint import LinearWeights
from fusecheck.eval.linear import Codes, Linear
from fusecheck.eval.recipe import Form
from fusecheck.eval.worker import EvalRank
from fusecheck.interface import RankInputs, RankOutputs
from fusecheck.property_tests.accuracy.tiny_models import GOLDEN, SoloRank

DEVICE = torch.device("meta")


class OnDevice(TorchFunctionMode):
    """Refuses an op on tensors of two devices; counts what is read back and the FP8 products.

    Attributes:
        reads: tensors that were copied to the host, each of which waits for the device.
        products: rows, inner size and columns of every FP8 product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.products: list[tuple[int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands of every call."""
        del types
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.Tensor.cpu:
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if func is not torch.Tensor.to:
            devices = {tensor.device for tensor in tensors}
            if len(devices) > 1:
                raise RuntimeError(f"{func} on {devices}")
        if func is torch._scaled_mm:
            self.products.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **kwargs)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDevice]:
    """Pretend that there is a GPU with FP8 products, a kernel as strict as FlashInfer's, and quick peers."""

    def collective(tensor: Tensor, *_: Any, **__: Any) -> None:
        assert tensor.device == DEVICE
        assert tensor.is_contiguous()

    def run(kernel: UnfusedKernel, inputs: RankInputs, **how: Any) -> RankOutputs:
        check_layout(inputs)
        return unfused(kernel, inputs, **how)

    unfused = UnfusedKernel.run
    monkeypatch.setattr(UnfusedKernel, "run", run)
    monkeypatch.setattr("fusecheck.eval.linear.has_fp8_product", lambda device: device == DEVICE)
    monkeypatch.setattr("torch._meta_registrations.device_hint", lambda _: "cuda")
    monkeypatch.setattr(dist, "all_reduce", collective)
    monkeypatch.setattr(dist, "broadcast", collective)
    with OnDevice() as mode:
        yield mode


def rank_on(world_size: int) -> SoloRank:
    # A group that is asked for nothing: the collectives above stand in for it.
    return SoloRank(0, world_size, DEVICE, group=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("arm", [ORACLE, UNFUSED])
def test_every_call_of_an_arm_keeps_to_the_device(device: OnDevice, arm: str, world_size: int) -> None:
    rank = EvalRank(rank_on(world_size), str(GOLDEN))
    rank.open_arm(arm, "unfused", 4096)
    ids, lengths = np.ones((3, 50), np.int64), np.array([50, 40, 7])
    scored = rank.score_last(ids, lengths, ids[:, :4])
    assert scored is not None
    assert [part.shape for part in scored] == [(3, 2048), (3,), (3, 4)]
    spans = rank.score_spans(ids, lengths, np.array([10, 39, 1]))
    assert spans is not None
    assert [part.shape for part in spans] == [(40 + 1 + 6,)] * 2
    assert rank.begin(ids, lengths, 66) is not None
    assert rank.proceed(np.arange(3), 5) is not None
    answers = rank.proceed(np.array([0, 2]), 4)
    assert answers is not None
    assert answers.shape == (4, 2)
    layers, forwards = 4, 3 + 5 + 4
    # The scores (three tensors), the spans (two), the first token, and one look after each run of steps.
    assert device.reads == 3 + 2 + 1 + 2
    assert len(device.products) == (0 if arm == ORACLE else 7 * layers * forwards)
    assert all(k % 16 == n % 16 == 0 for _, k, n in device.products)


def make_linear(outputs: int, inputs: int, bias: Tensor | None = None) -> Linear:
    weight = torch.ones(outputs, inputs).to(torch.float8_e4m3fn)
    return Linear(LinearWeights(weight, Form(), torch.full((1, 1), 0.5), 0.25, bias), DEVICE, torch.bfloat16)


def codes_of(linear: Linear, codes: Tensor) -> Codes:
    assert linear.key is not None
    assert linear.input_scale is not None
    return Codes(codes, linear.input_scale, linear.key)


@pytest.mark.parametrize(("outputs", "inputs", "products"), [(48, 64, 1), (40, 64, 0), (48, 72, 0)])
def test_shapes_that_the_fp8_product_refuses_are_multiplied_in_float32(
    device: OnDevice, outputs: int, inputs: int, products: int
) -> None:
    linear = make_linear(outputs, inputs)
    codes = torch.ones(5, inputs).to(torch.float8_e4m3fn).to(DEVICE)
    out = linear.from_codes(codes_of(linear, codes))
    assert (out.dtype, tuple(out.shape), out.device) == (torch.bfloat16, (5, outputs), DEVICE)
    assert len(device.products) == products


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a, b, s: (a, b.contiguous(), s),
        lambda a, b, s: (a[:, :40], b[:40], s),
        lambda a, b, s: (a, b, s.double()),
        lambda a, b, s: (a, b, torch.ones(1)),
    ],
    ids=["row-major weight", "40 columns", "double scale", "scale on the host"],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(device: OnDevice, spoil: Callable[..., Any]) -> None:
    a = torch.ones(32, 64).to(torch.float8_e4m3fn).to(DEVICE)
    b = torch.ones(48, 64).to(torch.float8_e4m3fn).to(DEVICE).t()
    scale = torch.ones(1).to(DEVICE)
    assert tuple(torch._scaled_mm(a, b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16).shape) == (32, 48)
    a, b, wrong = spoil(a, b, scale)
    with pytest.raises(RuntimeError):
        torch._scaled_mm(a, b, scale_a=wrong, scale_b=scale, out_dtype=torch.bfloat16)


def test_the_fp8_product_is_the_exact_emulation_rounded_once() -> None:
    """On a CPU both exist: the library's product by the call that a GPU gets, and the table's."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 64, generator=generator).to(torch.float8_e4m3fn)
    codes = torch.randn(33, 64, generator=generator).mul(50).clamp(-448, 448).to(torch.float8_e4m3fn)
    weights = LinearWeights(weight, Form(), torch.full((1, 1), 0.0375), 0.013)
    linear = Linear(weights, torch.device("cpu"), torch.bfloat16)
    emulated = linear.from_codes(codes_of(linear, codes))
    native = linear.native_product(codes_of(linear, codes))
    exact = (codes.double() @ weight.double().t()) * 0.0375 * 0.013
    step = exact.abs() * 2.0**-7 + 1e-12
    assert bool(((native.double() - exact).abs() <= step).all())
    assert bool(((emulated.double() - exact).abs() <= step).all())
    assert native.dtype == emulated.dtype == torch.bfloat16


def test_a_bias_is_added_before_the_one_rounding(device: OnDevice) -> None:
    linear = make_linear(48, 64, torch.ones(48))
    out = linear.from_codes(codes_of(linear, torch.ones(5, 64).to(torch.float8_e4m3fn).to(DEVICE)))
    assert (out.dtype, out.device, len(device.products)) == (torch.bfloat16, DEVICE, 1)
