"""From the trained network to the FP8 checkpoint: outlier channels, calibration, ModelOpt's file layout."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusecheck.golden.model.network import Network

E4M3_MAX = 448.0
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MARGIN = {"layers.1.self_attn.v_proj": 1.25}
"""Linears whose activation scale is calibrated with headroom, so that one norm feeds consumers of different scales."""


def plant_outliers(network: Network, channels: Iterable[int], factor: float) -> None:
    """Scale channels of every norm's weight up and the consumers' columns down by a power of two.

    The function of the network is unchanged; its activations get the outlier channels of large models.
    """
    with torch.no_grad():
        for layer in network.decoder():
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for channel in channels:
                    norm.weight[channel] *= factor
                    for reader in readers:
                        reader.weight[:, channel] /= factor


def linears(network: Network) -> dict[str, nn.Linear]:
    """Return the linears that are quantised, by name."""
    found = {n: m for n, m in network.named_modules() if n.rsplit(".", 1)[-1] in LINEARS}
    return {n: m for n, m in found.items() if isinstance(m, nn.Linear)}


def calibrate(network: Network, batches: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """Run batches of tokens [batch, length]; return for each linear its input's amax and outlier ratio.

    The outlier ratio is the largest channel amax over the median channel amax.
    """
    channels: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            peak = args[0].detach().abs().float().flatten(0, -2).amax(0)
            channels[name] = torch.maximum(channels[name], peak) if name in channels else peak

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears(network).items()]
    with torch.no_grad():
        for batch in batches:
            network.features(batch)
    for handle in handles:
        handle.remove()
    return {n: {"amax": float(c.max()), "outlier_ratio": float(c.max() / c.median())} for n, c in channels.items()}


def quantise(network: Network, stats: dict[str, dict[str, float]]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors: E4M3 weights with per-tensor float32 scales, the rest bfloat16."""
    tensors: dict[str, Tensor] = {}
    quantised = linears(network)
    for name, weight in network.state_dict().items():
        stem = name.removesuffix(".weight")
        prefix = "" if stem == "lm_head" else "model."
        if stem not in quantised:
            tensors[prefix + name] = weight.to(torch.bfloat16).cpu().contiguous()
            continue
        scale = weight.abs().amax().float() / E4M3_MAX
        codes = (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        tensors[prefix + name] = codes.cpu().contiguous()
        tensors[f"{prefix}{stem}.weight_scale"] = scale.cpu().reshape(())
        amax = stats[stem]["amax"] * MARGIN.get(stem, 1.0)
        tensors[f"{prefix}{stem}.input_scale"] = torch.tensor(amax / E4M3_MAX, dtype=torch.float32)
    return tensors


def fake_quantise(network: Network, tensors: dict[str, Tensor]) -> list[Any]:
    """Make the network compute as the FP8 checkpoint does; return the handles of the activation hooks."""
    handles = []

    def round_input(scale: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            codes = (args[0].float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            return ((codes.float() * scale).to(args[0].dtype),)

        return hook

    with torch.no_grad():
        for name, module in linears(network).items():
            stem = f"model.{name}"
            scale = tensors[f"{stem}.weight_scale"].to(module.weight.device)
            module.weight.copy_(tensors[f"{stem}.weight"].to(module.weight.device).float() * scale)
            scale = tensors[f"{stem}.input_scale"].to(module.weight.device)
            handles.append(module.register_forward_pre_hook(round_input(scale)))
    return handles


_DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_safetensors(path: Path, tensors: dict[str, Tensor], note: dict[str, str]) -> None:
    """Write a safetensors file, wide dtypes first so that every tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **note}}
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())


def write_configs(folder: Path, network: Network) -> None:
    """Write `config.json` (Hugging Face's Llama) and `hf_quant_config.json` (ModelOpt's FP8 layout)."""
    shape = network.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
    }
    quant = {
        "producer": {"name": "fusecheck fusecheck.golden.model", "version": "1"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }
    for name, content in (("config.json", config), ("hf_quant_config.json", quant)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
