"""How others accept an evaluation, and the smallest true drop that each rule would notice on the same questions.

Each rule compares a run with a stored reference or a fixed floor. Here the reference is the baseline's own score on the
same questions, which is kinder to the rule than a score stored on another day.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import norm

from fusecheck.eval.power import smallest_change


@dataclass(frozen=True)
class PeerRule:
    """One project's rule.

    Attributes:
        name: project and test.
        rule: the criterion in words.
        source: where it is written.
        n: questions that the project itself uses.
        tolerated: the largest measured drop that is accepted, from (baseline accuracy, n), as fractions of 1.
    """

    name: str
    rule: str
    source: str
    n: int
    tolerated: Callable[[float, int], float]


def _tensorrt_llm(baseline: float, n: int) -> float:
    return float(norm.isf(0.05)) * math.sqrt(2 * 0.5**2 / n)


PEERS: tuple[PeerRule, ...] = (
    PeerRule(
        "TensorRT-LLM accuracy_core",
        "score >= reference - 1.645 sqrt(2 sigma² / n), sigma 50 points, reference stored",
        "NVIDIA/TensorRT-LLM tests/integration/defs/accuracy/accuracy_core.py",
        4096,
        _tensorrt_llm,
    ),
    PeerRule(
        "vLLM lm-eval harness",
        "score >= 0.92 of a stored value",
        "vllm-project/vllm .buildkite/lm-eval-harness (text of PR #44704)",
        1000,
        lambda baseline, n: 0.08 * baseline,
    ),
    PeerRule(
        "vLLM tests/evals/gsm8k",
        "score >= threshold - 8 points",
        "vllm-project/vllm tests/evals/gsm8k",
        1319,
        lambda baseline, n: 0.08,
    ),
    PeerRule(
        "SGLang unit tests",
        "score >= a fixed floor, 6 points below what the model scores",
        "sgl-project/sglang test/srt (floor 0.45 for a model that scores 0.51)",
        200,
        lambda baseline, n: 0.06,
    ),
)


def smallest_flagged(tolerated: float, n: int, noise: float, *, power: float = 0.8) -> float:
    """Smallest true drop that a rule flags with chance `power`, as a fraction of 1.

    The rule flags a measured drop above `tolerated`. Both runs share the questions, so the measured drop d^ scatters
    with variance (noise + d - d²) / n: `noise` is the share of questions that flip anyway, and the drop adds its own.
    """
    z = float(norm.ppf(power))

    def excess(drop: float) -> float:
        return drop - tolerated - z * math.sqrt(max(noise + drop - drop * drop, 0.0) / n)

    if excess(1.0) < 0:
        return 1.0
    return float(brentq(excess, max(tolerated, 0.0), 1.0, xtol=1e-12))


def smallest_refused(margin: float, n: int, noise: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true drop that our gate does not PASS with chance `power`, by the same model of the scatter.

    The gate refuses a measured drop above margin - z_alpha sd.
    """
    z_alpha, z_power = float(norm.isf(alpha)), float(norm.ppf(power))

    def excess(drop: float) -> float:
        spread = math.sqrt(max(noise + drop - drop * drop, 0.0) / n)
        return drop - margin + (z_alpha - z_power) * spread

    if excess(0.0) >= 0:
        return 0.0
    return float(brentq(excess, 0.0, 1.0, xtol=1e-12))


def smallest_found(n: int, noise: float, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Smallest true drop that the paired test finds when it comes on top of `noise` flips: flips = noise + drop."""
    drop = smallest_change(n, noise, alpha=alpha, power=power) or noise
    for _ in range(100):
        found = smallest_change(n, noise + drop, alpha=alpha, power=power)
        if found is None:
            return None
        if abs(found - drop) < 1e-9:
            return found
        drop = found
    return drop
