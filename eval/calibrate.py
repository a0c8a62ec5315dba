"""`fusecheck accuracy calibrate`: a bf16 checkpoint as an FP8 one with static scales, in ModelOpt's form.

Activation scales are the largest magnitude that each linear reads over given prompts, divided by 448; weight scales the
same of the weight. The prompts run through the model in float32 with FP8 off.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from fusecheck.backends.unfused import E4M3_MAX, quantise
from fusecheck.errors import UsageError
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.data import EMBEDDED, read_rows
from fusecheck.eval.engine import Row
from fusecheck.eval.gguf_import import require_empty
from fusecheck.eval.linear import Linear
from fusecheck.eval.llama import Llama
from fusecheck.eval.paths import Feed, OraclePath
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
        lines = [line for line in raw.decode().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"--prompts {path}: no such file; give a text a line, or JSON lines") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
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
    """Write the FP8 checkpoint of `source` into `out`.

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
    require_empty(out)
    tell = tell or (lambda _: None)
    with Checkpoint(source) as checkpoint:
        if checkpoint.recipe is not None:
            raise UsageError(f"{source}: is quantised already, expected bf16 or fp16 weights")
        checkpoint.check()
        rows = [ids[:LONGEST] for ids in Tokens(source, checkpoint.shape).encode_all(prompts) if len(ids)]
        if not rows:
            raise UsageError("no prompt has a token; give texts that are not empty")
        tell(f"reading {len(rows)} prompts, {sum(map(len, rows)):,} tokens")
        scales = activation_scales(checkpoint, rows, torch.device(device))
        tell("quantising")
        tensors = dict(_quantised(checkpoint, scales))
        plain = [name for name in checkpoint.names() if name not in tensors]
        tensors |= {name: checkpoint.whole(name) for name in plain}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_configs(source, out)
    return scales


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


def _quantised(checkpoint: Checkpoint, scales: dict[str, float]) -> Iterable[tuple[str, Tensor]]:
    for module, outputs, inputs in checkpoint.linears():
        weight = checkpoint.tensor(f"{module}.weight", (outputs, inputs)).float()
        scale = weight.abs().amax() / E4M3_MAX
        yield f"{module}.weight", quantise(weight, scale)
        yield f"{module}.weight_scale", scale.reshape(())
        yield f"{module}.input_scale", torch.tensor(scales[module], dtype=torch.float32)


def _write_configs(source: Path, out: Path) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    shutil.copyfile(source / "config.json", out / "config.json")
    recipe = {
        "producer": {"name": "fusecheck accuracy calibrate"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    }
    (out / "hf_quant_config.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
