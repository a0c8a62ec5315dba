"""`fusecheck accuracy import` and `fusecheck accuracy calibrate`: from a model file to what arms run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusecheck.eval.progress import Progress


def import_checkpoint(
    source: Annotated[Path, typer.Argument(help="A whole GGUF file.", metavar="FILE.gguf")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    *,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="A tokenizer.json to take instead of the file's vocabulary.")
    ] = None,
) -> None:
    """Turn a GGUF file into a bf16 checkpoint folder: safetensors, config, tokenizer.

    Llama, Mistral, Qwen 2 and Qwen 3; weights are dequantised and rounded once to bf16.
    """
    from fusecheck.eval.gguf_import import import_gguf

    with Progress() as progress:
        progress(f"reading {source}")
        count = import_gguf(source, out, tokenizer=tokenizer)
    typer.echo(f"{count} tensors written to {out}")


def calibrate_checkpoint(
    source: Annotated[Path, typer.Argument(help="A bf16 or fp16 checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    *,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A text a line, or JSON lines; questions of MMLU and GSM8K if not given."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts to read.")] = 64,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """Turn a bf16 checkpoint into an FP8 one: E4M3, static scales, one a tensor, in ModelOpt's form.

    The scale of activations is the largest magnitude over the prompts, divided by 448.
    """
    from fusecheck.eval.calibrate import calibrate, read_prompts

    texts = read_prompts(prompts, count)
    with Progress() as progress:
        scales = calibrate(source, out, texts, device=device, tell=progress)
    typer.echo(f"{len(scales)} linears quantised, {len(texts)} prompts read; written to {out}")
