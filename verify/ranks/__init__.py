"""Who runs where: persistent pools of rank processes, here or under MPI, and what becomes of those that fail."""

from fusecheck.ranks.launch import Pools, open_pools, require_gpus
from fusecheck.ranks.mpi import enter
from fusecheck.ranks.pool import Pool
from fusecheck.ranks.replies import Failure, FailureKind, Reply, culprits, values
from fusecheck.ranks.schedule import Request, map_cases

__all__ = [
    "Failure",
    "FailureKind",
    "Pool",
    "Pools",
    "Reply",
    "Request",
    "culprits",
    "enter",
    "map_cases",
    "open_pools",
    "require_gpus",
    "values",
]
