"""How a checkpoint's FP8 linears are quantised: what its configuration files say, and the forms that are computed."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fusecheck.errors import UsageError
from fusecheck.eval.config import read_json
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantisers.group_fp8 import GROUP

BLOCK = (GROUP, GROUP)
"""Outputs and inputs of a weight that share a scale, where `weight_block_size` is given."""


@dataclass(frozen=True)
class Form:
    """One way to quantise linears, in E4M3.

    Attributes:
        activations: the quantiser of what a linear reads, by its name in `fusecheck.quantisers.known`.
        weights: what shares a scale of the weight: the whole `tensor`, a `channel` (an output), or a `block`.
        powers: the scales are powers of two.
    """

    activations: str = GIVEN_SCALE
    weights: Literal["tensor", "channel", "block"] = "tensor"
    powers: bool = False

    @property
    def static(self) -> bool:
        """Whether the activations' scale lies in the checkpoint."""
        return self.activations == GIVEN_SCALE

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of a weight's scales, where the weight is [outputs, inputs]."""
        if self.weights == "block":
            return -(-outputs // BLOCK[0]), -(-inputs // BLOCK[1])
        return (outputs if self.weights == "channel" else 1), 1


FORMS = {
    "static": Form(),
    "dynamic": Form("dynamic-fp8", "channel"),
    "group": Form("group-fp8", "block"),
    "group-ue8m0": Form("group-fp8-packed", "block", powers=True),
}
"""The forms that `fusecheck accuracy calibrate` writes."""


@dataclass(frozen=True)
class Recipe:
    """How the linears are quantised.

    Attributes:
        producer: whose configuration it is.
        excluded: name patterns of the linears that are not quantised.
        form: of those that are.
        weight_scale: what the tensor of a weight's scales is called, behind the linear's name.
    """

    producer: str
    excluded: tuple[str, ...]
    form: Form = field(default_factory=Form)
    weight_scale: str = "weight_scale"

    def covers(self, module: str) -> bool:
        """Say whether the linear of this name (without `.weight`) holds E4M3 codes."""
        return not any(_matches(module, pattern) for pattern in self.excluded)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        # compressed-tensors' regular expressions; the forms in use are prefixes, suffixes and wildcards.
        pattern = pattern[3:].replace(".*", "*").replace("\\.", ".").strip("^$")
    return fnmatch.fnmatchcase(module, pattern) or module.startswith(pattern + ".") or module.endswith("." + pattern)


def read_recipe(folder: Path) -> Recipe | None:
    """Read the FP8 recipe of a ModelOpt, compressed-tensors or `fp8` checkpoint; None for one that is not quantised.

    Raises:
        UsageError: a recipe other than the forms that are computed.
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
    """AutoFP8's form with static scales, and DeepSeek's with a scale for each block of a weight."""
    scheme, block = recipe.get("activation_scheme"), recipe.get("weight_block_size")
    excluded = _names(path, recipe, "ignored_layers") or _names(path, recipe, "modules_to_not_convert")
    if scheme == "static" and block is None:
        return Recipe("fp8", excluded)
    if scheme != "dynamic" or block != list(BLOCK):
        raise UsageError(
            f"{path}: quant_method fp8 with activation_scheme {scheme!r} and weight_block_size {block!r}; "
            f"expected 'static' and none, or 'dynamic' and {list(BLOCK)}"
        )
    if recipe.get("fmt", "e4m3") != "e4m3" or recipe.get("scale_fmt") not in (None, "ue8m0"):
        told = f"fmt {recipe.get('fmt')!r} and scale_fmt {recipe.get('scale_fmt')!r}"
        raise UsageError(f"{path}: quant_method fp8 with {told}; expected 'e4m3', and none or 'ue8m0'")
    form = FORMS["group-ue8m0" if recipe.get("scale_fmt") else "group"]
    return Recipe("fp8", excluded, form, "weight_scale_inv")


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


_SCHEMES: dict[tuple[str, str], Form] = {
    ("tensor", "tensor"): FORMS["static"],
    ("tensor", "token"): Form("dynamic-fp8", "tensor"),
    ("channel", "token"): FORMS["dynamic"],
    ("block", "group"): FORMS["group"],
}
"""compressed-tensors' strategies of weights and of activations that are computed."""


def _compressed(path: Path, recipe: dict[str, Any]) -> Recipe:
    groups = list(_object(path, "config_groups", recipe.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise UsageError(f"{path}: {len(groups)} config_groups, expected one for all linears")
    weights, activations = (
        _object(path, side, _object(path, "config_groups", groups[0]).get(side) or {})
        for side in ("weights", "input_activations")
    )
    form = _SCHEMES.get((str(weights.get("strategy")), str(activations.get("strategy"))))
    for side, scheme, dynamic in (
        ("weights", weights, False),
        ("input_activations", activations, form is not None and not form.static),
    ):
        got = {k: scheme.get(k) for k in ("num_bits", "type", "strategy")} | {"dynamic": bool(scheme.get("dynamic"))}
        if form is None or got != {"num_bits": 8, "type": "float", "strategy": got["strategy"], "dynamic": dynamic}:
            told = ", ".join(f"{k} {v}" for k, v in got.items())
            raise UsageError(
                f"{path}: {side} are {told}; expected 8-bit float, and strategies tensor/tensor, tensor/token, "
                "channel/token or block/group for weights/input_activations, dynamic for the last three"
            )
    sizes = weights.get("block_structure"), activations.get("group_size")
    if form is not None and form.weights == "block" and sizes != (list(BLOCK), GROUP):
        raise UsageError(f"{path}: block_structure and group_size are {sizes}, expected {list(BLOCK)} and {GROUP}")
    assert form is not None
    return Recipe("compressed-tensors", _names(path, recipe, "ignore"), form)
