"""`fusecheck golden record` and `fusecheck golden check`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fusecheck import backends
from fusecheck.case.run import WORKER, Caller
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.golden import check, record
from fusecheck.interrupts import Interruption
from fusecheck.kernel.virtual import VirtualPool
from fusecheck.ranks import Pool, require_gpus
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir, check_place

HERE = Path(__file__).parent
"""Where the committed recordings lie: `golden/*/records/*.json`."""

app = typer.Typer(help="Record what a real kernel returns, and check such records.")


def register(root: typer.Typer) -> None:
    """Add the commands."""
    root.add_typer(app, name="golden")


def committed() -> list[Path]:
    """The recordings that come with Fusecheck."""
    return sorted(HERE.glob("*/records/*.json"))


def _device(backend: str, world_size: int, *, virtual: bool) -> str:
    """Where the backend runs.

    Raises:
        Inconclusive: there are too few GPUs.
    """
    device = str(getattr(backends.backend(backend), "device", "cpu"))
    if device == "cuda" or virtual:
        require_gpus(1 if virtual else world_size)
    return device


def _pool(backend: str, world_size: int, *, virtual: bool) -> Any:
    device = _device(backend, world_size, virtual=virtual)
    return VirtualPool(world_size, device=device) if virtual else Pool(WORKER, world_size, device=device)


@app.command("record")
def record_command(
    out: Annotated[Path, typer.Argument(help="The JSON file to write; tensors go beside it.", callback=check_place)],
    backend: Annotated[str, typer.Option(help="Whose kernel.")] = "flashinfer",
    tp: Annotated[int, typer.Option(help="World size.")] = 2,
    virtual: Annotated[bool, typer.Option(help="All ranks on one GPU.")] = False,  # noqa: FBT002
    count: Annotated[int, typer.Option(help="Problems.")] = 200,
) -> None:
    """Run Problems that pass, and keep their outputs."""
    _device(backend, tp, virtual=virtual)  # first: without a GPU, nothing else is worth saying
    given = list(record.problems(backend, tp, count, virtual=virtual))
    if not given:
        raise UsageError(f"backend {backend} takes no Problem of the plan at tp {tp}")
    with closing(_pool(backend, tp, virtual=virtual)) as pool:
        caller: Caller = pool
        golden = record.record(caller, backend, given, virtual=virtual)
    record.write(golden, out)
    whole = sum(bool(entry.outputs) for entry in golden.entries)
    Console(highlight=False).out(f"{out}: {len(golden.entries)} Problems, {whole} with whole tensors")


@app.command("check")
def check_command(
    records: Annotated[list[Path] | None, typer.Argument(help="Recordings; default the committed ones.")] = None,
    again: Annotated[bool, typer.Option(help="Run the backend again: bit for bit, on the chip.")] = False,  # noqa: FBT002
    dataflow: Annotated[str | None, typer.Option(help="Judge by this dataflow, not the recorded one.")] = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Do the recorded outputs follow the recorded dataflow; with --again, does the kernel still return them?"""
    paths = records or committed()
    if not paths:
        raise Inconclusive("no golden records here: make some with fusecheck golden record")
    goldens = {path: record.read(path) for path in paths}
    directory = make_run_dir("golden", run_dir)
    console = Console(highlight=False)
    wrong: list[str] = []
    summaries = []
    with Interruption() as stop:
        for path, golden in goldens.items():
            found = _check(golden, dataflow, again=again)
            wrong += found.wrong
            summaries.append({"record": path.name, **{k: v for k, v in vars(found).items() if k != "wrong"}})
            console.out(
                f"{path.name}: {found.entries} Problems, {found.outputs} outputs bit for bit, {found.elements:,}"
                f" elements judged ({found.off_nominal} off nominal), {found.undecided} undecided,"
                f" {len(found.wrong)} wrong"
            )
    for line in wrong[:5]:
        console.out(line)
    verdict = Verdict.of(failed=bool(wrong), complete=not stop.happened)
    summary = {"records": summaries, "interrupted": stop.happened}
    write_result(directory, "golden", verdict, summary, [{"message": line} for line in wrong], json_file)
    console.print(verdict.value)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _check(golden: record.Golden, dataflow: str | None, *, again: bool) -> check.Checked:
    """Check one recording."""
    if dataflow is not None:
        golden = check.wrong_dataflow(golden, dataflow)
    if not again:
        return check.check_anywhere(golden)
    size = golden.entries[0].problem.world_size
    with closing(_pool(golden.backend, size, virtual=golden.virtual)) as pool:
        return check.check_same(golden, pool)
