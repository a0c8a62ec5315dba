"""Broken checkpoints are refused in one line that names the tensor, field or file at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.asked import Asked
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.config import read_shape
from fusecheck.eval.run import open_job
from fusecheck.eval.tokens import Tokens
from fusecheck.property_tests.accuracy.tiny_models import GOLDEN, write_checkpoint

SCALE = "model.layers.1.mlp.down_proj.input_scale"
WEIGHT = "model.layers.0.self_attn.k_proj.weight"


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value

    return change


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(SCALE), f"has no {SCALE}"),
        (put(SCALE, torch.tensor(0.0)), f"{SCALE} is 0.0"),
        (put(SCALE, torch.tensor(-0.5)), f"{SCALE} is -0.5"),
        (put(SCALE, torch.tensor(torch.nan)), f"{SCALE} is nan"),
        (put(SCALE, torch.tensor(torch.inf)), f"{SCALE} is inf"),
        (put(SCALE, torch.ones(64)), f"{SCALE} is torch.float32 [64]"),
        (put(SCALE, torch.tensor(1)), f"{SCALE} is torch.int64 []"),
        (put(SCALE.replace("input", "weight"), torch.tensor(0.0)), "weight_scale is 0.0"),
        (drop(WEIGHT), f"has no tensor {WEIGHT}"),
        (put(WEIGHT, torch.zeros(32, 64).to(torch.float8_e4m3fn)), f"{WEIGHT} has shape [32, 64]"),
        (put(WEIGHT, torch.zeros(64, 64, dtype=torch.bfloat16)), f"{WEIGHT} is BF16, but the configuration says E4M3"),
        (drop("model.norm.weight"), "has no tensor model.norm.weight"),
        (put("model.embed_tokens.weight", torch.zeros(3, 64)), "model.embed_tokens.weight has shape [3, 64]"),
        (put("model.layers.0.mlp.down_proj.bias", torch.zeros(64)), "a bias behind the sum over ranks"),
    ],
)
def test_a_broken_scale_or_weight_is_named(
    change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, change=change)
    with Checkpoint(folder) as checkpoint, pytest.raises(UsageError) as caught:
        checkpoint.check()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bias_that_the_configuration_implies_must_be_there(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.bias"
    folder = write_checkpoint(tmp_path, model_type="qwen2", change=drop(name))
    with Checkpoint(folder) as checkpoint, pytest.raises(UsageError, match=f"has no {name}"):
        checkpoint.check()


def test_ranks_read_slices_that_join_to_the_whole(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, model_type="qwen2")
    whole = load_file(folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        for module, outputs, inputs in checkpoint.linears():
            parts = [checkpoint.linear(module, outputs, inputs, (rank, 4)) for rank in range(4)]
            row_parallel = module.endswith(("o_proj", "down_proj"))
            joined = torch.cat([p.weight.view(torch.uint8) for p in parts], 1 if row_parallel else 0)
            assert torch.equal(joined, whole[f"{module}.weight"].view(torch.uint8))
            if f"{module}.bias" in whole:
                biases = [p.bias for p in parts if p.bias is not None]
                assert torch.equal(torch.cat(biases), whole[f"{module}.bias"])


def test_several_files_and_an_index_read_as_one(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one")
    many = write_checkpoint(tmp_path / "many")
    tensors = load_file(many / "model.safetensors")
    (many / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for k in range(2):
        part = {n: tensors[n] for n in names[k::2]}
        save_file(part, many / f"part-{k}.safetensors")
        index.update(dict.fromkeys(part, f"part-{k}.safetensors"))
    (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    with Checkpoint(one) as a, Checkpoint(many) as b:
        b.check()
        for module, outputs, inputs in a.linears():
            left, right = a.linear(module, outputs, inputs), b.linear(module, outputs, inputs)
            assert torch.equal(left.weight.view(torch.uint8), right.weight.view(torch.uint8))
            assert (left.weight_scale, left.input_scale) == (right.weight_scale, right.input_scale)


def test_the_digest_changes_with_one_bit_of_one_tensor(tmp_path: Path) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT].view(torch.uint8)[3, 5] ^= 1

    digests = []
    for name, change in (("a", None), ("b", None), ("c", flip)):
        with Checkpoint(write_checkpoint(tmp_path / name, change=change)) as checkpoint:
            digests.append(checkpoint.digest())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"not a whole safetensors file"):
        Checkpoint(tmp_path)


def test_pickled_checkpoints_are_not_read(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \*\.safetensors; pickled checkpoints are not read"):
        Checkpoint(tmp_path)


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"sliding_window": "x"}, "sliding_window is 'x'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "type 'longrope' is not computed here"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "judge its runs with `fusecheck accuracy compare`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "has original_max_position_embeddings None"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is ['</s>']"),
        ({"rope_scaling": 7}, "rope_scaling is 7"),
        ({"rms_norm_eps": "small"}, "a field is of the wrong type"),
    ],
)
def test_a_feature_that_the_model_does_not_compute_is_refused(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        read_shape(write_checkpoint(tmp_path, **fields))
    assert said in str(caught.value)


def test_every_end_of_generation_config_ends_a_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, eos_token_id=5)
    assert read_shape(folder).end_ids == (5,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5, 9]}', encoding="utf-8")
    assert read_shape(folder).end_ids == (5, 7, 9)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("hf_quant_config.json", {"quantization": [1]}, "quantization is a JSON list"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "exclude_modules": [1]}}, "exclude_modules is"),
        ("model.safetensors.index.json", {"weight_map": ["a"]}, "weight_map is ['a']"),
        ("model.safetensors.index.json", {}, "weight_map is None"),
    ],
)
def test_a_file_of_another_form_is_refused(name: str, content: object, said: str, tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        Checkpoint(tmp_path)
    assert f"{name}: {said}" in str(caught.value)


def test_excluded_modules_keep_their_own_dtype(tmp_path: Path) -> None:
    stem = WEIGHT.removesuffix(".weight")

    def unquantise(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT] = tensors[WEIGHT].to(torch.bfloat16)
        del tensors[f"{stem}.weight_scale"], tensors[f"{stem}.input_scale"]

    folder = write_checkpoint(tmp_path, change=unquantise)
    path = folder / "hf_quant_config.json"
    text = path.read_text(encoding="utf-8").replace('"lm_head"', '"lm_head", "model.layers.0.self_attn.k*"')
    path.write_text(text, encoding="utf-8")
    with Checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.linear(stem, 64, 64).weight_scale is None


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, vocab_size=1024)
    with pytest.raises(UsageError, match="belongs to another model"):
        Tokens(folder, read_shape(folder))


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe"])
def test_a_missing_or_broken_tokenizer_is_said(content: bytes | None, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.json: "):
        Tokens(folder, read_shape(folder))


def test_a_tensor_parallel_size_that_cuts_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--tp 8 does not divide kv_heads=4; use one of \[1, 2, 4\]"):
        open_job(Asked(write_checkpoint(tmp_path), 8, "emulated"))


def test_an_unknown_backend_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend 'emulatd'"):
        open_job(Asked(write_checkpoint(tmp_path), 2, "emulatd"))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_golden_model_is_whole_and_divides_by_every_size(tp: int) -> None:
    job = open_job(Asked(GOLDEN, tp, "emulated"))
    size = (GOLDEN / "model.safetensors").stat().st_size
    assert size <= 16 << 20
    assert job.shape.vocabulary == 2048
