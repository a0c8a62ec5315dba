"""`fusecheck graph`: does a rewrite put the fused collective where it belongs, and nowhere else?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fusecheck import backends
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.graph import autodeploy
from fusecheck.graph.config import BOTH_ENABLED, NORM_PASS, QUANT_PASS, load_transforms
from fusecheck.graph.dialects import NAMES, dialect_named
from fusecheck.graph.files import SUFFIX, FilePlan, load_file
from fusecheck.graph.model_plan import DECODER, FAMILIES, ModelPlan
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.run import GraphCase, GraphChecker, GraphResult, Subject, random_cases, row_cases
from fusecheck.graph.screen import GraphProgress, finding_records, show, summarise
from fusecheck.graph.subject import load_pass
from fusecheck.ranks import require_gpus
from fusecheck.report import Interruption, Verdict, make_run_dir, write_result
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
    ] = QUANT_PASS,
    after: Annotated[
        str, typer.Option(help=f"Which graph the pass gets: norm, after {NORM_PASS}; none, as exported.")
    ] = "norm",
    produces: Annotated[str, typer.Option(help="What the pass makes: quant, or norm.")] = "quant",
    only: Annotated[str, typer.Option(help="Which graphs, comma-separated: rows, random, models.")] = ",".join(GROUPS),
    given: Annotated[
        str | None, typer.Option("--graph", help="One graph: a finding's JSON line, or a .pt2 file of torch.export.")
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"Models, comma-separated: {DECODER}, {', '.join(FAMILIES)}.")
    ] = f"{DECODER},llama",
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
    checked = _subject(subject, after, produces)
    if tp not in WORLD_SIZES:
        raise UsageError(f"--tp {tp}, expected one of {', '.join(map(str, WORLD_SIZES))}")
    if not 0 < case_timeout < math.inf:
        raise UsageError(f"--case-timeout {case_timeout:g}, expected more than 0")
    backends.backend(backend)
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r}, expected cpu or cuda")
    if device == "cuda":
        require_gpus(tp)
    dialect_named(dialect)
    transforms = {**BOTH_ENABLED, **load_transforms(config)} if config else BOTH_ENABLED
    groups = _groups(only)
    cases = _given(given) if given else list(_cases(groups, model, layers, random, seed, tp))
    if not cases:
        raise Inconclusive("no graph to check: --only and --random leave none")
    directory = make_run_dir("graph", run_dir)
    options = {"backend": backend, "dialect": dialect, "timeout": case_timeout, "export": export, "device": device}
    work = {tp: cases}
    if not given and "rows" in groups and tp > 1:
        work[1] = row_cases(1)
    results: list[GraphResult] = []
    with Interruption() as stop, GraphProgress(console, sum(map(len, work.values())), results) as progress:
        for world_size, mine in work.items():
            with GraphChecker(checked, world_size, transforms=transforms, **options) as checker:  # type: ignore[arg-type]
                checker.check_all(mine, progress.seen)
    about = {"interrupted": stop.happened, "tensorrt_llm": autodeploy.status()}
    summary = summarise(results, checked, tp, backend, progress.seconds) | about
    verdict = Verdict.of(failed=not all(result.ok for result in results), complete=not stop.happened)
    show(results, summary, verdict, console)
    write_result(directory, "graph", verdict, summary, finding_records(results), json_file)
    console.print(f"{directory}/result.json", highlight=False, markup=False, soft_wrap=True)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _subject(name: str, after: str, produces: str) -> Subject:
    if after not in ("norm", "none"):
        raise UsageError(f"--after {after!r}, expected norm or none")
    if produces not in ("quant", "norm"):
        raise UsageError(f"--produces {produces!r}, expected quant or norm")
    load_pass(name)
    if name == NORM_PASS:
        return Subject(name, after_norm=False, quantises=False)
    return Subject(name, after_norm=after == "norm", quantises=produces == "quant")


def _groups(only: str) -> tuple[str, ...]:
    groups = tuple(part.strip() for part in only.split(","))
    for group in groups:
        if group not in GROUPS:
            raise UsageError(f"--only {group!r}, expected one of: {', '.join(GROUPS)}")
    return groups


def _given(text: str) -> list[GraphCase]:
    """The graph of `--graph`.

    Raises:
        UsageError: it is neither a plan nor an exported program.
    """
    if text.startswith('{"model":'):
        return [GraphCase("given", ModelPlan.from_json(text))]
    if text.lstrip().startswith("{"):
        return [GraphCase("given", GraphPlan.from_json(text))]
    if not text.endswith(SUFFIX):
        raise UsageError(f"--graph {text!r} is neither a finding's JSON line nor a {SUFFIX} file")
    load_file(FilePlan(text), 0)
    return [GraphCase(Path(text).name, FilePlan(text))]


def _cases(groups: tuple[str, ...], model: str, layers: int, random: int, seed: int, tp: int) -> Iterator[GraphCase]:
    if "rows" in groups:
        yield from row_cases(tp)
    if "random" in groups:
        yield from random_cases(random, seed)
    if "models" in groups:
        for name in model.split(","):
            plan = ModelPlan(model=name.strip(), layers=layers)
            yield GraphCase(f"{plan.model}, {layers} layers", plan)
