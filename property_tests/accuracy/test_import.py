"""A GGUF file becomes the checkpoint that it was made of, and a bf16 checkpoint an FP8 one; the rest is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.calibrate import calibrate, read_prompts
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.config import read_shape
from fusecheck.eval.data import read_rows
from fusecheck.eval.gguf_import import INNER, OUTER, import_gguf
from fusecheck.eval.tokens import Tokens
from fusecheck.property_tests.accuracy.tiny_models import CONFIG, hugging_face_model, write_checkpoint
from fusecheck.property_tests.suite.command_line import refused

gguf = pytest.importorskip("gguf", reason="reading GGUF needs pip install fusecheck[eval]")

Edit = Callable[[Any], None]
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""What the byte-level alphabet shows as it is; other bytes are shifted."""


def alphabet() -> list[str]:
    shifted = [b for b in range(256) if b not in BYTES]
    return [chr(b) if b in BYTES else chr(256 + shifted.index(b)) for b in range(256)]


VOCABULARY = [*alphabet(), "He", "ll", "Hell", "<|im_end|>", "</s>"]
MERGES = ["H e", "l l", "He ll"]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The order of rows in which llama.cpp's converter writes q and k of the Llama family."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path, *, pack: str = "F32", edit: Edit | None = None, **fields: Any) -> Path:
    """Write a checkpoint folder's tensors as llama.cpp's converter would, its vocabulary replaced by a small one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, fields.pop("architecture", family))
    for name, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        **fields,
    }.items():
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{family}.rope.freq_base", config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (len(VOCABULARY) - 2) + [3, 1])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(VOCABULARY.index("<|im_end|>"))
    back = {there: here for here, there in OUTER.items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float()
        if name in back:
            target = back[name]
        else:
            _, _, layer, *middle, kind = name.split(".")
            short = next(here for here, there in INNER.items() if there == ".".join(middle))
            target = f"blk.{layer}.{short}.{kind}"
            if family == "llama" and short in ("attn_q", "attn_k"):
                key = "num_attention_heads" if short == "attn_q" else "num_key_value_heads"
                values = interleaved(values, config[key])
        kind = gguf.GGMLQuantizationType[pack if values.dim() == 2 else "F32"]
        writer.add_tensor(target, gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}, {"model_type": "qwen3"}])
def test_a_gguf_file_becomes_the_checkpoint_that_it_was_made_of(family: dict[str, Any], tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", layout="plain", **family)
    import_gguf(write_gguf(tmp_path / "model.gguf", made), tmp_path / "out")
    whole, read = load_file(made / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert whole.keys() == read.keys()
    assert all(torch.equal(whole[name], read[name]) for name in whole)
    with Checkpoint(tmp_path / "out") as checkpoint, Checkpoint(made) as original:
        checkpoint.check()
        mine, theirs = checkpoint.shape, original.shape
    assert (mine.family, mine.eps, mine.theta, mine.tied) == (theirs.family, theirs.eps, theirs.theta, theirs.tied)
    # "</s>" is an ordinary token here, and ends nothing.
    assert mine.end_ids == (VOCABULARY.index("<|im_end|>"),)


@pytest.mark.parametrize("pack", ["Q8_0", "Q5_0", "F16", "BF16"])
def test_a_quantised_weight_is_what_its_own_library_makes_of_it(pack: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", layout="plain", model_type="qwen2")
    import_gguf(write_gguf(tmp_path / "model.gguf", made, pack=pack), tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    kind = gguf.GGMLQuantizationType[pack]
    packed = gguf.quants.quantize(load_file(made / "model.safetensors")[name].float().numpy(), kind)
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind), np.float32)).to(torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], expected)


def test_the_tokenizer_merges_bytes_and_knows_its_marks(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", layout="plain")
    import_gguf(write_gguf(tmp_path / "model.gguf", made), tmp_path / "out")
    tokens = Tokens(tmp_path / "out", read_shape(tmp_path / "out"))
    ids = tokens.encode("Hello é<|im_end|>")
    assert [VOCABULARY[i] for i in ids[:2]] == ["Hell", "o"]
    assert ids[-1] == VOCABULARY.index("<|im_end|>")
    assert tokens.decode(ids) == "Hello é"


def _adding(name: str, tensor: Any) -> dict[str, Any]:
    return {"edit": lambda writer: writer.add_tensor(name, tensor.astype(np.float32))}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "gemma3"}, "architecture 'gemma3', expected one of: llama, qwen2, qwen3"),
        ({"expert_count": 8}, "has 8 experts"),
        ({"rope.dimension_count": 8}, "rope turns 8 of 16 elements"),
        (
            _adding("blk.0.ffn_gate_exps.weight", np.zeros((4, 32))),
            "tensor blk.0.ffn_gate_exps.weight is not part of a dense llama",
        ),
        (_adding("rope_freqs.weight", np.linspace(1, 3, 8)), "rope_freqs.weight are not Llama 3.1's factors"),
        ({"edit": lambda w: w.add_string("tokenizer.ggml.pre", "odd")}, "tokenizer gpt2/odd"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", layout="plain")
    path = write_gguf(tmp_path / "model.gguf", made, **options)
    with pytest.raises(UsageError) as caught:
        import_gguf(path, tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_cut_file_an_unknown_quantisation_and_a_missing_tokenizer_are_said(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", layout="plain")
    path = write_gguf(tmp_path / "model.gguf", made)
    whole = path.read_bytes()
    with pytest.raises(UsageError, match=r"--tokenizer .*: no such file"):
        import_gguf(path, tmp_path / "a", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match=r"config.json: not a tokenizer"):
        import_gguf(path, tmp_path / "a", tokenizer=made / "config.json")
    assert not (tmp_path / "a" / "tokenizer.json").exists()
    with pytest.raises(UsageError, match=r"model.gguf: cannot be written"):
        import_gguf(path, path)
    path.write_bytes(whole.replace(b"<|im_end|>", b"<|im\xff\xff\xff\xff|>"))
    with pytest.raises(UsageError, match=r"tokenizer.ggml.tokens is no text"):
        import_gguf(path, tmp_path / "a")
    path.write_bytes(whole[:-5000])
    with pytest.raises(UsageError, match="not a whole GGUF file"):
        import_gguf(path, tmp_path / "b")
    # The kind follows the name and the four sizes of a tensor's entry.
    name = b"blk.1.ffn_up.weight"
    place = whole.index(name) + len(name) + 4 + 16
    path.write_bytes(whole[:place] + (99).to_bytes(4, "little") + whole[place + 4 :])
    with pytest.raises(UsageError, match=r"a quantisation that gguf does not know .*99"):
        import_gguf(path, tmp_path / "c")
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(UsageError, match="not a whole GGUF file"):
        import_gguf(path, tmp_path / "d")


def test_calibrated_scales_are_the_largest_magnitudes_that_hugging_faces_model_reads(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made", layout="plain")
    texts = ["How many apples are left?", "The capital of France", "1 + 1 ="]
    scales = calibrate(made, tmp_path / "out", texts)
    theirs = hugging_face_model(CONFIG, load_file(made / "model.safetensors"))
    peaks: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            peaks[name] = max(peaks.get(name, 0.0), float(args[0].abs().max()))

        return hook

    for name, module in theirs.named_modules():
        if name in scales:
            module.register_forward_pre_hook(watch(name))
    tokens = Tokens(made, read_shape(made))
    with torch.no_grad():
        for text in texts:
            theirs(input_ids=torch.tensor([tokens.encode(text)]))
    assert peaks.keys() == scales.keys()
    assert len(peaks) == 14
    for name, scale in scales.items():
        # Float32 sums in another order; any other formula is off by far more.
        assert abs(scale * 448 / peaks[name] - 1) < 1e-4
    with Checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.check()
        name = "model.layers.0.mlp.down_proj"
        weights = checkpoint.linear(name, 64, 128)
    whole = load_file(made / "model.safetensors")[f"{name}.weight"].float()
    assert weights.weight_scale == float(whole.abs().max() / 448)
    assert int(weights.weight.float().abs().max()) == 448


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no prompt in it"),
        ('{"prompt": " "}\n', "an empty prompt"),
        ('{"a": 1}\n', "no text under"),
        ("{", "broken"),
    ],
)
def test_prompts_that_are_none_are_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        read_prompts(path)


def test_only_a_line_feed_ends_a_prompt_or_a_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a\u2028b\x85c"}\r\n', encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "rows.jsonl") == ["a\u2028b\x85c"]
    assert read_rows(tmp_path / "rows.jsonl", ("question",)) == [{"question": "a\u2028b\x85c"}]
    (tmp_path / "texts.txt").write_text("one\x0ctwo\r\n\nthree\n", encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "texts.txt") == ["one\x0ctwo", "three"]


def test_a_compressed_file_whose_bits_are_damaged_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b'{"question": "a"}', mtime=0))
    packed[10] = 0xFF  # a type of block that there is not
    for path in (tmp_path / "prompts.jsonl.gz", tmp_path / "test.jsonl.gz"):
        path.write_bytes(packed)
    with pytest.raises(UsageError, match="not readable text"):
        read_prompts(tmp_path / "prompts.jsonl.gz")
    with pytest.raises(UsageError, match="not whole JSON lines"):
        read_rows(tmp_path / "test.jsonl", ("question",))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--device", "tpu"), 2, "--device tpu: expected cpu or cuda"),
        (("--device", "cuda"), 3, "0 CUDA GPUs here, 1 needed"),
        (("--form", "none"), 2, "--form none: expected one of"),
    ],
)
def test_calibrating_says_in_one_line_what_it_cannot_do(
    options: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    made = write_checkpoint(tmp_path / "made", layout="plain")
    assert said in refused("accuracy", "calibrate", made, tmp_path / "out", *options, code=code)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made")
    with pytest.raises(UsageError, match="is quantised already"):
        calibrate(made, tmp_path / "out", ["a"])
    with pytest.raises(UsageError, match="holds a checkpoint already"):
        calibrate(made, made, ["a"])
