"""The golden model in each FP8 form, and one bug planted around the fused kernel of each: what gate and trace say.

`python -m fusecheck.eval.planted_forms [--limit N] [--run-dir DIR] [--json FILE]` makes the golden model's weights
into every form (`--form` of `fusecheck accuracy calibrate`), runs the arms with the emulated kernel of that quantiser,
and prints a table. With the same `--run-dir` it goes on where it was broken off. A recorded table:
`golden/model/forms.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fusecheck.eval.arm import FUSED, ORACLE, RECORD_NAME, UNFUSED
from fusecheck.eval.asked import Asked
from fusecheck.eval.calibrate import COPIED, quantise_checkpoint
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.compare import compare
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.planted_tiers import asked, figures
from fusecheck.eval.recipe import FORMS
from fusecheck.eval.run import GOLDEN, open_job, run_arms
from fusecheck.eval.samples import Run, read_run
from fusecheck.eval.spoiled import KINDS
from fusecheck.eval.trace import Trace, change_of, choose, place, prompts, trace
from fusecheck.report.result import write_aside

TASK = "golden_mmlu"
TP = 2
BUGS = {
    "dynamic": ("nothing", "token_neighbour"),
    "group": ("nothing", "group_shifted"),
    "group-ue8m0": ("nothing", "group_shifted", "powers_late"),
}
"""What is planted in each form."""
COLUMNS = ("form", "candidate", "acc", "Δ pt", "lost/gained", "KL ÷ unfused's", "Wilcoxon p", "gate", "first site")


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
            quantise_checkpoint(plain, model, FORMS[form])

        def arms(
            wanted: Sequence[str], backend: str, out: Path, model: Path = model, form: str = form
        ) -> dict[str, Run]:
            left = [arm for arm in wanted if not (out / arm / RECORD_NAME).is_file()]
            if left:
                tell(f"{form}: {', '.join(left)} by {backend}")
                run_arms(Asked(model, TP, backend, [TASK], limit=limit), left, out)
            return {arm: read_run(out / arm) for arm in wanted}

        base = arms([ORACLE, UNFUSED], "emulated", folder / form / "base")
        for bug in BUGS[form]:
            backend = f"fusecheck.eval.spoiled:{bug}__emulated"
            candidate = arms([FUSED], backend, folder / form / bug)[FUSED]
            outcome = compare(base[UNFUSED], candidate, base[ORACLE], options=Options())
            questions = choose(outcome, base[UNFUSED], candidate)
            job = open_job(Asked(model, TP, backend))
            yield form, bug, outcome, trace(job, questions, prompts(questions, base[UNFUSED]), tell)


def to_json(form: str, bug: str, outcome: Comparison, found: Trace) -> dict[str, Any]:
    """What the table shows of one candidate."""
    flips, oracle, first = outcome.tasks[0].judgement.flips, outcome.oracle, found.first
    row: dict[str, Any] = {
        "form": form,
        "bug": bug,
        "title": KINDS[bug].title,
        "right": KINDS[bug].right,
        "questions": flips.n,
        "accuracy": flips.candidate_right / flips.n,
        "lost": flips.lost,
        "gained": flips.gained,
        "verdict": outcome.verdict.value,
        "trace": found.headline(change_of(outcome)),
        "first": None if first is None else [place(first.site), first.stage],
        "deviating_sites": len({site for site, _, _ in found.places}),
        "sites": found.sites,
    }
    return row if oracle is None else row | {"kl_ratio": oracle.ratio, "wilcoxon_p": oracle.p}


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [
        [
            str(row["form"]),
            str(row["title"]),
            *figures(row),
            str(row["verdict"]),
            "none" if row["first"] is None else ", stage ".join(row["first"]),
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ("---",) * len(COLUMNS), *cells)) + "\n"


def main() -> None:
    """Run and print."""
    options = asked(__doc__, BUGS)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run_dir or Path(scratch)
        for made in run_forms(options.names, options.limit, folder, lambda line: print(line, file=sys.stderr)):
            rows.append(to_json(*made))
            if options.json is not None:
                limit = "" if options.limit is None else f" --limit {options.limit}"
                command = f"python -m fusecheck.eval.planted_forms{limit}"
                write_aside(options.json, json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(to_markdown(rows), end="")


if __name__ == "__main__":
    main()
