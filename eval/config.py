"""What a checkpoint's configuration files say: the model's shape and its FP8 recipe. Read as JSON; no code is run."""

from __future__ import annotations

import fnmatch
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


@dataclass(frozen=True)
class Recipe:
    """How the linears are quantised; `excluded` holds name patterns of those that are not."""

    producer: str
    excluded: tuple[str, ...]

    def covers(self, module: str) -> bool:
        """Say whether the linear of this name (without `.weight`) holds E4M3 codes."""
        return not any(_matches(module, pattern) for pattern in self.excluded)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        # compressed-tensors' regular expressions; the forms in use are prefixes, suffixes and wildcards.
        pattern = pattern[3:].replace(".*", "*").replace("\\.", ".").strip("^$")
    return fnmatch.fnmatchcase(module, pattern) or module.startswith(pattern + ".") or module.endswith("." + pattern)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give a folder in Hugging Face's checkpoint layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def read_recipe(folder: Path) -> Recipe | None:
    """Read the FP8 recipe of a ModelOpt or compressed-tensors checkpoint; None for one that is not quantised.

    Raises:
        UsageError: a recipe other than E4M3 weights and activations with static per-tensor scales.
    """
    beside = folder / "hf_quant_config.json"
    if beside.is_file():
        return _modelopt(beside, read_json(beside).get("quantization") or {})
    path = folder / "config.json"
    inside = read_json(path).get("quantization_config")
    if inside is None:
        return None
    method = _object(path, "quantization_config", inside).get("quant_method")
    if method == "modelopt":
        return _modelopt(path, inside)
    if method == "compressed-tensors":
        return _compressed(path, inside)
    if method == "fp8":
        return _fp8(path, inside)
    raise UsageError(f"{path}: quant_method is {method!r}, expected modelopt, compressed-tensors or fp8")


def _fp8(path: Path, recipe: dict[str, Any]) -> Recipe:
    """The form of AutoFP8 and of vLLM's own `fp8`: per-tensor scales, static activations."""
    scheme, block = recipe.get("activation_scheme"), recipe.get("weight_block_size")
    if scheme != "static" or block is not None:
        raise UsageError(
            f"{path}: quant_method fp8 with activation_scheme {scheme!r} and weight_block_size {block!r}; "
            "expected 'static' and none: one scale a tensor"
        )
    return Recipe("fp8", _names(path, recipe, "ignored_layers") or _names(path, recipe, "modules_to_not_convert"))


def _modelopt(path: Path, recipe: Any) -> Recipe:
    recipe = _object(path, "quantization", recipe)
    if recipe.get("quant_algo") != "FP8":
        raise UsageError(f"{path}: quant_algo is {recipe.get('quant_algo')!r}, expected 'FP8' (static, per tensor)")
    return Recipe("modelopt", _names(path, recipe, "exclude_modules") or _names(path, recipe, "ignore"))


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {name} is a JSON {type(value).__name__}, expected an object; copy it again")
    return value


def _names(path: Path, recipe: dict[str, Any], field: str) -> tuple[str, ...]:
    names = recipe.get(field) or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UsageError(f"{path}: {field} is {names!r}, expected a list of module names")
    return tuple(names)


def _compressed(path: Path, recipe: dict[str, Any]) -> Recipe:
    groups = list(_object(path, "config_groups", recipe.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise UsageError(f"{path}: {len(groups)} config_groups, expected one for all linears")
    for side in ("weights", "input_activations"):
        scheme = _object(path, side, _object(path, "config_groups", groups[0]).get(side) or {})
        got = {k: scheme.get(k) for k in ("num_bits", "type", "strategy")} | {"dynamic": bool(scheme.get("dynamic"))}
        if got != {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}:
            told = ", ".join(f"{k} {v}" for k, v in got.items())
            raise UsageError(f"{path}: {side} are {told}; expected 8-bit float, strategy tensor, not dynamic")
    return Recipe("compressed-tensors", _names(path, recipe, "ignore"))
