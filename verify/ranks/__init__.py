"""Who runs where: persistent pools of rank processes, here or under MPI, and what becomes of those that fail."""

from verify.ranks.pool import Pool
from verify.ranks.replies import Failure, FailureKind, Reply, culprits, values

__all__ = ["Failure", "FailureKind", "Pool", "Reply", "culprits", "values"]
