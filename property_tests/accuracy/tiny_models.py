"""Small checkpoints with random weights, in every layout that is read, and Hugging Face's model of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

GOLDEN = Path(__file__).parents[2] / "golden" / "model"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
E4M3_MAX = 448.0

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        }
    },
    "ignore": ["lm_head"],
}


@dataclass
class SoloRank:
    """A rank alone in its group, in this process."""

    index: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: ProcessGroup | None = None

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """Map a buffer of its own."""
        del name
        return [torch.zeros(nbytes, dtype=torch.uint8)]


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, (rows, columns) in {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if config["model_type"] == "qwen2" and name[-6] in "qkv" and "attn" in name:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (hidden,)
        if config["model_type"] == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (size,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def random_tensors(config: dict[str, Any], seed: int, *, quantised: bool) -> dict[str, Tensor]:
    """Draw a checkpoint's tensors: bf16, or E4M3 codes with their two scales for the linears of the layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in _shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = (1 + 0.2 * values).to(torch.bfloat16)
            continue
        values = values * (0.3 if len(shape) == 1 else shape[-1] ** -0.5 * 1.5)
        stem = name.removesuffix(".weight")
        if quantised and stem.rsplit(".", 1)[-1] in LINEARS and name.endswith("weight"):
            scale = values.abs().amax() / E4M3_MAX
            tensors[name] = (values / scale).to(torch.float8_e4m3fn)
            tensors[f"{stem}.weight_scale"] = scale.reshape(())
            tensors[f"{stem}.input_scale"] = torch.tensor(0.02 + 0.005 * ("v_proj" in stem))
        else:
            tensors[name] = values.to(torch.bfloat16)
    return tensors


Change = Callable[[dict[str, Tensor]], None]


def write_checkpoint(
    folder: Path, *, layout: str = "modelopt", seed: int = 0, change: Change | None = None, **overrides: Any
) -> Path:
    """Write a checkpoint with the golden model's tokenizer.

    Args:
        folder: made if need be.
        layout: `modelopt`, `compressed-tensors`, `fp8`, or `plain` for one that is not quantised.
        seed: of the weights.
        change: edits the tensors before they are written.
        overrides: fields of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **overrides}
    tensors = random_tensors(config, seed, quantised=layout != "plain")
    if layout == "compressed-tensors":
        config["quantization_config"] = COMPRESSED
        tensors = {n: t.reshape(1) if n.endswith("_scale") else t for n, t in tensors.items()}
    elif layout == "fp8":  # AutoFP8's, with scales in bf16 as compressed-tensors has them by default
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
        tensors = {n: t.to(torch.bfloat16) if n.endswith("_scale") else t for n, t in tensors.items()}
    elif layout == "modelopt":
        quantisation = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        text = json.dumps({"producer": {"name": "test"}, "quantization": quantisation})
        (folder / "hf_quant_config.json").write_text(text, encoding="utf-8")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(GOLDEN / "tokenizer.json", folder / "tokenizer.json")
    return folder


def dequantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 weights that an FP8 checkpoint stands for."""
    plain = {}
    for name, value in tensors.items():
        if name.endswith("_scale"):
            continue
        scale = tensors.get(f"{name.removesuffix('.weight')}.weight_scale")
        plain[name] = value.float() if scale is None else value.float() * scale.reshape(())
    return plain


def hugging_face_model(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Build Hugging Face's model of this checkpoint in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "quantization_config")}
    built = AutoConfig.for_model(config["model_type"], **fields, attn_implementation="eager")
    build: Callable[[Any], Any] = AutoModelForCausalLM.from_config
    model = build(built).float().eval()
    weights = dequantise(tensors)
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model
