"""Fusecheck: whether a fused AllReduce + residual + RMSNorm + FP8 kernel may replace the ops it fuses.

A plug-in needs only the names below.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusecheck.dataflow import DATAFLOWS, Dataflow
    from fusecheck.interface import (
        Backend,
        FusionOp,
        Kernel,
        Limits,
        Operation,
        Rank,
        RankInputs,
        RankOutputs,
        Strategy,
        Support,
    )
    from fusecheck.problem import Problem

__all__ = [
    "DATAFLOWS",
    "Backend",
    "Dataflow",
    "FusionOp",
    "Kernel",
    "Limits",
    "Operation",
    "Problem",
    "Rank",
    "RankInputs",
    "RankOutputs",
    "Strategy",
    "Support",
]

__version__ = "0.1.0"

_HOME = {"DATAFLOWS": "fusecheck.dataflow", "Dataflow": "fusecheck.dataflow", "Problem": "fusecheck.problem"}


if not TYPE_CHECKING:  # a type checker shall not take every name for one of ours

    def __getattr__(name: str) -> object:
        """Import a name when it is first used: whoever only loads the pytest plug-in must not pay for torch."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME.get(name, "fusecheck.interface")), name)
