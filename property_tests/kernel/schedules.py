"""Many calls on one open workspace: shapes, ops, strategies and dtypes that change, late ranks, reused buffers.

The machine's rules write down the calls; its end runs them on a fresh workspace, back to back, without a warm-up,
and every call is judged. The last one is the Problem's own, the others its schedule, so what fails replays from one
line.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fusecheck.problem import Call, Problem
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.strategies import STRATEGIES, calls, seeds

FAMILIES = ("gaussian", "rank-tagged", "one-hot", "negative-zero", "outliers", "exact")
HIDDEN = (8, 64, 128, 264, 512, 2880)
MOST_TOKENS = 64
LONGEST = 12


class Workspace(RuleBasedStateMachine):
    """Calls on one workspace of a bench, in the order in which they happen."""

    bench: Bench

    def __init__(self) -> None:
        super().__init__()
        self.problem = Problem(world_size=self.bench.world_size)
        self.schedule: list[Call] = []
        self.next = Call(1)

    @initialize(family=st.sampled_from(FAMILIES), seed=seeds())
    def open(self, family: str, seed: int) -> None:
        self.problem = replace(self.problem, family=family, seed=seed, hidden=HIDDEN[0])

    @precondition(lambda self: len(self.schedule) < LONGEST)
    @rule(data=st.data())
    def call(self, data: st.DataObject) -> None:
        drawn = calls(self.bench.world_size, most_tokens=MOST_TOKENS, hidden=HIDDEN, dtypes=self.bench.dtypes)
        call = data.draw(drawn, label="call")
        call = replace(call, idle_ms=self.next.idle_ms, reopen=self.next.reopen and bool(self.schedule))
        if self.bench.accepts(step_of(self.problem, call)):
            self.schedule.append(call)
            self.next = Call(1)

    @precondition(lambda self: 2 <= len(self.schedule) < LONGEST)
    @rule(back=st.integers(2, 3))
    def call_as_before(self, back: int) -> None:
        """The shape of an earlier call again, as buffers that rotate are met again."""
        self.schedule.append(self.schedule[-min(back, len(self.schedule))])

    @precondition(lambda self: len(self.schedule) + 5 <= LONGEST)
    @rule(data=st.data(), long=st.integers(8, MOST_TOKENS), short=st.integers(1, 4))
    def long_short_short_long(self, data: st.DataObject, long: int, short: int) -> None:
        """Back to the buffer of the long call, with a rank that comes late, so that what was left there is read."""
        late = data.draw(st.integers(0, self.bench.world_size - 1), label="late rank")
        strategy = data.draw(st.sampled_from(STRATEGIES), label="strategy")
        counts = (long, short, short, long, short)
        added = [Call(tokens, hidden=HIDDEN[1], strategy=strategy) for tokens in counts]
        added[3] = replace(added[3], delayed=late, delay_ms=3)
        if all(self.bench.accepts(step_of(self.problem, call)) for call in added):
            self.schedule += added

    @rule(milliseconds=st.integers(1, 5))
    def idle(self, milliseconds: int) -> None:
        self.next = replace(self.next, idle_ms=milliseconds)

    @precondition(lambda self: bool(self.schedule))
    @rule()
    def reopen(self) -> None:
        self.next = replace(self.next, reopen=True)

    def teardown(self) -> None:
        if self.schedule:
            *earlier, last = self.schedule
            self.bench.check(replace(step_of(self.problem, last), seed=self.problem.seed, schedule=tuple(earlier)))


def step_of(problem: Problem, call: Call) -> Problem:
    """A call of a schedule as a Problem of its own."""
    return replace(problem, schedule=(call,)).calls()[0][1]


def run_schedules(bench: Bench, *, wanted: settings | None = None) -> None:
    """Run the machine on a bench.

    Args:
        bench: the kernel.
        wanted: Hypothesis settings; left out, the profile's, with schedules of up to eleven rules.
    """
    machine = type("Workspace", (Workspace,), {"bench": bench})
    run_state_machine_as_test(machine, settings=wanted or settings(stateful_step_count=11))
