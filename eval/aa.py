"""A-A pairs: does the gate keep its levels on the flips that a repetition of the unfused arm showed?

`fusecheck accuracy --operating-characteristics --noise RUN` draws pairs from a finished run. Under the null hypothesis
both arms are the same kernel, so the questions are drawn anew and either arm's answer may be either's: a FAIL is
false. For the other error a drop of just the margin is laid on top of those flips: a PASS is false.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from fusecheck.errors import UsageError
from fusecheck.eval.arm import NOISE, ORACLE, UNFUSED
from fusecheck.eval.endpoints import Pairs, choose_endpoints, join
from fusecheck.eval.gate import GateSettings, Verdict, decide
from fusecheck.eval.kl import judge_oracle
from fusecheck.eval.logprobs import arm_distances, choose_source
from fusecheck.eval.report_blocks import Block
from fusecheck.eval.samples import Run, read_run

DOUBT = 0.01
"""A rate is called above its level where a gate that keeps the level shows such a count less often than this."""


@dataclass(frozen=True)
class ErrorRate:
    """How often one error was made, and how often the rule allows it.

    Attributes:
        what: task and error.
        noise: flips of the repetition, and questions.
        wrong: pairs that were judged wrongly.
        pairs: simulated.
        level: the rule's.
    """

    what: str
    noise: str
    wrong: int
    pairs: int
    level: float

    @property
    def kept(self) -> bool:
        """Whether the count is one that a gate which keeps its level shows."""
        return float(binom.sf(self.wrong - 1, self.pairs, self.level)) >= DOUBT


def aa_rates(folder: Path, settings: GateSettings, *, pairs: int, seed: int) -> list[ErrorRate]:
    """Simulate pairs from the arms `unfused` and `unfused-again` of a run, and from its oracle if there is one.

    Raises:
        UsageError: the run has no such arms, or nothing in it can be judged.
    """
    for arm in (UNFUSED, NOISE):
        if not (folder / arm).is_dir():
            raise UsageError(
                f"--noise {folder}: has no arm {arm}; give the --run-dir of a run without --quick, or of --aa"
            )
    first, second = read_run(folder / UNFUSED), read_run(folder / NOISE)
    oracle = read_run(folder / ORACLE) if (folder / ORACLE).is_dir() else None
    rng, rates = np.random.default_rng(seed), []
    endpoints, _ = choose_endpoints(first, {})
    joined = [join(endpoint, first, second) for endpoint in endpoints]
    if not joined:
        raise UsageError(f"--noise {folder}: no task in it has a metric that is 0 or 1; nothing to simulate")
    for paired in joined:
        rates += _accuracy_rates(paired, settings, len(joined), pairs, rng)
    if oracle is not None:
        rates += _oracle_rates(joined, (first, second, oracle), settings, pairs, rng)
    return rates


def _accuracy_rates(
    paired: Pairs, settings: GateSettings, tasks: int, pairs: int, rng: np.random.Generator
) -> list[ErrorRate]:
    flipped = paired.right(paired.baseline) != paired.right(paired.candidate)
    n, name, margin = len(flipped), paired.endpoint.name, settings.margin(paired.endpoint.name)
    share, noise = float(flipped.mean()), f"{int(flipped.sum()):,} of {len(flipped):,}"

    def judged(change: float) -> NDArray[np.str_]:
        """Verdicts on pairs whose flips are as likely a loss as a gain, with a drop on top."""
        counts = rng.multinomial(n, (share / 2 - change, share / 2, 1 - share + change), size=pairs)
        level = settings.alpha / tasks
        return decide(counts[:, 0], counts[:, 1], n, margin=margin, alpha_low=settings.alpha, alpha_high=level)

    same, worse = judged(0.0), judged(-margin)
    drop = f"{name}: PASS at a true drop of the margin, {100 * margin:g} pt"
    return [
        ErrorRate(f"{name}: FAIL, nothing changed", noise, _count(same, Verdict.FAIL), pairs, settings.alpha / tasks),
        ErrorRate(drop, noise, _count(worse, Verdict.PASS), pairs, settings.alpha),
    ]


def _count(verdicts: NDArray[np.str_], verdict: Verdict) -> int:
    return int((verdicts == verdict.value).sum())


def _oracle_rates(
    joined: list[Pairs], runs: tuple[Run, Run, Run], settings: GateSettings, pairs: int, rng: np.random.Generator
) -> list[ErrorRate]:
    first, second, oracle = runs
    found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for paired in joined:
        source = choose_source(paired.endpoint, runs)
        near, far = (arm_distances(paired.endpoint, source, oracle, arm) for arm in (first, second))
        if near is not None and far is not None:
            found.append((near.kl, far.kl))
    if not found:
        return []
    kl = np.stack([np.concatenate(side) for side in zip(*found, strict=True)])
    n, wrong = kl.shape[1], 0
    for _ in range(pairs):
        drawn, swapped = rng.integers(0, n, n), rng.integers(0, 2, n)
        mine, theirs = kl[swapped, drawn], kl[1 - swapped, drawn]
        wrong += judge_oracle(mine, theirs, settings).verdict is Verdict.FAIL
    noise = f"{int((kl[0] != kl[1]).sum()):,} of {n:,} moved"
    return [ErrorRate("distance to the oracle: FAIL, nothing changed", noise, wrong, pairs, settings.kl_alpha)]


def aa_block(folder: Path, settings: GateSettings, *, pairs: int, seed: int) -> Block:
    """The table that `--operating-characteristics --noise` prints."""
    rates = aa_rates(folder, settings, pairs=pairs, seed=seed)
    rows = [
        [
            rate.what,
            rate.noise,
            f"{rate.wrong:,} of {rate.pairs:,}",
            f"{100 * rate.wrong / rate.pairs:.1f} %",
            f"{100 * rate.level:g} %",
            "kept" if rate.kept else "EXCEEDED",
        ]
        for rate in rates
    ]
    columns = ("error", "flips of the repetition", "pairs judged wrongly", "rate", "the rule allows", "level")
    note = f"{pairs:,} simulated pairs a row, seed {seed}; exceeded: such a count has a chance below {DOUBT:g}"
    return Block("A-A pairs from this run's own noise", columns, rows, [note])
