"""Bugs planted in the fused kernel of a whole model, and which tier catches each.

`python -m fusecheck.eval.planted [--limit N] [--run-dir DIR] [--json FILE]` asks the kernel question of each of
`PLANTED`, runs the golden model once with the unfused ops and once with each, and prints a table. Each is a backend:
`fusecheck.eval.planted:row_in_32` and so on. With the same `--run-dir` it goes on where it was broken off. The whole
table: `golden/model/planted.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_arithmetic import Arithmetic, Row
from fusecheck.errors import UsageError
from fusecheck.eval.arm import FUSED, ORACLE, UNFUSED
from fusecheck.eval.asked import Asked, keep_to
from fusecheck.eval.compare import compare
from fusecheck.eval.exported import ExportedBackend
from fusecheck.eval.outcome import Comparison, Options
from fusecheck.eval.planted_arms import collect
from fusecheck.eval.planted_tiers import KernelTier, answered, ask_kernel, ended, folder_of, options_of, table, tiers
from fusecheck.eval.run import run_arms
from fusecheck.eval.samples import Run, read_run
from fusecheck.eval.spoiled import FirstScalePath, SpoiledBackend
from fusecheck.faults.casts import QuantisesUnrounded
from fusecheck.interface import RankInputs

TASK = "golden_mmlu"
FP32 = "flashinfer-fp32"
"""The dataflow that adds the ranks' addends in float32."""


class Eps(Arithmetic):
    """The norm adds an eps of its own."""

    value = 0.0

    def epsilon(self, inputs: RankInputs) -> float:
        """Ignore the caller's."""
        del inputs
        return self.value


class Eps1e4(Eps):
    """Ten times the golden model's eps."""

    value = 1e-4


class Eps1(Eps):
    """An eps of the size of the mean square."""

    value = 1.0


class ScaleToPowerOfTwo(Arithmetic):
    """The scale is rounded down to a power of two, while the reader multiplies by the true one; codes saturate."""

    def prepare(self, inputs: RankInputs) -> Row:
        """Round the scale first."""
        return super().prepare(replace(inputs, scale=torch.exp2(torch.floor(torch.log2(inputs.scale)))))


class SumsInFp8(Arithmetic):
    """The collective accumulates in E4M3, unscaled."""

    def round_sum(self, accumulator: Tensor, native: torch.dtype) -> Tensor:
        """Round the sum to E4M3 on its way."""
        narrow = accumulator.float().clamp(-448, 448).to(torch.float8_e4m3fn)
        return super().round_sum(narrow.to(accumulator.dtype), native)


class FirstScaleBackend(EmulatedBackend):
    """A right kernel in a wrong graph."""

    path = FirstScalePath


@dataclass(frozen=True)
class Planted:
    """One candidate.

    Attributes:
        title: what it does.
        make: makes its backend.
        right: whether it is as it should be.
        tp: ranks on which it shows.
        promised: the dataflow that the model was promised, where the kernel itself declares another.
    """

    title: str
    make: Callable[[], EmulatedBackend | ExportedBackend | SpoiledBackend]
    right: bool = False
    tp: int = 2
    promised: str | None = None


def _with(arithmetic: type[Arithmetic]) -> Callable[[], EmulatedBackend]:
    return lambda: EmulatedBackend(arithmetic=arithmetic)


def _fp32() -> EmulatedBackend:
    return EmulatedBackend(FP32)


def _bf16() -> EmulatedBackend:
    return EmulatedBackend("flashinfer")


PLANTED: dict[str, Planted] = {
    "correct": Planted("fused, correct", EmulatedBackend, right=True),
    "correct_fp32": Planted("fused, correct, float32 sum", _fp32, right=True),
    "exported": Planted("exported graph, fused by the passes", lambda: ExportedBackend("emulated"), right=True),
    "skips_rounding": Planted("missing bf16 round trip before the cast", _with(QuantisesUnrounded)),
    "row_in_32": Planted("1 row in 32 with another scale", lambda: SpoiledBackend("row_in_32", "emulated")),
    "eps_1e4": Planted("eps 1e-4 for 1e-5", _with(Eps1e4)),
    "eps_1": Planted("eps 1 for 1e-5", _with(Eps1)),
    "first_scale": Planted("first consumer's scale for all", FirstScaleBackend),
    "scale_power_of_two": Planted("scale rounded down to a power of two", _with(ScaleToPowerOfTwo)),
    "sums_in_fp8": Planted("collective accumulates in FP8", _with(SumsInFp8)),
    # Two addends are added exactly alike in either precision.
    "correct_tp4": Planted("fused, correct, float32 sum of 4 ranks", _fp32, right=True, tp=4),
    "sums_in_bf16": Planted("bf16 sum of 4 ranks for float32", _bf16, tp=4, promised=FP32),
}


def __getattr__(name: str) -> EmulatedBackend | ExportedBackend | SpoiledBackend:
    """The backend of this name."""
    if name not in PLANTED:
        raise AttributeError(name)
    made = PLANTED[name].make()
    made.name = f"planted:{name}"
    return made


def run_planted(
    names: Sequence[str], limit: int | None, folder: Path, tell: Callable[[str], None]
) -> Iterator[tuple[str, Comparison]]:
    """Run the unfused arm and the oracle once per number of ranks, and the fused arm once per candidate; judge each.

    Arms that `folder` holds already are not run again.

    Raises:
        UsageError: a broken model or limit, or arms that were run with another limit.
        ArmError: the ranks failed.
    """

    def arms(wanted: Sequence[str], backend: str, tp: int, out: Path) -> dict[str, Run]:
        left = [arm for arm in wanted if not (out / arm).is_dir()]
        if left:
            run_arms(Asked(tp=tp, backend=backend, tasks=[TASK], limit=limit), left, out)
        return {arm: read_run(out / arm) for arm in wanted}

    keep_to(folder, {"limit": limit})
    base: dict[int, dict[str, Run]] = {}
    for name in names:
        tp = PLANTED[name].tp
        if tp not in base:
            tell(f"oracle and unfused on {tp} ranks")
            base[tp] = arms([ORACLE, UNFUSED], "unfused", tp, folder / f"base{tp}")
        tell(PLANTED[name].title)
        candidate = arms([FUSED], f"fusecheck.eval.planted:{name}", tp, folder / name)[FUSED]
        yield name, compare(base[tp][UNFUSED], candidate, base[tp][ORACLE], options=Options())


def kernel_tier(name: str) -> KernelTier | None:
    """What the kernel question says of a candidate; None for a graph that calls another candidate's kernel.

    Raises:
        UsageError: the kernel takes no case.
    """
    planted = PLANTED[name]
    if isinstance(planted.make(), ExportedBackend):
        return None
    return ask_kernel(f"fusecheck.eval.planted:{name}", planted.tp, planted.promised)


def to_json(name: str, outcome: Comparison, kernel: KernelTier | None) -> dict[str, Any]:
    """What the table shows of one candidate."""
    planted = PLANTED[name]
    return {
        "name": name,
        "title": planted.title,
        "right": planted.right,
        "tp": planted.tp,
        "kernel": None if kernel is None else asdict(kernel),
        **answered(outcome),
        "caught_by": tiers(kernel, outcome),
    }


def run(options: argparse.Namespace) -> None:
    """Run the candidates, and print the table, also where they end early.

    Raises:
        UsageError: a broken argument, or a --run-dir whose arms were run with another limit.
        Inconclusive: a package is missing.
        ArmError: the ranks failed.
    """
    if unknown := [name for name in options.names if name not in PLANTED]:
        raise UsageError(f"candidate {unknown[0]!r}, expected some of: {', '.join(PLANTED)}")
    with folder_of(options) as folder:
        made = run_planted(options.names, options.limit, folder, lambda x: print(x, flush=True))
        rows = (to_json(name, outcome, kernel_tier(name)) for name, outcome in made)
        show = Console(width=180).print
        collect(rows, "python -m fusecheck.eval.planted", options.json, lambda every: show(table(every)))


if __name__ == "__main__":
    given = options_of(__doc__, PLANTED).parse_args()
    sys.exit(ended("planted", lambda: run(given)))
