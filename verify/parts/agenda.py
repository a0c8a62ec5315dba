"""The parts of `fusecheck verify`, what they cost, and how a budget of time is divided among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusecheck.errors import UsageError

KERNEL_SECONDS = 55.0
"""What the kernel question takes about without a budget, on two idle cores."""

REAL_SECONDS = 60.0
"""What it takes about of a real kernel at one world size; golden/h200x2/family has 13 to 93 s."""

SLACK = 1.3
"""Of a budget, each part gets so many times what it takes about: machines differ."""


@dataclass(frozen=True)
class Form:
    """One way to run a part.

    Attributes:
        arguments: of its command.
        seconds: that it takes about, on two idle cores.
    """

    arguments: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Step:
    """A part behind the kernel question: a command of its own, so that it can be stopped when its time is up.

    Attributes:
        name: the command.
        quick: the form that runs without a budget.
        full: the form that runs where a budget allows; None where there is none.
        takes: its options that name a kernel and its place; none where it asks about no kernel.
    """

    name: str
    quick: Form
    full: Form | None = None
    takes: tuple[str, ...] = ()

    def about(self, kernel: Mapping[str, str]) -> Step:
        """The same about a kernel: `kernel` has the values of `--backend` and `--device`."""
        words = [word for option in self.takes if option in kernel for word in (option, kernel[option])]
        full = self.full and replace(self.full, arguments=(*self.full.arguments, *words))
        return replace(self, quick=replace(self.quick, arguments=(*self.quick.arguments, *words)), full=full)


KERNEL = ("--backend", "--device")

STEPS = (
    Step("graph", Form(("--random", "10", "--no-export"), 25.0), Form((), 150.0), takes=KERNEL),
    Step("protocol", Form(("--ranks", "2", "--blocks", "1", "--calls", "4"), 10.0), Form((), 30.0)),
    Step(
        "invariance",
        Form(("--hidden", "256", "--tokens", "4", "--rows", "4"), 8.0),
        Form(("--hidden", "1024", "--tokens", "64"), 45.0),
        takes=KERNEL,
    ),
    Step("accuracy", Form(("--quick",), 75.0), Form((), 240.0), takes=KERNEL),
    Step("faults", Form(("--quick",), 50.0), Form((), 780.0)),
    Step("latency", Form(("--tokens", "1,16,128,1024", "--replays", "10"), 60.0), takes=("--backend",)),
)
NAMES = tuple(step.name for step in STEPS)


@dataclass(frozen=True)
class Division:
    """Who gets how much of a budget.

    Attributes:
        kernel: seconds of the kernel question; None for its own number of cases.
        forms: the form of each part that is to run, by name.
    """

    kernel: float | None
    forms: dict[str, Form] = field(default_factory=dict)


def divide(steps: Sequence[Step], budget: float | None, kernel: float = KERNEL_SECONDS) -> Division:
    """The quick form of each part as long as they fit, then full forms, in order; the kernel question gets the rest.

    It gets half of a budget that is too small for more. Without a budget every part runs in its quick form.

    Args:
        steps: the parts that can run.
        budget: seconds of all.
        kernel: what the kernel question takes about.
    """
    if budget is None:
        return Division(None, {step.name: step.quick for step in steps})
    spare = budget - min(kernel, budget / 2)
    forms: dict[str, Form] = {}
    for step in steps:
        if SLACK * step.quick.seconds <= spare:
            forms[step.name] = step.quick
            spare -= SLACK * step.quick.seconds
    for step in steps:
        if step.full is None or step.name not in forms:
            continue
        more = SLACK * (step.full.seconds - step.quick.seconds)
        if more <= spare:
            forms[step.name] = step.full
            spare -= more
    return Division(budget - SLACK * sum(form.seconds for form in forms.values()), forms)


def duration(text: str) -> float:
    """Seconds of a text such as `90s`, `5m` or `1h`; a bare number is seconds.

    Raises:
        UsageError: it is no positive duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--budget {text!r}, expected a time such as 90s, 5m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
