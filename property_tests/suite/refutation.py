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
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.numerics import enclosure
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite import legal_kernels, quantiser_refutation, refuting, sum_refutation
from fusecheck.property_tests.suite.dataflows import draw_dataflow, draw_native
from fusecheck.property_tests.suite.legal_inputs import DISTRIBUTIONS, draw
from fusecheck.property_tests.suite.legal_kernels import Floats, Inputs, Outputs
from fusecheck.property_tests.suite.refuting import Tallies, report
from fusecheck.quantflow import QUANT_FLOWS

HIDDEN = (64, 128, 512, 1024, 2048, 2880, 4096, 5120, 7168, 8192)
STAGES = ("residual", "norm", "quotient", "code")
KERNELS = 4
"""For each problem."""
SEED = 20260822


@dataclass
class Tally(refuting.Tally):
    """What one bound was tried on; an element is judged in four stages.

    Attributes:
        codes: admissible codes, summed over the elements.
        reach: how far from the middle of its interval an unquantised norm was seen, as a share of the radius, at most.
    """

    codes: int = 0
    reach: float = 0.0

    def rest(self) -> dict[str, str]:
        return {"codes each": f"{self.codes / self.elements:.5f}", "reach": f"{self.reach:.2f}"}


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


def _problem(rng: np.random.Generator, index: int, elements: int) -> tuple[Dataflow, Inputs]:
    hidden = int(rng.choice(HIDDEN))
    flow = draw_dataflow(rng)
    shape = int(rng.integers(1, 9)), max(1, elements // hidden), hidden
    return flow, draw(rng, DISTRIBUTIONS[index % len(DISTRIBUTIONS)], *shape, draw_native(rng, flow))


def refute(checks: int, elements: int, seed: int) -> Iterator[Tallies[Tally]]:
    """Judge so many outputs by each sound bound, in calls of about so many; yields the tallies after every problem."""
    rng = np.random.default_rng(seed)
    free, declared, spoilt = Tally(), Tally(), Tally()
    tallies = Tallies({"any order": free, "depth declared": declared}, {"sabotaged": spoilt})
    for index in itertools.count():
        flow, inputs = _problem(rng, index, elements)
        given = operands(inputs)
        for turn in range(KERNELS):
            # One kernel in four adds up in sequence, the order whose error grows fastest.
            order = "sequential" if turn == 0 else str(rng.choice(legal_kernels.ORDERS))
            out, depth = legal_kernels.run(inputs, flow, rng, order)
            judge(flow, given, out, free)
            judge(replace(flow, depth=depth), given, out, declared)
            if turn == 0:
                with sabotage():
                    judge(flow, given, out, spoilt)
        yield tallies
        if declared.elements >= checks:
            return


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 if no sound bound was violated and each broken one was caught, else 1."""
    parser = argparse.ArgumentParser(description="Try to refute the oracle's bounds with random legal kernels.")
    parser.add_argument("--checks", type=float, default=1e8, help="elements to judge by each sound bound")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--elements", type=int, default=1 << 18, help="outputs of one call")
    parser.add_argument(
        "--format",
        choices=[*QUANT_FLOWS, "sums", "all"],
        help="a quantiser's bounds instead, or those of sums over ranks",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checks, elements, seed = int(options.checks), options.elements, options.seed
    if not options.format:
        return int(report("norms", refute(checks, elements, seed), checks))
    names = [*QUANT_FLOWS, "sums"] if options.format == "all" else [options.format]
    failed = False
    for name in names:
        if name == "sums":
            failed |= report(name, sum_refutation.refute(checks, min(elements, 1 << 14), seed), checks)
        else:
            failed |= report(name, quantiser_refutation.refute(name, checks, elements, seed), checks)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
