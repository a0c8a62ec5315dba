"""Stop as soon as the evidence suffices: anytime-valid betting on the per-question differences.

Each question gives X in {-1, 0, +1}, candidate minus baseline. A gambler who stakes lambda on "the change is better
than -M" multiplies his wealth by 1 + lambda (X + M); were the change -M or worse, his wealth would grow above 20 with
chance at most 1 in 20, however often one looks (Ville's inequality). The stakes are mixed over a fixed set.
PASS when that wealth reaches 1 / alpha; FAIL when the wealth against "no change" does and the mean is -M or lower.
When the questions run out the result is INCONCLUSIVE, not a test at fixed n: that would spend alpha twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusecheck.errors import UsageError
from fusecheck.eval.gate import Verdict
from fusecheck.report.result import write_aside

STAKES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Evidence:
    """What is known of one task after some questions.

    Attributes:
        margin: M, a fraction of 1.
        alpha: level of each side.
        n: questions seen.
        total: sum of X.
        log_pass: log wealth of each stake against "the change is -M or worse".
        log_fail: log wealth of each stake against "no change or better".
        verdict: PASS or FAIL once reached, and then final; INCONCLUSIVE until then.
    """

    margin: float
    alpha: float = 0.05
    n: int = 0
    total: int = 0
    log_pass: tuple[float, ...] = (0.0,) * len(STAKES)
    log_fail: tuple[float, ...] = (0.0,) * len(STAKES)
    verdict: Verdict = Verdict.INCONCLUSIVE

    @property
    def e_pass(self) -> float:
        """Wealth of the mixture against "the change is -M or worse"."""
        return _mixture(self.log_pass)

    @property
    def e_fail(self) -> float:
        """Wealth of the mixture against "no change or better"."""
        return _mixture(self.log_fail)

    def extended(self, differences: ArrayLike) -> Evidence:
        """The evidence after further questions, one at a time: a verdict reached on the way stands."""
        x = np.asarray(differences, dtype=np.float64)
        if x.ndim != 1 or not np.isin(x, (-1.0, 0.0, 1.0)).all():
            raise ValueError(f"differences must be -1, 0 or 1, one a question; got shape {x.shape}")
        if self.verdict is not Verdict.INCONCLUSIVE or not len(x):
            return self
        stakes = np.asarray(STAKES)
        passing = np.asarray(self.log_pass) + np.cumsum(np.log1p(stakes * (x[:, None] + self.margin)), axis=0)
        failing = np.asarray(self.log_fail) + np.cumsum(np.log1p(-stakes * x[:, None]), axis=0)
        threshold = math.log(len(STAKES)) - math.log(self.alpha)
        means = (self.total + np.cumsum(x)) / (self.n + np.arange(1, len(x) + 1))
        passed = _log_sum(passing) >= threshold
        failed = (_log_sum(failing) >= threshold) & (means <= -self.margin)
        stopped = np.flatnonzero(passed | failed)
        last = int(stopped[0]) if len(stopped) else len(x) - 1
        verdict = Verdict.INCONCLUSIVE
        if len(stopped):
            verdict = Verdict.PASS if passed[last] else Verdict.FAIL
        return replace(
            self,
            n=self.n + last + 1,
            total=self.total + int(x[: last + 1].sum()),
            log_pass=tuple(float(v) for v in passing[last]),
            log_fail=tuple(float(v) for v in failing[last]),
            verdict=verdict,
        )


def _mixture(log_wealth: Sequence[float]) -> float:
    # Capped where float64 ends; nobody needs more evidence than that.
    return math.exp(min(float(_log_sum(np.asarray(log_wealth))) - math.log(len(STAKES)), 700.0))


def _log_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the sum of exponentials over the last axis; scipy's checks cost more than the sum here."""
    largest = values.max(axis=-1)
    total: NDArray[np.float64] = largest + np.log(np.exp(values - largest[..., None]).sum(axis=-1))
    return total


def stratified_order(strata: Sequence[str], seed: int) -> NDArray[np.int64]:
    """A seeded order of the questions in which every prefix has each stratum's share, as nearly as whole numbers allow.

    Args:
        strata: the stratum of each question, length n.
        seed: of numpy's default generator.

    Returns:
        Indices [n], a permutation.
    """
    rng = np.random.default_rng(seed)
    names, index = np.unique(np.asarray(strata, dtype=np.str_), return_inverse=True)
    place = np.empty(len(strata))
    for stratum in range(len(names)):
        members = rng.permutation(np.flatnonzero(index == stratum))
        # The k-th of m members goes to a random point of the k-th m-th of the line.
        place[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(place, kind="stable").astype(np.int64)


@dataclass(frozen=True)
class SequentialPlan:
    """What is fixed before the first question, and must be unchanged when a run is resumed.

    Attributes:
        questions: (leaf task, doc_id) in the order of asking.
        margin: M, a fraction of 1.
        alpha: level of each side.
        block: questions between two looks.
        identity: digest of anything else that must not change (weights, backend, tasks).
    """

    questions: tuple[tuple[str, int], ...]
    margin: float
    alpha: float = 0.05
    block: int = 256
    identity: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the plan."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class SequentialState:
    """How far a plan has come; written after every block."""

    plan_digest: str
    asked: int
    evidence: Evidence
    history: tuple[tuple[int, float, float], ...] = field(default=())

    def save(self, path: Path) -> None:
        """Write aside and rename, so that an interrupted run leaves the last whole state."""
        data = asdict(self)
        data["evidence"]["verdict"] = self.evidence.verdict.value
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, json.dumps({"schema": 1, **data}, sort_keys=True) + "\n")


def load_state(path: Path, plan: SequentialPlan) -> SequentialState:
    """The state at `path`, or a fresh one where there is none.

    Raises:
        UsageError: the file is broken, or belongs to another plan.
    """
    if not path.is_file():
        return SequentialState(plan.digest, 0, Evidence(plan.margin, plan.alpha))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        evidence = dict(data["evidence"])
        evidence["verdict"] = Verdict(evidence["verdict"])
        evidence["log_pass"], evidence["log_fail"] = tuple(evidence["log_pass"]), tuple(evidence["log_fail"])
        history = tuple((int(n), float(a), float(b)) for n, a, b in data["history"])
        state = SequentialState(str(data["plan_digest"]), int(data["asked"]), Evidence(**evidence), history)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not a state of a sequential run ({error!r}); delete it to start again") from error
    if state.plan_digest != plan.digest:
        raise UsageError(
            f"{path}: was begun with another plan (questions, margin, model or order); "
            "use another --run-dir, or delete it to start again"
        )
    return state


def run_sequential(
    plan: SequentialPlan, ask: Callable[[Sequence[tuple[str, int]]], ArrayLike], path: Path
) -> SequentialState:
    """Ask block after block until a verdict or the end; resumes from `path` where it was left.

    Args:
        plan: the order of the questions and the rule.
        ask: answers the questions in both arms; returns X in {-1, 0, 1} for each, in order.
        path: where the state is kept.
    """
    state = load_state(path, plan)
    while state.evidence.verdict is Verdict.INCONCLUSIVE and state.asked < len(plan.questions):
        block = plan.questions[state.asked : state.asked + plan.block]
        evidence = state.evidence.extended(ask(block))
        look = (evidence.n, evidence.e_pass, evidence.e_fail)
        state = SequentialState(plan.digest, state.asked + len(block), evidence, (*state.history, look))
        state.save(path)
    return state
