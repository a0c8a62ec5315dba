"""The golden model in each FP8 form, and one bug planted around the fused kernel of each: what gate and trace say.

`python -m fusecheck.eval.planted_forms [--limit N] [--run-dir DIR] [--json FILE]` makes the golden model's weights
into every form (`--form` of `fusecheck accuracy calibrate`), runs the arms with the emulated kernel of that quantiser,
and prints a table. With the same `--run-dir` it goes on where it was broken off. A recorded table:
`golden/model/forms.json`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.eval.asked import Asked
from fusecheck.eval.calibrate import COPIED, quantise_checkpoint
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.outcome import Comparison
from fusecheck.eval.planted_arms import collect, run_bugs, to_json
from fusecheck.eval.planted_tiers import ended, folder_of, options_of
from fusecheck.eval.recipe import FORMS
from fusecheck.eval.run import GOLDEN, open_job
from fusecheck.eval.trace import Trace

TASK = "golden_mmlu"
BUGS = {
    "dynamic": ("nothing", "token_neighbour"),
    "group": ("nothing", "group_shifted"),
    "group-ue8m0": ("nothing", "group_shifted", "powers_late"),
}
"""What is planted in each form."""


def write_plain(out: Path) -> Path:
    """The golden model's weights as its codes stand for them, in bf16, as a checkpoint that is not quantised."""
    out.mkdir(parents=True, exist_ok=True)
    with Checkpoint(GOLDEN) as checkpoint:
        tensors: dict[str, Tensor] = {}
        for module, outputs, inputs in checkpoint.linears():
            codes = checkpoint.tensor(f"{module}.weight", (outputs, inputs)).float()
            tensors[f"{module}.weight"] = (codes * checkpoint.weight_scale(module, outputs, inputs)).to(torch.bfloat16)
        names = (name for name in checkpoint.names() if name not in tensors and not name.endswith("_scale"))
        tensors |= {name: checkpoint.whole(name) for name in names}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", *COPIED):
        if (GOLDEN / name).is_file():
            shutil.copyfile(GOLDEN / name, out / name)
    return out


def run_forms(
    forms: Sequence[str], limit: int | None, folder: Path, tell: Callable[[str], None]
) -> Iterator[tuple[str, str, Comparison, Trace]]:
    """Yield form, bug, what the gate says, and what the trace finds; arms that `folder` holds are not run again.

    Raises:
        UsageError: a broken limit.
        ArmError: the ranks failed.
    """
    plain = folder / "plain"
    if not (plain / "config.json").is_file():
        write_plain(plain)
    for form in forms:
        model = folder / form / "model"
        if not (model / "config.json").is_file():
            shutil.rmtree(model, ignore_errors=True)  # of a run that was broken off
            quantise_checkpoint(plain, model, FORMS[form])
        asked = Asked(model, tasks=[TASK], limit=limit)
        for bug, outcome, found in run_bugs(open_job(asked), BUGS[form], folder / form, tell):
            yield form, bug, outcome, found


def run(options: argparse.Namespace) -> None:
    """Run, and print the table.

    Raises:
        UsageError: a broken argument, or a --run-dir whose arms were asked for otherwise.
        Inconclusive: a package is missing.
        ArmError: the ranks failed.
    """
    if unknown := [name for name in options.names if name not in BUGS]:
        raise UsageError(f"form {unknown[0]!r}, expected some of: {', '.join(BUGS)}")
    limit = "" if options.limit is None else f" --limit {options.limit}"
    with folder_of(options) as folder:
        made = run_forms(options.names, options.limit, folder, lambda line: print(line, file=sys.stderr))
        collect((to_json(*each) for each in made), f"python -m fusecheck.eval.planted_forms{limit}", options.json)


if __name__ == "__main__":
    given = options_of(__doc__, BUGS).parse_args()
    sys.exit(ended("planted_forms", lambda: run(given)))
