"""`fusecheck faults`: would Fusecheck notice if the kernel were wrong, and would anybody else?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fusecheck.errors import UsageError
from fusecheck.faults import listed, record, scale_sensitivity, screen, sensitivity
from fusecheck.faults.catalogue import GROUPS, Fault, catalogue
from fusecheck.faults.hunt import Budget
from fusecheck.faults.results import Result
from fusecheck.faults.run import FaultRun, Settings
from fusecheck.interrupts import Interruption
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir, place

console = Console()

MOST_SCALE_ERROR, MOST_SCALE_ERROR_DEEP = 2e-4, 3e-6
"""The smallest scale error must be rejected from here on: in any order, and with the depth declared."""

QUICK_LEGAL_CASES = 16
"""Cases of each right kernel with `--quick`."""

Others = Annotated[
    str | None, typer.Option(help="Judge other kernels: package.module:attribute, or a TOML file that lists some.")
]
Legal = Annotated[int, typer.Option(help="Cases of each right kernel, for false alarms; fewer with --quick.", min=0)]
Record = Annotated[Path | None, place("--record", help="Add what caught each fault at each seed to this file.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("faults")(faults)


def faults(
    group: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(GROUPS)}; may be repeated.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="An id, such as KA-01; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One of each of the thirty ranked kinds.")] = False,  # noqa: FBT002
    peers: Annotated[bool, typer.Option("--peers", help="Ask the field's criteria too.")] = False,  # noqa: FBT002
    sensitive: Annotated[bool, typer.Option("--sensitivity", help="Print how small an error is rejected.")] = False,  # noqa: FBT002
    backend: Others = None,
    listing: Annotated[bool, typer.Option("--list", help="Print the catalogue with its sources, and stop.")] = False,  # noqa: FBT002
    seed: Annotated[int, typer.Option(help="Of the plan.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds to run, from --seed on.", min=1)] = 1,
    cases: Annotated[int, typer.Option(help="Most cases for each fault.", min=1)] = Budget.cases,
    case_timeout: Annotated[float, typer.Option(help="Seconds until a case counts as hung.", min=0.5)] = Budget.timeout,
    legal_cases: Legal = Settings.legal_cases,
    record_file: Record = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Inject published bugs, one at a time, and print who notices: Fusecheck, and the criteria of other suites.

    Exit code 0: all were caught and no right kernel was rejected; 1: not so; 2: wrong usage; 3: nothing was run.
    """
    if not case_timeout < math.inf:
        raise UsageError(f"--case-timeout {case_timeout:g}, expected seconds: some faults hang until then")
    chosen = catalogue().select(group or (), fault or (), quick=quick)
    if listing:
        _list(chosen, with_left_out=not (group or fault or quick))
        return
    others = listed.read(backend) if backend else []
    folder = make_run_dir("faults", run_dir)
    budget = Budget(cases=cases, timeout=case_timeout)
    if sensitive:
        verdict, summary, findings = _sensitivity(seed)
    elif others:
        verdict, summary, findings = _others(others, Settings(budget=budget), seed)
    else:
        legal = min(legal_cases, QUICK_LEGAL_CASES) if quick else legal_cases
        settings = Settings(tuple(range(seed, seed + seeds)), budget, legal, peers, shrink=not quick)
        verdict, summary, findings = _catalogue(chosen, settings, record_file)
    write_result(folder, "faults", verdict, summary, findings, json_file)
    console.out(f"{verdict.value}  {folder / 'result.json'}", highlight=False)
    raise typer.Exit(verdict.exit_code)


Outcome = tuple[Verdict, dict[str, Any], list[dict[str, Any]]]


def _catalogue(chosen: list[Fault], settings: Settings, record_file: Path | None) -> Outcome:
    if not chosen:
        raise UsageError("no fault is selected; leave out --quick or name another --group")
    if record_file is not None:
        record.read(record_file)  # refused now, not after the run
    total, done = len(chosen) * len(settings.seeds), 0

    def seen(seed: int, result: Result) -> None:
        nonlocal done
        done += 1
        told = f"seed {seed}  " if len(settings.seeds) > 1 else ""
        console.out(f"{done:4}/{total}  {told}{screen.line(result)}", highlight=False)

    with FaultRun(settings, seen) as run:
        report = run.execute(chosen)
    screen.show(console, report)
    if record_file is not None:
        record.add(record_file, report)
    return report.verdict, report.summary(), report.findings()


def _others(kernels: list[listed.Listed], settings: Settings, seed: int) -> Outcome:
    judged: list[listed.Judged] = []
    with Interruption() as stop, FaultRun(settings) as run:
        for kernel in kernels:
            judged.append(listed.judge(run.hunter, kernel, seed))  # noqa: PERF401 - what is done by Ctrl-C counts
    screen.show_listed(console, judged)
    wrong = [each for each in judged if not each.as_expected]
    idle = any(not each.caught.cases for each in judged)
    verdict = Verdict.of(failed=bool(wrong), complete=not idle and not stop.happened)
    faulty = [each for each in judged if each.kernel.expect == "fail"]
    summary = {
        "faults": len(faulty),
        "killed": sum(each.caught.killed for each in faulty),
        "false_alarms": sum(each.caught.killed for each in judged if each.kernel.expect == "pass"),
        "kernels": [each.to_record() for each in judged],
        "interrupted": stop.happened,
    }
    return verdict, summary, [each.to_record() for each in wrong]


def _sensitivity(seed: int) -> Outcome:
    with sensitivity.one_thread():
        rows = sensitivity.table(seed)
        any_order = sensitivity.smallest_scale_error(depth=False, seed=seed)
        deep = sensitivity.smallest_scale_error(depth=True, seed=seed)
        scales = list(scale_sensitivity.rows(seed))
    screen.show_sensitivity(console, rows, any_order, deep)
    screen.show_scales(console, scales)
    blunt = [row.defect.name for row in rows if not row.kept]
    blunt += ["scale error, any order"] if any_order > MOST_SCALE_ERROR else []
    blunt += ["scale error, depth declared"] if deep > MOST_SCALE_ERROR_DEEP else []
    blunt += [f"scales of {row.quantiser}, declared {row.rules}" for row in scales if not row.sharp]
    defects = [row for row in rows if 8 in row.defect.expected]
    summary = {
        "faults": len(defects),
        "killed": sum(row.kept for row in defects),
        "false_alarms": sum(sum(row.rejected) for row in rows if row.defect.expected == (0, 0, 0)),
        "smallest_scale_error": {"any_order": any_order, "depth_declared": deep},
        "scales": [
            {"quantiser": r.quantiser, "declared": r.rules, "unit": r.unit, "rejected_from": r.steps} for r in scales
        ],
        "rows": [{"defect": row.defect.name, "rejected": list(row.rejected), "kept": row.kept} for row in rows],
    }
    verdict = Verdict.FAIL if blunt else Verdict.PASS
    return verdict, summary, [{"kind": "blunt", "message": name} for name in blunt]


def _list(chosen: list[Fault], *, with_left_out: bool) -> None:
    table = Table("id", "group", "what it does", "hook", "visible by", "source")
    for fault in chosen:
        table.add_row(fault.id, fault.group, fault.does, fault.hook, fault.visible, "\n".join(fault.links))
    for entry in catalogue().left_out if with_left_out else ():
        table.add_row(entry.id, "left out", entry.reason, "", "", "\n".join(entry.links), style="dim")
    console.print(table)
