"""`fusecheck invariance`: does a row depend on its company?"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fusecheck import backends
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.interrupts import Interruption
from fusecheck.invariance.claims import Answer
from fusecheck.listed import numbers
from fusecheck.manual import some_backend, some_ops
from fusecheck.operations import Operation, Strategy
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fusecheck.interface import Backend
    from fusecheck.invariance.subject import Kernels
    from fusecheck.problem import Problem

    Asked = tuple[tuple[int, ...], Problem]

console = Console(highlight=False)

USUAL = "RESIDUAL_RMS_NORM_OUT_QUANT_FP8"
WORLDS = (2, 4, 8, 16, 1)
"""Numbers of ranks of which the first that is taken is asked about, unless some are given."""

INTERRUPTED = "the run was interrupted"

STRATEGIES = (Strategy.ONESHOT.value, Strategy.TWOSHOT.value)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("invariance")(invariance)


def invariance(
    backend: Annotated[
        str,
        typer.Option(help="A name of `fusecheck backends`, or package.module:attribute.", autocompletion=some_backend),
    ] = "emulated",
    op: Annotated[
        str | None,
        typer.Option(help=f"An operation of `fusecheck backends`; else {USUAL}, if taken.", autocompletion=some_ops),
    ] = None,
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = 1024,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the largest batch.")] = 64,
    dense: Annotated[int, typer.Option(min=1, help="Every batch size up to this is tried, above every eighth.")] = 128,
    rows: Annotated[int, typer.Option(min=4, max=64, help="How many rows are watched.")] = 16,
    tp: Annotated[
        str | None, typer.Option(help="Ranks, such as 2; of several, such as 2,4, all must give the same; else 2.")
    ] = None,
    virtual_ranks: Annotated[bool, typer.Option("--virtual-ranks", help="All ranks on one GPU.")] = False,  # noqa: FBT002
    multiprocessors: Annotated[
        int | None,
        typer.Option(min=1, help="Of the chip, for predicted thresholds; asked of the GPU, where there is one."),
    ] = None,
    require_invariant: Annotated[  # noqa: FBT002
        bool, typer.Option("--require-invariant", help="Every claim that breaks is a finding.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two certificates instead.", metavar="A B")
    ] = None,
    probe_calls: Annotated[
        int, typer.Option(min=0, help="Calls in which trees of additions are read, at most; 0 reads no order.")
    ] = 1000,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; where the backend runs, unless given.")] = None,
    case_timeout: Annotated[float, typer.Option(help="Seconds until a call counts as hung.")] = 60.0,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Does a row depend on its company: on the call, the batch, its place, its neighbours, the ranks, the exchange?

    Each claim is decided bit by bit: it holds over what was tried, or breaks from a size on. A threshold is an answer,
    not a finding, unless the kernel declares otherwise, or --require-invariant is given.

    Examples:
      fusecheck invariance --backend emulated
      fusecheck invariance --backend mypackage.kernels:MyKernel --tokens 512 --hidden 4096 --require-invariant
      fusecheck invariance --backend flashinfer --virtual-ranks --tp 2,4 --hidden 8192
      fusecheck invariance --compare runs/before runs/after
    """
    if compare is not None:
        _compare(*compare)
        return
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {device!r}, expected cpu or cuda")
    if not case_timeout > 0:
        raise UsageError(f"--case-timeout {case_timeout:g}, expected more than 0")
    from fusecheck.invariance.subject import Kernels
    from fusecheck.kernel.run import check_device
    from fusecheck.problem import Problem

    where = device or backends.device_of(backend)
    kernel = backends.backend(backend)
    ops = [op] if op else [USUAL, *(each.name for each in getattr(kernel, "operations", ()))]
    every = [tuple(sorted(set(numbers("--tp", tp))))] if tp else [(world,) for world in WORLDS]
    usual = Problem(op=Operation.named(ops[0]), dtype=dtype, world_size=every[0][0], tokens=tokens, hidden=hidden)
    worlds, problem = next(_taken(kernel, usual, ops, every), (every[0], usual))
    check_device(kernel, where, worlds[-1], virtual=virtual_ranks)
    directory = make_run_dir("invariance", run_dir)
    with Kernels(backend, problem, where, virtual_ranks, case_timeout) as kernels:
        if reason := kernels.takes(_batch_of(1)):
            raise UsageError(f"{backend} refuses a batch of one row: {reason}; give another --op, --hidden or --tp")
        if reason := kernels.takes(_batch_of(tokens)):
            raise UsageError(f"{backend} refuses a batch of {tokens} rows: {reason}; give another --tokens")
        made, found, stopped = _ask(
            kernels, worlds, Extent(rows, dense, probe_calls), multiprocessors, require=require_invariant
        )
    verdict = Verdict.of(failed=bool(found), complete=not stopped)
    subjects = [{"backend": backend, "world_size": worlds[0]}]
    summary = {"certificate": made, "subjects": subjects, "interrupted": stopped == INTERRUPTED}
    summary |= {"headline": stopped} if stopped else {}
    write_result(directory, "invariance", verdict, summary, found, json_file)
    (directory / "certificate.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for finding in found:
        console.out(f"{finding['message']}  replay='{finding['question']}'")
    console.out(f"{verdict.value}{f', {stopped}' if stopped else ''}  {directory / 'certificate.json'}")
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _batch_of(tokens: int) -> Any:
    from fusecheck.invariance.calls import Call

    return Call(tokens)


def _taken(kernel: Backend, usual: Problem, ops: Sequence[str], every: Sequence[tuple[int, ...]]) -> Iterator[Asked]:
    """The operations and worlds of which the kernel takes a batch of one row, in their order."""
    for name, worlds in itertools.product(ops, every):
        with contextlib.suppress(UsageError):  # a group that does not divide this hidden is no reason to refuse it
            problem = replace(usual, op=Operation.named(name), world_size=worlds[0])
            if kernel.supports(replace(problem, tokens=1)).ok:
                yield worlds, problem


@dataclass(frozen=True)
class Extent:
    """How much is asked: watched rows, batch sizes that are all tried, calls for one tree at most."""

    rows: int
    dense: int
    probe_calls: int


def _ask(
    kernels: Kernels, worlds: tuple[int, ...], extent: Extent, multiprocessors: int | None, *, require: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The certificate, the findings, and why not all was asked: Ctrl-C, or a call that failed."""
    from fusecheck.invariance import certificate
    from fusecheck.invariance.probes import ORDER, TREE
    from fusecheck.invariance.search import Search
    from fusecheck.invariance.shares import choose

    chosen = choose(kernels.problem, extent.rows)
    shown = ", ".join(f"{share:.0%} of the rows for {name}" for name, share in chosen.shares.items())
    drawn = ", ".join(f"{share:.1%} for {name}" for name, share in chosen.drawn.items())
    console.out(
        f"{len(chosen.rows)} rows; another order shows in {shown or 'no figure'} (drawn at random: {drawn or '-'})"
    )

    answers: dict[str, Answer] = {}

    def told(answer: Answer) -> None:
        answers[answer.claim] = answer
        console.out(f"{answer.claim}: {answer.verdict}{f' from {answer.breach.size} on' if answer.breach else ''}")

    search = Search(kernels, chosen.rows, kernels.problem.tokens, extent.dense, STRATEGIES, worlds, told)
    stopped = _until_it_fails(search.run)
    if stopped not in ("", INTERRUPTED) and not answers:
        raise Inconclusive(stopped)
    done = [answers.get(claim) or Answer(claim, untold=stopped) for claim in search.claims]
    read: list[dict[str, Any]] = []
    if not stopped:
        stopped = _until_it_fails(lambda: read.extend(_probe(kernels, worlds, answers, extent.probe_calls)))
        read += [certificate.unasked(claim, stopped) for claim in (ORDER, TREE) if stopped]
    records = [*certificate.claims(kernels, done), *read]
    made = certificate.certificate(kernels, records, chosen, multiprocessors or _multiprocessors(kernels.device))
    _table(made)
    found = list(certificate.findings(kernels, records, require=require))
    return made, found, stopped


def _until_it_fails(ask: Callable[[], Any]) -> str:
    """Ask; why that came to no end, Ctrl-C or a call that failed, and nothing where it did."""
    failed = ""
    with Interruption() as stop:
        try:
            ask()
        except Inconclusive as error:
            failed = str(error)
    return INTERRUPTED if stop.happened else failed


def _probe(kernels: Kernels, worlds: tuple[int, ...], answers: dict[str, Answer], most: int) -> list[dict[str, Any]]:
    """What the probes read; nothing where a call does not depend on its inputs alone."""
    from fusecheck.invariance.certificate import probed, sentence, unasked
    from fusecheck.invariance.probes import ORDER, TREE, Probes

    if not most:
        return []
    if broken := [claim for claim in ("run to run", "workspace history") if answers[claim].breach]:
        records = [unasked(claim, f"{broken[0]} breaks, and a probe takes many calls") for claim in (ORDER, TREE)]
    else:
        records = probed(kernels, Probes(kernels, worlds, STRATEGIES, answers["batch"].changes, most).records())
    for record in records:
        console.out(sentence(record))
    return records


def _multiprocessors(device: str) -> int | None:
    if device != "cuda":
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def _table(made: dict[str, Any]) -> None:
    table = Table("claim", "verdict", "what was seen, or tried", "calls")
    from fusecheck.invariance.certificate import sentence

    for record in made["claims"]:
        told = sentence(record).removeprefix(f"{record['claim']}: ")
        table.add_row(record["claim"], record["verdict"], told, str(record["calls"] or ""))
    console.print(table)
    for each in made.get("predicted", []):
        console.out(f"predicted by the launch rule: from {each['rows']} rows on {each['launch']}")
    console.out(f"{made['evidence']['calls']} calls; not tried: {'; '.join(made['not_tried'])}")


def _compare(first: Path, second: Path) -> None:
    from fusecheck.invariance.certificate import compared, read_certificate

    lines = compared(read_certificate(first), read_certificate(second))
    for line in lines or ["the two certificates say the same"]:
        console.out(line)
