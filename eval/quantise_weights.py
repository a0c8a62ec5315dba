"""Weights in E4M3, in each form that is written, and the configuration that published checkpoints of it have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusecheck.eval.recipe import BLOCK, FORMS, Form
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.group_fp8 import group_fp8
from fusecheck.quantisers.quantiser import Quantiser

DIVIDE = QuantFlow("weights", zero_group="one", amax_nan="propagate")
"""Scales of weights: the largest magnitude over 448, 1 where all are zero; codes by division."""
POWERS = QuantFlow("weights, powers of two", pow2="rceil", zero_group="one", amax_nan="propagate")
"""The same, rounded up to a power of two."""


def quantise_weight(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [out, in], and scales, float32, of the form's shape, of a float32 weight [out, in]."""
    rules = POWERS if form.powers else DIVIDE
    outputs, inputs = weight.shape
    if form.weights != "block":
        rows = weight if form.weights == "channel" else weight.reshape(1, -1)
        codes, scales = _quantise(group_fp8(rows.shape[1]), rows, rules)
        return codes.reshape(weight.shape), scales
    high, wide = form.scale_shape(outputs, inputs)
    whole = functional.pad(weight, (0, wide * BLOCK[1] - inputs, 0, high * BLOCK[0] - outputs))
    blocks = whole.reshape(high, BLOCK[0], wide, BLOCK[1]).transpose(1, 2).reshape(high, -1)
    codes, scales = _quantise(group_fp8(BLOCK[0] * BLOCK[1]), blocks, rules)
    back = codes.view(torch.uint8).reshape(high, wide, *BLOCK).transpose(1, 2).reshape(whole.shape)
    return back[:outputs, :inputs].contiguous().view(torch.float8_e4m3fn), scales


def _quantise(made: Quantiser, rows: Tensor, rules: QuantFlow) -> tuple[Tensor, Tensor]:
    scales = made.scales(rows, rules)
    return made.codes(rows, scales, rules).view(torch.float8_e4m3fn), scales


def scale_name(form: Form) -> str:
    """What the tensor of a weight's scales is called, behind the linear's name."""
    return "weight_scale_inv" if form.weights == "block" else "weight_scale"


def quantization_config(form: Form) -> dict[str, Any]:
    """`quantization_config` of config.json: compressed-tensors' for a scale a token, DeepSeek's for groups."""
    if form == FORMS["dynamic"]:
        scheme = {"num_bits": 8, "type": "float", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**scheme, "strategy": "channel", "dynamic": False},
            "input_activations": {**scheme, "strategy": "token", "dynamic": True},
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(BLOCK),
        **({"scale_fmt": "ue8m0"} if form.powers else {}),
        "modules_to_not_convert": ["lm_head"],
    }
