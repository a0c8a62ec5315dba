"""The kernel question: run cases on pools of ranks until a count or a time, and sum up what they showed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fusecheck import backends
from fusecheck.errors import UsageError
from fusecheck.interface import Backend
from fusecheck.interrupts import Interruption
from fusecheck.kernel.isolation import Isolation
from fusecheck.kernel.report import Group, KernelReport, Subject
from fusecheck.kernel.shares import Share, given_shares, joint_shares, own_shares
from fusecheck.kernel.table import Case
from fusecheck.kernel.turn import Conditions, Turn
from fusecheck.kernel.virtual import VirtualPool, open_ranks
from fusecheck.ranks.launch import Pools, require_gpus, require_groups

SAMPLES = 64
"""Cases that a kernel may refuse until it is said to refuse all."""


class Run(Conditions):
    """A run of the kernel question."""

    def validate(self) -> None:
        """Refuse what cannot run, before anything is started or written.

        Raises:
            UsageError: an unknown backend, or a shape, value or world size that it or a Problem refuses.
        """
        for subject in self.subjects:
            backend = backends.backend(subject.backend)
            check_device(backend, self.device, subject.world_size, virtual=self.virtual)
            reasons: Counter[str] = Counter()
            for case in self._samples(subject):
                support = self.supports(backend, case.problem)
                if support.ok:
                    backend.dataflow(case.problem)
                    break
                reasons[support.reason] += 1
            else:
                reason = reasons.most_common(1)[0][0]
                raise UsageError(f"backend {subject.backend} refuses every case at tp {subject.world_size}: {reason}")

    def _samples(self, subject: Subject) -> Iterator[Case]:
        """Cases of which the kernel must take one."""
        if self.given is not None:
            yield from self.given[subject]
        else:
            plan = self.plan.about(backends.backend(subject.backend))
            yield from (plan.draw(subject.world_size, index) for index in range(SAMPLES))

    def execute(self) -> KernelReport:
        """Run every subject's cases; Ctrl-C ends the run with what it has."""
        report = KernelReport(accept_refusals=self.accept_refusals)
        report.groups = {subject: Group(subject) for subject in self.subjects}
        began = time.monotonic()
        shares, isolation = self.shares(), Isolation(self.timeout)
        report.coverages = list({id(share.coverage): share.coverage for share in shares.values()}.values())
        with Interruption() as stop:
            for world_size in dict.fromkeys(subject.world_size for subject in self.subjects):
                mine = [subject for subject in self.subjects if subject.world_size == world_size]
                with self._open(world_size) as pools:
                    for subject in mine:
                        Turn(self, shares[subject], report, isolation, stop).run(pools.pools)
        report.interrupted = stop.happened
        report.seconds = time.monotonic() - began
        return report

    def shares(self) -> dict[Subject, Share]:
        """Which cases each subject runs."""
        if self.given is not None:
            return given_shares(self.given)
        deal = joint_shares if self.joint else own_shares
        return deal(self.plan, self.subjects, lambda backend, problem: self.supports(backend, problem).ok)

    def _open(self, world_size: int) -> Pools | VirtualPool:
        options: dict[str, Any] = {"device": self.device}
        options["output"] = None if self.logs is None else self.logs / f"tp{world_size}"
        return open_ranks(world_size, virtual=self.virtual, **options)


def check_device(backend: Backend, device: str, world_size: int, *, virtual: bool) -> None:
    """Check that the backend runs on the device, and that there are as many GPUs as it needs.

    Raises:
        UsageError: it runs on another device, virtual ranks are to share one that is no GPU, or mpirun started ranks
            that are no multiple of the world size.
        Inconclusive: there are fewer GPUs.
    """
    needed = getattr(backend, "device", None)
    if needed is not None and needed != device:
        raise UsageError(f"backend {backend.name} runs on {needed}, got --device {device}; give --device {needed}")
    if virtual and device != "cuda":
        raise UsageError(f"virtual ranks share a GPU, got --device {device}; give --device cuda, or leave them out")
    if not virtual:
        require_groups(world_size)
    if device == "cuda":
        require_gpus(1 if virtual else world_size)
