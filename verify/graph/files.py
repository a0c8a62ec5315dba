"""A user's own graph: a program saved by `torch.export.save` that is made of Fusecheck's operators."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.graph.build import BuiltGraph
from fusecheck.graph.dialect import FUSECHECK

SUFFIX = ".pt2"


@dataclass(frozen=True)
class FilePlan:
    """Where the program is.

    Attributes:
        file: its path; `{rank}` in it stands for the rank's number, where ranks have programs of their own.
    """

    file: str

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FilePlan:
        """Read a plan, as `to_json` wrote it."""
        return cls(**json.loads(text))


def is_file(source: str) -> bool:
    """Whether a job's source is a model file."""
    return source.startswith('{"file":')


def load_file(plan: FilePlan, rank: int) -> BuiltGraph:
    """Load a rank's program; its inputs are the example that it was exported with.

    Raises:
        UsageError: the file is not an exported program, has no example inputs, or no all-reduce of Fusecheck's.
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
        raise UsageError(f"model file {path} is not a graph of torch.export.save ({told})") from None
    finally:
        logging.disable(logging.NOTSET)
    if program.example_inputs is None or not program.example_inputs[0]:
        raise UsageError(f"model file {path} has no example inputs, expected those it was exported with")
    inputs = program.example_inputs[0]
    if not all(isinstance(each, Tensor) for each in inputs):
        raise UsageError(f"model file {path} takes inputs that are not tensors")
    module = program.module(check_guards=False)
    if not any(FUSECHECK.is_all_reduce(node) for node in module.graph.nodes):
        raise UsageError(f"model file {path} has no torch.ops.fusecheck.all_reduce, expected a tensor-parallel graph")
    return BuiltGraph(module, lambda tokens: inputs, (), None)
