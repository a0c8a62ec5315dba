"""`fusecheck graph`: does a rewrite put the fused collective where it belongs, and nowhere else?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fusecheck.errors import UsageError
from fusecheck.graph.cases import GraphCase, Subject, lone_cases, pair_cases, random_cases, read_plan, row_cases
from fusecheck.graph.config import FAMILY_PASS, NORM_PASS
from fusecheck.graph.dialects import NAMES, library_named
from fusecheck.graph.expectations import EVERY
from fusecheck.graph.files import SUFFIX, FilePlan, expectations, load_file
from fusecheck.graph.model_plan import DECODER, FAMILIES, named_model
from fusecheck.graph.question import Question
from fusecheck.graph.session import Run
from fusecheck.graph.subject import load_pass
from fusecheck.graph.waivers import from_options
from fusecheck.listed import choices
from fusecheck.ranks import require_gpus
from fusecheck.report import make_run_dir
from fusecheck.report.places import JsonFile, RunDir

WORLD_SIZES = (1, 2, 4)
GROUPS = ("rows", "random", "models")
console = Console()


def register(app: typer.Typer) -> None:
    """Add the command `graph` to `app`."""
    app.command("graph")(graph)


def graph(
    *,
    subject: Annotated[
        str, typer.Option("--pass", help="package.module:function, or the name of one of Fusecheck's own.")
    ] = FAMILY_PASS,
    after: Annotated[
        str, typer.Option(help=f"Which graph the pass gets: norm, after {NORM_PASS}; none, as exported.")
    ] = "norm",
    produces: Annotated[
        str,
        typer.Option(
            help="What the pass makes: norm, quant (static FP8), all, one-sum of two over ranks; or some of: "
            + ", ".join(EVERY)
        ),
    ] = "",
    only: Annotated[str, typer.Option(help="Which graphs, comma-separated: rows, random, models.")] = ",".join(GROUPS),
    rows: Annotated[str, typer.Option("--rows", help="Which rows, comma-separated: F3, N8-*.")] = "*",
    given: Annotated[
        list[str] | None,
        typer.Option("--graph", help="A graph: a finding's JSON line, or a .pt2 file of torch.export. Repeatable."),
    ] = None,
    expect: Annotated[
        str,
        typer.Option(help="Of a .pt2 file's graph after the pass, comma-separated: sites=63, all_reduce=1."),
    ] = "",
    waive: Annotated[list[str] | None, typer.Option(help="Accept a check's findings: NAME or NAME:ROW.")] = None,
    why: Annotated[list[str] | None, typer.Option(help="The reason of each --waive.")] = None,
    waivers: Annotated[Path | None, typer.Option(help="YAML: a list of waive: and why:.")] = None,
    model: Annotated[
        str,
        typer.Option(
            help=f"Models, comma-separated: {DECODER}, {', '.join(FAMILIES)}; :QUANTISER names that of their layers."
        ),
    ] = f"{DECODER},{DECODER}:group-fp8,{DECODER}:dynamic-fp8,llama",
    layers: Annotated[int, typer.Option(min=1, help="Of each model.")] = 2,
    random: Annotated[int, typer.Option(min=0, help="Random graphs.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the first random graph.")] = 0,
    tp: Annotated[int, typer.Option(help="Ranks, each a process: 1, 2 or 4.")] = 2,
    backend: Annotated[str, typer.Option(help="The kernel that fused operators call.")] = "emulated",
    dialect: Annotated[str, typer.Option(help=f"Of the graphs' operators: {' or '.join(NAMES)}.")] = NAMES[0],
    config: Annotated[Path | None, typer.Option(help="YAML with transforms: and their policies.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    export: Annotated[bool, typer.Option(help="Export each rewritten graph again.")] = True,
    case_timeout: Annotated[float, typer.Option("--case-timeout", help="Seconds until a graph counts as hung.")] = 120,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Does a graph pass fuse what it must, leave the rest, and change no bit?

    Examples:
      fusecheck graph --pass mypackage.passes:fuse --after none
      fusecheck graph --only models --model llama,qwen3 --layers 4
    """
    question = Question(_subject(subject, after, produces), tp, backend, dialect, config, device, export)
    if tp not in WORLD_SIZES:
        raise UsageError(f"--tp {tp}, expected one of {', '.join(map(str, WORLD_SIZES))}")
    if not 0 < case_timeout < math.inf:
        raise UsageError(f"--case-timeout {case_timeout:g}, expected more than 0")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r}, expected cpu or cuda")
    if device == "cuda":
        require_gpus(tp)
    accepted = from_options(waive or (), why or (), waivers)
    groups = choices("--only", only, GROUPS)
    if given:
        cases = list(_given(given, expect, dialect))
    else:
        lone = lone_cases(rows) if tp > 1 else []
        named = pair_cases(rows) if question.subject.merges else row_cases(tp, rows) + lone
        cases = list(_cases(groups, named, model, layers, random, seed))
    if expect and not any(isinstance(case.plan, FilePlan) for case in cases):
        raise UsageError("--expect is about a .pt2 file, expected --graph FILE.pt2; plans say what becomes of them")
    run = Run(question, case_timeout, accepted, make_run_dir("graph", run_dir), console)
    code = run.finish(cases, json_file)
    if code:
        raise typer.Exit(code)


def _subject(name: str, after: str, produces: str) -> Subject:
    if after not in ("norm", "none"):
        raise UsageError(f"--after {after!r}, expected norm or none")
    named: dict[str, tuple[str, ...]] = {"quant": ("fp8",), "all": EVERY} | dict.fromkeys(("", "norm", "one-sum"), ())
    moves = named.get(produces, tuple(produces.split(",")))
    if not set(moves) <= set(EVERY):
        known = f"norm, quant, one-sum, all, or some of {', '.join(EVERY)}"
        raise UsageError(f"--produces {produces!r}, expected {known}")
    if produces == "one-sum" and after != "none":
        raise UsageError(f"--produces one-sum --after {after}, expected --after none: a norm pass takes the sums away")
    load_pass(name)
    if name == NORM_PASS:
        return Subject(name, after_norm=False, quantises=False)
    return Subject(name, after == "norm", produces not in ("norm", "one-sum"), moves, merges=produces == "one-sum")


def _given(texts: list[str], expect: str, dialect: str) -> Iterator[GraphCase]:
    """The graphs of `--graph`.

    Raises:
        UsageError: one is neither a plan nor an exported program.
    """
    for number, text in enumerate(texts, 1):
        name = "given" if len(texts) == 1 else f"given {number}"
        if text.lstrip().startswith("{"):
            yield GraphCase(name, read_plan(text))
        elif text.endswith(SUFFIX):
            plan = FilePlan(text, expectations(expect))
            library = library_named(dialect)
            library.ready()
            load_file(plan, 0, library)
            yield GraphCase(Path(text).name, plan)
        else:
            raise UsageError(f"--graph {text!r} is neither a finding's JSON line nor a {SUFFIX} file")


def _cases(
    groups: tuple[str, ...], rows: list[GraphCase], model: str, layers: int, random: int, seed: int
) -> Iterator[GraphCase]:
    if "rows" in groups:
        yield from rows
    if "random" in groups:
        yield from random_cases(random, seed)
    if "models" in groups:
        for name in model.split(","):
            yield GraphCase(f"{name.strip()}, {layers} layers", named_model(name, layers))
