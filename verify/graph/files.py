"""A user's own graph: a program saved by `torch.export.save` that is made of Fusecheck's operators."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from fusecheck.errors import UsageError
from fusecheck.graph.build import BuiltGraph
from fusecheck.graph.dialects import LIBRARIES
from fusecheck.graph.library import Library
from fusecheck.operations import COMPOSITIONS

SUFFIX = ".pt2"
ROLES = ("sites", "all_reduce", "norm", *(op.value for op in COMPOSITIONS if op.residual and op.norm))
"""What may be expected of a user's graph; `sites` are all fused operators."""


@dataclass(frozen=True)
class FilePlan:
    """Where the program is.

    Attributes:
        file: its path; `{rank}` in it stands for the rank's number, where ranks have programs of their own.
        expect: how many operators of a role the rewritten graph must have; `sites` counts all fused ones.
    """

    file: str
    expect: Mapping[str, int] = field(default_factory=dict)
    tokens: ClassVar[int] = 0  # its example is the one size that it is run at

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return json.dumps({"file": self.file} | ({"expect": dict(self.expect)} if self.expect else {}))

    @classmethod
    def from_json(cls, text: str) -> FilePlan:
        """Read a plan, as `to_json` wrote it; `cases.read_plan` says what is wrong with one."""
        return cls(**json.loads(text))


def expectations(text: str) -> dict[str, int]:
    """What `--expect sites=63,norm=1` says: how many operators of each role, `sites` for all fused ones.

    Raises:
        UsageError: an unknown role, or something that is no count.
    """
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        role, _, count = part.strip().partition("=")
        if role not in ROLES or not count.isdecimal():
            raise UsageError(f"--expect {part!r}, expected NAME=COUNT with one of: {', '.join(ROLES)}")
        found[role] = int(count)
    return found


def load_file(plan: FilePlan, rank: int, library: Library) -> tuple[BuiltGraph, GraphModule]:
    """Load a rank's program: in Fusecheck's operators, with the example that it was exported with, and as it is.

    Raises:
        UsageError: the file is not an exported program, has no example inputs, or is of another dialect.
    """
    path = Path(plan.file.replace("{rank}", str(rank)))
    if not path.is_file():
        raise UsageError(f"model file {path} does not exist")
    logging.disable()  # torch logs a traceback of its own before it raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:  # whatever torch makes of a file that is something else
        told = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UsageError(
            f"model file {path} is not a graph of torch.export.save in operators of --dialect {library.name} ({told})"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    if program.example_inputs is None or not program.example_inputs[0]:
        raise UsageError(f"model file {path} has no example inputs, expected those it was exported with")
    inputs = program.example_inputs[0]
    if not all(isinstance(each, Tensor) for each in inputs):
        raise UsageError(f"model file {path} takes inputs that are not tensors")
    module = program.module(check_guards=False)
    if not library.speaks(module):
        others = [name for name, other in LIBRARIES.items() if other.speaks(module)]
        hint = f"it is of --dialect {others[0]}" if others else "expected a tensor-parallel graph"
        raise UsageError(f"model file {path} has no sum over ranks of --dialect {library.name}: {hint}")
    read = library.leave(module)
    return BuiltGraph(read, lambda tokens: inputs, (), None), module
