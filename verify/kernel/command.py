"""`fusecheck kernel` and `fusecheck replay`: their options, and the run that these ask for.

A typo must not wait for torch: what is heavy is imported once the options are read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusecheck import backends
from fusecheck.dataflow import dataflow
from fusecheck.errors import UsageError
from fusecheck.inputs.models import model as model_named
from fusecheck.journal import FILE_NAME, finished
from fusecheck.manual import some_backend, some_dataflow, some_families, some_model, some_ops, some_strategies
from fusecheck.operations import STATIC_OPS, Operation, Strategy
from fusecheck.report import Verdict
from fusecheck.report.places import JsonFile, MarkdownFile, RunDir

if TYPE_CHECKING:
    from fusecheck.kernel.report import KernelReport

Timeout = Annotated[float, typer.Option("--case-timeout", help="Seconds until a case counts as hung.")]
DataflowName = Annotated[
    str | None, typer.Option("--dataflow", help="Judge by this known dataflow.", autocompletion=some_dataflow)
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; where the backend runs, unless given.")]


def register(app: typer.Typer) -> None:
    """Add the commands `kernel` and `replay` to `app`."""
    app.command("kernel")(kernel)
    app.command("replay")(replay)


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
        typer.Option(help="Operations of `fusecheck backends`, comma-separated.", autocompletion=some_ops),
    ] = None,
    quantiser: Annotated[
        str | None,
        typer.Option(help="Only operations with these: none, static-fp8, mxfp8, ..., comma-separated."),
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
    most_elements: Annotated[int, typer.Option(min=1, help="tokens * hidden of the largest drawn case.")] = 2**19,
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
    from fusecheck.inputs.families import FAMILIES
    from fusecheck.kernel.plan import Plan
    from fusecheck.kernel.report import Subject
    from fusecheck.kernel.run import Budget, Run
    from fusecheck.kernel.session import run_kernel

    _positive("--case-timeout", case_timeout)
    shape = model_named(model) if model else None
    asked = _operations(backend, op, quantiser)
    plan = Plan(
        seed=seed,
        tokens=_numbers("--tokens", tokens),
        hidden=(shape.hidden,) if shape and not hidden else _numbers("--hidden", hidden),
        ops=tuple(each for each in asked if each in STATIC_OPS),
        others=tuple(each for each in asked if each not in STATIC_OPS),
        strategies=tuple(map(Strategy, _choices("--strategy", strategy, tuple(each.value for each in Strategy)))),
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
    most = 200 * bool(plan.ops) + len(plan.of_others(2))
    if not most:
        raise UsageError(f"--hidden {hidden}, expected a multiple of the groups of {asked[0].quantiser}")
    budget = Budget(cases if cases is not None or seconds is not None else most, seconds)
    sizes = _numbers("--virtual-ranks", virtual_ranks) or _numbers("--tp", tp)
    subjects = [Subject(backend, size, dataflow_name) for size in sizes]
    skip = frozenset(finished(resume / FILE_NAME)) if resume is not None else frozenset()
    where = _device(backend, device)
    run = Run(subjects, plan, budget, device=where, virtual=virtual_ranks is not None, timeout=case_timeout, skip=skip)
    _finish(run_kernel("kernel", run, run_dir or resume, json_file, markdown))


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
    from fusecheck.kernel.given import Given, replay_lines
    from fusecheck.kernel.report import Subject
    from fusecheck.kernel.run import Budget, Run
    from fusecheck.kernel.session import run_kernel
    from fusecheck.problem import Problem

    _positive("--case-timeout", case_timeout)
    problems = [Problem.from_json(line) for line in replay_lines(problem)]
    sizes = dict.fromkeys(p.world_size for p in problems)
    if dataflow_name is not None:
        dataflow(dataflow_name)
    subjects = [Subject(backend, size, dataflow_name) for size in sizes]
    plan = Given(problems)
    where = _device(backend, device)
    run = Run(subjects, plan, Budget(cases=len(problems)), device=where, timeout=case_timeout)
    _finish(run_kernel("replay", run, run_dir, json_file, markdown))


def _operations(backend: str, named: str | None, quantisers: str | None) -> tuple[Operation, ...]:
    """What is asked for: operations by name, else all that the backend says it has; of them those with a quantiser.

    Raises:
        UsageError: no operation is left.
    """
    of_backend: tuple[Operation, ...] = getattr(backends.backend(backend), "operations", STATIC_OPS)
    every = tuple(map(Operation.named, _split(named))) or of_backend
    wanted = _split(quantisers) or [each.quantiser for each in every]
    found = tuple(each for each in every if each.quantiser in wanted)
    if not found or not set(wanted) <= {each.quantiser for each in every}:
        known = ", ".join(dict.fromkeys(each.quantiser for each in every))
        raise UsageError(f"--quantiser {quantisers!r}, expected some of: {known}")
    return found


def _device(backend: str, given: str | None) -> str:
    """The device to run on: as given, else where the backend runs, else the CPU."""
    if given not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {given!r}, expected cpu or cuda")
    return given or backends.device_of(backend)


def _finish(report: KernelReport) -> None:
    if report.verdict is not Verdict.PASS:
        raise typer.Exit(report.verdict.exit_code)


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
