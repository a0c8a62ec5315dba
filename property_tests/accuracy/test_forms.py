"""The FP8 forms of published checkpoints: written, read, run in every arm, and told from a planted bug in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusecheck.backends import backend
from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, ORACLE, UNFUSED
from fusecheck.eval.asked import Asked
from fusecheck.eval.calibrate import quantise_checkpoint
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.llama import Llama
from fusecheck.eval.paths import OraclePath
from fusecheck.eval.planted_arms import to_markdown
from fusecheck.eval.planted_forms import BUGS
from fusecheck.eval.quantise_weights import quantise_weight
from fusecheck.eval.recipe import FORMS, Form, read_recipe
from fusecheck.eval.run import open_job
from fusecheck.eval.trace_rank import Deviation
from fusecheck.eval.virtual import InParts
from fusecheck.eval.worker import EvalRank
from fusecheck.interface import Operation, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.accuracy.console import call
from fusecheck.property_tests.accuracy.tiny_models import (
    CONFIG,
    GOLDEN,
    SoloRank,
    hugging_face_model,
    write_checkpoint,
)

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 32}
"""Sizes that 128 divides, but for the 128 keys: one block."""
NEW = [name for name, form in FORMS.items() if not form.static]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def spread(tensors: dict[str, Tensor]) -> None:
        """Rows and blocks of very different sizes, so that a scale in the wrong place shows."""
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                weight[::2] *= 2
                weight[1::2] /= 2
                weight[:, 128:] /= 4

    return write_checkpoint(tmp_path_factory.mktemp("plain"), layout="plain", change=spread, **SIZES)


@pytest.fixture(scope="module")
def folders(plain: Path) -> dict[str, Path]:
    made = {name: plain.parent / f"{plain.name}-{name}" for name in NEW}
    for name, folder in made.items():
        assert quantise_checkpoint(plain, folder, FORMS[name]) == 14
    return made


def expanded(scale: Tensor, weight: Tensor) -> Tensor:
    """One scale beside each weight: columns of one are repeated, blocks of 128 spread."""
    if scale.shape[1] == 1 and scale.shape[0] == weight.shape[0]:
        return scale.expand_as(weight)
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]


def dequantised(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    scales = {name.rsplit(".", 1)[0]: t for name, t in tensors.items() if "weight_scale" in name}
    found = {name: t.float() for name, t in tensors.items() if "weight_scale" not in name}
    for stem, scale in scales.items():
        found[f"{stem}.weight"] *= expanded(scale.float(), found[f"{stem}.weight"])
    return found


@pytest.mark.parametrize("name", NEW)
def test_a_form_is_read_as_hugging_faces_model_of_what_its_codes_stand_for(name: str, folders: dict[str, Path]) -> None:
    with Checkpoint(folders[name]) as checkpoint:
        checkpoint.check()
        assert checkpoint.recipe is not None
        assert checkpoint.recipe.form == FORMS[name]
        model = Llama(checkpoint, SoloRank())
    theirs = hugging_face_model({**CONFIG, **SIZES}, dequantised(folders[name]))
    ids = torch.randint(0, 2000, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    got = model.logits(model.forward(OraclePath(SoloRank()), ids, torch.zeros(2, dtype=torch.int64)))
    assert expected.abs().max() > 1
    assert float((got - expected).abs().max()) < 1e-3


@pytest.mark.parametrize("name", NEW)
def test_weights_are_within_half_a_step_and_every_block_uses_the_whole_range(
    name: str, plain: Path, folders: dict[str, Path]
) -> None:
    wanted, got = load_file(plain / "model.safetensors"), dequantised(folders[name])
    stored = load_file(folders[name] / "model.safetensors")
    stem = "model.layers.0.mlp.down_proj"
    weight, back = wanted[f"{stem}.weight"].float(), got[f"{stem}.weight"]
    scales = stored[f"{stem}.{'weight_scale' if name == 'dynamic' else 'weight_scale_inv'}"]
    assert tuple(scales.shape) == ((256, 1) if name == "dynamic" else (2, 3))
    # Half a step of three mantissa bits, or of the subnormals.
    assert bool(((weight - back).abs() <= torch.maximum(weight.abs() / 16, expanded(scales, weight) * 2.0**-10)).all())
    tallest = (weight / expanded(scales, weight)).abs()
    low, high = (224, 448) if name == "group-ue8m0" else (448, 448)
    peaks = tallest.amax(1) if name == "dynamic" else tallest.view(2, 128, 3, 128).amax((1, 3))
    assert bool(((low * (1 - 1e-6) <= peaks) & (peaks <= high * (1 + 1e-6))).all())
    if name == "group-ue8m0":
        assert bool((torch.frexp(scales)[0] == 0.5).all())


def test_a_zero_channel_has_a_scale_and_a_ragged_block_is_whole() -> None:
    weight = torch.randn(200, 130, generator=torch.Generator().manual_seed(2))
    weight[3] = 0
    codes, scales = quantise_weight(weight, FORMS["dynamic"])
    assert float(scales[3]) == 1
    assert not bool(codes[3].float().any())
    codes, scales = quantise_weight(weight, FORMS["group"])
    assert (codes.shape, scales.shape) == (weight.shape, (2, 2))
    assert float(scales[1, 1]) == float(weight[128:, 128:].abs().max() / 448)


SCHEME = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(weights: dict[str, Any], activations: dict[str, Any]) -> dict[str, Any]:
    group = {"weights": {**SCHEME, **weights}, "input_activations": {**SCHEME, **activations}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
TOKEN = {"strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("recipe", "form"),
    [
        (compressed({"strategy": "channel", "dynamic": False}, TOKEN), FORMS["dynamic"]),
        (compressed({"strategy": "tensor"}, TOKEN), Form("dynamic-fp8")),
        (
            compressed(
                {"strategy": "block", "block_structure": [128, 128]},
                {"strategy": "group", "group_size": 128, "dynamic": True},
            ),
            FORMS["group"],
        ),
        (BLOCKS, FORMS["group"]),
        ({**BLOCKS, "scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}, FORMS["group-ue8m0"]),
    ],
)
def test_the_configurations_of_published_checkpoints_are_read(
    recipe: dict[str, Any], form: Form, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": recipe}), encoding="utf-8")
    read = read_recipe(tmp_path)
    assert read is not None
    assert read.form == form
    assert read.weight_scale == ("weight_scale_inv" if recipe["quant_method"] == "fp8" else "weight_scale")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({**BLOCKS, "weight_block_size": [64, 128]}, "weight_block_size [64, 128]; expected 'static' and none, or"),
        ({**BLOCKS, "weight_block_size": None}, "activation_scheme 'dynamic' and weight_block_size None; expected"),
        ({**BLOCKS, "activation_scheme": "static"}, "expected 'static' and none, or 'dynamic' and"),
        ({**BLOCKS, "scale_fmt": "e5m3"}, "scale_fmt 'e5m3'; expected 'e4m3', and none or 'ue8m0'"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt 'e5m2' and scale_fmt None; expected"),
        (compressed({"strategy": "channel"}, {"strategy": "token"}), "input_activations are num_bits 8, type float"),
        (compressed({"strategy": "group"}, TOKEN), "weights are num_bits 8, type float, strategy group"),
        (compressed({"strategy": "channel"}, {"strategy": "tensor"}), "strategy channel"),
        (compressed({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": True}), "dynamic True"),
        (compressed({"strategy": "tensor", "num_bits": 4}, {"strategy": "tensor"}), "num_bits 4"),
        (
            compressed(
                {"strategy": "block", "block_structure": [64, 64]},
                {"strategy": "group", "group_size": 64, "dynamic": True},
            ),
            "block_structure and group_size are ([64, 64], 64), expected [128, 128] and 128",
        ),
    ],
)
def test_a_form_that_is_not_computed_is_refused_by_name(recipe: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": recipe}), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_recipe(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _dropped(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _transposed(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].t().contiguous()


def _negative(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][-1, -1] = -1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_dropped, "has no model.layers.1.mlp.up_proj.weight_scale_inv"),
        (_transposed, "weight_scale_inv is torch.float32 [2, 3], expected float32 [3, 2]"),
        (_negative, "weight_scale_inv is -1.0, expected a positive finite number"),
    ],
)
def test_broken_scales_of_blocks_are_named(
    change: Callable[[dict[str, Tensor], str], None], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(folders["group"] / "model.safetensors")
    change(tensors, "model.layers.1.mlp.up_proj.weight_scale_inv")
    (tmp_path / "config.json").write_bytes((folders["group"] / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(UsageError) as caught:
        checkpoint.check()
    assert said in str(caught.value)


def test_sizes_that_128_does_not_divide_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    narrow = write_checkpoint(tmp_path / "narrow", layout="plain")
    with pytest.raises(
        UsageError, match=r"layers\.0\.self_attn\.q_proj: 64 inputs on each of 1 ranks, .* the 128 that"
    ):
        quantise_checkpoint(narrow, tmp_path / "out", FORMS["group"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"k_proj: 64 outputs on each of 2 ranks, .* use a smaller --tp"):
        open_job(Asked(folders["group"], 2, "emulated"))


def test_a_kernel_whose_scales_are_of_another_kind_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        UsageError, match="unfused rounds scales of group-fp8 to powers of two, the checkpoint does not"
    ):
        open_job(Asked(folders["group"], 1, "unfused"))
    assert open_job(Asked(folders["group"], 1, "unfused:vllm")).backend_of(UNFUSED) == "unfused:vllm"


def test_a_bug_that_cannot_show_in_a_form_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="the bug needs static-fp8, not dynamic-fp8: nothing would change"):
        open_job(Asked(folders["dynamic"], 1, "fusecheck.eval.spoiled:scale_times_2__emulated"))


@pytest.mark.parametrize("arguments", [("--form", "int8"), ("--form", "group", "--prompts", "x.txt")])
def test_wrong_options_of_calibrate_are_said_in_one_line(arguments: tuple[str, ...], plain: Path) -> None:
    result = call(["calibrate", plain, plain / "out", *arguments])
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith(
        ("--form int8: expected one of: static, dynamic", "--prompts: --form group")
    )


def answers(rank: EvalRank, arm: str, name: str) -> np.ndarray[Any, Any]:
    ids = np.random.default_rng(0).integers(3, 2000, (8, 40))
    rank.open_arm(arm, name, 4096)
    scored = rank.score_last(ids, np.full(8, 40), ids[:, :1])
    assert scored is not None
    assert rank.close_arm()["calls"] == (0 if arm == ORACLE else 4)
    return scored[0].astype(np.float64)


@pytest.mark.parametrize(
    ("name", "bug", "stage", "sites"),
    [
        ("dynamic", "token_neighbour", "scale", [0, 1, 2]),
        ("group", "group_shifted", "scale", [0, 1, 2]),
        ("group-ue8m0", "group_shifted", "scale", [0, 1, 2]),
        ("group-ue8m0", "powers_late", "code", [0, 1, 2]),
    ],
)
def test_the_fused_arm_is_as_far_from_the_oracle_as_the_unfused_one_and_a_bug_is_farther(
    name: str, bug: str, stage: str, sites: list[int], folders: dict[str, Path]
) -> None:
    rank = EvalRank(SoloRank(), str(folders[name]))
    oracle = answers(rank, ORACLE, "")

    def divergence(arm: str, made: str) -> float:
        other = answers(rank, arm, made)
        return float((np.exp(oracle) * (oracle - other)).sum(-1).mean())

    unfused, fused = divergence(UNFUSED, "unfused:vllm"), divergence(FUSED, "emulated")
    assert 1e-6 < unfused < 0.2
    assert fused < 1.25 * unfused
    assert divergence(FUSED, f"fusecheck.eval.spoiled:{bug}__emulated") > 1.25 * unfused
    assert traced(rank, "fusecheck.eval.spoiled:nothing__emulated") == traced(rank, "unfused:vllm") == {}
    assert traced(rank, f"fusecheck.eval.spoiled:{bug}__emulated") == dict.fromkeys(sites, stage)


def traced(rank: EvalRank, name: str) -> dict[int, str]:
    rank.open_arm(FUSED, name, 128)
    ids = np.random.default_rng(0).integers(3, 2000, (2, 40))
    sites, found = rank.trace(ids, np.array([40, 25]))
    rank.close_arm()
    assert sites == 4
    return {deviation.site: deviation.stage for deviation in (Deviation(**record) for record in found)}


@pytest.mark.parametrize("op", ["DYNAMIC_FP8", "GROUP_FP8", "GROUP_FP8_PACKED"])
def test_a_call_in_parts_stores_its_scales_as_the_whole_call_does(op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 640, generator=generator).to(torch.bfloat16) for _ in range(2))
    given = RankInputs(x, y, x[0], torch.ones(1), 1e-5, 0.0)
    kernel = backend("unfused:vllm").open(SoloRank(), None)  # type: ignore[arg-type]

    def run(rows: int) -> RankOutputs:
        named = Operation.named(f"RESIDUAL_RMS_NORM_QUANT_{op}")
        return InParts(kernel, rows).run(given, op=named, strategy=Strategy.AUTO)

    whole, parts = run(7), run(3)
    assert whole.scale is not None
    assert parts.scale is not None
    assert parts.scale.stride() == whole.scale.stride()
    assert torch.equal(whole.scale, parts.scale)
    assert replace(whole, scale=None, residual=None).quant is not None


def test_the_recorded_table_names_every_bug_by_site_and_stage_and_no_right_kernel() -> None:
    rows = json.loads((GOLDEN / "forms.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["form"], row["bug"]) for row in rows] == [(form, bug) for form, bugs in BUGS.items() for bug in bugs]
    for row in rows:
        assert (row["first"] is None) == row["right"] == (row["verdict"] != "fail"), row
        assert row["right"] or row["first"][1] == ("code" if row["bug"] == "powers_late" else "scale")
    assert to_markdown(rows) in (GOLDEN / "README.md").read_text(encoding="utf-8")
