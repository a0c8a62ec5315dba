"""Read a checkpoint's tensors: safetensors only, sliced for one rank, with every scale checked by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.config import Shape, read_json, read_shape
from fusecheck.eval.recipe import Form, Recipe, read_recipe
from fusecheck.quantisers.group_fp8 import GROUP

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears that are split by output rows; the other two, o_proj and down_proj, by input columns."""


@dataclass(frozen=True)
class LinearWeights:
    """One rank's share of a linear.

    Attributes:
        weight: [out, in]; float8_e4m3fn codes, or the checkpoint's own dtype where it is not quantised.
        form: how it is quantised; None where it is not.
        weight_scale: dequantisation scales of the codes, float32, [1, 1], [out, 1], or [out / 128, in / 128] with the
            last of each side cut short; None where there are no codes.
        input_scale: dequantisation scale of the activations; None where they have scales of their own, or no codes.
        bias: [out] or None.
    """

    weight: Tensor
    form: Form | None = None
    weight_scale: Tensor | None = None
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

    def input_scale(self, module: str) -> float:
        """Read a linear's static scale of activations.

        Raises:
            UsageError: it is missing, not a single float, zero, negative, NaN or infinite.
        """
        return float(self._scales(f"{module}.input_scale", (1, 1)))

    def weight_scale(self, module: str, outputs: int, inputs: int) -> Tensor:
        """Read the scales of a whole linear's weight, float32, of the shape that the recipe's form gives them.

        Raises:
            UsageError: they are missing, of another shape, no floats, or not all positive and finite.
        """
        assert self.recipe is not None
        return self._scales(f"{module}.{self.recipe.weight_scale}", self.recipe.form.scale_shape(outputs, inputs))

    def _scales(self, name: str, shape: tuple[int, int]) -> Tensor:
        if name not in self._where:
            raise UsageError(
                f"{self.folder}: has no {name}; every quantised linear needs one, calibrate and export again"
            )
        value: Tensor = self._file(self._where[name]).get_tensor(name)
        # One a tensor is written as [] or [1], one a channel as [out] or [out, 1].
        alike = {shape, shape[:1]} | ({()} if shape == (1, 1) else set())
        if tuple(value.shape) not in alike or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            wanted = "one float32, bfloat16 or float16 a tensor" if shape == (1, 1) else f"float32 {list(shape)}"
            raise UsageError(
                f"{name} is {value.dtype} {list(value.shape)}, expected {wanted}, as the configuration says"
            )
        scales = value.float().reshape(shape)
        wrong = scales[~(scales.isfinite() & (scales > 0))]
        if len(wrong):
            raise UsageError(
                f"{name} is {wrong[0].item()}, expected a positive finite number; calibrate and export again"
            )
        return scales

    def form(self, module: str) -> Form | None:
        """How a linear is quantised; None where it is not."""
        return self.recipe.form if self.recipe is not None and self.recipe.covers(module) else None

    def linear(self, module: str, outputs: int, inputs: int, part: tuple[int, int] = (0, 1)) -> LinearWeights:
        """Read one rank's share of a linear of a checked checkpoint; `module` is its name without `.weight`.

        Raises:
            UsageError: a missing or misshapen tensor, or a broken scale.
        """
        column = module.rsplit(".", 1)[-1] in COLUMN
        split = 0 if column else 1
        weight = self.tensor(f"{module}.weight", (outputs, inputs), split=split, part=part)
        bias = None
        if column and self.has(f"{module}.bias"):
            bias = self.tensor(f"{module}.bias", (outputs,), split=0, part=part)
        form = self.form(module)
        if form is None:
            return LinearWeights(weight, bias=bias)
        scales = self.weight_scale(module, outputs, inputs)
        if part[1] > 1 and scales.shape[split] > 1:
            scales = scales.chunk(part[1], split)[part[0]].contiguous()
        return LinearWeights(weight, form, scales, self.input_scale(module) if form.static else None, bias)

    def require_divisible(self, world_size: int) -> None:
        """Refuse a tensor-parallel size that would cut a head, or a group or block that shares a scale.

        Raises:
            UsageError: what does not divide.
        """
        self.shape.require_divisible(world_size)
        if self.recipe is not None:
            self.require_form(self.recipe.form, world_size)

    def require_form(self, form: Form, world_size: int = 1) -> None:
        """Refuse a form whose groups or blocks do not divide a rank's share of the linears.

        Raises:
            UsageError: the first linear that they do not divide.
        """
        for module, outputs, inputs in self.linears() if form.weights == "block" else ():
            if self.recipe is not None and not self.recipe.covers(module):
                continue
            column = module.rsplit(".", 1)[-1] in COLUMN
            sides = {"inputs": (inputs, 1 if column else world_size)}
            if column and world_size > 1:  # a whole weight may end within a block
                sides["outputs"] = outputs, world_size
            for side, (size, ranks) in sides.items():
                if size // ranks % GROUP:
                    remedy = "a smaller --tp" if size % GROUP == 0 else "another form of the checkpoint"
                    raise UsageError(
                        f"{module}: {size // ranks} {side} on each of {ranks} ranks, expected a multiple of the "
                        f"{GROUP} that share a scale; use {remedy}"
                    )

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
            form = self.form(module)
            if (form is not None) != (source.get_dtype() == "F8_E4M3"):
                expected = "E4M3 codes" if form is not None else "no FP8"
                raise UsageError(
                    f"{module}.weight is {source.get_dtype()}, but the configuration says {expected}; export it again"
                )
            if form is not None:
                self.weight_scale(module, outputs, inputs)
            if form is not None and form.static:
                self.input_scale(module)
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
