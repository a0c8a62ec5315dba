"""What the times say: the gain of a site, the break-even, a step of a model, and a policy for the graph passes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.graph.config import NORM_PASS, QUANT_PASS
from fusecheck.inputs.models import Model

PUBLISHED: dict[str, dict[int, float]] = {"llama-3.1-8b": {1: -0.10, 2: -0.10, 16: -0.11, 256: 2.91}}
"""Milliseconds per decode step that the change made on B200 at tp 2, by concurrency, as its authors reported."""


@dataclass(frozen=True)
class Timing:
    """One path at one shape: microseconds per call, a value a replay.

    Attributes:
        tokens: rows.
        path: `fused ...`, `norm ..., quantise` or `unfused`.
        replays: as measured, on the slowest rank.
    """

    tokens: int
    path: str
    replays: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median replay."""
        return statistics.median(self.replays)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and ninth decile."""
        if len(self.replays) < 2:
            return self.replays[0], self.replays[0]
        deciles = statistics.quantiles(self.replays, n=10)
        return deciles[0], deciles[-1]

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        low, high = self.spread
        return {
            "tokens": self.tokens,
            "path": self.path,
            "median_us": round(self.median, 3),
            "spread_us": [round(low, 3), round(high, 3)],
            "replays": len(self.replays),
        }


@dataclass(frozen=True)
class Site:
    """The best of each way at one token count, in microseconds; `gain` is what fusing the quantiser saves."""

    tokens: int
    fused: float
    separate: float
    unfused: float

    @property
    def gain(self) -> float:
        """Positive where fusing pays."""
        return self.separate - self.fused


def sites(timings: Sequence[Mapping[str, Any]]) -> dict[int, Site]:
    """The best median of each way by token count, from records of `Timing`.

    Raises:
        UsageError: a token count lacks one of the ways.
    """
    found: dict[int, Site] = {}
    for tokens in sorted({int(t["tokens"]) for t in timings}):
        here = {t["path"]: float(t["median_us"]) for t in timings if t["tokens"] == tokens}
        best = {}
        for way, begins in (("fused", "fused "), ("separate", "norm "), ("unfused", "unfused")):
            times = [time for path, time in here.items() if path.startswith(begins)]
            if not times:
                raise UsageError(f"the timings of {tokens} tokens have no path that begins with {begins!r}")
            best[way] = min(times)
        found[tokens] = Site(tokens, **best)
    return found


def threshold(found: Mapping[int, Site]) -> int | None:
    """The most tokens up to which fusing pays at every measured count; None where it pays at all, 0 where at none."""
    paying = 0
    for tokens, site in sorted(found.items()):
        if site.gain <= 0:
            return paying
        paying = tokens
    return None


def regressions(found: Mapping[int, Site], allowed: float) -> list[str]:
    """Where the fused call is slower than the norm with a separate quantiser by more than a fraction."""
    return [
        f"{tokens} tokens: fused {site.fused:.2f} us, separate {site.separate:.2f} us"
        f" ({site.fused / site.separate - 1:+.1%}, {allowed:.1%} allowed)"
        for tokens, site in sorted(found.items())
        if site.fused > site.separate * (1 + allowed)
    ]


def prediction(
    found: Mapping[int, Site], model: Model, concurrency: Sequence[int], published: Mapping[int, float]
) -> list[dict[str, Any]]:
    """The change per decode step, -gain * sites, at each concurrency that was measured.

    Args:
        found: the times of a site.
        model: how many sites.
        concurrency: sequences of a decode step.
        published: milliseconds by concurrency, where someone published what the change was.

    Raises:
        UsageError: a concurrency was not measured.
    """
    rows = []
    for tokens in concurrency:
        if tokens not in found:
            raise UsageError(f"concurrency {tokens} was not measured; add it to --tokens")
        change = -found[tokens].gain * model.fused_sites / 1000
        rows.append(
            {
                "concurrency": tokens,
                "sites": model.fused_sites,
                "gain_us": round(found[tokens].gain, 3),
                "predicted_ms": round(change, 4),
                "published_ms": published.get(tokens),
            }
        )
    return rows


def reading(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words, where a prediction and a published figure do not have the same cause."""
    lines = []
    for row in rows:
        published = row["published_ms"]
        if published is None or (published < 0) == (row["predicted_ms"] < 0):
            continue
        each = published * 1000 / row["sites"]
        lines.append(
            f"at {row['concurrency']} the kernel would change a step by {row['predicted_ms']:+.2f} ms, but"
            f" {published:+.2f} ms was published: {each:+.1f} us a site, which this kernel does not explain. The cause"
            " lies outside it: the algorithm that is picked, calls outside captured graphs, or other fusions that are"
            " lost."
        )
    return lines


def policy(found: Mapping[int, Site]) -> dict[str, Any]:
    """A `transforms:` mapping for the graph passes: quantise where it pays."""
    most = threshold(found)
    entry: dict[str, Any] = {"enabled": most != 0}
    if most:
        entry["policy"] = {"kind": "per_range", "max_tokens": most}
    return {"transforms": {NORM_PASS: {"enabled": True}, QUANT_PASS: entry}}


def policy_yaml(found: Mapping[int, Site]) -> str:
    """The policy as YAML."""
    lines = ["# Proposed by `fusecheck latency`: the largest token count up to which the fused quantiser is faster."]
    for name, entry in policy(found)["transforms"].items():
        lines += ["transforms:"] if len(lines) == 1 else []
        lines += [f"  {name}:", f"    enabled: {str(entry['enabled']).lower()}"]
        if "policy" in entry:
            lines += ["    policy:", *(f"      {key}: {value}" for key, value in entry["policy"].items())]
    return "\n".join(lines) + "\n"
