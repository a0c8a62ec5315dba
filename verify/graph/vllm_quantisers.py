"""vLLM's quantisers that make their scales: the operator of each format, what it is given, and where it writes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Node

from fusecheck.graph.quantised import Form
from fusecheck.graph.subject import PassError
from fusecheck.graph.vllm_host import overload
from fusecheck.quantflow import without_group
from fusecheck.quantisers.group_fp8 import group_fp8, group_fp8_packed

LIMITS = {"eps": 1e-10, "fp8_min": -448.0, "fp8_max": 448.0}
"""What the group quantisers are told of E4M3."""
DYNAMIC, GROUP = "dynamic_per_token_scaled_fp8_quant", "per_token_group_fp8_quant"
PACKED = "per_token_group_fp8_quant_packed"
NVFP4 = "scaled_fp4_quant"
ROLES = (DYNAMIC, GROUP, PACKED, NVFP4)
LAYOUTS = ("linear", "column-major")
"""Of float32 scales of groups."""
SWIZZLED = "128x4"
"""Of NVFP4's scales, four bytes to an int32."""
OF_BUFFERS = {
    *(torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default),
    *(torch.ops.aten.permute.default, torch.ops.aten.view.dtype),
    *(operator.add, operator.floordiv, operator.mul),
}
"""What makes the buffers of scales, and their sizes."""


@dataclass(frozen=True)
class Call:
    """A quantise as vLLM calls it.

    Attributes:
        role: of the operator.
        codes: which argument receives the codes.
        scales: which argument receives the scales.
        options: the arguments besides tensors.
        factor: which argument is the factor of the tensor, if any.
    """

    role: str
    codes: str
    scales: str
    options: dict[str, Any]
    factor: str = ""


def call_of(form: Form) -> Call | None:
    """How vLLM quantises to a form; None for one that stays Fusecheck's operator."""
    group = {"group_size": form.quantiser.group, **LIMITS}
    family, layout = without_group(form.name), form.named
    if family == "dynamic-fp8":
        return Call(DYNAMIC, "result", "scale", {"scale_ub": None})
    if family == "group-fp8" and layout in LAYOUTS:
        flags = {"scale_ue8m0": False, "dummy_is_scale_transposed": layout == LAYOUTS[1], "dummy_is_tma_aligned": False}
        return Call(GROUP, "output_q", "output_s", group | flags)
    if family == "nvfp4" and layout == SWIZZLED:
        return Call(NVFP4, "output", "output_scale", {"is_sf_swizzled_layout": True}, "input_scale")
    return Call(PACKED, "output_q", "output_s_packed", group) if family == "group-fp8-packed" else None


def quantises(node: Node) -> bool:
    """Whether a node calls one of these operators, functionalised."""
    return node.target is auto_functionalized and any(node.args[0] == overload(role) for role in ROLES)


def form_of(node: Node) -> tuple[Form, Call]:
    """To which form a node quantises for which `quantises` holds, and how.

    Raises:
        PassError: it is told limits that no form has.
    """
    size = node.kwargs.get("group_size")
    forms = [Form("dynamic-fp8", "linear"), Form("nvfp4", SWIZZLED)]
    if isinstance(size, int):
        forms = [*(Form(group_fp8(size).name, each) for each in LAYOUTS), Form(group_fp8_packed(size).name, "packed")]
    for form in forms:
        call = call_of(form)
        same = call is not None and node.args[0] == overload(call.role)
        if call is not None and same and all(node.kwargs[name] == value for name, value in call.options.items()):
            return form, call
    told = ", ".join(f"{name}={value}" for name, value in node.kwargs.items() if not isinstance(value, Node))
    raise PassError(f"{node.name} calls {node.args[0]} with {told}, expected what a format has: {LIMITS}")


def made_for(buffer: Node) -> list[Node]:
    """A buffer and what it alone was made of."""
    found, pending = [], [buffer]
    while pending:
        node = pending.pop()
        if node.target in OF_BUFFERS:
            found.append(node)
            pending += node.all_input_nodes
    return found
