"""`fusecheck accuracy calibrate`: a bf16 checkpoint as an FP8 one.

Scales of weights are the largest magnitude of what shares one, divided by 448. Static scales of activations are the
same of what each linear reads over given prompts, which run through the model in float32 with FP8 off. The other forms
need no prompts: their activations get scales as they arise.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from fusecheck.backends.unfused import E4M3_MAX
from fusecheck.errors import UsageError
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.config import read_json
from fusecheck.eval.data import EMBEDDED, read_rows
from fusecheck.eval.engine import Row
from fusecheck.eval.gguf_import import require_empty, write_json
from fusecheck.eval.linear import Linear
from fusecheck.eval.llama import Llama
from fusecheck.eval.paths import Feed, OraclePath
from fusecheck.eval.quantise_weights import quantise_weight, quantization_config, scale_name
from fusecheck.eval.recipe import FORMS, Form
from fusecheck.eval.tokens import Tokens
from fusecheck.interface import Rank

PROMPTS = 64
LONGEST = 512
"""Tokens of a prompt that are read."""
TEXT_FIELDS = ("prompt", "text", "question")
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass
class Alone:
    """A rank without peers, in this process."""

    device: torch.device
    index: int = 0
    world_size: int = 1
    group: ProcessGroup | None = field(default=None)

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """A buffer of its own."""
        del name
        return [torch.zeros(nbytes, dtype=torch.uint8, device=self.device)]


class AmaxPath(OraclePath):
    """The wide path, which keeps the largest magnitude that each linear has read.

    Attributes:
        peaks: by the linear's identity, float32 scalars on the device.
    """

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.peaks: dict[int, Tensor] = {}

    def read(self, feed: Feed, linear: Linear) -> Tensor:
        """Apply a reader to the normed activations."""
        assert feed.norm is not None
        return self.apply(feed.norm, linear)

    def apply(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply a linear to [tokens, in]."""
        peak = x.abs().amax()
        known = self.peaks.get(id(linear))
        self.peaks[id(linear)] = peak if known is None else torch.maximum(known, peak)
        return super().apply(x, linear)


def read_prompts(path: Path | None, count: int = PROMPTS) -> list[str]:
    """The first `count` prompts of a file: a text a line, or JSON lines with `prompt`, `text` or `question`.

    Without a file: questions of the embedded samples of MMLU and GSM8K.

    Raises:
        UsageError: no file, no text in it, or a row without any of the fields.
    """
    if path is None:
        mmlu = read_rows(EMBEDDED / "mmlu" / "test.jsonl", ("question",))
        gsm8k = read_rows(EMBEDDED / "gsm8k" / "test.jsonl", ("question", "answer"))
        texts = [row["question"] for row in mmlu] + [f"{row['question']}\n{row['answer']}" for row in gsm8k]
        return texts[:: max(1, len(texts) // count)][:count]
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = [line.rstrip("\r") for line in raw.decode().split("\n") if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"--prompts {path}: no such file; give a text a line, or JSON lines") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(f"--prompts {path}: not readable text ({error}); give UTF-8, a text a line") from None
    texts = [_text(path, number, line) for number, line in enumerate(lines[:count], 1)]
    if not texts or not all(text.strip() for text in texts):
        raise UsageError(f"--prompts {path}: {'an empty prompt' if texts else 'no prompt'} in it, expected texts")
    return texts


def _text(path: Path, number: int, line: str) -> str:
    if ".json" not in path.name:
        return line
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"--prompts {path}:{number}: broken JSON ({error.msg}); copy the file again") from None
    found = next((row[name] for name in TEXT_FIELDS if isinstance(row, dict) and name in row), None)
    if not isinstance(found, str):
        raise UsageError(f"--prompts {path}:{number}: no text under {', '.join(TEXT_FIELDS)}; expected one of them")
    return found


def calibrate(
    source: Path, out: Path, prompts: Sequence[str], *, device: str = "cpu", tell: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Write the FP8 checkpoint of `source` with static scales into `out`, in ModelOpt's form.

    Args:
        source: a bf16 or fp16 checkpoint folder with its tokenizer.
        out: a folder that is made or empty.
        prompts: texts that show what the activations are like.
        device: where the model runs, `cpu` or `cuda`.
        tell: told in one line what begins.

    Returns:
        The activation scale of each linear, by its name.

    Raises:
        UsageError: a broken or quantised checkpoint, no prompt, a linear that reads nothing but zeros or NaN.
    """
    tell = tell or (lambda _: None)
    with _open_plain(source, out) as checkpoint:
        rows = [ids[:LONGEST] for ids in Tokens(source, checkpoint.shape).encode_all(prompts) if len(ids)]
        if not rows:
            raise UsageError("no prompt has a token; give texts that are not empty")
        tell(f"reading {len(rows)} prompts, {sum(map(len, rows)):,} tokens")
        scales = activation_scales(checkpoint, rows, torch.device(device))
        tell("quantising")
        inputs = {f"{name}.input_scale": torch.tensor(value) for name, value in scales.items()}
        _write_tensors(checkpoint, FORMS["static"], inputs, out)
    _write_configs(source, out)
    return scales


def quantise_checkpoint(source: Path, out: Path, form: Form, tell: Callable[[str], None] | None = None) -> int:
    """Write the FP8 checkpoint of `source` in a form whose activations need no calibration; returns its linears.

    Raises:
        UsageError: a broken or quantised checkpoint, or a size that the form's groups do not divide.
    """
    with _open_plain(source, out) as checkpoint:
        checkpoint.require_form(form)
        (tell or (lambda _: None))("quantising")
        count = _write_tensors(checkpoint, form, {}, out)
    _write_configs(source, out, quantization_config(form))
    return count


def _open_plain(source: Path, out: Path) -> Checkpoint:
    """A whole checkpoint that is not quantised."""
    require_empty(out)
    checkpoint = Checkpoint(source)
    if checkpoint.recipe is not None:
        raise UsageError(f"{source}: is quantised already, expected bf16 or fp16 weights")
    checkpoint.check()
    return checkpoint


def activation_scales(checkpoint: Checkpoint, rows: Sequence[Row], device: torch.device) -> dict[str, float]:
    """The largest magnitude that each linear reads over these tokens, divided by 448, by the linear's name.

    Raises:
        UsageError: a linear reads nothing but zeros, or NaN or an infinity.
    """
    rank = Alone(device)
    model, path = Llama(checkpoint, rank), AmaxPath(rank)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    for row in rows:  # one text at a time: padding would be calibrated, too
        model.forward(path, torch.tensor(row, dtype=torch.int64, device=device)[None], start)
    found = {}
    for name, linear in model.linears():
        peak = float(path.peaks[id(linear)])
        if not 0 < peak < float("inf"):
            raise UsageError(f"{name} reads activations up to {peak}, expected finite ones above 0; other prompts?")
        found[name] = peak / E4M3_MAX
    return found


def _write_tensors(checkpoint: Checkpoint, form: Form, scales: dict[str, Tensor], out: Path) -> int:
    """Write the weights as codes with their scales, these scales of activations, and all else as it is."""
    tensors, count = dict(scales), 0
    for module, outputs, inputs in checkpoint.linears():
        weight = checkpoint.tensor(f"{module}.weight", (outputs, inputs)).float()
        codes, scale = quantise_weight(weight, form)
        tensors[f"{module}.weight"] = codes
        tensors[f"{module}.{scale_name(form)}"] = scale.reshape(()) if form.weights == "tensor" else scale
        count += 1
    tensors |= {name: checkpoint.whole(name) for name in checkpoint.names() if name not in tensors}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return count


def _write_configs(source: Path, out: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write config.json with the recipe, or ModelOpt's file of static scales beside it, and copy the rest."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    config = read_json(source / "config.json")
    if recipe is None:
        beside = {
            "producer": {"name": "fusecheck accuracy calibrate"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
        }
        write_json(out / "hf_quant_config.json", beside)
    else:
        config |= {"quantization_config": recipe}
    write_json(out / "config.json", config)
