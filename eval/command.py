"""`fusecheck accuracy`: run the arms and judge them, or judge runs that another engine made."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fusecheck.errors import UsageError
from fusecheck.eval.asked import Asked
from fusecheck.eval.chat import Chat
from fusecheck.eval.command_model import calibrate_checkpoint, import_checkpoint
from fusecheck.eval.compare import compare
from fusecheck.eval.endpoints import name_endpoints
from fusecheck.eval.gate import GateSettings
from fusecheck.eval.options import Shared, read_metrics, read_settings, read_tasks, require_margins, with_shared
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.progress import Progress, Tell
from fusecheck.eval.report_text import open_console, print_block
from fusecheck.eval.samples import Run, read_run
from fusecheck.eval.session import (
    Copies,
    deliver,
    deliver_failure,
    deliver_interruption,
    finished_arms,
    judge_arms,
    judge_finished,
    require_lm_eval,
)
from fusecheck.report import make_run_dir

GOLDEN_TASKS = ("golden_mmlu", "golden_gsm8k")
QUICK_TASKS = ("golden_mmlu",)


def register(app: typer.Typer) -> None:
    """Add the command group `accuracy` to `app`."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(accuracy)
    group.command("compare")(compare_runs)
    group.command("import")(import_checkpoint)
    group.command("calibrate")(calibrate_checkpoint)
    app.add_typer(group, name="accuracy")


@with_shared
def accuracy(
    context: typer.Context,
    *,
    model: Annotated[
        Path | None, typer.Option("--model", help="FP8 checkpoint folder; the small golden model if not given.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks, each a process.")] = 2,
    backend: Annotated[str, typer.Option("--backend", help="The fused kernel under test.")] = "emulated",
    tasks: Annotated[
        str | None, typer.Option("--tasks", help=f"lm-eval tasks; {','.join(GOLDEN_TASKS)} if not given.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with your MMLU and GSM8K; embedded samples if not given.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions of each task; of a group at least one a subject.")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="Examples before each question.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=4,
            help="Rows of a batch at most; 96 on a CPU, 512 on a GPU, fewer of a large model on a CPU.",
        ),
    ] = None,
    virtual: Annotated[
        bool, typer.Option("--virtual", help="All ranks in one process on one GPU, a thread and a stream each.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Name the first site and stage that deviate; also done when the gate fails.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts as turns, by the checkpoint's own template.")
    ] = False,
    multiturn: Annotated[
        bool, typer.Option("--fewshot-as-multiturn/--no-fewshot-as-multiturn", help="Examples as turns of their own.")
    ] = True,
    system: Annotated[str | None, typer.Option("--system-instruction", help="A text before every prompt.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how many questions it takes.")] = False,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Ask in blocks and stop when decided; goes on in the same --run-dir.")
    ] = False,
    block: Annotated[int, typer.Option("--block", min=1, help="Questions between two looks of --sequential.")] = 512,
    aa: Annotated[bool, typer.Option("--aa", help="Unfused against itself at another batch size: the noise.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three arms, multiple choice, margin 1.5 points.")] = False,
    operating: Annotated[
        bool, typer.Option("--operating-characteristics", help="Simulate the gate and print how it does.")
    ] = False,
    simulations: Annotated[int, typer.Option("--simulations", min=100, help="Simulated runs a cell.")] = 20000,
    noise: Annotated[
        Path | None,
        typer.Option(
            "--noise", help="With --operating-characteristics: a finished run, from whose two unfused arms to simulate."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Order of --sequential; simulations.")] = 0,
    expected_flips: Annotated[
        float | None, typer.Option("--expect-flips", min=0.01, max=100, help="Flips in percent, for --plan.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0, help="Seconds a question, for --plan.")] = None,
    shared: Shared,
) -> None:
    """Does the model answer as before?

    Runs the model unfused and fused on the same questions, with an FP8-free oracle and a repetition of the unfused
    arm, and judges the change by a paired interval against a margin. With no options it takes the golden model.

    `fusecheck accuracy compare BASELINE CANDIDATE` judges lm-eval runs of any other engine.
    """
    if context.invoked_subcommand is not None:
        return
    if sum((plan, sequential, aa, operating)) > 1:
        raise UsageError("--plan, --sequential, --aa, --operating-characteristics: give one of them")
    if noise is not None and not operating:
        raise UsageError("--noise: goes with --operating-characteristics, or with `fusecheck accuracy compare`")
    settings = read_settings(shared.margins, quick=quick)
    names = read_tasks(tasks) or list(QUICK_TASKS if quick else GOLDEN_TASKS)
    require_margins(names, settings)
    if plan:
        from fusecheck.eval.plan import plan_block

        share = None if expected_flips is None else expected_flips / 100
        print_block(plan_block(names, settings, limit=limit, seconds=seconds, flips=share), open_console(), full=True)
        return
    if noise is not None:
        from fusecheck.eval.aa import aa_block

        print_block(aa_block(noise, settings, pairs=simulations, seed=seed), open_console(), full=True)
        return
    if operating:
        from fusecheck.eval.operating import operating_blocks

        for table in operating_blocks(runs=simulations, sequential_runs=400, seed=seed, settings=settings):
            print_block(table, open_console(), full=True)
        return
    options = Options(settings=settings, metrics=read_metrics(shared.metrics), flips=shared.flips, same_kernel=aa)
    asked = Asked(
        model, tp, backend, names, data, limit, shots, device, batch, virtual, Chat(chat, multiturn, system), trace
    )
    copies = Copies(shared.json, shared.junit, shared.markdown)
    folder = make_run_dir("accuracy", shared.run_dir)
    if sequential:
        raise typer.Exit(_run_sequentially(asked, settings, folder, copies, block=block, seed=seed))
    raise typer.Exit(_run(asked, options, folder, copies, quick=quick, full=shared.full))


def _run(asked: Asked, options: Options, folder: Path, copies: Copies, *, quick: bool, full: bool) -> int:
    from fusecheck.eval.engine import ArmError

    console, progress = open_console(), Progress()
    outcome: Comparison | None
    try:
        with progress:
            outcome = judge_arms(asked, options, folder, quick=quick, tell=progress)
    except ArmError as error:
        return deliver_failure(error, folder, console, copies)
    except KeyboardInterrupt:
        outcome = judge_finished(options, folder, progress.doing)
    if outcome is None:
        return deliver_interruption(progress.doing, finished_arms(folder), folder, console, copies)
    return deliver(outcome, folder, console, full=full, copies=copies)


def _run_sequentially(
    asked: Asked, settings: GateSettings, folder: Path, copies: Copies, *, block: int, seed: int
) -> int:
    require_lm_eval()
    from fusecheck.eval.engine import ArmError
    from fusecheck.eval.session_sequential import (
        SequentialOutcome,
        asked_so_far,
        deliver_sequential,
        judge_sequentially,
    )

    console, progress = open_console(), Progress()
    outcomes: list[SequentialOutcome] = []
    try:
        with progress:
            # Those that were yielded before an interruption stay in the list.
            outcomes.extend(judge_sequentially(asked, settings, folder, block=block, seed=seed, tell=progress))
    except ArmError as error:
        return deliver_failure(error, folder, console, copies)
    except KeyboardInterrupt:
        so_far = asked_so_far(asked.tasks, folder)
        return deliver_sequential(outcomes, folder, console, copies, interrupted=progress.doing, asked=so_far)
    return deliver_sequential(outcomes, folder, console, copies)


@with_shared
def compare_runs(
    baseline: Annotated[Path, typer.Argument(help="lm-eval output folder, or results file, of the unfused run.")],
    candidate: Annotated[Path, typer.Argument(help="The same of the fused run.")],
    oracle: Annotated[Path | None, typer.Argument(help="The same weights in high precision.")] = None,
    *,
    noise: Annotated[Path | None, typer.Option("--noise", help="The unfused run again, at another batch size.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Judge only these tasks.")] = None,
    shared: Shared,
) -> None:
    """Judge two lm-eval runs of any engine, question by question.

    Each run is what `lm_eval … --log_samples --output_path FOLDER` wrote. Exit code: 0 pass, 1 fail, 3 inconclusive,
    4 where the runs are not a pair: other questions, prompts, settings, answers that never came, or one run twice.
    """
    options = Options(
        settings=read_settings(shared.margins),
        tasks=read_tasks(tasks),
        metrics=read_metrics(shared.metrics),
        flips=shared.flips,
    )
    console, copies, progress = open_console(), Copies(shared.json, shared.junit, shared.markdown), Progress()
    outcome: Comparison | None = None
    with suppress(KeyboardInterrupt), progress:
        runs = [_read(path, progress) for path in (baseline, candidate)]
        others = [None if path is None else _read(path, progress) for path in (oracle, noise)]
        progress("judging")
        named = [name for name in name_endpoints(runs[0]) if name in runs[0].tasks or name in runs[0].groups]
        require_margins([n for n in named if not options.tasks or n in options.tasks], options.settings)
        outcome = compare(*runs, *others, options=options)
    folder = make_run_dir("accuracy", shared.run_dir)
    if outcome is None:
        raise typer.Exit(deliver_interruption(progress.doing, {}, folder, console, copies))
    raise typer.Exit(deliver(outcome, folder, console, full=shared.full, copies=copies))


def _read(path: Path, tell: Tell) -> Run:
    tell(f"reading {path}")
    return read_run(path)
