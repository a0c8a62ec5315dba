"""Right kernels of every known dataflow and every known quantiser, judged: nothing may be found.

    python -m fusecheck.property_tests.suite.false_alarms --outputs 1e9 --json golden/false_alarms.json

Each dataflow goes with each known arithmetic of each format, on inputs of every family in turn. The emulated kernels
cut off wherever a division need not be correctly rounded, which is the far end of what they may do. On Gaussian rows
it is counted, too, how many scales a group may have, and how many codes an element.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.inputs.scales import draw_scale
from fusecheck.operations import GIVEN_SCALE, Collective, compose
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import CPU, Given, emulated, judged
from fusecheck.quantflow import QUANT_FLOWS, QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.report import Verdict, write_result
from fusecheck.stages.judgement import raw

HIDDEN = (1024, 2048, 2944, 4096, 7168)
"""Multiples of 128, so that groups of every format divide them."""
WORLD_SIZES = (2, 4, 2, 8)
FACTORS = (561.0286, 512.0)
"""NVFP4's factors of a tensor in turn: one that makes no quotient a tie, and a power of two."""
ROWS = 8192
"""Gaussian rows of 128 on which admissible scales and codes are counted."""


@dataclass
class Room:
    """How many scales and codes were admissible, given the norm that was returned.

    Attributes:
        groups: counted, 0 where the scale is given.
        scales: admissible over all groups.
        elements: counted.
        codes: admissible over all elements, given the scales as stored.
    """

    groups: int = 0
    scales: int = 0
    elements: int = 0
    codes: int = 0

    def to_record(self) -> dict[str, float]:
        """The counts, and the means: scales a group, codes an element given its scale, pairs of both an element."""
        scales, codes = self.scales / self.groups if self.groups else 1.0, self.codes / self.elements
        means = {"scales_per_group": scales, "codes_per_element": codes, "pairs_per_element": scales * codes}
        return asdict(self) | {name: round(mean, 9) for name, mean in means.items()}


@dataclass
class Run:
    """What was judged so far.

    Attributes:
        outputs: elements of residual, norm, codes, scales and padding that were judged.
        calls: of the emulated kernels.
        by_format: outputs by quantiser.
        findings: one line each.
    """

    outputs: int = 0
    calls: int = 0
    by_format: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def known() -> Iterator[tuple[str, QuantFlow | None]]:
    """Every format with every known arithmetic; a given scale is the dataflow's own matter."""
    yield GIVEN_SCALE, None
    for name, flows in QUANT_FLOWS.items():
        yield from ((name, rules) for rules in flows.values() if name != GIVEN_SCALE)


def problem_of(turn: int, elements: int) -> Problem:
    """The inputs of one turn: family, shape and dtype, each changing at its own pace."""
    family = FAMILIES[sorted(FAMILIES)[turn % len(FAMILIES)]]
    hidden = HIDDEN[turn % len(HIDDEN)]
    return Problem(
        dtype=("bf16", "bf16", "fp16")[turn % 3],
        world_size=WORLD_SIZES[turn % len(WORLD_SIZES)],
        tokens=max(1, elements // hidden),
        hidden=hidden,
        gamma=family.gamma or "spread",
        family=family.name,
        seed=turn,
    )


def asked(problem: Problem, name: str, rules: QuantFlow | None, turn: int) -> Problem:
    """The same inputs for one format: with and without the norm, its layouts in turn, a scale of a kind that fits."""
    op = compose(Collective.ALL_REDUCE, residual=True, quantiser=name, norm_out=turn % 3 < 2)
    kinds, layouts = FAMILIES[problem.family].scales, quantiser(name).layouts
    given = draw_scale(kinds[turn % len(kinds)], turn)
    if rules is not None:
        factor = FACTORS[turn % len(FACTORS)]
        given = {"multiplies": factor, "divides": 1 / factor}.get(rules.given, 1.0)
    return replace(problem, op=op, scale=given, layout=layouts[turn % len(layouts)] if op.returns_scale else "")


def declared(base: Dataflow, name: str, rules: QuantFlow | None) -> Dataflow:
    """The dataflow with one arithmetic of one format."""
    return base if rules is None else replace(base, quants=((name, rules),))


def judge(run: Run, problem: Problem, flow: Dataflow, source: Inputs) -> None:
    """One call of the emulated kernel, judged as a whole."""
    outputs, operands = emulated(problem, flow, source=source), source.operands(range(problem.tokens))
    for stage, tally in judged(problem, flow, outputs, operands=operands).items():
        run.outputs += tally.elements
        run.by_format[problem.op.quantiser] = run.by_format.get(problem.op.quantiser, 0) + tally.elements
        if tally.outside:
            run.findings.append(f"{stage.value} {flow.name} {flow.quants} {problem.to_json()} {tally.shown[:1]}")
    run.calls += 1


def room(name: str, rules: QuantFlow, given: float, rows: int) -> Room:
    """The admissible scales and codes of so many Gaussian rows of 128 in bf16, each an observed norm."""
    made = quantiser(name)
    norm = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wide = norm.double(), norm.double()
    stored = made.scales(norm, rules, given)
    low, high = (end.expand(rows, -1) for end in made.scale_ends(wide, rules, given))
    first, last = made.code_ends(wide, stored.expand(rows, -1), rules, given)
    unit = 1 << 23 if stored.dtype is torch.float32 and rules.pow2 != "no" else 1  # of powers of two: exponents
    scales = (raw(high).long() - raw(low).long() + unit - 1) // unit + 1
    codes = last.long() - first.long() + 1
    groups = 0 if rules.given == "scale" else scales.numel()
    return Room(groups, int(scales.sum()), codes.numel(), int(codes.sum()))


def rooms(rows: int) -> dict[str, Room]:
    """`room` of every known arithmetic of every format; NVFP4's with a factor of either kind."""
    found = {}
    for name, flows in QUANT_FLOWS.items():
        for rules in flows.values():
            kinds = {"multiplies": FACTORS, "divides": tuple(1 / g for g in FACTORS), "scale": (0.0123,)}
            for given in kinds.get(rules.given, (1.0,)):
                told = f" g={given:.6g}" if rules.given in ("multiplies", "divides") else ""
                found[f"{name} {rules.name}{told}"] = room(name, rules, float(torch.tensor(given)), rows)
    return found


def execute(outputs: float, elements: int, seconds: float) -> Iterator[Run]:
    """Judge calls of so many elements, until so many outputs are judged or the time is over; yields after each turn."""
    run, began, turn = Run(), time.monotonic(), 0
    while True:
        for base in DATAFLOWS.values():
            problem = problem_of(turn, elements)
            source = Inputs(problem, CPU)
            rows = range(problem.tokens)
            partials, addend = source.partials(rows), source.residual(rows)
            for index, (name, rules) in enumerate(known()):
                here = asked(problem, name, rules, turn + index)
                judge(run, here, declared(base, name, rules), Given(here, partials, addend))
            turn += 1
            yield run
            if run.outputs >= outputs or time.monotonic() - began >= seconds:
                return


def table(counted: dict[str, Room]) -> str:
    """One line a format and its arithmetic."""
    lines = [f"{'admissible on Gaussian rows':46}{'scales a group':>16}{'codes an element':>18}{'pairs':>12}"]
    for name, each in counted.items():
        made = each.to_record()
        means = f"{made['scales_per_group']:16.6f}{made['codes_per_element']:18.7f}{made['pairs_per_element']:12.6f}"
        lines.append(f"{name:46}{means}")
    return "\n".join(lines)


def main() -> int:
    """Print the progress and the table; 0 if nothing was found in all that was asked for, 1 if something, 3 if less."""
    parser = argparse.ArgumentParser(description="Right kernels of every dataflow and format: nothing may be found.")
    parser.add_argument("--outputs", type=float, default=1e7, help="to judge, at least")
    parser.add_argument("--elements", type=int, default=2**18, help="of a call")
    parser.add_argument("--minutes", type=float, default=60, help="after which no further turn begins")
    parser.add_argument("--json", type=Path, help="write the record there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, run = time.monotonic(), Run()
    for run in execute(arguments.outputs, arguments.elements, 60 * arguments.minutes):
        if run.calls % (len(DATAFLOWS) * len(list(known()))) == 0:
            print(
                f"{run.outputs:,} outputs, {len(run.findings)} findings, {time.monotonic() - began:.0f} s", flush=True
            )
    counted = rooms(ROWS)
    verdict = Verdict.of(failed=bool(run.findings), complete=run.outputs >= arguments.outputs)
    summary = {
        "outputs": run.outputs,
        "false_alarms": len(run.findings),
        "calls": run.calls,
        "dataflows": len(DATAFLOWS),
        "arithmetics": len(list(known())),
        "families": len(FAMILIES),
        "seconds": round(time.monotonic() - began, 1),
        "outputs_by_format": run.by_format,
        "admissible": {name: each.to_record() for name, each in counted.items()},
    }
    print(table(counted))
    print(*run.findings[:9], f"{verdict.value}: {run.outputs:,} outputs, {len(run.findings)} false alarms", sep="\n")
    if arguments.json:
        with tempfile.TemporaryDirectory() as folder:
            write_result(
                Path(folder),
                "false-alarms",
                verdict,
                summary,
                [{"message": line} for line in run.findings],
                arguments.json,
            )
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main())
