"""`fusecheck backends`: what there is to judge, and what to judge it by."""

from __future__ import annotations

import typer
from rich.console import Console

from fusecheck import backends
from fusecheck.dataflow import DATAFLOWS
from fusecheck.operations import COMPOSITIONS, WORLD_SIZES
from fusecheck.quantflow import QUANT_FLOWS


def register(app: typer.Typer) -> None:
    """Add the command `backends` to `app`."""
    app.command("backends")(list_backends)


def list_backends() -> None:
    """List the backends, the known dataflows and quantisers, the operations and the world sizes."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print("backends (or package.module:attribute):")
    for name, target in backends.backends().items():
        console.print(f"  {name}  {target}")
    console.print("dataflows (emulated:<dataflow>, --dataflow; with another's quantisers as in vllm-c/deepgemm):")
    for flow in DATAFLOWS.values():
        console.print(f"  {flow.name}  {flow.source}")
    console.print("quantisers as implementations compute them (behind a slash):")
    for quantiser, rules in QUANT_FLOWS.items():
        console.print(f"  {quantiser}  {', '.join(rules)}")
    console.print("operations (--op) by quantiser (--quantiser):")
    for quantiser in dict.fromkeys(op.quantiser for op in COMPOSITIONS):
        console.print(f"  {quantiser}  {', '.join(op.name for op in COMPOSITIONS if op.quantiser == quantiser)}")
    console.print(f"world sizes: {', '.join(map(str, WORLD_SIZES))}")
