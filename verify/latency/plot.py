"""The plot: microseconds per call over tokens, a line a path, with the spread of the replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(timings: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write an SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(t["path"] for t in timings):
        mine = sorted((t for t in timings if t["path"] == name), key=lambda t: int(t["tokens"]))
        tokens = [t["tokens"] for t in mine]
        line = axes.plot(tokens, [t["median_us"] for t in mine], marker="o", markersize=3, label=name)[0]
        low, high = ([t.get("spread_us", [t["median_us"]] * 2)[end] for t in mine] for end in (0, 1))
        axes.fill_between(tokens, low, high, alpha=0.2, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds per call", title=title)
    axes.set_xscale("log", base=2)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})
