"""Bugs planted around a real kernel in your own model: what the gate says of each, and where the trace finds it.

`python -m fusecheck.eval.planted_model MODEL [BUG ...] --backend flashinfer:fp32 --device cuda --tasks mmlu --data DIR`
runs the oracle and the unfused arm once, then the fused arm with each bug, on ranks that are started once, and prints a
table. With the same `--run-dir` and the same options it goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fusecheck.eval.asked import Asked
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.options import read_tasks
from fusecheck.eval.planted_arms import collect, run_bugs, to_json
from fusecheck.eval.planted_tiers import ended, folder_of, options_of
from fusecheck.eval.recipe import Form
from fusecheck.eval.run import Job, open_job
from fusecheck.eval.spoiled import KINDS


def fitting(job: Job) -> list[str]:
    """The bugs that can show in a checkpoint."""
    quantiser = (job.form or Form()).activations
    kinds = {name: kind for name, kind in KINDS.items() if not kind.quantisers or quantiser in kind.quantisers}
    with Checkpoint(job.folder) as checkpoint:
        return [name for name, kind in kinds.items() if not kind.unseen_in(checkpoint)]


def run(given: argparse.Namespace) -> None:
    """Run the arms, and print the table.

    Raises:
        UsageError: a broken argument, or a --run-dir whose arms were asked for otherwise.
        Inconclusive: a package or a GPU is missing.
        ArmError: the ranks failed.
    """
    how = ("model", "tp", "backend", "data", "limit", "shots", "device", "batch", "virtual")
    asked = Asked(tasks=read_tasks(given.tasks), **{name: getattr(given, name) for name in how})
    with folder_of(given) as folder:
        right = open_job(asked)
        bugs = given.names or fitting(right)
        made = run_bugs(right, bugs, folder, lambda line: print(line, file=sys.stderr, flush=True))
        rows = (to_json(given.model.name, *each) for each in made)
        limit = "" if asked.limit is None else f" --limit {asked.limit}"
        about = f"--model {given.model.name} --backend {asked.backend} --tasks {given.tasks} --tp {asked.tp}{limit}"
        collect(rows, f"python -m fusecheck.eval.planted_model {about}", given.json)


def main() -> int:
    """Run and print; returns the exit code."""
    parser = options_of(__doc__, KINDS)
    parser.set_defaults(names=[])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--backend", default="emulated", help="the right kernel")
    parser.add_argument("--tp", type=int, default=2, help="ranks")
    parser.add_argument("--tasks", default="mmlu", help="lm-eval tasks, comma-separated")
    parser.add_argument("--data", type=Path, help="folder with MMLU and GSM8K")
    parser.add_argument("--shots", type=int, default=0, help="examples before each question")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, help="rows of a batch at most")
    parser.add_argument("--virtual", action="store_true", help="all ranks in one process on one GPU")
    given = parser.parse_args()
    return ended("planted_model", lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
