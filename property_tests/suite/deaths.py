"""Every way in which a rank can die, under every launcher: what is reported, how soon, and what is left.

python -m fusecheck.property_tests.suite.deaths [--launcher local|mpirun] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fusecheck.journal import Journal, unfinished
from fusecheck.property_tests.suite.launching import MARK, marked, marked_environment, mpirun, wait_until_gone
from fusecheck.ranks import FailureKind, Pools, Request, culprits, enter, map_cases, open_pools

DEADLINE = 2.0
"""Seconds that each call has."""
MEMORY_LIMIT = 600 << 20

MANNERS = {
    "spin": ("spins for ever", FailureKind.HANG),
    "wedge": ("blocks in native code, interpreter locked", FailureKind.HANG),
    "stop": ("is stopped (SIGSTOP)", FailureKind.HANG),
    "sigkill": ("is SIGKILLed", FailureKind.CRASH),
    "sigsegv": ("SIGSEGVs", FailureKind.CRASH),
    "exit": ("calls os._exit(7)", FailureKind.CRASH),
    "grandchildren": ("starts daemons, then is SIGKILLed", FailureKind.CRASH),
    "throw": ("raises on one rank only", FailureKind.ERROR),
    "sys_exit": ("calls sys.exit(3)", FailureKind.ERROR),
    "leak": ("leaks until the limit", FailureKind.MEMORY),
    "garbage": ("writes garbage to its pipe", FailureKind.GARBAGE),
}
"""The ways to die: what is done, and how it must be reported."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        manner: what rank 1 does while rank 0 waits for it.
        launcher: `local` or `mpirun`.
        reported: the kinds reported, worst first.
        message: the first failure's own words.
        seconds: from the call to the report.
        deadline: what the call had.
        lost: calls around the death that got no outcome.
        left: processes left once the pools are closed.
        ok: reported as it must be, in time, nothing lost, nothing left.
    """

    manner: str
    launcher: str
    reported: str
    message: str
    seconds: float
    deadline: float
    lost: int
    left: int
    ok: bool


def measure(manner: str, pools: Pools, mark: str, known: frozenset[int]) -> Row:
    """Let rank 1 of one call in the middle of others die, and see what becomes of all of them."""
    deadline = 30.0 if manner == "leak" else DEADLINE
    requests = [Request("echo", (i,), tag=i) for i in range(4)]
    requests[1:1] = [Request("die_waiting", (manner, 1), tag="death", timeout=deadline)]
    begun, seconds, lost, failures = time.monotonic(), 0.0, len(requests), []
    for request, replies in map_cases(pools.pools, requests, timeout=20.0):
        if request.tag == "death":
            seconds = time.monotonic() - begun
            failures = culprits(replies)
            lost -= bool(failures)
        else:
            lost -= [reply.value for reply in replies] == [request.tag] * len(replies)
    pools.close()
    left = wait_until_gone(mark, known)
    wanted = MANNERS[manner][1]
    ok = any(f.kind is wanted for f in failures) and seconds < deadline + 5 and not lost and not left
    kinds = ", ".join(sorted({failure.kind.value for failure in failures}))
    message = str(failures[0]) if failures else "nothing"
    # Rank 1 dies, rank 0 waits: the first line names rank 1, unless both do the same.
    ok = ok and (failures[0].rank == 1 or manner == "spin")
    return Row(manner, pools.launcher, kinds, message, round(seconds, 2), deadline, lost, len(left), ok)


def measure_all(manners: list[str]) -> Iterator[Row]:
    """Measure in this process, which is the one that drives: here, or as rank 0 under mpirun."""
    enter()
    mark = os.environ[MARK]
    with open_pools("fusecheck.property_tests.suite.workers:Doomed", 2, memory_limit=MEMORY_LIMIT) as pools:
        before = marked(mark)
        for pool in pools.pools:
            pool.call("nothing", timeout=60.0)
        pools.close()
        # The zygotes, one for each process that starts ranks, stay for the next pool.
        known = frozenset(before) | {pid for pid, parent in marked(mark).items() if parent in before}
        for manner in manners:
            yield measure(manner, pools, mark, known)


def measure_parent(launcher: str) -> Row:
    """Kill the driving process itself in the middle of a call."""
    mark, environment = marked_environment()
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory) / "cases.jsonl"
        command = _command(launcher, ["--doomed", str(journal)])
        program = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert program.stdout is not None
        driver = int(program.stdout.readline())
        time.sleep(0.3)
        begun = time.monotonic()
        os.kill(driver, signal.SIGKILL)
        left = wait_until_gone(mark, seconds=10.0)
        seconds = time.monotonic() - begun
        program.wait(10)
        program.stdout.close()
        named = unfinished(journal)
    ok = named == ["the case in flight"] and not left and program.returncode != 0
    message = f"journal names {named}, exit status {program.returncode}"
    return Row("parent", launcher, "journal", message, round(seconds, 2), 0.0, 0, len(left), ok)


def run_doomed(journal: Path) -> None:
    """Be the program that is killed in the middle of a call."""
    enter()
    with open_pools("fusecheck.property_tests.suite.workers:Doomed", 2) as pools, Journal(journal) as lines:
        pools.pools[0].call("nothing", timeout=60.0)
        lines.start("the case in flight")
        pools.pools[0].submit("die", "spin", -1, timeout=600.0)
        pools.pools[0].poll()
        print(os.getpid(), flush=True)
        time.sleep(600)


def survey(launcher: str, manners: list[str]) -> list[Row]:
    """Measure the manners in a fresh program under the launcher, and the parent's own death."""
    _, environment = marked_environment()
    command = _command(launcher, ["--measure", ",".join(manners)])
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    rows = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    return [*rows, measure_parent(launcher)]


def _command(launcher: str, arguments: list[str]) -> list[str]:
    prefix = mpirun(2) if launcher == "mpirun" else []
    return [*prefix, sys.executable, "-m", "fusecheck.property_tests.suite.deaths", *arguments]


def _print_table(rows: list[Row]) -> None:
    table = Table(title=f"Rank 1 dies while rank 0 waits for it; each call has {DEADLINE:g} s (leak: 30 s)")
    for name in ("the rank", "launcher", "reported as", "seconds", "cases lost", "processes left", ""):
        table.add_column(name)
    for row in rows:
        title = MANNERS[row.manner][0] if row.manner in MANNERS else "(its parent is SIGKILLed)"
        mark = "ok" if row.ok else "WRONG"
        table.add_row(title, row.launcher, row.message, f"{row.seconds:.2f}", str(row.lost), str(row.left), mark)
    Console(width=160).print(table)


def main() -> int:
    """Print the table; the exit status is 1 if any line of it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", choices=["local", "mpirun"], action="append")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--doomed", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.doomed:
        run_doomed(options.doomed)
        return 0
    if options.measure:
        for row in measure_all(options.measure.split(",")):
            print(json.dumps(asdict(row)), flush=True)
        return 0
    launchers = options.launcher or ["local", "mpirun"]
    rows = [row for launcher in launchers for row in survey(launcher, list(MANNERS))]
    _print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
