"""What a checkpoint's config.json says of the model's shape. Read as JSON; no code is run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """The sizes and constants of a decoder of the Llama family.

    Attributes:
        family: `model_type` of config.json.
        vocabulary: rows of the embedding.
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: elements per head.
        intermediate: width of the MLP.
        eps: of every RMSNorm.
        theta: base of the rotary embedding.
        rope_scaling: `rope_scaling` of config.json, or None.
        positions: longest context.
        tied: the head reads the embedding's weight.
        query_bias: q, k and v have a bias (Qwen 2).
        head_norm: q and k are normed per head (Qwen 3).
        end_ids: tokens that end a text.
        dtype: of the activations, `bf16` or `fp16`.
    """

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    theta: float
    rope_scaling: dict[str, Any] | None
    positions: int
    tied: bool
    query_bias: bool
    head_norm: bool
    end_ids: tuple[int, ...]
    dtype: str

    @property
    def multiplies(self) -> int:
        """Products that a token takes in the linears of all layers."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (attention + 3 * self.intermediate)

    def require_divisible(self, world_size: int) -> None:
        """Refuse a tensor-parallel size that would cut a head.

        Raises:
            UsageError: what does not divide, and which sizes do.
        """
        counts = {"heads": self.heads, "kv_heads": self.kv_heads, "intermediate": self.intermediate}
        fitting = [n for n in (1, 2, 4, 8, 16) if all(c % n == 0 for c in counts.values())]
        for name, count in counts.items():
            if count % world_size:
                raise UsageError(f"--tp {world_size} does not divide {name}={count}; use one of {fitting}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give a folder in Hugging Face's checkpoint layout") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not JSON ({error}); copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def read_shape(folder: Path) -> Shape:
    """Read config.json.

    Raises:
        UsageError: an unknown architecture, a missing field, or a feature that `fusecheck.eval.llama` does not compute.
    """
    path = folder / "config.json"
    config = read_json(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"{path}: model_type is {family!r}, expected one of: {', '.join(FAMILIES)}")
    _refuse_unknown_features(path, config)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = config.get("rope_parameters") or {}
        return Shape(
            family=family,
            vocabulary=int(config["vocab_size"]),
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            eps=float(config["rms_norm_eps"]),
            theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            rope_scaling=_scaling(path, config.get("rope_scaling") or rope),
            positions=int(config.get("max_position_embeddings", 4096)),
            tied=bool(config.get("tie_word_embeddings", False)),
            query_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
            head_norm=family == "qwen3",
            end_ids=_end_ids(folder, config),
            dtype="fp16" if config.get("torch_dtype", config.get("dtype")) == "float16" else "bf16",
        )
    except KeyError as error:
        raise UsageError(f"{path}: has no field {error}; it is not a complete configuration") from None
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: a field is of the wrong type ({error}); copy the checkpoint again") from None


def _refuse_unknown_features(path: Path, config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UsageError(f"{path}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    if config.get("mlp_bias"):
        raise UsageError(f"{path}: mlp_bias is set, expected an MLP without bias")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and not isinstance(window, int):
        raise UsageError(f"{path}: sliding_window is {window!r}, expected a whole number or null")
    if window is not None and window < int(config.get("max_position_embeddings") or 0):
        raise UsageError(f"{path}: sliding_window={window} is shorter than the context, expected full attention")


ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The rope scalings that `fusecheck.eval.rotary` computes, and the numbers that each needs."""


def _scaling(path: Path, scaling: Any) -> dict[str, Any] | None:
    if not isinstance(scaling, dict):
        raise UsageError(f"{path}: rope_scaling is {scaling!r}, expected an object or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_FIELDS:
        raise UsageError(
            f"{path}: rope_scaling of type {kind!r} is not computed here, expected {', '.join(ROPE_FIELDS)} or none; "
            "run lm-eval with an engine that computes it, and judge its runs with `fusecheck accuracy compare`"
        )
    for name in ROPE_FIELDS[kind]:
        if not isinstance(scaling.get(name), (int, float)):
            raise UsageError(
                f"{path}: rope_scaling of type {kind!r} has {name} {scaling.get(name)!r}, expected a number"
            )
    return {**scaling, "rope_type": kind}


def _end_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """All tokens that end a text: config.json's and generation_config.json's, which often names more."""
    beside = folder / "generation_config.json"
    found: list[int] = []
    for source in (config, read_json(beside) if beside.is_file() else {}):
        ends = source.get("eos_token_id")
        found += ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(isinstance(end, bool) or not isinstance(end, int) for end in found):
        raise UsageError(f"{folder}: eos_token_id is {found}, expected whole numbers; copy the checkpoint again")
    return tuple(dict.fromkeys(found))
