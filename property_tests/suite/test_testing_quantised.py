"""`assert_quantised`, and the scales and codes of a fused call, as a test holds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.property_tests.suite.testing_ranks import EPS, HIDDEN, fused, operands, quantised, right_call
from fusecheck.quantflow import QUANT_FLOWS, QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.testing import NotConforming, assert_conforms, assert_quantised, conforms

RULES = [
    (name, flow)
    for base, known in QUANT_FLOWS.items()
    for name in (base, *((f"{base}-32",) if base.startswith("group-") else ()))
    for flow in known.values()
]


@pytest.mark.parametrize(("name", "flow"), RULES, ids=[f"{name}-{flow.name}" for name, flow in RULES])
def test_every_known_quantiser_is_explained_and_a_code_or_scale_one_step_off_is_not(name: str, flow: QuantFlow) -> None:
    norm = 3 * operands(0)[0]
    norm[1] = 0
    codes, stored = quantised(name, flow, norm)
    assert assert_quantised(codes, stored, of=norm, format=name, flow=flow) == flow.name
    assert assert_quantised(codes, stored, of=norm, format=name)
    with pytest.raises(NotConforming, match=rf"^(code|quant): \[2,\d+\] y/scale in .* of=\S+ .* judged as {name} by"):
        assert_quantised(spoilt_code(codes), stored, of=norm, format=name)
    if isinstance(stored, Tensor):
        count = stored.untyped_storage().nbytes() // stored.element_size()
        bits = stored.as_strided((count,), (1,)).clone()
        # An approximate division may be 2 ulp off.
        bits.view(torch.uint8)[0] ^= 16 if stored.dtype is torch.float32 else 1
        wrong = bits.as_strided(stored.shape, stored.stride())
        with pytest.raises(NotConforming, match=r"^(scale|code): "):
            assert_quantised(codes, wrong, of=norm, format=name, flow=flow)


def spoilt_code(codes: Tensor) -> Tensor:
    """The same with one code one step off, in the middle of its range."""
    bits = codes.clone().view(torch.uint8)
    bits[2, int(torch.argmax(codes.float()[2].abs() if codes.dtype != torch.uint8 else (bits[2] & 7).float()))] ^= 1
    return bits.view(codes.dtype)


@pytest.mark.parametrize("quantised_by", ["dynamic-fp8", "group-fp8-packed-64", "mxfp8", "nvfp4"])
def test_scales_and_codes_of_a_fused_call_are_judged(quantised_by: str) -> None:
    call = right_call()
    flow = DATAFLOWS["flashinfer-fp32"].quant(quantised_by)
    codes, stored = quantised(quantised_by, flow, call["norm"])
    call |= {
        "quant": codes,
        "scale_out": stored,
        "quantiser": quantised_by,
        "scale": 1.0,
        "dataflow": "flashinfer-fp32",
    }
    assert assert_conforms(**call)
    assert assert_conforms(**(call | {"norm": None}))
    with pytest.raises(NotConforming, match=r"^code: element\[2,"):
        assert_conforms(**(call | {"quant": spoilt_code(codes)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "group-fp8-96"}, "group"),
        ({"format": "int8"}, "quantiser='int8', expected one of"),
        ({"of": torch.ones(6, 256)}, "of is \\[6, 256\\] torch.float32, expected the activations"),
        (
            {"codes": torch.zeros(6, 128, dtype=torch.uint8)},
            r"expected \[6, 256\] torch.float8_e4m3fn or torch.uint8 of dyn",
        ),
        ({"codes": torch.zeros(6, 256).to(torch.float8_e5m2)}, r"codes is \[6, 256\] torch.float8_e5m2, expected"),
        ({"codes": torch.zeros(0, 256), "of": torch.ones(0, 256).bfloat16()}, r"of is \[0, 256\] .*, not empty"),
        ({"format": "none"}, "quantiser='none', expected one of: static-fp8"),
        ({"format": "static-fp8"}, "scale has 6 elements, expected one"),
        ({"format": "static-fp8", "scale": None}, "scale is NoneType, expected a number"),
        ({"format": "static-fp8", "scale": "1"}, "scale is str, expected a number"),
        ({"scale": torch.ones(5, 1)}, "scale: got scales torch.float32 \\[5, 1\\]"),
        ({"scale": 0.5}, "scale is float, expected the tensor of scales"),
        ({"flow": "cublas"}, "flow='cublas' is not known for dynamic-fp8, expected one of: flashinfer"),
        ({"layout": "zigzag"}, "zigzag"),
    ],
)
def test_an_argument_of_a_quantiser_that_cannot_be_meant_is_named(change: dict[str, Any], message: str) -> None:
    codes, stored = quantised("dynamic-fp8", QUANT_FLOWS["dynamic-fp8"]["flashinfer"], operands(0)[0])
    given = {"codes": codes, "scale": stored, "of": operands(0)[0], "format": "dynamic-fp8"} | change
    with pytest.raises(UsageError, match=message):
        assert_quantised(**given)


def test_a_number_of_python_is_the_float32_that_a_kernel_reads() -> None:
    partial, factor = (
        torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16(),
        float(torch.tensor(0.3)),
    )
    gamma = torch.ones(HIDDEN).bfloat16()
    residual, of, _ = fused([partial], partial, gamma)
    flow = QuantFlow("exact", given="multiplies", scale_rule="multiply", code_rule="reciprocal")
    made = quantiser("nvfp4")
    scales = made.scales(of, flow, factor)
    codes = made.codes(of, scales, flow, factor)
    assert not torch.equal(made.codes(of, scales, flow, 0.3), codes)  # ties are decided by the last bit of g / scale
    codes = made.element.pack(codes)
    for given in (0.3, factor, torch.tensor([0.3])):
        assert assert_quantised(codes, scales, of=of, format="nvfp4", tensor_scale=given, flow=flow, layout="linear")
        call: dict[str, Any] = {"partials": partial, "residual_in": partial, "gamma": gamma, "eps": EPS}
        call |= {"quantiser": "nvfp4", "layout": "linear", "quant": codes, "scale_out": scales}
        call["dataflow"] = replace(DATAFLOWS["trtllm-fp32"], quants=(("nvfp4", flow),))
        assert_conforms(residual, of, scale=given, **call)
    with pytest.raises(UsageError, match="scale is missing, expected the factor of the tensor"):
        conforms(residual, of, **call)


@pytest.mark.parametrize(("name", "own"), [("mxfp8", torch.float8_e8m0fnu), ("nvfp4", torch.float8_e4m3fn)])
def test_scales_are_taken_in_the_shape_and_dtype_in_which_libraries_return_them(name: str, own: torch.dtype) -> None:
    norm = operands(0)[0]
    codes, stored = quantised(name, QUANT_FLOWS[name]["flashinfer"], norm)
    assert isinstance(stored, Tensor)
    rows = stored.view(128, -1)
    for given in (stored, rows, rows.view(own), rows.view(torch.int32)):
        assert assert_quantised(codes, given, of=norm, format=name)
    with pytest.raises(UsageError, match=r"scale: got scales torch.float8_e5m2 \[128"):
        assert_quantised(codes, rows.view(torch.float8_e5m2), of=norm, format=name)
