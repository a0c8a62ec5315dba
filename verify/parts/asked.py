"""What `fusecheck verify` asks of the kernel question: which kernels, at which world sizes, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from fusecheck.backends import device_of, shipped
from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.parts.agenda import KERNEL_SECONDS, REAL_SECONDS
from fusecheck.ranks.mpi import detect

if TYPE_CHECKING:
    from fusecheck.kernel.run import Run

WORLD_SIZES = (2, 4)
LARGER = (8,)
"""Also, where cases or a budget are given: eight ranks take more than half of the time on two cores."""

DRAWN = 10
"""Cases of each kernel behind the core plan: over the world sizes, each kernel meets every input family."""

MOST_ELEMENTS = 2**26
"""tokens * hidden of the largest case."""

HUNG_ON_GPUS = 20.0
"""Seconds of one case there; the slowest of the core plan takes two."""

START_SECONDS, OVERSHOOT = 3.0, 0.1
"""What starting the ranks of a world size takes, and by what share the cases in flight overrun their time."""


@dataclass(frozen=True)
class Asked:
    """What is asked of the kernel question.

    Attributes:
        seed: of the stream of cases.
        cases: of each subject, as given.
        most_elements: of the largest case.
        seconds: for all subjects; None without a budget.
        backend: the kernel; None for the emulator under every dataflow.
    """

    seed: int
    cases: int | None
    most_elements: int
    seconds: float | None
    backend: str | None = None

    def run(self) -> tuple[Run, dict[str, str]]:
        """Every kernel at every world size that takes it, and the reasons of the others.

        Raises:
            UsageError: the kernel is unknown, or no world size takes it.
            Inconclusive: there are too few GPUs for any.
        """
        names = [f"emulated:{name}" for name in DATAFLOWS] if self.backend is None else [self.backend]
        refused: dict[str, str] = {}
        if there := self._shipped():
            run, refused = _possible(self._run(there, "cuda"), "installed kernels")
            if run.subjects:
                return run, refused | {
                    "emulated kernels": "real ones are here; ask by fusecheck kernel --backend emulated"
                }
        asked = self._run(names, "cpu" if self.backend is None else device_of(self.backend))
        run, more = _possible(asked)
        if not run.subjects:
            asked.validate()
        return run, refused | more

    def takes(self) -> float:
        """Seconds that it takes about; the core plan of each real kernel is run whatever the budget is.

        Raises:
            UsageError, Inconclusive: as `run`.
        """
        run, _ = self.run()
        return KERNEL_SECONDS if run.device == "cpu" else REAL_SECONDS * len(run.subjects)

    def _shipped(self) -> list[str]:
        """The installed kernels for GPUs, where none is named and there are GPUs for them."""
        from torch.cuda import device_count

        needed = min(WORLD_SIZES) if detect() is None else 1  # mpirun may show each of its ranks one
        return shipped() if self.backend is None and device_count() >= needed else []

    @property
    def _sizes(self) -> tuple[int, ...]:
        return WORLD_SIZES if self.cases is None and self.seconds is None else WORLD_SIZES + LARGER

    def _run(self, names: Sequence[str], device: str) -> Run:
        from fusecheck.kernel.plan import Plan
        from fusecheck.kernel.report import Subject
        from fusecheck.kernel.run import Run
        from fusecheck.kernel.turn import Budget

        subjects = [Subject(name, size) for size in self._sizes for name in names]
        drawn = DRAWN if self.cases is None and self.seconds is None else self.cases
        share = None if self.seconds is None else share_of(self.seconds, len(subjects))
        # The emulator's dataflows are variants of one kernel.
        joint = self.backend is None and device == "cpu"
        plan = Plan(seed=self.seed, most_elements=self.most_elements, whole=not joint)
        timeout = HUNG_ON_GPUS if device == "cuda" else Run.timeout
        return Run(subjects, plan, Budget(drawn=drawn, seconds=share), device=device, joint=joint, timeout=timeout)

    def arguments(self) -> list[str]:
        """The same as words, by which two runs are known to have asked the same."""
        run, _ = self.run()
        asked = [("--backend", subject.backend, "--tp", str(subject.world_size)) for subject in run.subjects]
        return ["kernel", *chain.from_iterable(asked), repr(self), repr(run.budget)]


def _possible(run: Run, every: str = "kernel") -> tuple[Run, dict[str, str]]:
    """The run with the subjects that can be asked here, and the reasons of the others.

    Args:
        run: with all subjects.
        every: what all kernels together are called.
    """
    why = {subject: _refusal(replace(run, subjects=[subject])) for subject in run.subjects}
    sizes: dict[tuple[str, str], list[int]] = {}
    for subject, reason in why.items():
        if reason:
            sizes.setdefault((subject.backend, reason), []).append(subject.world_size)
    names: dict[tuple[str, str], list[str]] = {}
    for (name, reason), at in sizes.items():
        names.setdefault((", ".join(map(str, at)), reason), []).append(name)
    count = len({subject.backend for subject in why})
    refused = {
        f"{every if len(who) == count else ' and '.join(who)} at tp {at}": reason for (at, reason), who in names.items()
    }
    return replace(run, subjects=[subject for subject, reason in why.items() if not reason]), refused


def _refusal(run: Run) -> str:
    """Why the run's only subject cannot be asked; empty where it can."""
    (subject,) = run.subjects
    try:
        run.validate()
    except (UsageError, Inconclusive) as why:
        return str(why).removeprefix(f"backend {subject.backend} refuses every case at tp {subject.world_size}: ")
    return ""


def share_of(seconds: float, subjects: int) -> float:
    """Seconds of each subject, so that with the start of the ranks and the last case of each all end in time."""
    return max(seconds - START_SECONDS * len(WORLD_SIZES + LARGER), seconds / 2) * (1 - OVERSHOOT) / subjects
