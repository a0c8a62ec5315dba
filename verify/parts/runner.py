"""Runs the parts behind the kernel question one after the other, each in a process and a folder of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fusecheck.backends.packages import is_installed
from fusecheck.errors import UsageError
from fusecheck.interrupts import Interruption
from fusecheck.parts.agenda import Form, Step
from fusecheck.parts.reuse import keep, recall
from fusecheck.ranks.mpi import detect
from fusecheck.report import Verdict
from fusecheck.report.record import read_run

HANG_SECONDS = 1800.0
"""Without a budget a part runs to its end; this only keeps one that hangs from holding the job for ever."""

OWN_END_SECONDS, TOLD_END_SECONDS = 3.0, 7.0
"""After Ctrl-C: a part has had the signal from the terminal too and may write what it has; then it is told again."""

POLL_SECONDS = 0.5
"""How often a part that runs is looked at, and Ctrl-C heeded."""

OUTPUT = "output.txt"
"""In a part's folder: what it printed."""


class Steps:
    """Runs parts and keeps their records, and the reasons for those that were left out.

    Args:
        directory: of the run; each part gets a folder in it.
        console: where to say what runs.
        deadline: of all parts, on the monotonic clock; None for no budget.
        stop: tells whether the user has had enough; in its context, which does not raise.
        resume: whether a part that passed in `directory` before, and is still valid, is not run again.
        required: parts that have to be answered, whatever it is that keeps them.
    """

    def __init__(
        self,
        directory: Path,
        console: Console,
        deadline: float | None,
        stop: Interruption,
        *,
        resume: bool = False,
        required: Collection[str] = (),
    ) -> None:
        self._directory, self._console, self._deadline = directory, console, deadline
        self._resume, self._stop = resume, stop
        self._required = required
        self.done: dict[str, dict[str, Any]] = {}
        self.not_run: list[dict[str, Any]] = []
        self.reused: list[str] = []

    def verdicts(self) -> list[Verdict]:
        """Those of the parts that were run; one that was asked for and not answered is inconclusive."""
        open_ = [Verdict.INCONCLUSIVE] if any(left["unanswered"] for left in self.not_run) else []
        return [Verdict(record["verdict"]) for record in self.done.values()] + open_

    def leave_out(self, name: str, reason: str, *, unanswered: bool) -> None:
        """Note that a part was not run; `unanswered` if it was asked for, and could have been."""
        self.not_run.append({"part": name, "reason": reason, "unanswered": unanswered or name in self._required})

    def take(self, step: Step, form: Form | None, *, wanted: bool) -> None:
        """Run a part in a form if it is wanted, possible and in time, else note why not; None is no time for it."""
        if lack := self._refusal(step, wanted=wanted):
            self.leave_out(step.name, lack.reason, unanswered=lack.mendable)
            return
        if form is None:
            reason = f"takes about {step.quick.seconds:.0f} s; give more --budget, or none"
            self.leave_out(step.name, reason, unanswered=True)
            return
        folder = self._directory / step.name
        if self._resume and (record := recall(folder, (step.name, *form.arguments))) is not None:
            self.done[step.name] = record
            self.reused.append(step.name)
            return
        left = HANG_SECONDS if self._deadline is None else self._deadline - time.monotonic()
        if form.seconds > left and form is step.full:
            form = step.quick
        if form.seconds > left:
            reason = f"takes about {form.seconds:.0f} s, {max(left, 0):.0f} s were left"
            self.leave_out(step.name, reason, unanswered=True)
            return
        self._run(step.name, form, folder, left)

    def _refusal(self, step: Step, *, wanted: bool) -> Lack | None:
        if not wanted:
            return Lack("left out by --only", mendable=False)
        if self._stop.noted:
            return Lack("interrupted", mendable=True)
        if detect() is not None:
            told = f"ranks of mpirun run the kernel question only; run fusecheck {step.name} by itself"
            return Lack(told, mendable=False)
        return missing(step.name)

    def _run(self, name: str, form: Form, folder: Path, limit: float) -> None:
        if (folder / OUTPUT).exists():  # of an earlier run in the same place, whose files must not mix with these
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "fusecheck", name, *form.arguments, "--run-dir", str(folder)]
        about = f"{name}: about {form.seconds:.0f} s" + (f" of {limit:.0f} s left" if self._deadline else "")
        self._console.print(about, highlight=False)
        with (folder / OUTPUT).open("w", encoding="utf-8") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            code = self._await(process, name, form, limit)
        self._collect(name, form, folder, code, limit)

    def _await(self, process: subprocess.Popen[bytes], name: str, form: Form, limit: float) -> int | None:
        """The exit code, or None when its time was up; after Ctrl-C it may write what it has."""
        began = time.monotonic()
        with self._console.status(name) as status:
            while (passed := time.monotonic() - began) < limit:
                if self._stop.noted:
                    return _end(process, (OWN_END_SECONDS, None), (TOLD_END_SECONDS, signal.SIGINT))
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=min(POLL_SECONDS, limit - passed))
                remaining = f"about {form.seconds - passed:.0f} s left" if passed < form.seconds else "nearly done"
                status.update(f"{name}: {passed:.0f} s, {remaining}")
        _end(process)
        return None

    def _collect(self, name: str, form: Form, folder: Path, code: int | None, limit: float) -> None:
        with suppress(UsageError):
            record = read_run(folder)
            self.done[name] = record
            if code in (0, 1) and not self._stop.noted:
                keep(folder, (name, *form.arguments))
            return
        if self._stop.noted:
            reason = "interrupted"
        elif code is None:
            reason = f"not done after {limit:.0f} s and stopped; give more --budget, or none"
        else:
            last = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            reason = f"ended with exit code {code}: {''.join(last) or 'it said nothing'}"[:400]
        self.leave_out(name, reason, unanswered=True)


@dataclass(frozen=True)
class Lack:
    """Why a part cannot run.

    Attributes:
        reason: one clause, with the remedy.
        mendable: it could on this machine: a package is missing, not a GPU.
    """

    reason: str
    mendable: bool


def missing(name: str) -> Lack | None:
    """What a part needs that is not here; None where it can run."""
    import torch

    if name == "latency":
        gpus = torch.cuda.device_count()
        if gpus < 2:
            return Lack(f"needs two GPUs, {gpus} here", mendable=False)
        if not is_installed("flashinfer"):
            told = "needs FlashInfer, which is not installed; pip install 'fusecheck[flashinfer]'"
            return Lack(told, mendable=True)
    if name == "accuracy" and not is_installed("lm_eval"):
        return Lack("needs lm-eval, which is not installed; pip install 'fusecheck[eval]'", mendable=True)
    return None


def _end(process: subprocess.Popen[bytes], *gentle: tuple[float, signal.Signals | None]) -> int | None:
    """End a process, ever less gently: each signal with the seconds that it has, then SIGTERM, then SIGKILL."""
    for seconds, number in (*gentle, (5.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
        if number is not None:
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=seconds)
    return None
