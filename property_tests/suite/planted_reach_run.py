"""Does the core plan find what shows in one corner only? `python -m fusecheck.property_tests.suite.planted_reach_run`.

Each planted kernel gets the core plan of `fusecheck kernel`'s default, world size by world size, until it is caught.
Exit code 1 if one survives. Names choose some; `--right` runs right kernels to the end, which must not be accused.
`--seed=3` takes another plan than that of seed 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fusecheck import backends
from fusecheck.case.run import WORKER, request, run_case
from fusecheck.dataflow import DATAFLOWS
from fusecheck.kernel.core import core_plan
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.table import Case
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.planted_reach import FAULTS
from fusecheck.ranks import Pool

HERE = "fusecheck.property_tests.suite.planted_reach"
WORLD_SIZES = (2, 4)
RIGHT = (*(f"emulated:{name}" for name in DATAFLOWS), "fusecheck.property_tests.suite.example_backend:ExampleBackend")


@dataclass(frozen=True)
class Found:
    """What became of one kernel: cases run, seconds, and the finding that ended it, if any."""

    cases: int
    seconds: float
    line: str = ""


def hunt(
    backend: str, pools: dict[int, Pool], cases: dict[int, list[Case]] | None = None, plan: Plan | None = None
) -> Found:
    """Run the core plan until something is found.

    Args:
        backend: the kernel.
        pools: by world size.
        cases: instead of the core plan, by world size.
        plan: whose core it is; the default's unless given.
    """
    known, began, count = backends.backend(backend), time.monotonic(), 0

    def takes(problem: Problem) -> bool:
        return known.supports(problem).ok

    for size, pool in pools.items():
        for case in cases[size] if cases else core_plan((plan or Plan()).about(known), size, takes):
            if not all(takes(step) for _, step in case.problem.calls()):
                continue
            count += 1
            outcome = run_case(pool, request(case.problem, backend, checks=case.checks), timeout=60.0)
            if outcome.findings:
                pool.close()  # its workspaces are this kernel's, and nothing is known of them
                return Found(count, time.monotonic() - began, outcome.findings[0].line())
        pool.close()
    return Found(count, time.monotonic() - began)


def main(words: Sequence[str]) -> int:
    """Print a row for each kernel; 1 if a planted one survives or a right one is accused."""
    right = "--right" in words
    seed = next((int(word.partition("=")[2]) for word in words if word.startswith("--seed=")), 0)
    names = [word for word in words if not word.startswith("--")] or list(RIGHT if right else FAULTS)
    pools = {size: Pool(WORKER, size) for size in WORLD_SIZES}
    wrong = 0
    try:
        for name in names:
            plan = None if right else FAULTS[name].plan(seed)
            found = hunt(name if right else f"{HERE}:{name.replace('-', '_')}", pools, plan=plan)
            wrong += bool(found.line) == right
            about = "" if right else f"{FAULTS[name].dimension:14s}{FAULTS[name].does:64s}"
            said = found.line[:90] or ("passes" if right else "SURVIVES")
            print(f"{name:18s}{about}{found.seconds:7.1f} s {found.cases:4d} cases  {said}", flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    print(f"{len(names) - wrong} of {len(names)} as it must be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
