"""`fusecheck report`: one page from one run, or the comparison of several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fusecheck.errors import UsageError
from fusecheck.report.groups import sentence
from fusecheck.report.places import JsonFile, MarkdownFile, RunDir, place
from fusecheck.report.record import parts, read_run
from fusecheck.report.result import Verdict, make_run_dir, write_aside, write_markdown, write_result

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command `report` to `app`."""
    app.command("report")(report)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or result.json files.")],
    markdown: MarkdownFile = None,
    html: Annotated[Path | None, place("--html", help="Write report.html here too.")] = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Merge runs of several kernels, machines or dates into one comparison.

    The exit code is that of the worst run: 0 pass, 1 fail, 3 inconclusive; 2 where a run cannot be read.

    Examples:
      fusecheck report runs/*-kernel --markdown summary.md
      fusecheck report before/result.json after/result.json --run-dir runs/compared
    """
    records = dict(single for name, path in zip(_names(runs), runs, strict=True) for single in _single(name, path))
    verdict = Verdict.worst([Verdict(record["verdict"]) for record in records.values()])
    findings = [{**finding, "run": name} for name, record in records.items() for finding in record["findings"]]
    summary = {"runs": [{"name": name, "record": {**record, "findings": []}} for name, record in records.items()]}
    directory = make_run_dir("report", run_dir)
    written = write_result(directory, "report", verdict, summary, findings, json_file)
    if markdown is not None:
        write_markdown(markdown, written)
    if html is not None:
        write_aside(html, (directory / "report.html").read_text(encoding="utf-8"))
    for part in parts(written):
        line = f"{part.verdict}  {part.run}  {part.command}: {sentence(part)}"
        console.out(line, highlight=False)
    console.out(f"{directory}/report.html", highlight=False)
    raise typer.Exit(verdict.exit_code)


def _single(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A run under its name; of a comparison each of its runs, with its own findings."""
    record = read_run(path)
    if record["command"] != "report":
        yield name, record
        return
    for each in record["summary"]["runs"]:
        own = [{k: v for k, v in f.items() if k != "run"} for f in record["findings"] if f.get("run") == each["name"]]
        yield f"{name}/{each['name']}", {**each["record"], "findings": own}


def _names(runs: list[Path]) -> list[str]:
    """A short name for each run: its directory's, or the whole path where that is not unique.

    Raises:
        UsageError: the same run twice.
    """
    places = [run.resolve() for run in runs]
    if len(set(places)) < len(places):
        twice = next(run for run, place in zip(runs, places, strict=True) if places.count(place) > 1)
        raise UsageError(f"{twice} is given twice, expected each run once")
    short = [place.parent.name if place.name == "result.json" else place.name for place in places]
    return [name if short.count(name) == 1 else str(run) for name, run in zip(short, runs, strict=True)]
