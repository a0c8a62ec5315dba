"""The process that ranks are forked from: when it begins, what its death does, and that nothing outlives a parent."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fusecheck.property_tests.suite.launching import marked, marked_environment, wait_until_gone
from fusecheck.ranks import Pool, values

ZYGOTE_DIES = """
import os, sys, time, psutil
from fusecheck.ranks import Pool, culprits, values
with Pool("fusecheck.property_tests.suite.workers:Doomed", 1) as pool:
    rank = values(pool.call("place", timeout=60.0))[0][3]
    psutil.Process(rank).parent().parent().kill()
    time.sleep(.2)
    print(*culprits(pool.call("nothing", timeout=60.0)))
    print(values(pool.call("echo", 1, timeout=60.0)))
"""


def test_a_zygote_that_is_killed_is_reported_and_replaced() -> None:
    # In a program of its own: the zygote is shared by all pools of a process.
    mark, environment = marked_environment()
    done = subprocess.run(
        [sys.executable, "-c", ZYGOTE_DIES], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        "crash: rank 0: its keeper process was killed between calls, after place",
        "[1]",
    ]
    assert wait_until_gone(mark) == set()


BEGUN = """
import sys, psutil
from fusecheck.ranks.zygote import ZYGOTE
ZYGOTE.begin(("fusecheck.property_tests.suite.workers",))
print([x.pid for x in psutil.Process().children()])
if sys.argv[1:]:
    from fusecheck.ranks import Pool, values
    with Pool("fusecheck.property_tests.suite.workers:Doomed", 1) as pool:
        rank = values(pool.call("place", timeout=60.0))[0][3]
        print([psutil.Process(rank).parent().parent().pid])
"""


@pytest.mark.parametrize("words", [[], ["used"]], ids=["not used", "used"])
def test_a_zygote_that_begins_before_it_is_needed_serves_the_pools_and_ends_with_its_parent(words: list[str]) -> None:
    mark, environment = marked_environment()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BEGUN, *words], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    begun, *serving = done.stdout.splitlines()
    assert begun != "[]"
    assert serving == [begun] * len(words)
    assert wait_until_gone(mark) == set()
    if not words:
        assert time.monotonic() - began < 5, "nobody waits for its imports"


PROGRAM = """
import os, sys, time
from fusecheck.ranks import Pool
pool = Pool("fusecheck.property_tests.suite.workers:Doomed", 2)
pool.call("start_daemon", timeout=60.0)
print(pool.call("directory", timeout=60.0)[0].value, flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then",
    ["raise SystemError", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)"],
    ids=["raises", "is SIGKILLed", "is terminated"],
)
def test_nothing_outlives_a_parent_that(then: str) -> None:
    mark, environment = marked_environment()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then="time.sleep(.2); " + then)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert program.stdout is not None
    directory = Path(program.stdout.readline().decode().strip())
    assert directory.is_dir()
    # The parent, its zygote, a keeper, two ranks and a daemon of each: the mark does find them.
    assert len(marked(mark)) >= 6
    assert program.wait(10) != 0
    program.stdout.close()
    assert wait_until_gone(mark) == set()
    assert not directory.exists()


def test_the_zygote_starts_no_threads_since_it_is_forked() -> None:
    with Pool("fusecheck.property_tests.suite.workers:Doomed", 1) as pool:
        rank = values(pool.call("place", timeout=30.0))[0][3]
        zygote = psutil.Process(rank).parent().parent()  # type: ignore[union-attr]
        assert zygote is not None
        assert zygote.num_threads() == 1
