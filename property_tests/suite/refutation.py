"""Try to refute the oracle's bounds: random problems, random legal kernels, every output inside every time.

Each problem is computed by several kernels that keep its dataflow (`legal_kernels`), and each output is judged by
the oracle twice: with the order of the squares left open, and with the depth declared that the kernel really had.
One violation refutes the bound. To show that the run could have found one, the same outputs are judged a third time
by a bound that is broken on purpose (no error granted to the sum of squares), which must be caught.

The numbers that matter are those of the unquantised norm: a code hides nearly every violation.

    python -m fusecheck.property_tests.suite.refutation --checks 1e8
    python -m fusecheck.property_tests.suite.refutation --checks 1e8 --format all
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.numerics import enclosure
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite import legal_kernels, quantiser_refutation, sum_refutation
from fusecheck.property_tests.suite.dataflows import draw_dataflow, draw_native
from fusecheck.property_tests.suite.legal_inputs import DISTRIBUTIONS, draw
from fusecheck.property_tests.suite.legal_kernels import Floats, Inputs, Outputs
from fusecheck.quantflow import QUANT_FLOWS

HIDDEN = (64, 128, 512, 1024, 2048, 2880, 4096, 5120, 7168, 8192)
STAGES = ("residual", "norm", "quotient", "code")


@dataclass
class Tally:
    """What one bound was tried on.

    Attributes:
        elements: outputs judged; each in four stages.
        violations: by stage.
        codes: admissible codes, summed over the elements.
        reach: how far from the middle of its interval an unquantised norm was seen, as a share of the radius, at most.
    """

    elements: int = 0
    violations: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    codes: int = 0
    reach: float = 0.0

    @property
    def total(self) -> int:
        """Violations of any stage."""
        return sum(self.violations.values())


def _native(values: Floats, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def operands(inputs: Inputs) -> Operands:
    """The oracle's view of the inputs."""
    return Operands(
        [_native(partial, inputs.native) for partial in inputs.partials],
        _native(inputs.residual, inputs.native),
        _native(inputs.gamma, inputs.native),
        inputs.scale,
        inputs.eps,
        inputs.weight_bias,
    )


def _outside(values: Tensor, ends: tuple[Tensor, Tensor]) -> int:
    """How many are not inside; NaN is not."""
    inside = (values >= ends[0]) & (values <= ends[1])
    return int(values.numel() - int(inside.sum()))


def _ordinals(codes: Tensor) -> Tensor:
    wide = codes.to(torch.int16)
    return torch.where(wide >= 0x80, 0x80 - wide, wide)


def judge(flow: Dataflow, given: Operands, out: Outputs, tally: Tally) -> None:
    """Judge every element of one kernel's outputs by one bound, and add to its tally."""
    tokens, hidden = out.residual.shape
    rows, columns = torch.meshgrid(torch.arange(tokens), torch.arange(hidden), indexing="ij")
    where = (rows.reshape(-1), columns.reshape(-1))
    oracle = Oracle(flow, given)
    residual = _native(out.residual, given.residual.dtype)
    computed = {
        name: torch.from_numpy(np.ascontiguousarray(values)).reshape(-1).to(torch.float64)
        for name, values in (("residual", out.residual), ("norm", out.unrounded_norm), ("quotient", out.quotient))
    }
    norm_ends = oracle.unrounded_norm_ends(residual, where)
    code_ends = oracle.code_ends(residual, None, where)
    tally.violations["residual"] += _outside(computed["residual"], oracle.residual_ends(where))
    tally.violations["norm"] += _outside(computed["norm"], norm_ends)
    tally.violations["quotient"] += _outside(computed["quotient"], oracle.quotient_ends(residual, None, where))
    tally.violations["code"] += _outside(_ordinals(torch.from_numpy(out.codes).reshape(-1)), code_ends)
    tally.elements += tokens * hidden
    tally.codes += int((code_ends[1].to(torch.int64) - code_ends[0] + 1).sum())
    middle, radius = (norm_ends[0] + norm_ends[1]) / 2, (norm_ends[1] - norm_ends[0]) / 2
    if not flow.round_normed:  # a rounding inside the interval moves a norm to its end, legally
        share = ((computed["norm"] - middle).abs() / radius)[radius > 0]
        tally.reach = max(tally.reach, float(share.max()) if share.numel() else 0.0)


@contextmanager
def sabotage() -> Iterator[None]:
    """Grant the sum of squares no error at all."""
    with mock.patch.object(enclosure, "kappa", return_value=0.0):
        yield


@dataclass(frozen=True)
class Plan:
    """How much to try.

    Attributes:
        checks: elements for each sound bound, at least.
        elements: outputs of one call, about.
        kernels: legal kernels for each problem.
        seed: of everything.
    """

    checks: int
    elements: int = 1 << 18
    kernels: int = 4
    seed: int = 20260822


def _problem(rng: np.random.Generator, index: int, elements: int) -> tuple[Dataflow, Inputs]:
    hidden = int(rng.choice(HIDDEN))
    flow = draw_dataflow(rng)
    shape = int(rng.integers(1, 9)), max(1, elements // hidden), hidden
    return flow, draw(rng, DISTRIBUTIONS[index % len(DISTRIBUTIONS)], *shape, draw_native(rng, flow))


def refute(plan: Plan) -> Iterator[dict[str, Tally]]:
    """Run the plan; yield the tallies so far after every problem, by the name of the bound."""
    rng = np.random.default_rng(plan.seed)
    tallies = {name: Tally() for name in ("any order", "depth declared", "sabotaged")}
    index = 0
    while tallies["depth declared"].elements < plan.checks:
        flow, inputs = _problem(rng, index, plan.elements)
        given = operands(inputs)
        for turn in range(plan.kernels):
            # One kernel in four adds up in sequence, the order whose error grows fastest.
            order = "sequential" if turn == 0 else str(rng.choice(legal_kernels.ORDERS))
            out, depth = legal_kernels.run(inputs, flow, rng, order)
            judge(flow, given, out, tallies["any order"])
            judge(replace(flow, depth=depth), given, out, tallies["depth declared"])
            if turn == 0:
                with sabotage():
                    judge(flow, given, out, tallies["sabotaged"])
        index += 1
        yield tallies


def _table(tallies: dict[str, Tally]) -> str:
    lines = [f"{'bound':16}{'elements':>14}" + "".join(f"{s:>12}" for s in STAGES) + f"{'codes each':>13}{'reach':>8}"]
    for name, tally in tallies.items():
        counts = "".join(f"{tally.violations[stage]:>12}" for stage in STAGES)
        lines.append(f"{name:16}{tally.elements:>14}{counts}{tally.codes / tally.elements:>13.5f}{tally.reach:>8.2f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 if no sound bound was violated and the broken one was caught, else 1."""
    parser = argparse.ArgumentParser(description="Try to refute the oracle's bounds with random legal kernels.")
    parser.add_argument("--checks", type=float, default=1e8, help="elements to judge by each sound bound")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--elements", type=int, default=Plan.elements, help="outputs of one call")
    parser.add_argument(
        "--format",
        choices=[*QUANT_FLOWS, "sums", "all"],
        help="a quantiser's bounds instead, or those of sums over ranks",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.format:
        names = [*QUANT_FLOWS, "sums"] if options.format == "all" else [options.format]
        asked = [name for name in names if name != "sums"]
        failed = quantiser_refutation.report(asked, int(options.checks), options.elements, options.seed)
        if "sums" in names:
            failed |= sum_refutation.report(int(options.checks), min(options.elements, 1 << 14), options.seed)
        return failed
    start = time.monotonic()
    tallies: dict[str, Tally] = {}
    problems = 0
    for tallies in refute(Plan(int(options.checks), options.elements, seed=options.seed)):
        problems += 1
        if problems % 20 == 0:
            seconds = time.monotonic() - start
            print(f"... {problems} problems, {tallies['any order'].elements:.2e} elements, {seconds:.0f} s", flush=True)
    print(f"{problems} problems, seed {options.seed}, {time.monotonic() - start:.0f} s; violations by stage:")
    print(_table(tallies))
    sound = tallies["any order"].total == 0 and tallies["depth declared"].total == 0
    caught = tallies["sabotaged"].violations["norm"] > 0
    print(f"sound bounds {'hold' if sound else 'REFUTED'}; sabotaged bound {'caught' if caught else 'NOT CAUGHT'}")
    return 0 if sound and caught else 1


if __name__ == "__main__":
    sys.exit(main())
