"""One accuracy run from arms to files: what the command does between its options and its exit code."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fusecheck.errors import Inconclusive
from fusecheck.eval.arm import FUSED, NOISE, ORACLE, UNFUSED, read_arm_record
from fusecheck.eval.asked import Asked
from fusecheck.eval.compare import compare
from fusecheck.eval.gate import Verdict
from fusecheck.eval.outcome import Comparison, Options, TraceFound
from fusecheck.eval.progress import Tell
from fusecheck.eval.report_blocks import interruption
from fusecheck.eval.report_files import findings, summary, to_json
from fusecheck.eval.report_text import print_comparison, to_markdown
from fusecheck.eval.samples import Run, read_run
from fusecheck.report import write_markdown, write_result
from fusecheck.report.result import write_aside


@dataclass(frozen=True)
class Copies:
    """Further places for the files of a run."""

    json: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None


def require_lm_eval() -> None:
    """Check that what runs the arms is installed; `compare` needs none of it.

    Raises:
        Inconclusive: a package is missing.
    """
    for name in ("lm_eval", "tokenizers", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise Inconclusive(f"running the arms needs {name}, which is not installed; pip install 'fusecheck[eval]'")


def judge_arms(asked: Asked, options: Options, folder: Path, *, quick: bool, tell: Tell) -> Comparison:
    """Run the arms into `folder` and judge them: oracle, unfused, fused and, unless `quick`, unfused again.

    With `options.same_kernel` only the unfused arm and its repetition are run, and the second is judged as candidate.

    Raises:
        UsageError: a broken checkpoint, task, data folder or argument.
        ArmError: the ranks failed in the middle of an arm.
    """
    require_lm_eval()
    from fusecheck.eval.run import run_arms

    if options.same_kernel:
        arms: tuple[str, ...] = (UNFUSED, NOISE)
    else:
        arms = (ORACLE, UNFUSED, FUSED) if quick else (ORACLE, UNFUSED, FUSED, NOISE)
    done = run_arms(asked, arms, folder, tell)
    tell("judging")
    runs = {arm.name: read_run(arm.folder) for arm in done}
    outcome = _judge(runs, options)
    if FUSED in runs and outcome.tasks and (asked.trace or outcome.verdict is Verdict.FAIL):
        outcome = replace(outcome, trace=_trace(asked, outcome, runs, folder, tell))
    return outcome


def _trace(asked: Asked, outcome: Comparison, runs: dict[str, Run], folder: Path, tell: Tell) -> TraceFound:
    """Trace the questions that flipped."""
    from fusecheck.eval.run import open_job
    from fusecheck.eval.trace import change_of, choose, prompts, trace, write_trace

    job = open_job(asked)
    questions = choose(outcome, runs[UNFUSED], runs[FUSED])
    found = trace(job, questions, prompts(questions, runs[UNFUSED]), tell)
    return write_trace(found, change_of(outcome), folder)


def _judge(runs: dict[str, Run], options: Options) -> Comparison:
    if options.same_kernel:
        return compare(runs[UNFUSED], runs[NOISE], options=options)
    return compare(runs[UNFUSED], runs[FUSED], runs[ORACLE], runs.get(NOISE), options=options)


def judge_finished(options: Options, folder: Path, doing: str) -> Comparison | None:
    """Judge the arms that an interrupted run finished; None where the pair to compare is not among them.

    Args:
        options: as for `judge_arms`.
        folder: where the arms are.
        doing: what the run was doing.
    """
    finished = finished_arms(folder)
    if not {UNFUSED, NOISE if options.same_kernel else FUSED} <= finished.keys():
        return None
    return _judge({arm: read_run(folder / arm) for arm in finished}, options).cut_short(doing)


def finished_arms(folder: Path) -> dict[str, int]:
    """The arms in `folder` that came to their end, each with the number of its questions."""
    records = {arm: read_arm_record(folder / arm) for arm in (ORACLE, UNFUSED, FUSED, NOISE)}
    return {arm: int(record.extra.get("questions", 0)) for arm, record in records.items() if record is not None}


def deliver(outcome: Comparison, folder: Path, console: Console, *, full: bool, copies: Copies) -> int:
    """Write the comparison's files and print it; returns the exit code.

    `folder` gets result.json, report.html, accuracy.json (everything, the same bytes for the same inputs), junit.xml
    and accuracy.md.
    """
    # A pair that is not one could not be judged; the exit code says that the input is at fault.
    verdict = Verdict.INCONCLUSIVE if outcome.verdict is Verdict.INVALID else outcome.verdict
    write_result(folder, "accuracy", verdict.value, summary(outcome), findings(outcome), copies.json)
    write_aside(folder / "accuracy.json", json.dumps(to_json(outcome), indent=1) + "\n")
    write_aside(folder / "accuracy.md", to_markdown(outcome))
    _copy_junit(folder, copies)
    if copies.markdown is not None:
        write_aside(copies.markdown, to_markdown(outcome))
    # Last: a reader that closes the pipe ends the program here.
    print_comparison(outcome, console, full=full)
    if outcome.trace is not None:
        from fusecheck.eval.trace import in_lines

        console.print(Text(in_lines(outcome.trace)), soft_wrap=True)
    console.print(Text(f"written to {folder}"), soft_wrap=True)
    return outcome.verdict.exit_code


def deliver_record(
    verdict: Verdict, summary: dict[str, Any], found: list[dict[str, Any]], folder: Path, copies: Copies
) -> int:
    """Write the files of a run that has no comparison; returns the exit code."""
    record = write_result(folder, "accuracy", verdict.value, summary, found, copies.json)
    _copy_junit(folder, copies)
    if copies.markdown is not None:
        write_markdown(copies.markdown, record)
    return verdict.exit_code


def _copy_junit(folder: Path, copies: Copies) -> None:
    if copies.junit is not None:
        write_aside(copies.junit, (folder / "junit.xml").read_text(encoding="utf-8"))


def deliver_failure(error: Exception, folder: Path, console: Console, copies: Copies) -> int:
    """Report an arm that died: a kernel that crashes or hangs has failed, whatever it would have answered."""
    line = f"FAIL  an arm died before its last answer: {error}"
    console.print(Text(line, style="bold red"), soft_wrap=True)
    found = [{"stage": "alive", "title": "arm", "detail": str(error)}]
    return deliver_record(Verdict.FAIL, {"headline": line}, found, folder, copies)


def deliver_interruption(doing: str, finished: dict[str, int], folder: Path, console: Console, copies: Copies) -> int:
    """Report a run that Ctrl-C ended before there was anything to compare.

    Args:
        doing: what it was doing.
        finished: arms that came to their end, each with the number of its questions.
        folder: of the run.
        console: where to say so.
        copies: further places for the files.
    """
    done = ", ".join(f"{arm} ({questions:,} questions)" for arm, questions in finished.items())
    line = f"INCONCLUSIVE  {interruption(doing)}; finished arms: {done or 'none'}"
    console.print(Text(line, style="yellow"), soft_wrap=True)
    summary = {"headline": line, "finished_arms": finished, "interrupted": True}
    return deliver_record(Verdict.INCONCLUSIVE, summary, [], folder, copies)
