"""Read a checkpoint's tensors: safetensors only, sliced for one rank, with every scale checked by name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.config import Recipe, Shape, read_json, read_recipe, read_shape

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears that are split by output rows; the other two, o_proj and down_proj, by input columns."""


@dataclass(frozen=True)
class LinearWeights:
    """One rank's share of a linear.

    Attributes:
        weight: [out, in]; float8_e4m3fn codes, or the checkpoint's own dtype where it is not quantised.
        weight_scale: dequantisation scale of the codes; None where there are none.
        input_scale: dequantisation scale of the activations; None likewise.
        bias: [out] or None.
    """

    weight: Tensor
    weight_scale: float | None = None
    input_scale: float | None = None
    bias: Tensor | None = None


class Checkpoint:
    """An open checkpoint folder. Use it as a context manager.

    Attributes:
        folder: where it lies.
        shape: the model's sizes.
        recipe: its FP8 recipe, or None.

    Raises:
        UsageError: no folder, no safetensors, a broken file or configuration.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; give a checkpoint in Hugging Face's layout")
        self.folder = folder
        self.shape: Shape = read_shape(folder)
        self.recipe: Recipe | None = read_recipe(folder)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = self._index()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._files.clear()

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not (isinstance(places, dict) and places):
                raise UsageError(f"{index}: weight_map is {places!r}, expected tensors and their files; copy it again")
            return {str(name): str(file) for name, file in places.items()}
        names = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not names:
            raise UsageError(f"{self.folder}: holds no *.safetensors; pickled checkpoints are not read, convert it")
        name = "model.safetensors" if "model.safetensors" in names else names[0]
        if name != "model.safetensors" and len(names) > 1:
            raise UsageError(f"{self.folder}: {len(names)} safetensors files, but no model.safetensors.index.json")
        return dict.fromkeys(self._file(name).keys(), name)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = self._open.enter_context(safe_open(path, "pt"))
            except FileNotFoundError:
                raise UsageError(
                    f"{path}: no such file, though the index names it; copy the checkpoint again"
                ) from None
            except SafetensorError as error:
                raise UsageError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
        return self._files[name]

    def has(self, name: str) -> bool:
        """Say whether the checkpoint holds a tensor of this name."""
        return name in self._where

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._where)

    def whole(self, name: str) -> Tensor:
        """A tensor as it is, whatever its shape."""
        read: Tensor = self._slice(name)[:]
        return read

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise UsageError(f"{self.folder}: has no tensor {name}; the checkpoint does not fit its config.json")
        return self._file(self._where[name]).get_slice(name)

    def tensor(
        self, name: str, shape: tuple[int, ...], *, split: int | None = None, part: tuple[int, int] = (0, 1)
    ) -> Tensor:
        """Read a tensor, or one rank's slice of it.

        Args:
            name: its full name.
            shape: of the whole tensor, as the configuration implies it.
            split: the dimension that is cut, or None for the whole tensor.
            part: (rank, world size).

        Raises:
            UsageError: the tensor is missing or has another shape.
        """
        source = self._of_shape(name, shape)
        if split is None:
            whole: Tensor = source[:]
            return whole
        step = shape[split] // part[1]
        window = slice(part[0] * step, (part[0] + 1) * step)
        cut: Tensor = source[window] if split == 0 else source[:, window]
        return cut.contiguous()

    def scale(self, name: str) -> float:
        """Read a per-tensor scale.

        Raises:
            UsageError: it is missing, not a single float, zero, negative, NaN or infinite.
        """
        if name not in self._where:
            raise UsageError(
                f"{self.folder}: has no {name}; every quantised linear needs one, calibrate and export again"
            )
        value: Tensor = self._file(self._where[name]).get_tensor(name)
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            got = f"{value.dtype} {list(value.shape)}"
            raise UsageError(
                f"{name} is {got}, expected one float32, bfloat16 or float16 a tensor; scales a channel, a group or a "
                "token are not computed here"
            )
        scale = value.item()
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"{name} is {scale}, expected a positive finite number; calibrate and export again")
        return scale

    def linear(self, module: str, outputs: int, inputs: int, part: tuple[int, int] = (0, 1)) -> LinearWeights:
        """Read one rank's share of a linear of a checked checkpoint; `module` is its name without `.weight`.

        Raises:
            UsageError: a missing or misshapen tensor, or a broken scale.
        """
        column = module.rsplit(".", 1)[-1] in COLUMN
        weight = self.tensor(f"{module}.weight", (outputs, inputs), split=0 if column else 1, part=part)
        bias = None
        if column and self.has(f"{module}.bias"):
            bias = self.tensor(f"{module}.bias", (outputs,), split=0, part=part)
        if self.recipe is None or not self.recipe.covers(module):
            return LinearWeights(weight, bias=bias)
        return LinearWeights(weight, self.scale(f"{module}.weight_scale"), self.scale(f"{module}.input_scale"), bias)

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, outputs and inputs of every linear of the decoder."""
        s = self.shape
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        sizes = {
            "self_attn.q_proj": (queries, s.hidden),
            "self_attn.k_proj": (keys, s.hidden),
            "self_attn.v_proj": (keys, s.hidden),
            "self_attn.o_proj": (s.hidden, queries),
            "mlp.gate_proj": (s.intermediate, s.hidden),
            "mlp.up_proj": (s.intermediate, s.hidden),
            "mlp.down_proj": (s.hidden, s.intermediate),
        }
        for layer in range(s.layers):
            for name, (outputs, inputs) in sizes.items():
                yield f"model.layers.{layer}.{name}", outputs, inputs

    def _plain(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of every tensor but the linears'."""
        s = self.shape
        yield "model.embed_tokens.weight", (s.vocabulary, s.hidden)
        if not s.tied:
            yield "lm_head.weight", (s.vocabulary, s.hidden)
        yield "model.norm.weight", (s.hidden,)
        for layer in range(s.layers):
            yield f"model.layers.{layer}.input_layernorm.weight", (s.hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (s.hidden,)
            for name in ("q_norm", "k_norm") if s.head_norm else ():
                yield f"model.layers.{layer}.self_attn.{name}.weight", (s.head_dim,)

    def check(self) -> None:
        """Check names and shapes of all tensors, and the linears' dtypes and scales, without loading the weights.

        Raises:
            UsageError: the first defect, by name.
        """
        for module, outputs, inputs in self.linears():
            source = self._of_shape(f"{module}.weight", (outputs, inputs))
            self._check_bias(module)
            covered = self.recipe is not None and self.recipe.covers(module)
            if covered != (source.get_dtype() == "F8_E4M3"):
                expected = "E4M3 codes" if covered else "no FP8"
                raise UsageError(
                    f"{module}.weight is {source.get_dtype()}, but the configuration says {expected}; export it again"
                )
            if covered:
                self.scale(f"{module}.weight_scale")
                self.scale(f"{module}.input_scale")
        for name, shape in self._plain():
            self._of_shape(name, shape)

    def _of_shape(self, name: str, shape: tuple[int, ...]) -> Any:
        source = self._slice(name)
        if tuple(source.get_shape()) != shape:
            raise UsageError(
                f"{name} has shape {list(source.get_shape())}, config.json implies {list(shape)}; "
                "the two are not of one checkpoint"
            )
        return source

    def _check_bias(self, module: str) -> None:
        name, kind = f"{module}.bias", module.rsplit(".", 1)[-1]
        if self.has(name) and kind not in COLUMN:
            raise UsageError(f"{self.folder}: has {name}; a bias behind the sum over ranks is not computed here")
        if self.shape.query_bias and kind in ("q_proj", "k_proj", "v_proj") and not self.has(name):
            raise UsageError(f"{self.folder}: has no {name}, which config.json implies; copy the checkpoint again")

    def digest(self) -> str:
        """Return the SHA-256 of the configuration files and all tensors' files, in the order of their names."""
        names = sorted({*self._where.values(), "config.json", "hf_quant_config.json"})
        whole = hashlib.sha256()
        for path in (self.folder / name for name in names if (self.folder / name).is_file()):
            with path.open("rb") as file:
                part = hashlib.sha256()
                while block := file.read(1 << 20):
                    part.update(block)
            whole.update(f"{path.name}\0".encode() + part.digest())
        return whole.hexdigest()
