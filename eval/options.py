"""Options that several accuracy commands share, and what their text means."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fusecheck.errors import UsageError
from fusecheck.eval.gate import DEFAULT_MARGINS, GateSettings
from fusecheck.report.places import place

QUICK_MARGIN = 0.015


@dataclass(frozen=True)
class Shared:
    """The options that `accuracy` and `accuracy compare` have in common; see `with_shared`."""

    margins: Annotated[
        list[str] | None,
        typer.Option(
            "--margin",
            metavar="TASK=POINTS",
            help="Largest accepted drop, in points; repeatable. "
            + ", ".join(f"{task} {100 * margin:g}" for task, margin in DEFAULT_MARGINS.items())
            + ", any other task 1.",
        ),
    ] = None
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="TASK=METRIC,FILTER",
            help="What is judged, where not acc or exact_match under flexible-extract; repeatable.",
        ),
    ] = None
    flips: Annotated[
        int, typer.Option("--flips", min=0, help="Show so many questions whose answer changed, with both answers.")
    ] = 0
    full: Annotated[bool, typer.Option("--full", help="Print every row of the long tables.")] = False
    json: Annotated[Path | None, place("--json", help="Write result.json to this file too.")] = None
    junit: Annotated[Path | None, place("--junit", help="Write JUnit XML to this file too.")] = None
    markdown: Annotated[Path | None, place("--markdown", help="Write Markdown to this file too.")] = None
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder for all files; runs/<utc>-accuracy if not given.")
    ] = None


def with_shared(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of `Shared` as options behind its own; it gets them as its argument `shared`."""
    own = inspect.signature(command, eval_str=True)
    kinds = get_type_hints(Shared, include_extras=True)
    added = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=kinds[f.name])
        for f in fields(Shared)
    ]
    parameters = [*(p for p in own.parameters.values() if p.name != "shared"), *added]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        shared = Shared(**{f.name: given.pop(f.name) for f in fields(Shared)})
        command(**given, shared=shared)

    # Where typer reads which options there are.
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def read_settings(margins: Sequence[str] | None, *, quick: bool = False) -> GateSettings:
    """The gate's settings with the user's margins.

    Raises:
        UsageError: a margin that is not TASK=POINTS with points in (0, 100].
    """
    chosen = dict.fromkeys(DEFAULT_MARGINS, QUICK_MARGIN) if quick else dict(DEFAULT_MARGINS)
    for text in margins or ():
        task, equals, value = text.partition("=")
        try:
            points = float(value)
        except ValueError:
            points = math.nan
        if not (task and equals and 0 < points <= 100):
            raise UsageError(f"--margin {text}: expected TASK=POINTS with points above 0, such as mmlu=0.5")
        chosen[task] = points / 100
    return GateSettings(margins=chosen)


def require_margins(names: Sequence[str], settings: GateSettings) -> None:
    """Ask for the margin of every task that has none: it is fixed before the numbers are seen.

    Raises:
        UsageError: a task without a margin.
    """
    lacking = [name for name in names if name not in settings.margins]
    if lacking:
        asked = " ".join(f"--margin {name}=POINTS" for name in lacking)
        known = ", ".join(f"{name} {100 * value:g}" for name, value in settings.margins.items())
        raise UsageError(f"no margin is known for {', '.join(lacking)} (known, in points: {known}); give {asked}")


def read_metrics(metrics: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """(metric, filter) by task.

    Raises:
        UsageError: one that is not TASK=METRIC,FILTER.
    """
    chosen = {}
    for text in metrics or ():
        task, _, rest = text.partition("=")
        metric, comma, name = rest.partition(",")
        if not (task and metric and comma and name):
            raise UsageError(f"--metric {text}: expected TASK=METRIC,FILTER, such as gsm8k=exact_match,strict-match")
        chosen[task] = (metric, name)
    return chosen


def read_tasks(tasks: str | None) -> list[str]:
    """The names in a comma-separated list.

    Raises:
        UsageError: a list without a name.
    """
    names = [t.strip() for t in (tasks or "").split(",") if t.strip()]
    if tasks is not None and not names:
        raise UsageError("--tasks: expected names separated by commas, such as mmlu,gsm8k")
    return names
