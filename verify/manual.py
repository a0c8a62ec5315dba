"""What the command line says beyond its options: examples for every command, and what a shell may complete."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import typer

from fusecheck import backends
from fusecheck.dataflow import DATAFLOWS
from fusecheck.inputs.models import models
from fusecheck.operations import COMPOSITIONS, Strategy

NARROWEST, WIDEST = 30, 110
"""Columns of a help page, however wide the terminal is."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "kernel": (
        "fusecheck kernel --backend emulated:flashinfer-fp32 --tp 2,4 --cases 200",
        "fusecheck kernel --backend mypackage.kernels:MyKernel --model llama-3.1-8b --seconds 30",
        "fusecheck kernel --tokens 1,16,256 --hidden 2880 --dtype bf16 --family outliers,special",
        "fusecheck kernel --backend emulated:flashinfer --quantiser mxfp8,nvfp4",
        "fusecheck kernel --cases 400 --resume runs/20260102T030405Z-kernel",
    ),
    "replay": (
        """fusecheck replay '{"tokens":5,"hidden":128,"seed":7}' --backend emulated:trtllm""",
        "fusecheck replay findings.jsonl --backend mypackage.kernels:MyKernel",
    ),
    "backends": ("fusecheck backends",),
    "pace": ("fusecheck pace --seconds 8", "fusecheck pace --backend emulated --tokens 1,128 --hidden 1024 --batch 9"),
    "exhaust": ("fusecheck exhaust --json exhaust.json",),
    "latency": (
        "fusecheck latency --model llama-3.1-8b --tp 2 --max-regression 2%",
        "fusecheck latency --from runs/20260102T030405Z-latency/result.json --concurrency 1,64",
    ),
    "faults": (
        "fusecheck faults --quick",
        "fusecheck faults --group protocol --seeds 5",
        "fusecheck faults --sensitivity",
        "fusecheck faults --backend mypackage.kernels:MyKernel",
    ),
    "golden record": ("fusecheck golden record mine.json --backend mypackage.kernels:MyKernel --tp 2 --count 50",),
    "golden check": ("fusecheck golden check", "fusecheck golden check mine.json --again"),
    "accuracy": (
        "fusecheck accuracy --quick",
        "fusecheck accuracy --model checkpoint --tp 2 --backend flashinfer --device cuda --tasks mmlu --data data",
        "fusecheck accuracy --plan --tasks mmlu --seconds 0.05",
    ),
    "accuracy import": ("fusecheck accuracy import model.gguf model-bf16",),
    "accuracy calibrate": ("fusecheck accuracy calibrate model-bf16 model-fp8 --prompts prompts.txt --device cuda",),
    "accuracy compare": ("fusecheck accuracy compare unfused fused oracle --margin mmlu=0.5",),
}
"""By command; those whose own text has examples are not here."""


def page_width() -> int:
    """The columns of a help page on this terminal."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns - 2))


def add_examples(app: typer.Typer, above: str = "") -> None:
    """Give each command of `app` its examples, one a line however narrow the page."""
    for command in app.registered_commands:
        command.help = _text(command.callback, f"{above}{command.name}")
    for group in app.registered_groups:
        inner = group.typer_instance
        if inner is None:
            continue
        if inner.registered_callback is not None and group.name is not None:
            inner.registered_callback.help = _text(inner.registered_callback.callback, group.name)
        add_examples(inner, f"{above}{group.name} ")


def _text(callback: Callable[..., Any] | None, name: str) -> str:
    text = inspect.getdoc(callback) or ""
    if name in EXAMPLES:
        text += "\n\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name])
    # After this mark the lines of a paragraph stay as they are.
    return text.replace("\n\nExamples:\n", "\n\n\b\nExamples:\n")


def some_backend(incomplete: str) -> Iterator[str]:
    """Backends by name, the emulator with each dataflow among them."""
    return _starting(incomplete, [*backends.backends(), *(f"emulated:{name}" for name in DATAFLOWS)])


def some_dataflow(incomplete: str) -> Iterator[str]:
    """Known dataflows."""
    return _starting(incomplete, DATAFLOWS)


def some_model(incomplete: str) -> Iterator[str]:
    """Models whose shapes are known."""
    return _starting(incomplete, models())


def some_families(incomplete: str) -> Iterator[str]:
    """Input families, comma-separated."""
    from fusecheck.inputs.families import FAMILIES

    return _listed(incomplete, FAMILIES)


def some_ops(incomplete: str) -> Iterator[str]:
    """Fused operations, comma-separated."""
    return _listed(incomplete, [op.value for op in COMPOSITIONS])


def some_strategies(incomplete: str) -> Iterator[str]:
    """Exchanges, comma-separated."""
    return _listed(incomplete, [strategy.value for strategy in Strategy])


def _starting(incomplete: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name.startswith(incomplete))


def _listed(incomplete: str, names: Iterable[str]) -> Iterator[str]:
    before, comma, last = incomplete.rpartition(",")
    return (before + comma + name for name in _starting(last, names))
