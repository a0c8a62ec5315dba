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

from eval.config import Recipe, Shape, read_json, read_recipe, read_shape
from verify.errors import UsageError

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
            return {str(k): str(v) for k, v in (read_json(index).get("weight_map") or {}).items()}
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
        source = self._slice(name)
        if tuple(source.get_shape()) != shape:
            raise UsageError(f"{name} has shape {list(source.get_shape())}, config.json implies {list(shape)}")
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
            UsageError: it is missing, not a single float32, zero, negative, NaN or infinite.
        """
        if name not in self._where:
            raise UsageError(
                f"{self.folder}: has no {name}; every quantised linear needs one, calibrate and export again"
            )
        value: Tensor = self._file(self._where[name]).get_tensor(name)
        if value.numel() != 1 or value.dtype != torch.float32:
            got = f"{value.dtype} {list(value.shape)}"
            raise UsageError(f"{name} is {got}, expected one float32 per tensor; per-channel scales are not supported")
        scale = value.item()
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"{name} is {scale}, expected a positive finite number; calibrate and export again")
        return scale

    def linear(self, module: str, outputs: int, inputs: int, part: tuple[int, int] = (0, 1)) -> LinearWeights:
        """Read one rank's share of a linear; `module` is its name without `.weight`.

        Raises:
            UsageError: a missing or misshapen tensor, a broken scale, or weights that are not E4M3 codes.
        """
        column = module.rsplit(".", 1)[-1] in COLUMN
        weight = self.tensor(f"{module}.weight", (outputs, inputs), split=0 if column else 1, part=part)
        bias = None
        if column and self.has(f"{module}.bias"):
            bias = self.tensor(f"{module}.bias", (outputs,), split=0, part=part)
        if self.recipe is None or not self.recipe.covers(module):
            if not weight.dtype.is_floating_point or weight.dtype == torch.float8_e4m3fn:
                raise UsageError(f"{module}.weight is {weight.dtype}, but the configuration excludes it from FP8")
            return LinearWeights(weight, bias=bias)
        if weight.dtype != torch.float8_e4m3fn:
            raise UsageError(f"{module}.weight is {weight.dtype}, expected float8_e4m3fn by the configuration")
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

    def check(self) -> None:
        """Check names, shapes and scales of all linears, without loading the weights.

        Raises:
            UsageError: the first defect, by name.
        """
        for module, outputs, inputs in self.linears():
            source = self._slice(f"{module}.weight")
            if tuple(source.get_shape()) != (outputs, inputs):
                got = list(source.get_shape())
                raise UsageError(f"{module}.weight has shape {got}, config.json implies {[outputs, inputs]}")
            if self.recipe is not None and self.recipe.covers(module):
                self.scale(f"{module}.weight_scale")
                self.scale(f"{module}.input_scale")

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
