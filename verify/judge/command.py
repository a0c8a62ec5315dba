"""`fusecheck judge`: every call in folders of one rank each, judged by a declared dataflow or a known one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fusecheck.errors import Inconclusive, UsageError
from fusecheck.judge.dumps import is_dump, read_dumps
from fusecheck.judge.recorded import RankCall, as_call, joined, read_safetensors
from fusecheck.report.places import JsonFile, MarkdownFile, RunDir
from fusecheck.report.result import Verdict, make_run_dir, write_markdown, write_result
from fusecheck.testing.conformity import Conformity, conformity_of

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command `judge` to `app`."""
    app.command("judge")(judge)


def judge(
    folders: Annotated[list[Path], typer.Argument(help="A folder a rank, in rank order, or one that holds them.")],
    dataflow_name: Annotated[str | None, typer.Option("--dataflow", help="Judge by this known dataflow.")] = None,
    eps: Annotated[float | None, typer.Option(help="Added to the mean square; where the files do not say.")] = None,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Judge calls that are on disk: what went into each rank, and what came out.

    A rank's folder holds a .safetensors file for each call, with the tensors partial, residual_in, gamma, scale,
    residual, norm, quant, scale_out and the metadata eps, weight_bias, quantiser and layout; or it is what FlashInfer's
    logger wrote (FLASHINFER_LOGLEVEL=10, FLASHINFER_DUMP_DIR). Without --dataflow, a known one must explain every
    element of a call.

    Examples:
      fusecheck judge calls/rank0 calls/rank1 --dataflow trtllm-fp32
      fusecheck judge flashinfer_dumps --json judged.json
    """
    everyones = _read(folders)
    directory = make_run_dir("judge", run_dir)
    judged: list[tuple[str, Conformity]] = []
    for parts in joined(everyones):
        for rank, found in enumerate(_judge(parts, dataflow_name, eps)):
            title = f"{parts[0].name} rank {rank}"
            judged.append((title, found))
            for line in found.findings:
                console.out(f"{title}: {line}", highlight=False)
    verdict = Verdict.of(failed=any(not found for _, found in judged), complete=bool(judged))
    summary = {
        "cases": len(judged) // len(everyones),
        "ranks": len(everyones),
        "elements": sum(found.elements for _, found in judged),
        "dataflows": sorted({found.dataflow for _, found in judged}),
    }
    findings = [finding for title, found in judged for finding in found.records(title)]
    record = write_result(directory, "judge", verdict, summary, findings, json_file)
    if markdown is not None:
        write_markdown(markdown, record)
    _tell(verdict, summary, directory)
    raise typer.Exit(verdict.exit_code)


def _tell(verdict: Verdict, summary: dict[str, Any], directory: Path) -> None:
    flows = ", ".join(summary["dataflows"])
    told = f"{summary['cases']} calls of {summary['ranks']} ranks, {summary['elements']:,} elements, judged by {flows}"
    console.out(f"{verdict.value}: {told}", highlight=False)
    console.out(f"{directory}/report.html", highlight=False)


def _judge(parts: list[RankCall], dataflow_name: str | None, eps: float | None) -> list[Conformity]:
    """One verdict a rank; ranks whose outputs are rank 0's, bit for bit, share its verdict."""
    declared = dataflow_name or (parts[0].dataflows[0] if parts[0].dataflows else None)
    try:
        return [conformity_of(as_call(parts, rank, eps), declared) for rank in range(len(parts))]
    except UsageError as error:
        raise UsageError(f"{parts[0].place}: {error}") from None


def _read(folders: list[Path]) -> list[list[RankCall]]:
    """The calls of each rank, in rank order.

    Raises:
        UsageError: a folder that holds no calls, or a rank that is missing.
        Inconclusive: nothing to judge.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder, expected one for each rank, or one that holds them")
    if all(is_dump(folder) for folder in folders):
        by_rank = {rank: calls for folder in folders for rank, calls in read_dumps(folder).items()}
        if not by_rank:
            raise Inconclusive(f"{folders[0]}: FlashInfer's logger wrote no call of allreduce_fusion here")
        missing = sorted(set(range(max(by_rank) + 1)) - set(by_rank))
        if missing:
            raise UsageError(f"{folders[0]} has dumps of rank {max(by_rank)} but none of rank {missing[0]}")
        return [by_rank[rank] for rank in sorted(by_rank)]
    if len(folders) == 1 and not list(folders[0].glob("*.safetensors")):
        folders = sorted((path for path in folders[0].iterdir() if path.is_dir()), key=_natural)
    everyones = [[read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))] for folder in folders]
    if not any(everyones):
        raise Inconclusive(
            f"{', '.join(map(str, folders)) or 'the folder'} holds no .safetensors file: nothing to judge"
        )
    return everyones


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
