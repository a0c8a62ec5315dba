"""`fusecheck protocol`: is the protocol between ranks right in every interleaving?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fusecheck.errors import UsageError
from fusecheck.interrupts import Interruption
from fusecheck.plugins import plug_in
from fusecheck.protocol.check import check_museum, smallest
from fusecheck.protocol.explorer import MEMORIES
from fusecheck.protocol.language import Model, Size
from fusecheck.protocol.museum import FULL, KERNELS, LEFT_OUT, MUSEUM
from fusecheck.protocol.system import place
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir

console = Console(highlight=False)
DEFAULT = Size(2, 2, 7)
REPAIRED = ".repaired"
STATES = 2_000_000
"""The most states of one exploration: some gigabytes."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("protocol")(protocol)


def some_name(incomplete: str) -> Iterator[str]:
    """Kernels and exhibits by name."""
    return (name for name in _names() if name.startswith(incomplete))


def _names() -> list[str]:
    return [*KERNELS, *(x.name for x in MUSEUM), *(x.name + REPAIRED for x in MUSEUM)]


def protocol(
    name: Annotated[
        str | None,
        typer.Argument(help="A kernel or a fault of --list; without one, all of them.", autocompletion=some_name),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Of the group, N.")] = None,
    blocks: Annotated[int | None, typer.Option(help="The most of a launch, B.")] = None,
    calls: Annotated[int | None, typer.Option(help="One after another on one workspace, K.")] = None,
    memory: Annotated[str | None, typer.Option(help="sc or relaxed; both, if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="Your own protocol: package.module:attribute.")] = None,
    states: Annotated[int, typer.Option(min=1, help="The most of one exploration; more is inconclusive.")] = STATES,
    listing: Annotated[bool, typer.Option("--list", help="Print what there is, with sources, and stop.")] = False,  # noqa: FBT002
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Try every interleaving of a protocol between ranks, and show the first that goes wrong as a schedule.

    Without a name: every published fault of the museum must be found and its repaired form be right, and the kernels as
    they are today are explored. With one, or with --model, the verdict is that of the one protocol.

    Examples:
      fusecheck protocol
      fusecheck protocol moe-finalize --ranks 2 --blocks 1 --calls 3
      fusecheck protocol two-shot --memory relaxed --blocks 2 --calls 7
      fusecheck protocol --model mypackage.protocols:MyBarrier
    """
    if memory is not None and memory not in MEMORIES:
        raise UsageError(f"--memory {memory!r}, expected one of: {', '.join(MEMORIES)}")
    memories = MEMORIES if memory is None else (memory,)
    given = None if ranks is blocks is calls is None else _size(ranks, blocks, calls)
    if listing:
        _list()
        return
    if name is not None and model is not None:
        raise UsageError(f"got both {name!r} and --model {model}, expected one of them")
    one = _loaded(model) if model is not None else _named(name) if name is not None else None
    directory = make_run_dir("protocol", run_dir)
    if one is None:
        verdict, summary, findings = _museum(given, memories)
    else:
        verdict, summary, findings = _single(one, name or str(model), given or DEFAULT, memories, states)
    write_result(directory, "protocol", verdict, summary, findings, json_file)
    console.out(f"{verdict.value}{', interrupted' * summary.get('interrupted', False)}  {directory / 'result.json'}")
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


Result = tuple[Verdict, dict[str, Any], list[dict[str, Any]]]


def _museum(given: Size | None, memories: tuple[str, ...]) -> Result:
    def seen(row: dict[str, Any]) -> None:
        found, right = row["faulty"], all(x["verdict"] == "pass" for x in row["repaired"])
        how = f"{found['kind']} in {len(found['steps'])} steps, {found['memory']}" if row["killed"] else "survived"
        console.out(f"{row['id']}: {how}; repaired: {'right' if right else 'WRONG'}")

    summary = check_museum(MUSEUM, given, memories, seen)
    summary["kernels"] = []
    sizes = FULL if given is None else (given,)
    with Interruption() as stop:
        for name, (title, model) in ({} if summary["interrupted"] else KERNELS).items():
            outcomes = [smallest(model, size, memory).to_record() for size in sizes for memory in memories]
            summary["kernels"].append({"id": name, "title": title, "outcomes": outcomes})
            worst = next((x for x in outcomes if x["verdict"] != "pass"), outcomes[0])
            right = worst["verdict"] == "pass"
            console.out(f"{title}: {'right' if right else '; '.join(worst.get('outcome', ['not explored']))}")
    summary["interrupted"] |= stop.happened
    wrong = [row for row in summary["exhibits"] if not row["killed"]]
    findings = [{"kind": "survived", "message": row["title"], "exhibit": row["id"]} for row in wrong]
    for row in summary["exhibits"]:
        findings += [
            {"kind": "false alarm", "message": f"{row['id']}, repaired: {'; '.join(x.get('outcome', []))}", **x}
            for x in row["repaired"]
            if x["verdict"] != "pass"
        ]
    return Verdict.of(failed=bool(findings), complete=not summary["interrupted"]), summary, findings


def _single(model: Model, name: str, size: Size, memories: tuple[str, ...], states: int) -> Result:
    outcomes = [smallest(model, size, memory, states) for memory in memories]
    records = [found.to_record() for found in outcomes]
    table = Table("memory", "size", "verdict", "states", "transitions", "seconds", "MB")
    for record in records:
        table.add_row(
            *(str(record[key]) for key in ("memory", "size", "verdict", "states", "transitions", "seconds", "peak_mb"))
        )
    console.print(table)
    findings = []
    for record in (r for r in records if r["verdict"] == "fail"):
        message = "; ".join(record["outcome"])
        findings.append({"kind": record["kind"], "message": message, **record, "model": name})
        console.out(f"{record['memory']}, {record['size']}:")
        for number, step in enumerate(record["steps"], 1):
            where = f"rank {step['rank']} block {step['block']} call {step['call']} {step['kernel']}"
            console.out(f"{number:4} {where}: {'; '.join(step['does'])}")
        for line in record["outcome"]:
            console.out(f"     {line}")
    verdicts = {record["verdict"] for record in records}
    verdict = Verdict.of(failed="fail" in verdicts, complete="inconclusive" not in verdicts)
    kernels = [{"id": name, "title": name, "outcomes": records}]
    return verdict, {"faults": 0, "killed": 0, "false_alarms": 0, "exhibits": [], "kernels": kernels}, findings


def _size(ranks: int | None, blocks: int | None, calls: int | None) -> Size:
    return Size(
        DEFAULT.ranks if ranks is None else ranks,
        DEFAULT.blocks if blocks is None else blocks,
        DEFAULT.calls if calls is None else calls,
    )


def _named(name: str) -> Model:
    if name in KERNELS:
        return KERNELS[name][1]
    for exhibit in MUSEUM:
        if name == exhibit.name:
            return exhibit.faulty
        if name == exhibit.name + REPAIRED:
            return exhibit.repaired
    raise UsageError(f"no protocol {name!r}; fusecheck protocol --list prints their names")


def _loaded(path: str) -> Model:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(plug_in(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--model {path}: {error}; expected package.module:attribute") from None
    except Exception as error:
        raise UsageError(f"--model {path}: importing it raised {_told(error)}") from error
    if not callable(getattr(found, "launches", None)):
        raise UsageError(f"--model {path} has no launches(size); see fusecheck.protocol.language.Model")
    try:
        made: Model = found() if isinstance(found, type) else found
        made.launches(DEFAULT)
    except Exception as error:
        raise UsageError(f"--model {path} raised {_told(error)}") from error
    return made


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}; mend the protocol ({place(error)})"


def _list() -> None:
    table = Table("name", "what it is", "source")
    for name, (title, _) in KERNELS.items():
        table.add_row(name, title, "")
    for exhibit in MUSEUM:
        table.add_row(exhibit.name, exhibit.title, exhibit.link)
    for link, reason in LEFT_OUT.items():
        table.add_row("left out", reason, link, style="dim")
    console.print(table)
