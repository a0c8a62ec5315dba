"""Run the catalogue: each fault by the runner of its subject, then right kernels for false alarms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from fusecheck.dataflow import DATAFLOWS
from fusecheck.eval.compare import compare
from fusecheck.eval.gate import Verdict as PairVerdict
from fusecheck.eval.outcome import Options
from fusecheck.faults import accuracy
from fusecheck.faults.catalogue import Fault, catalogue, resolve
from fusecheck.faults.hunt import PATIENCE, Budget, Catch, Hunter
from fusecheck.faults.peers import Peers
from fusecheck.faults.results import Alarm, Report, Result
from fusecheck.graph.cases import GraphCase, Subject, random_cases, row_cases
from fusecheck.graph.config import NORM_PASS
from fusecheck.graph.run import GraphChecker
from fusecheck.inputs.cells import hash64
from fusecheck.interrupts import Interruption
from fusecheck.kernel.table import Case
from fusecheck.ranks import Pool, values
from fusecheck.verdict import Stage

WORKER = "fusecheck.faults.worker:FaultWorker"
WORLD_SIZES = (2, 4)
JUDGED = 96
"""Cases of a right kernel that a weakened judge is given before known faults are replayed."""

ROUNDS = 4
"""How often a known fault must pass under a weakened judge and fail under the right one."""

FURTHER = 24
"""Cases of the plan that are looked at for each known fault, where the first one that caught it hides nothing."""

GRAPH_RANDOM = 40
"""Random graphs that a faulty pass is given after the named rows."""

RIGHT_NORM = Subject(NORM_PASS, after_norm=False, quantises=False)
RIGHT_QUANT = Subject()

Seen = Callable[[int, Result], None]


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        seeds: of the plan, one run of the catalogue each.
        budget: for each kernel fault.
        legal_cases: cases of each known dataflow, for false alarms; 0 for none.
        peers: whether the field's criteria are asked too, at the first seed.
        shrink: whether catching cases are made smaller, at the first seed.
    """

    seeds: tuple[int, ...] = (0,)
    budget: Budget = field(default_factory=Budget)
    legal_cases: int = 48
    peers: bool = False
    shrink: bool = True


class FaultRun:
    """Runs faults; a context manager that holds the ranks.

    Args:
        settings: what to run.
        seen: told of every result.
    """

    def __init__(self, settings: Settings, seen: Seen = lambda seed, result: None) -> None:
        self.settings, self._seen = settings, seen
        self._stack = ExitStack()
        self._catches: list[tuple[Fault, Catch]] = []

    def __enter__(self) -> FaultRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def hunter(self) -> Hunter:
        """The hunter of kernel faults, with its pools."""
        preload = ("fusecheck.faults.backend",)
        pools = {size: self._stack.enter_context(Pool(WORKER, size, preload=preload)) for size in WORLD_SIZES}
        return Hunter(pools, self.settings.budget)

    @cached_property
    def peers(self) -> Peers:
        """The field's criteria."""
        return Peers(self.hunter)

    @cached_property
    def checker(self) -> GraphChecker:
        """The checker of graph passes."""
        return self._stack.enter_context(GraphChecker(RIGHT_QUANT, 2, export=False, tokens=(5,)))

    def execute(self, faults: Sequence[Fault]) -> Report:
        """Run these faults at every seed; Ctrl-C ends the run with what it has."""
        report = Report(self.settings.seeds, left_out=catalogue().left_out)
        began = time.monotonic()
        with Interruption() as stop:
            for seed in self.settings.seeds:
                self._catches.clear()
                results = report.results.setdefault(seed, [])
                for fault in faults:
                    results.append(self.run(fault, seed))
                    self._seen(seed, results[-1])
                self._false_alarms(report, seed)
            if self.settings.peers:
                report.peer_alarms = dict(self.peers.false_alarms(tuple(DATAFLOWS), self.settings.seeds[:1]))
        report.interrupted = stop.happened
        report.seconds = time.monotonic() - began
        return report

    def run(self, fault: Fault, seed: int) -> Result:
        """One fault at one seed."""
        runner = {"kernel": self._kernel, "pass": self._pass, "pair": self._pair, "judge": self._judge}
        began = time.monotonic()
        result = runner[fault.subject](fault, seed)
        result.seconds = result.seconds or time.monotonic() - began
        return result

    def _kernel(self, fault: Fault, seed: int) -> Result:
        backend, right = f"fusecheck.faults.backend:{fault.id}", fault.right
        first = seed == self.settings.seeds[0]
        caught = self.hunter.hunt(backend, seed, right=right, shrink=self.settings.shrink and first)
        self._catches.append((fault, caught))
        result = _of_catch(fault, caught)
        if self.settings.peers and first:
            result.columns = self.peers.judge(fault, caught, seed)
        return result

    def _pass(self, fault: Fault, seed: int) -> Result:
        made = pass_of(fault)
        faulty, right = (self.checker.for_subject(s) for s in (made, RIGHT_QUANT if made.after_norm else RIGHT_NORM))
        result = Result(fault)
        for case in _graphs(seed):
            result.cases += 1
            found = faulty.check(case).findings
            if not found:
                continue
            excused = right.check(case).findings
            result.false_alarms += [f"{case.name}: {finding.check.value}: {finding.message}" for finding in excused[:1]]
            if not excused:
                result.stages = list(dict.fromkeys(finding.check.value for finding in found))
                result.message, result.case = found[0].message, case.name
                break
        return result

    def _pair(self, fault: Fault, seed: int) -> Result:
        pair = accuracy.right_pair(seed)
        result = Result(fault, cases=1)
        right = compare(*pair, options=Options())
        if right.verdict is not PairVerdict.PASS:
            result.false_alarms.append(f"a right pair is {right.verdict.value}: {right.reason}")
        found = compare(*resolve(fault.patch)(pair), options=Options())
        if found.verdict is not PairVerdict.PASS:
            result.stages, result.message = [found.verdict.value], found.reason
        return result

    def _judge(self, fault: Fault, seed: int) -> Result:
        """A weakened judge is noticed when a right kernel fails under it, or a known fault's case passes."""
        result = Result(fault)
        self._weaken(fault, self.hunter.pools.values())
        stream = self.hunter.stream(seed, "emulated")
        for case in islice(stream, JUDGED):
            result.cases += 1
            found = self.hunter.judge(case, "emulated", timeout=PATIENCE).findings
            if found:
                result.stages, result.message = ["right kernel fails"], found[0].line()
                if " raised " in found[0].message:
                    raise RuntimeError(f"{fault.patch} does not fit what it patches: {found[0].message}")
                break
        else:
            self._replay(fault, seed, result)
        self.hunter.refresh()
        return result

    def _replay(self, fault: Fault, seed: int, result: Result) -> None:
        """The catching case of every known fault, then further ones, those of the exchange first: they vary most."""
        known = []
        for entry in self._known(seed):
            known.append(entry)
            assert entry[1].case is not None
            if self._shows(fault, entry, entry[1].case, result):
                return
        for entry in sorted(known, key=lambda each: each[0].group not in ("protocol", "launcher")):
            for case in self._further(fault, entry[1], seed):
                if self._shows(fault, entry, case, result):
                    return

    def _shows(self, fault: Fault, entry: tuple[Fault, Catch], case: Case, result: Result) -> bool:
        """Whether the weakened judge is noticed by this case of a known fault."""
        known, caught = entry
        result.cases += 1
        if not self.hides(fault, case, caught.backend):
            return False
        result.stages, result.message = ["known fault passes"], f"{known.id} passes: {known.does}"
        result.case = case.problem.to_json()
        return True

    def _further(self, fault: Fault, caught: Catch, seed: int) -> list[Case]:
        """The plan's cases after the catching one that fail under the right judge, and pass once under the weakened."""
        plan = list(islice(self.hunter.stream(seed, caught.backend), caught.cases, caught.cases + FURTHER))
        self.hunter.refresh()
        failing = [case for case in plan if not self.hunter.judge(case, caught.backend).passed]
        self._weaken(fault, self.hunter.pools.values())
        return [case for case in failing if self.hunter.judge(case, caught.backend).passed]

    def hides(self, fault: Fault, case: Case, backend: str) -> bool:
        """Whether the weakened judge hides what the case shows: it passes, under the right one it fails, every time.

        Once is not enough: where ranks race, a case passes now and then under either.
        """
        pool = self.hunter.pools[case.problem.world_size]
        for _ in range(ROUNDS):
            self._weaken(fault, [pool])
            if not self.hunter.judge(case, backend).passed:
                return False
            pool.cancel()
            if self.hunter.judge(case, backend).passed:
                return False
        return True

    def _weaken(self, fault: Fault, pools: Iterable[Pool]) -> None:
        """Weaken fresh ranks, so that nothing but this patch is in them.

        Raises:
            RuntimeError: the patch failed, and a judge that is not weakened proves nothing.
        """
        for pool in pools:
            pool.cancel()
            values(pool.call("weaken", fault.patch, timeout=PATIENCE))

    def _known(self, seed: int) -> Iterator[tuple[Fault, Catch]]:
        """Kernel faults with a case that catches them otherwise than by a hang; caught now where they were not yet."""
        done = {fault.id for fault, _ in self._catches}
        yield from ((f, c) for f, c in list(self._catches) if c.killed and not _hung(c))
        for fault in catalogue().faults:
            if fault.subject == "kernel" and fault.id not in done:
                caught = self.hunter.hunt(f"fusecheck.faults.backend:{fault.id}", seed, shrink=False)
                self._catches.append((fault, caught))
                if caught.killed and not _hung(caught):
                    yield fault, caught

    def _false_alarms(self, report: Report, seed: int) -> None:
        for flow in DATAFLOWS if self.settings.legal_cases else ():
            right = f"emulated:{flow}"
            self.hunter.refresh()
            stream = self.hunter.stream(seed, right)
            for case in islice(stream, self.settings.legal_cases):
                outcome = self.hunter.judge(case, right, timeout=PATIENCE)
                report.legal[right, seed] += 1
                report.alarms += [Alarm(right, seed, finding.line()) for finding in outcome.findings]


def pass_of(fault: Fault) -> Subject:
    """The faulty pass of an entry, which stands where the pass stands that it changes."""
    of_norm = fault.hook.startswith("FuseNorm.")
    return Subject(f"{fault.patch}.apply", after_norm=not of_norm, quantises=not of_norm)


def _of_catch(fault: Fault, caught: Catch) -> Result:
    case: Case | None = caught.case
    return Result(
        fault,
        cases=caught.cases,
        stages=caught.stages,
        message=caught.message,
        case=case.problem.to_json() if case else None,
        shrunk=caught.shrunk.to_json() if caught.shrunk else None,
        checks=list(case.checks) if case else [],
        seconds=caught.seconds,
        false_alarms=caught.false_alarms,
    )


def _hung(caught: Catch) -> bool:
    return caught.stages[0] == Stage.ALIVE.value and caught.message.startswith(("hang", "crash", "memory"))


def _graphs(seed: int) -> Iterator[GraphCase]:
    """The named rows in an order that the seed decides, then random graphs."""
    yield from sorted(row_cases(2), key=lambda case: hash64(seed, *case.name.encode()))
    yield from random_cases(GRAPH_RANDOM, seed)
