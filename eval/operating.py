"""What the gate does on simulated runs: the chance of each verdict, coverage of its bounds, and the peers beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from fusecheck.eval.gate import GateSettings, Verdict, decide
from fusecheck.eval.intervals import score_statistic
from fusecheck.eval.peers import PEERS, smallest_flagged, smallest_found, smallest_refused
from fusecheck.eval.power import smallest_change, smallest_unpaired_change
from fusecheck.eval.report_blocks import Block
from fusecheck.eval.sequential import Evidence


@dataclass(frozen=True)
class Setting:
    """One row of the table: n questions, margin M, and the share of flips, the last two as fractions of 1."""

    name: str
    n: int
    margin: float
    flips: float


SETTINGS: tuple[Setting, ...] = (
    Setting("MMLU", 14042, 0.005, 0.01),
    Setting("MMLU", 14042, 0.005, 0.02),
    Setting("MMLU", 14042, 0.005, 0.05),
    Setting("MMLU 4,096", 4096, 0.01, 0.02),
    Setting("GSM8K", 1319, 0.02, 0.02),
    Setting("GSM8K", 1319, 0.02, 0.05),
    Setting("GSM8K", 1319, 0.01, 0.05),
    Setting("200 questions", 200, 0.02, 0.05),
)
DRIFTS = (0.0, -0.5, -1.0, -2.0)
"""True changes, in margins."""


@dataclass(frozen=True)
class Characteristics:
    """Shares of simulated runs at one true change.

    Attributes:
        passed: share of PASS.
        failed: share of FAIL.
        open: share of INCONCLUSIVE.
        covered: share of runs whose one-sided lower bound lies at or below the truth.
    """

    passed: float
    failed: float
    open: float
    covered: float


def simulate(setting: Setting, change: float, *, runs: int, seed: int, alpha: float) -> Characteristics | None:
    """Simulate the gate; None where a change of this size would need more flips than there are."""
    if abs(change) > setting.flips:
        return None
    rng = np.random.default_rng(seed)
    lost, gained = (setting.flips - change) / 2, (setting.flips + change) / 2
    counts = rng.multinomial(setting.n, (lost, gained, 1 - setting.flips), size=runs).astype(np.float64)
    verdicts = decide(counts[:, 0], counts[:, 1], setting.n, margin=setting.margin, alpha_low=alpha, alpha_high=alpha)
    statistic = score_statistic(counts[:, 0], counts[:, 1], setting.n, change)
    return Characteristics(
        passed=float((verdicts == Verdict.PASS.value).mean()),
        failed=float((verdicts == Verdict.FAIL.value).mean()),
        open=float((verdicts == Verdict.INCONCLUSIVE.value).mean()),
        covered=float((statistic <= norm.isf(alpha)).mean()),
    )


@dataclass(frozen=True)
class SequentialCharacteristics:
    """Shares of simulated sequential runs at one true change, and the mean number of questions they took."""

    passed: float
    failed: float
    questions: float


def simulate_sequential(
    setting: Setting, change: float, *, runs: int, seed: int, alpha: float
) -> SequentialCharacteristics:
    """Simulate the sequential rule, question by question, up to `setting.n` questions."""
    rng = np.random.default_rng(seed)
    lost, gained = (setting.flips - change) / 2, (setting.flips + change) / 2
    ends = []
    for _ in range(runs):
        x = rng.choice((-1, 1, 0), size=setting.n, p=(lost, gained, 1 - setting.flips))
        evidence = Evidence(setting.margin, alpha)
        for start in range(0, setting.n, 512):
            evidence = evidence.extended(x[start : start + 512])
        ends.append(evidence)
    return SequentialCharacteristics(
        passed=float(np.mean([e.verdict is Verdict.PASS for e in ends])),
        failed=float(np.mean([e.verdict is Verdict.FAIL for e in ends])),
        questions=float(np.mean([e.n for e in ends])),
    )


def operating_blocks(*, runs: int, sequential_runs: int, seed: int, settings: GateSettings) -> list[Block]:
    """The tables that `--operating-characteristics` prints."""
    return [
        _gate_block(runs, seed, settings.alpha),
        _sequential_block(sequential_runs, seed, settings.alpha),
        _change_block(settings),
        peer_block(settings),
    ]


def _gate_block(runs: int, seed: int, alpha: float) -> Block:
    rows = []
    for setting in SETTINGS:
        cells = [setting.name, f"{setting.n:,}", f"{100 * setting.margin:g}", f"{setting.flips:.0%}"]
        covered = []
        for index, drift in enumerate(DRIFTS):
            found = simulate(setting, drift * setting.margin, runs=runs, seed=seed + index, alpha=alpha)
            cells.append("-" if found is None else f"{found.passed:.3f}/{found.failed:.3f}/{found.open:.3f}")
            covered += [] if found is None else [found.covered]
        rows.append([*cells, f"{min(covered):.3f} to {max(covered):.3f}"])
    columns = ("task", "n", "margin, pt", "flips", "true 0", "true -M/2", "true -M", "true -2M", "bound covers")
    notes = [f"PASS/FAIL/INCONCLUSIVE in {runs:,} simulated runs a cell, seed {seed}; '-': more change than flips"]
    return Block("Operating characteristics of the gate", columns, rows, notes)


def _sequential_block(runs: int, seed: int, alpha: float) -> Block:
    rows = []
    for setting in (
        Setting("MMLU", 14042, 0.005, 0.01),
        Setting("MMLU", 14042, 0.005, 0.02),
        Setting("MMLU", 14042, 0.01, 0.02),
        Setting("GSM8K", 1319, 0.02, 0.02),
    ):
        for drift in (0.0, -1.0, -2.0):
            change = drift * setting.margin
            if abs(change) > setting.flips:
                continue
            found = simulate_sequential(setting, change, runs=runs, seed=seed, alpha=alpha)
            fixed = [setting.name, f"{100 * setting.margin:g}", f"{setting.flips:.0%}", f"{100 * change:+.1f}"]
            used = f"{found.questions:,.0f} of {setting.n:,}"
            rows.append([*fixed, f"{found.passed:.3f}", f"{found.failed:.3f}", used])
    columns = ("task", "margin, pt", "flips", "true change, pt", "PASS", "FAIL", "mean questions used")
    return Block("Sequential mode", columns, rows, [f"{runs:,} simulated runs a row, seed {seed}"])


def _change_block(settings: GateSettings) -> Block:
    sizes = (("MMLU", 14042), ("MMLU", 4096), ("GSM8K", 1319), ("", 500), ("", 200))
    level = {"alpha": settings.alpha, "power": settings.power}
    rows = [["two separate samples"] + [f"{100 * smallest_unpaired_change(n, **level):.2f}" for _, n in sizes]]
    for flips in (0.005, 0.01, 0.02, 0.05, 0.1):
        found = [smallest_change(n, flips, **level) for _, n in sizes]
        rows.append([f"paired, flips {flips:.1%}"] + ["-" if f is None else f"{100 * f:.3f}" for f in found])
    columns = ("smallest detectable drop, pt", *(f"{name} {n:,}".strip() for name, n in sizes))
    return Block("Smallest detectable change, 80 % power", columns, rows, ["'-': more change than flips"])


def peer_block(settings: GateSettings) -> Block:
    """The smallest true drop that each project's rule flags with 80 % chance, and ours, on the same questions."""
    sizes, noise, baseline = (("mmlu", 14042), ("gsm8k", 1319)), 0.02, 0.75
    rows = []
    for peer in PEERS:
        on = [smallest_flagged(peer.tolerated(baseline, n), n, noise) for n in (peer.n, *(n for _, n in sizes))]
        rows.append([peer.name, peer.rule, f"{100 * on[0]:.2f} (n {peer.n:,})", *(f"{100 * d:.2f}" for d in on[1:])])
    found = [smallest_found(n, noise, alpha=settings.alpha, power=settings.power) for _, n in sizes]
    rows.append(
        ["fusecheck, paired test", "one-sided McNemar, 5 %", ""]
        + ["-" if f is None else f"{100 * f:.2f}" for f in found]
    )
    refused = [smallest_refused(settings.margin(t), n, noise, alpha=settings.alpha) for t, n in sizes]
    margins = ", ".join(f"{t} {100 * settings.margin(t):g}" for t, _ in sizes)
    rows.append(["fusecheck, PASS refused", f"margins {margins} pt", "", *(f"{100 * d:.2f}" for d in refused)])
    columns = ("who", "rule", "on its own n, pt", *(f"{t} {n:,}, pt" for t, n in sizes))
    notes = [
        f"smallest true drop noticed with 80 % chance; {noise:.1%} of the questions flip anyway; "
        f"baseline {baseline:.0%}; every rule is given the same questions in both arms"
    ]
    return Block("Beside other projects' rules", columns, rows, [*notes, *(f"{p.name}: {p.source}" for p in PEERS)])
