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
from fusecheck.interface import operations_of
from fusecheck.journal import FILE_NAME, finished
from fusecheck.listed import choices, names, numbers
from fusecheck.manual import some_backend, some_dataflow, some_families, some_model, some_ops, some_strategies
from fusecheck.operations import Operation, Strategy
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
    tp: Annotated[
        str | None, typer.Option(help="World sizes, such as 2 or 2,4,8; else 2 and 4, as far as there are GPUs.")
    ] = None,
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
    seconds: Annotated[
        float | None, typer.Option(help="Go on behind the core plan until so long after the first case, for each tp.")
    ] = None,
    cases: Annotated[
        int | None, typer.Option(help="Stop each tp after so many cases; fewer than the core plan's are no answer.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the stream of cases.")] = 0,
    most_elements: Annotated[int, typer.Option(help="tokens * hidden of the largest case.")] = 2**26,
    accept_refusals: Annotated[  # noqa: FBT002
        bool, typer.Option("--accept-refusals", help="A pass may be one on less than half of the core plan.")
    ] = False,
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

    The core plan comes first: each kernel by dtype, op and exchange, every kind of input, shape and call pattern, among
    them hundreds of calls on one workspace. Behind it --seconds or --cases draw more. A pass has reached every cell of
    the core plan that the kernel takes. A finding ends with a line that `fusecheck replay` takes.
    """
    _begin()
    from fusecheck.inputs.families import FAMILIES
    from fusecheck.kernel.plan import Plan
    from fusecheck.kernel.report import Subject
    from fusecheck.kernel.run import Run
    from fusecheck.kernel.session import run_kernel
    from fusecheck.kernel.turn import Budget
    from fusecheck.ranks.zygote import FOR_GPUS

    _positive("--case-timeout", case_timeout)
    _positive("--most-elements", most_elements)
    shape = model_named(model) if model else None
    asked = _operations(backend, op, quantiser)
    plan = Plan(
        seed=seed,
        tokens=numbers("--tokens", tokens),
        hidden=(shape.hidden,) if shape and not hidden else numbers("--hidden", hidden),
        strategies=tuple(map(Strategy, choices("--strategy", strategy, Strategy))),
        dtypes=choices("--dtype", dtype, ("bf16", "fp16")),
        families=choices("--family", family, FAMILIES),
        eps=_floats("--eps", eps) or ((shape.eps,) if shape else (1e-5, 1e-6)),
        weight_bias=shape.weight_bias if shape else None,
        most_elements=most_elements,
    ).asking(asked)
    if dataflow_name is not None:
        dataflow(dataflow_name)
    if seconds is not None:
        _positive("--seconds", seconds)
    if cases is not None:
        _positive("--cases", cases)
    if not plan.ops and not plan.of_others(2):
        raise UsageError(f"--hidden {hidden}, expected a multiple of the groups of {asked[0].quantiser}")
    where = _device(backend, device)
    if where == "cuda":
        _begin(*FOR_GPUS)
    sizes = numbers("--virtual-ranks", virtual_ranks) or numbers("--tp", tp) or _sizes(where)
    subjects = [Subject(backend, size, dataflow_name) for size in sizes]
    skip = frozenset(finished(resume / FILE_NAME)) if resume is not None else frozenset()
    run = Run(
        subjects,
        plan,
        Budget(cases, seconds=seconds),
        device=where,
        virtual=virtual_ranks is not None,
        timeout=case_timeout,
        skip=skip,
        accept_refusals=accept_refusals,
    )
    _finish(run_kernel("kernel", run, run_dir or resume, json_file, markdown))


def replay(
    problem: Annotated[str, typer.Argument(help="The JSON of a finding's replay line, or a file with one per line.")],
    backend: Annotated[
        str | None, typer.Option(help="Another kernel than the line's.", autocompletion=some_backend)
    ] = None,
    dataflow_name: DataflowName = None,
    device: Device = None,
    case_timeout: Timeout = 60.0,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Run the cases of replay lines again: the same kernel, dataflow, checks, and what came before.

    A line is whole; one of an earlier version, which names no backend, needs --backend.
    """
    _begin()
    from fusecheck.invariance.replaying import is_question
    from fusecheck.kernel.given import read_questions, run_of
    from fusecheck.kernel.session import run_kernel

    _positive("--case-timeout", case_timeout)
    if dataflow_name is not None:
        dataflow(dataflow_name)
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {device!r}, expected cpu or cuda")
    if is_question(problem):
        _replay_invariance(problem, backend, device, json_file, run_dir)
        return
    questions = read_questions(problem, backend=backend, flow=dataflow_name, device=device)
    _finish(run_kernel("replay", run_of(questions, case_timeout), run_dir, json_file, markdown))


def _begin(*modules: str) -> None:
    """Have the process that starts ranks import what they need while this one does."""
    from fusecheck.ranks.zygote import ZYGOTE

    ZYGOTE.begin(("fusecheck.case.worker", *modules))


def _replay_invariance(
    line: str, backend: str | None, device: str | None, json_file: Path | None, run_dir: Path | None
) -> None:
    from fusecheck.invariance.certificate import sentence
    from fusecheck.invariance.replaying import replay as again
    from fusecheck.kernel.session import say_where
    from fusecheck.report import make_run_dir, write_result

    directory = make_run_dir("replay", run_dir)
    record = again(line, backend=backend, device=device)
    parted = record["verdict"] == "breaks"
    found = [{"stage": record["claim"], "message": sentence(record), "question": line}] if parted else []
    verdict = Verdict.of(failed=parted, complete=True)
    write_result(directory, "replay", verdict, {"cases": 1}, found, json_file)
    typer.echo(sentence(record))
    say_where(directory)
    if parted:
        raise typer.Exit(verdict.exit_code)


def _sizes(device: str) -> tuple[int, ...]:
    """The world sizes of a plain run: as many ranks as there are GPUs, two at least."""
    if device != "cuda":
        return (2, 4)
    from torch.cuda import device_count

    return (2, 4) if device_count() >= 4 else (2,)


def _operations(backend: str, named: str | None, quantisers: str | None) -> tuple[Operation, ...]:
    """What is asked for: operations by name, else all that the backend says it has; of them those with a quantiser.

    Raises:
        UsageError: no operation is left, or the backend does not say what it has.
    """
    every = tuple(map(Operation.named, names(named))) or operations_of(backends.backend(backend))
    wanted = names(quantisers) or [each.quantiser for each in every]
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


def _floats(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in names(text))
    except ValueError:
        raise UsageError(f"{option} {text!r}, expected numbers such as 1e-5,1e-6") from None
