"""`fusecheck accuracy import FILE.gguf`: a GGUF file as a bf16 checkpoint folder in Hugging Face's layout.

Weights are dequantised and rounded once to bf16. Read are decoders of the Llama family: `llama` (Mistral's files say so
too), `qwen2` and `qwen3`. What would be computed wrongly is refused by name: a tensor, a scaling, a tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.gguf_tokenizer import CONTROL, END_TEXTS, write_tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCY_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 has; a file holds only the factors that follow."""


class GgufFile:
    """An open GGUF file: its fields as Python values, its tensors as float32 arrays.

    Raises:
        UsageError: the reader is not installed, or the file is none, cut short, or quantised in an unknown way.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError:
            raise UsageError("reading GGUF needs gguf, which is not installed; pip install 'fusecheck[eval]'") from None
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give a GGUF file")
        self.path = path
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            told = " ".join(str(error).split())
            if "GGMLQuantizationType" in told:
                advice = "update gguf, or take a file in another quantisation"
                raise UsageError(
                    f"{path}: has a tensor in a quantisation that gguf does not know ({told}); {advice}"
                ) from None
            raise UsageError(f"{path}: not a whole GGUF file ({told}); join its parts or copy it again") from None
        self.tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        self._fields = reader.fields

    def field(self, name: str, default: Any = None) -> Any:
        """The value of a metadata field.

        Raises:
            UsageError: it is a text that is none.
        """
        try:
            return self._fields[name].contents() if name in self._fields else default
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}: {name} is no text ({error}); copy the file again") from None

    def number(self, name: str) -> Any:
        """The value of a numeric field that must be there.

        Raises:
            UsageError: it is missing, or no number.
        """
        value = self.field(name)
        if not isinstance(value, (int, float)):
            raise UsageError(f"{self.path}: {name} is {value!r}, expected a number; the file is not complete")
        return value

    def values(self, name: str) -> NDArray[np.float32]:
        """A tensor dequantised, float32, in torch's order of dimensions.

        Raises:
            UsageError: its quantisation is not known here.
        """
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            wide = dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:  # the library's own error for what it cannot read is no subclass of another
            kind = tensor.tensor_type.name
            raise UsageError(
                f"{self.path}: {name} is quantised as {kind}, which gguf cannot read ({error}); update gguf, "
                "or take a file in another quantisation"
            ) from None
        return np.array(wide, np.float32).reshape([int(size) for size in reversed(tensor.shape)])


def import_gguf(source: Path, out: Path, *, tokenizer: Path | None = None) -> int:
    """Write the checkpoint of a GGUF file into `out`; returns the number of its tensors.

    Args:
        source: the file, whole.
        out: a folder that is made or empty.
        tokenizer: a tokenizer.json to copy instead of converting the file's own vocabulary.

    Raises:
        UsageError: what the file holds cannot be computed, or `out` holds a checkpoint already.
    """
    require_empty(out)
    file = GgufFile(source)
    config = read_config(file)
    tensors = dict(_tensors(file, config))
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(file, out, tokenizer, config["vocab_size"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ends = end_ids(file)
    write_json(out / "generation_config.json", {"eos_token_id": ends, "do_sample": False})
    write_json(out / "config.json", {**config, "eos_token_id": ends})
    return len(tensors)


def require_empty(out: Path) -> None:
    """Refuse, before the work, a folder that holds a checkpoint, and one that cannot be made or written.

    Raises:
        UsageError: it does, or cannot.
    """
    there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
        if not there:
            out.rmdir()
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); give another folder") from None
    if any(out.glob("*.safetensors")) or (out / "config.json").exists():
        raise UsageError(f"{out}: holds a checkpoint already; give a folder that is new or empty")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as checkpoints have it, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json that the file's metadata stands for.

    Raises:
        UsageError: another architecture, experts, a missing field, or a scaling that is not computed here.
    """
    family = file.field("general.architecture")
    if family not in ARCHITECTURES:
        raise UsageError(f"{file.path}: architecture {family!r}, expected one of: {', '.join(ARCHITECTURES)}")
    if file.field(f"{family}.expert_count"):
        raise UsageError(f"{file.path}: has {file.field(f'{family}.expert_count')} experts, expected a dense model")
    heads, hidden = int(file.number(f"{family}.attention.head_count")), int(file.number(f"{family}.embedding_length"))
    head_dim = int(file.field(f"{family}.attention.key_length", hidden // heads))
    turned = int(file.field(f"{family}.rope.dimension_count", head_dim))
    if turned != head_dim:
        raise UsageError(f"{file.path}: rope turns {turned} of {head_dim} elements of a head, expected all")
    if "token_embd.weight" not in file.tensors:
        raise UsageError(f"{file.path}: has no tensor token_embd.weight; is it one part of several? join them first")
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": head_dim,
        "intermediate_size": int(file.number(f"{family}.feed_forward_length")),
        "max_position_embeddings": int(file.number(f"{family}.context_length")),
        "num_attention_heads": heads,
        "num_hidden_layers": int(file.number(f"{family}.block_count")),
        "num_key_value_heads": int(file.field(f"{family}.attention.head_count_kv", heads)),
        "rms_norm_eps": _shortest(file.number(f"{family}.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(file.field(f"{family}.rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(file, str(family), head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
    }


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-06 for 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _scaling(file: GgufFile, family: str, head_dim: int) -> dict[str, Any] | None:
    kind = file.field(f"{family}.rope.scaling.type", "none")
    if FREQUENCY_FACTORS in file.tensors:
        return _llama3(file, family, head_dim)
    if kind in ("none", None):
        return None
    if kind not in ("linear", "yarn"):
        raise UsageError(f"{file.path}: rope scaling of type {kind!r}, expected linear, yarn or none")
    found = {"rope_type": kind, "factor": float(file.number(f"{family}.rope.scaling.factor"))}
    if kind == "yarn":
        name = f"{family}.rope.scaling.original_context_length"
        found["original_max_position_embeddings"] = int(file.number(name))
    return found


def _llama3(file: GgufFile, family: str, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, recognised by the factors that follow from it: the file does not name its numbers."""
    factors = file.values(FREQUENCY_FACTORS)
    factor, theta = float(factors.max()), float(file.field(f"{family}.rope.freq_base", 10000.0))
    turns = LLAMA3["original_max_position_embeddings"] / (
        2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    )
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = (1 / (blend + (1 - blend) / factor)).astype(np.float32)
    # Both are float32 roundings of one formula, evaluated in another order: four units in the last place cover them.
    if factors.shape != expected.shape or (np.abs(factors - expected) > 4 * np.spacing(expected)).any():
        raise UsageError(f"{file.path}: {FREQUENCY_FACTORS} are not Llama 3.1's factors; other ones are not computed")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _tensors(file: GgufFile, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under Hugging Face's name, bf16.

    Raises:
        UsageError: a tensor that a model of this family does not have.
    """
    for name in file.tensors:
        if name == FREQUENCY_FACTORS:
            continue
        values = torch.from_numpy(file.values(name))
        target = OUTER.get(name) or _inner_name(name)
        if target is None:
            raise UsageError(f"{file.path}: tensor {name} is not part of a dense {config['model_type']}; not imported")
        if config["model_type"] == "llama" and ".q_proj." in target:
            values = _unturned(values, config["num_attention_heads"])
        elif config["model_type"] == "llama" and ".k_proj." in target:
            values = _unturned(values, config["num_key_value_heads"])
        yield target, values.to(torch.bfloat16).contiguous()


def _inner_name(name: str) -> str | None:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in INNER:
        return None
    return f"model.layers.{match[1]}.{INNER[match[2]]}.{match[3]}"


def _unturned(rows: Tensor, heads: int) -> Tensor:
    """Undo the order of rows that GGUF's `llama` has: pairs that rope turns together lie side by side there."""
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return halves.transpose(1, 2).reshape(rows.shape)


def end_ids(file: GgufFile) -> list[int]:
    """The tokens that end a text: those that the file names, and those whose text says so."""
    named = [file.field(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    texts, kinds = (file.field(f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type"))
    marks = zip(texts, kinds, strict=False)
    known = [index for index, (text, kind) in enumerate(marks) if kind == CONTROL and text in END_TEXTS]
    return sorted({int(index) for index in [*named, *known] if index is not None})
