"""The command line: one sub-command per question, and the mapping of errors to exit codes."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import fusecheck
import typer
from fusecheck import backends
from fusecheck.case.run import CHECKS
from fusecheck.dataflow import DATAFLOWS, dataflow
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.models import model as model_named
from fusecheck.interface import FusionOp, Strategy
from fusecheck.journal import FILE_NAME, finished
from fusecheck.kernel.plan import Case, Plan
from fusecheck.kernel.report import KernelReport, Subject
from fusecheck.kernel.run import Budget, Run
from fusecheck.kernel.session import run_kernel
from fusecheck.manual import (
    add_examples,
    page_width,
    some_backend,
    some_dataflow,
    some_families,
    some_model,
    some_ops,
    some_strategies,
)
from fusecheck.problem import WORLD_SIZES, Problem
from fusecheck.ranks.mpi import enter
from fusecheck.report import Verdict
from fusecheck.report.places import JsonFile, MarkdownFile, RunDir
from rich.console import Console

app = typer.Typer(
    name="fusecheck",
    help="Decide whether a fused AllReduce + residual + RMSNorm + FP8 kernel may replace the ops it fuses.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help folds to any width; panels cut their text off
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": page_width()},
)
console = Console()

_PLUGGED: tuple[str, ...] = (
    "fusecheck.verify_command",
    "fusecheck.report.command",
    "fusecheck.kernel.pace",
    "fusecheck.exhaust",
    "fusecheck.latency.command",
    "fusecheck.golden.command",
    "fusecheck.graph.command",
    "fusecheck.protocol.command",
    "fusecheck.faults.command",
    "fusecheck.eval.command",
)
"""Modules that add further commands."""

Timeout = Annotated[float, typer.Option("--case-timeout", help="Seconds until a case counts as hung.")]
DataflowName = Annotated[
    str | None, typer.Option("--dataflow", help="Judge by this known dataflow.", autocompletion=some_dataflow)
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; where the backend runs, unless given.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:  # noqa: FBT002
    if version:
        console.print(f"fusecheck {fusecheck.__version__}", highlight=False)
        raise typer.Exit


@app.command("kernel")
def kernel(
    backend: Annotated[
        str,
        typer.Option(help="A name of `fusecheck backends`, or package.module:attribute.", autocompletion=some_backend),
    ] = "emulated",
    tp: Annotated[str, typer.Option(help="World sizes, such as 2 or 2,4,8.")] = "2",
    model: Annotated[
        str | None,
        typer.Option(help="Take hidden size, eps and weight bias of a known model.", autocompletion=some_model),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Rows to choose from, such as 1,16,128.")] = None,
    hidden: Annotated[str | None, typer.Option(help="Hidden sizes to choose from.")] = None,
    op: Annotated[
        str | None,
        typer.Option(help="RESIDUAL_RMS_NORM[_QUANT_FP8|_OUT_QUANT_FP8], comma-separated.", autocompletion=some_ops),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="ONESHOT, TWOSHOT, AUTO, comma-separated.", autocompletion=some_strategies)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, comma-separated.")] = None,
    family: Annotated[
        str | None, typer.Option(help="Input families, comma-separated.", autocompletion=some_families)
    ] = None,
    eps: Annotated[str | None, typer.Option(help="Values of eps, comma-separated.")] = None,
    dataflow_name: DataflowName = None,
    seconds: Annotated[float | None, typer.Option(help="Stop each backend and tp after so long.")] = None,
    cases: Annotated[int | None, typer.Option(help="Stop each backend and tp after so many cases.")] = None,
    seed: Annotated[int, typer.Option(help="Of the stream of cases.")] = 0,
    most_elements: Annotated[int, typer.Option(help="tokens * hidden of the largest drawn case.")] = 2**19,
    device: Device = None,
    case_timeout: Timeout = 60.0,
    virtual_ranks: Annotated[
        str | None, typer.Option(help="World sizes like --tp, all ranks on one GPU and in one process.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on after the run in this directory.")] = None,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Does the kernel compute what it promises, on every rank, call after call?

    Cases are drawn from the seed: shapes, scales and input families in turn, calls of changing size on one workspace.
    Without --cases or --seconds, 200 for each world size. A finding ends with a line that `fusecheck replay` takes.
    """
    _positive("--case-timeout", case_timeout)
    shape = model_named(model) if model else None
    plan = Plan(
        seed=seed,
        tokens=_numbers("--tokens", tokens),
        hidden=(shape.hidden,) if shape and not hidden else _numbers("--hidden", hidden),
        ops=_members("--op", FusionOp, op),
        strategies=_members("--strategy", Strategy, strategy),
        dtypes=_choices("--dtype", dtype, ("bf16", "fp16")),
        families=_choices("--family", family, tuple(FAMILIES)),
        eps=_floats("--eps", eps) or ((shape.eps,) if shape else (1e-5, 1e-6)),
        weight_bias=shape.weight_bias if shape else None,
        most_elements=most_elements,
    )
    if dataflow_name is not None:
        dataflow(dataflow_name)
    if seconds is not None:
        _positive("--seconds", seconds)
    if cases is not None:
        _positive("--cases", cases)
    budget = Budget(cases if cases is not None or seconds is not None else 200, seconds)
    sizes = _numbers("--virtual-ranks", virtual_ranks) or _numbers("--tp", tp)
    subjects = [Subject(backend, size, dataflow_name) for size in sizes]
    skip = frozenset(finished(resume / FILE_NAME)) if resume is not None else frozenset()
    where = _device(backend, device)
    run = Run(subjects, plan, budget, device=where, virtual=virtual_ranks is not None, timeout=case_timeout, skip=skip)
    _finish(run_kernel("kernel", run, run_dir or resume, json_file, markdown))


@app.command("replay")
def replay(
    problem: Annotated[str, typer.Argument(help="The JSON of a finding's replay line, or a file with one per line.")],
    backend: Annotated[str, typer.Option(help="Whose kernel to run.", autocompletion=some_backend)] = "emulated",
    dataflow_name: DataflowName = None,
    device: Device = None,
    case_timeout: Timeout = 60.0,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Run the cases of replay lines again, with every check."""
    _positive("--case-timeout", case_timeout)
    problems = [Problem.from_json(line) for line in _replay_lines(problem)]
    sizes = dict.fromkeys(p.world_size for p in problems)
    if dataflow_name is not None:
        dataflow(dataflow_name)
    subjects = [Subject(backend, size, dataflow_name) for size in sizes]
    plan = _Given(problems)
    where = _device(backend, device)
    run = Run(subjects, plan, Budget(cases=len(problems)), device=where, timeout=case_timeout)
    _finish(run_kernel("replay", run, run_dir, json_file, markdown))


@app.command("backends")
def list_backends() -> None:
    """List the backends, the known dataflows, and the world sizes."""
    console.print("backends (or package.module:attribute):", highlight=False)
    for name, target in backends.backends().items():
        console.print(f"  {name}  {target}", highlight=False, markup=False)
    console.print("dataflows (emulated:<dataflow>, --dataflow):", highlight=False)
    for flow in DATAFLOWS.values():
        console.print(f"  {flow.name}  {flow.source}", highlight=False, markup=False)
    console.print(f"world sizes: {', '.join(map(str, WORLD_SIZES))}", highlight=False)


class _Given(Plan):
    """A plan that hands out given Problems, with every check."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__()
        object.__setattr__(self, "_problems", problems)

    def case(self, world_size: int, index: int) -> Case:
        mine = [p for p in self.__dict__["_problems"] if p.world_size == world_size]
        return Case(mine[index % len(mine)], CHECKS)


def _device(backend: str, given: str | None) -> str:
    """The device to run on: as given, else where the backend runs, else the CPU."""
    if given not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {given!r}, expected cpu or cuda")
    return given or str(getattr(backends.backend(backend), "device", "cpu"))


def _finish(report: KernelReport) -> None:
    if report.verdict is not Verdict.PASS:
        raise typer.Exit(report.verdict.exit_code)


def _replay_lines(given: str) -> list[str]:
    """The argument itself if it is JSON, else the lines of that file.

    Raises:
        UsageError: neither.
    """
    if given.lstrip().startswith("{"):
        return [given]
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{given!r} is neither a JSON object nor a readable file ({error})") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise UsageError(f"{given} has no replay line, expected one JSON object a line")
    return lines


def _positive(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{option} {value:g}, expected more than 0")


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    parts = _split(text)
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        raise UsageError(f"{option} {text!r}, expected whole numbers such as 2 or 2,4,8") from None
    if any(number < 1 for number in numbers):
        raise UsageError(f"{option} {text!r}, expected numbers of at least 1")
    return numbers


def _floats(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _split(text))
    except ValueError:
        raise UsageError(f"{option} {text!r}, expected numbers such as 1e-5,1e-6") from None


def _choices(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    parts = _split(text)
    for part in parts:
        if part not in known:
            raise UsageError(f"{option} {part!r}, expected one of: {', '.join(known)}")
    return tuple(parts) or known


def _members(option: str, kind: type[FusionOp] | type[Strategy], text: str | None) -> tuple:  # type: ignore[type-arg]
    names = _choices(option, text, tuple(member.value for member in kind))
    return tuple(kind(name) for name in names)


@functools.cache
def _plug_in_commands() -> None:
    """Add the further commands and the examples, once a process however often `main` runs in it."""
    for name in _PLUGGED:
        importlib.import_module(name).register(app)
    add_examples(app)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        # Under mpirun only rank 0 goes on from here.
        enter()
        _plug_in_commands()
        sys.exit(app(prog_name="fusecheck", standalone_mode=False) or 0)
    except UsageError as error:
        _complain(str(error), 2)
    except Inconclusive as error:
        _complain(str(error), 3)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted", 3)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong options, whichever click it carries
            raise
        _complain(f"{error.format_message()} Try --help.", 2)


def _complain(message: str, exit_code: int) -> NoReturn:
    print(f"fusecheck: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
