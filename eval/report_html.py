"""A comparison as a fragment of HTML for the report: no scripts, no styles of its own, nothing fetched.

Everything that came from a file is escaped. The fragment uses classes that the report's style sheet knows (`verdict`,
`pass`, `fail`, `inconclusive`, `invalid`, `figure`) and `currentColor`, so that it follows light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eval.flips import FlippedQuestion
from eval.outcome import Comparison, TaskResult
from eval.report_blocks import Block, around, blocks, headline, oracle_line, points, shorten, task_line, visible

_WIDTH, _ROW = 640, 40


def to_html(outcome: Comparison) -> str:
    """The comparison as one `<section>`; every text of a run is escaped."""
    parts = ['<section class="accuracy" aria-label="accuracy">']
    parts.append(f'<p class="verdict {outcome.verdict.value}">{_text(headline(outcome))}</p>')
    if len(outcome.tasks) > 1:
        lines = [task_line(t) for t in outcome.tasks]
        line = oracle_line(outcome)
        items = "".join(f"<li>{_text(x)}</li>" for x in [*lines, *([line] if line else [])])
        parts.append(f"<ul>{items}</ul>")
    if outcome.tasks:
        parts += [_interval_figure(outcome.tasks), *(_margin_figure(t) for t in outcome.tasks)]
    parts += [_table(block) for block in blocks(outcome)]
    flipped = outcome.flipped or outcome.examples
    if flipped:
        parts.append("<h3>Flipped answers</h3>")
        parts += [_flip(flip) for flip in flipped]
    parts.append("</section>")
    return "\n".join(p for p in parts if p)


def _text(text: str) -> str:
    return escape(visible(text), quote=True)


def _table(block: Block) -> str:
    notes = "".join(f"<p>{_text(n)}</p>" for n in block.notes)
    if not block.rows:
        return f"<h3>{_text(block.title)}</h3>{notes}"
    head = "".join(f'<th scope="col">{_text(c)}</th>' for c in block.columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in block.rows)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    if block.keep and len(block.rows) > block.keep:
        return f"<details><summary>{_text(block.title)} ({len(block.rows)})</summary>{table}{notes}</details>"
    return f"<h3>{_text(block.title)}</h3>{table}{notes}"


def _interval_figure(tasks: Sequence[TaskResult]) -> str:
    """Each task's interval for the change, with zero and the margin marked."""
    low = min(min(t.judgement.interval.low, -t.judgement.margin) for t in tasks)
    high = max(max(t.judgement.interval.high, 0.0) for t in tasks)
    pad = 0.08 * (high - low)
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return 120 + (value - low) / (high - low) * (_WIDTH - 140)

    height = _ROW * len(tasks) + 34
    zero = f'<line x1="{x(0):.1f}" y1="4" x2="{x(0):.1f}" y2="{height - 22}" stroke="currentColor" opacity="0.4"/>'
    marks = [zero, f'<text x="{x(0):.1f}" y="{height - 8}" text-anchor="middle">no change</text>']
    for index, task in enumerate(tasks):
        j, y = task.judgement, _ROW * index + 30
        name, estimate, margin = _text(shorten(task.endpoint.name, 16)), x(j.flips.delta), x(-j.margin)
        marks += [
            f'<text x="4" y="{y + 4}">{name}</text>',
            f'<line x1="{x(j.interval.low):.1f}" y1="{y}" x2="{x(j.interval.high):.1f}" y2="{y}" '
            'stroke="currentColor" stroke-width="3"/>',
            f'<circle cx="{estimate:.1f}" cy="{y}" r="5" fill="currentColor"/>',
            f'<line x1="{margin:.1f}" y1="{y - 12}" x2="{margin:.1f}" y2="{y + 12}" '
            'stroke="currentColor" stroke-dasharray="3 2"/>',
            f'<text x="{margin:.1f}" y="{y - 13}" text-anchor="middle">margin {points(-j.margin)}</text>',
        ]
    label = "; ".join(f"{t.endpoint.name}: {points(t.judgement.flips.delta)} points" for t in tasks)
    return _svg(height, f"Change of accuracy with its bounds. {label}", marks)


def _margin_figure(task: TaskResult) -> str:
    """Lost and gained answers by quartile of the baseline's margin: flips belong where the baseline hesitates."""
    slices = [s for s in task.slices if s.kind.startswith("baseline margin")]
    largest = max((max(s.lost, s.gained) for s in slices), default=0)
    if not largest:
        return ""
    marks = []
    for index, part in enumerate(slices):
        for offset, (name, count) in enumerate((("lost", part.lost), ("gained", part.gained))):
            y, width = 40 * index + 14 + 16 * offset, count / largest * 320
            style = 'fill="currentColor"' if name == "lost" else 'fill="none" stroke="currentColor"'
            marks.append(f'<rect x="220" y="{y}" width="{width:.1f}" height="11" {style}/>')
            marks.append(f'<text x="{228 + width:.1f}" y="{y + 10}">{count} {name}</text>')
        marks.append(f'<text x="4" y="{40 * index + 30}">{_text(part.label)} nat</text>')
    label = f"Flips of {task.endpoint.name} by quartile of the baseline's margin"
    return _svg(40 * len(slices) + 14, label, marks)


def _svg(height: int, label: str, marks: Sequence[str]) -> str:
    return (
        f'<figure class="figure"><svg role="img" aria-label="{_text(label)}" viewBox="0 0 {_WIDTH} {height}" '
        f'fill="currentColor" font-size="12" font-family="sans-serif">{"".join(marks)}</svg>'
        f"<figcaption>{_text(label)}</figcaption></figure>"
    )


def _flip(flip: FlippedQuestion) -> str:
    title = f"{flip.kind}: {flip.task}, doc_id {flip.doc_id}, prompt {flip.prompt_hash[:12]}"
    place = flip.first_difference
    sides = []
    for name, answer, text, margin in (
        ("baseline", flip.baseline, flip.baseline_text, flip.baseline_margin),
        ("candidate", flip.candidate, flip.candidate_text, flip.candidate_margin),
    ):
        body = shorten(text, 240) if place is None else around(text, place)
        note = "" if margin is None else f" (margin {margin:.3g} nat)"
        sides.append(f"<td><strong>{name}{note}: {_text(shorten(answer, 60))}</strong><pre>{_text(body)}</pre></td>")
    return (
        f"<details><summary>{_text(title)}</summary><pre>{_text(shorten(flip.question, 1200))}</pre>"
        f"<p>right answer: {_text(shorten(flip.target, 300))}</p>"
        f'<div class="scroll"><table><tbody><tr>{"".join(sides)}</tr></tbody></table></div></details>'
    )
