"""Ranks under a real mpirun."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fusecheck.errors import UsageError
from fusecheck.property_tests.suite.deaths import MANNERS, measure_parent, survey
from fusecheck.property_tests.suite.launching import marked_environment, mpirun, wait_until_gone
from fusecheck.ranks.mpi import detect, local_ranks, split_world

PROGRAM = """
import sys
from fusecheck.errors import UsageError
from fusecheck.ranks import Request, dialling, enter, map_cases, open_pools, values
{before}
enter()
print("driving", flush=True)
try:
    pools = open_pools("fusecheck.property_tests.suite.workers:Echo", {tp})
except UsageError as error:
    print(error)
    sys.exit(2)
with pools:
    for pool in pools.pools:
        print(pools.launcher, sorted(place[0] for place in values(pool.call("place", timeout=60.0))),
              values(pool.call("total", timeout=60.0)), values(pool.call("write_and_read", "a", 8, timeout=60.0)))
    requests = [Request("echo", (i,)) for i in range(50)]
    answers = [values(replies) for _, replies in map_cases(pools.pools, requests, timeout=60.0)]
    print(sorted(answers) == [[i, i] for i in range(50)])
sys.exit({status})
"""


def run(processes: int, **fields: object) -> tuple[int, list[str]]:
    """Run the program under mpirun; returns its exit status and output, and asserts that no process is left."""
    mark, environment = marked_environment()
    program = PROGRAM.format(**({"before": "", "tp": 2, "status": 0} | fields))
    command = [*mpirun(processes), sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert wait_until_gone(mark) == set()
    return done.returncode, done.stdout.splitlines()


def test_the_world_is_split_into_groups_and_output_and_status_are_rank_0s() -> None:
    group = "mpirun [0, 1] [3.0, 3.0] [[1, 2], [1, 2]]"
    assert run(4, status=3) == (3, ["driving", group, group, "True"])


def test_a_tp_that_does_not_divide_the_world_is_one_line_and_status_2() -> None:
    status, lines = run(3)
    assert status == 2
    assert lines == ["driving", "--tp 2 does not divide the MPI world of 3: take a multiple for mpirun -n"]


def test_cpu_ranks_on_two_hosts_are_refused() -> None:
    status, lines = run(
        2, before="import os; dialling.host_name = lambda: 'localhost' + '.' * int(os.environ['OMPI_COMM_WORLD_RANK'])"
    )
    assert status == 2
    assert "MPI ranks 0-1 are on the hosts localhost, localhost., but CPU ranks share memory" in lines[1]


def test_every_kind_of_death_is_reported_under_mpirun_as_locally() -> None:
    # One manner of each kind; `python -m fusecheck.property_tests.suite.deaths` goes through all.
    manners = list({kind: manner for manner, (_, kind) in MANNERS.items()}.values())
    rows = survey("mpirun", manners)
    assert [row.manner for row in rows] == [*manners, "parent"]
    assert [row for row in rows if not row.ok] == []


def test_the_journal_names_the_case_when_a_local_parent_is_killed() -> None:
    assert measure_parent("local").ok


def test_groups_are_consecutive_ranks_and_devices_count_per_host() -> None:
    names = ["a", "a", "b", "b"]
    assert [list(group) for group in split_world(names, 2, "cpu")] == [[0, 1], [2, 3]]
    assert [list(group) for group in split_world(names, 4, "cuda")] == [[0, 1, 2, 3]]
    assert local_ranks(["a", "b", "a", "b", "a"]) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("world_size", [0, 3, 8])
def test_a_group_size_must_divide_the_world(world_size: int) -> None:
    with pytest.raises(UsageError, match=f"--tp {world_size} does not divide the MPI world of 4"):
        split_world(["a"] * 4, world_size, "cpu")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, (2, 4)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, (0, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PYTEST_XDIST_WORKER": "gw0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "FUSECHECK_MPI_PROCESS": "1"}, None),
    ],
)
def test_mpirun_is_told_from_what_mpi_processes_start(
    environment: dict[str, str], place: tuple[int, int] | None
) -> None:
    assert detect(environment) == place
