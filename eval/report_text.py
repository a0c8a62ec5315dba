"""A comparison on the terminal and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fusecheck.eval.flips import FlippedQuestion
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison
from fusecheck.eval.report_blocks import Block, around, blocks, headline, oracle_line, shorten, task_line
from fusecheck.report.visible import visible

_STYLE = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.INVALID: "bold red", Verdict.INCONCLUSIVE: "yellow"}


def open_console() -> Console:
    """A console on standard output; 150 columns wide where that is a file or a pipe and COLUMNS says nothing."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=150)


def print_comparison(outcome: Comparison, console: Console, *, full: bool = False) -> None:
    """Print the verdict, a line a task, then the blocks; `full` prints every row of the long ones."""
    style = _STYLE[outcome.verdict]
    console.print(Text(visible(headline(outcome)), style=style), soft_wrap=True)
    if len(outcome.tasks) > 1:
        for task in outcome.tasks:
            console.print(Text(f"  {visible(task_line(task))}", style=_STYLE[task.judgement.verdict]), soft_wrap=True)
        line = oracle_line(outcome)
        if line is not None and outcome.oracle is not None:
            console.print(Text(f"  {visible(line)}", style=_STYLE[outcome.oracle.verdict]), soft_wrap=True)
    for block in blocks(outcome):
        print_block(block, console, full=full)
    for flip in outcome.flipped:
        _print_flip(flip, console)


def print_block(block: Block, console: Console, *, full: bool) -> None:
    """Print one block; a long one only in part unless `full`, a wide one with few rows on its side."""
    rows = block.rows if full or not block.keep else block.rows[: block.keep]
    console.print(Text(f"\n{visible(block.title)}", style="bold"), soft_wrap=True)
    if rows:
        columns, cells = block.columns, [[visible(cell) for cell in row] for row in rows]
        width = sum(max(map(len, column)) + 3 for column in zip(columns, *cells, strict=True))
        if width > console.width and len(rows) <= 3:
            columns, *cells = ([*field] for field in zip(columns, *cells, strict=True))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(escape(column), overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)
    if len(rows) < len(block.rows):
        console.print(Text(f"  and {len(block.rows) - len(rows)} more; --full shows them"))
    for note in block.notes:
        console.print(Text(f"  {visible(note)}"), soft_wrap=True)


def _print_flip(flip: FlippedQuestion, console: Console) -> None:
    console.print()
    place = f"{flip.task}, doc_id {flip.doc_id}, prompt {flip.prompt_hash[:12]}"
    console.print(Text(visible(f"{flip.kind}: {place}"), style="bold"))
    console.print(Text(shorten(flip.question, 600)))
    console.print(Text(f"right answer: {shorten(flip.target, 300)}"))
    width = max(24, console.width // 2 - 2)
    sides = []
    for name, answer, text, margin in (
        ("baseline", flip.baseline, flip.baseline_text, flip.baseline_margin),
        ("candidate", flip.candidate, flip.candidate_text, flip.candidate_margin),
    ):
        title = f"{name}: {shorten(answer, 40)}" + ("" if margin is None else f", margin {margin:.3g} nat")
        body = shorten(text, 240) if flip.first_difference is None else around(text, flip.first_difference)
        sides.append(Panel(Text(body), title=Text(title), width=width))
    console.print(Columns(sides))


def to_markdown(outcome: Comparison) -> str:
    """The comparison as Markdown, for a pull request or a job summary."""
    lines = [f"**{_cell(headline(outcome))}**", ""]
    if len(outcome.tasks) > 1:
        lines += [f"- {_cell(task_line(task))}" for task in outcome.tasks]
        line = oracle_line(outcome)
        lines += [f"- {_cell(line)}"] if line else []
        lines.append("")
    for block in blocks(outcome):
        lines += _markdown_block(block)
    for flip in outcome.flipped:
        lines += _markdown_flip(flip)
    return "\n".join(lines).rstrip() + "\n"


def _markdown_block(block: Block) -> list[str]:
    lines = [f"### {_cell(block.title)}", ""]
    if block.rows:
        lines.append(_markdown_row(block.columns))
        lines.append("|" + " --- |" * len(block.columns))
        lines += [_markdown_row(row) for row in block.rows]
        lines.append("")
    if block.notes:
        lines += [f"- {_cell(note)}" for note in block.notes]
        lines.append("")
    return lines


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(c) for c in cells) + " |"


def _markdown_flip(flip: FlippedQuestion) -> list[str]:
    header = f"{flip.kind}: {flip.task}, doc_id {flip.doc_id}, prompt {flip.prompt_hash[:12]}"
    place = flip.first_difference
    sides = (
        (
            f"{flip.baseline}\n{shorten(flip.baseline_text, 240)}",
            f"{flip.candidate}\n{shorten(flip.candidate_text, 240)}",
        )
        if place is None
        else (around(flip.baseline_text, place), around(flip.candidate_text, place))
    )
    return [
        f"### {_cell(header)}",
        "",
        _cell(shorten(flip.question, 600)),
        "",
        _markdown_row(("right answer", "baseline", "candidate")),
        "| --- | --- | --- |",
        _markdown_row((shorten(flip.target, 300), *sides)),
        "",
    ]


def _cell(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new cell, no new line."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]|#!~$@" else c for c in visible(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<br>".join(escaped.splitlines())
