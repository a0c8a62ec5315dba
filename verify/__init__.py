"""Fusecheck: whether a fused AllReduce + residual + RMSNorm + FP8 kernel may replace the ops it fuses.

A plug-in needs only the names below.
"""

from verify.dataflow import DATAFLOWS, Dataflow
from verify.interface import (
    Backend,
    FusionOp,
    Kernel,
    Limits,
    Rank,
    RankInputs,
    RankOutputs,
    Strategy,
    Support,
)
from verify.problem import Problem

__all__ = [
    "DATAFLOWS",
    "Backend",
    "Dataflow",
    "FusionOp",
    "Kernel",
    "Limits",
    "Problem",
    "Rank",
    "RankInputs",
    "RankOutputs",
    "Strategy",
    "Support",
]

__version__ = "0.1.0"
