"""`fusecheck accuracy import` and `fusecheck accuracy calibrate`: from a model file to what arms run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusecheck.errors import UsageError
from fusecheck.eval.progress import Progress
from fusecheck.ranks.launch import require_gpus


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
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="static: a scale a tensor (ModelOpt). dynamic: a scale a token and a channel (compressed-tensors). "
            "group: a scale for 128 activations and for 128 x 128 weights (DeepSeek). group-ue8m0: the same, powers "
            "of two.",
        ),
    ] = "static",
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A text a line, or JSON lines; questions of MMLU and GSM8K if not given."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts to read.")] = 64,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
) -> None:
    """Turn a bf16 checkpoint into an FP8 one: E4M3, in the form of published checkpoints.

    A static scale of activations is the largest magnitude over the prompts, divided by 448; the other forms read none.
    """
    from fusecheck.eval.calibrate import calibrate, quantise_checkpoint, read_prompts
    from fusecheck.eval.recipe import FORMS

    if form not in FORMS:
        raise UsageError(f"--form {form}: expected one of: {', '.join(FORMS)}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected cpu or cuda")
    if device == "cuda":
        require_gpus(1)
    if prompts is not None and not FORMS[form].static:
        raise UsageError(f"--prompts: --form {form} reads none, its activations get scales as they arise; leave it out")
    with Progress() as progress:
        if FORMS[form].static:
            texts = read_prompts(prompts, count)
            linears = len(calibrate(source, out, texts, device=device, tell=progress))
            read = f"{len(texts)} prompts read; "
        else:
            linears, read = quantise_checkpoint(source, out, FORMS[form], progress), ""
    typer.echo(f"{linears} linears quantised, {read}written to {out}")
