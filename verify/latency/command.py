"""`fusecheck latency`: measure, compare, predict, propose a policy, draw."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fusecheck.errors import Inconclusive, UsageError
from fusecheck.inputs.models import model as model_named
from fusecheck.interface import Operation
from fusecheck.interrupts import Interruption
from fusecheck.latency import analysis
from fusecheck.latency.analysis import Site, Timing
from fusecheck.latency.plot import draw
from fusecheck.listed import numbers
from fusecheck.operations import GIVEN_SCALE, Collective
from fusecheck.ranks import Pool, require_gpus
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir
from fusecheck.report.result import write_aside

WORKER = "fusecheck.latency.worker:LatencyWorker"
STATIC = Operation.RESIDUAL_RMS_NORM_QUANT_FP8.name
"""What is timed unless told otherwise, and what the published figures are of."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("latency")(command)


@dataclass(frozen=True)
class Setting:
    """What is measured, at every token count.

    Attributes:
        backend: the fused kernel's.
        tp: world size.
        hidden: columns.
        op: of the fused path.
        replays: how often each path is timed.
        graphs: as CUDA graphs, or launched call by call.
    """

    backend: str
    tp: int
    hidden: int
    op: Operation = Operation.RESIDUAL_RMS_NORM_QUANT_FP8
    replays: int = 30
    graphs: bool = True

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        mode = "CUDA graph of 20 calls" if self.graphs else "eager"
        same = {"backend": self.backend, "hidden": self.hidden, "tp": self.tp}
        return same | {"op": self.op.value, "mode": mode}


def measure(setting: Setting, tokens: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """Time every path at every token count; the times of one count after the other.

    Raises:
        Inconclusive: too few GPUs, or a rank failed.
    """
    require_gpus(setting.tp)
    return _measured(setting, tokens)


def _measured(setting: Setting, tokens: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    from fusecheck.latency.worker import slowest

    rest = (setting.hidden, max(tokens), setting.replays, setting.graphs, setting.op.value)
    with Pool(WORKER, setting.tp, device="cuda") as pool:
        for rows in tokens:
            replies = pool.call("measure", setting.backend, rows, *rest, timeout=120.0)
            failure = next((reply.failure for reply in replies if reply.failure is not None), None)
            if failure is not None:
                raise Inconclusive(f"{rows} tokens: {failure.error}: {failure.message}")
            measured = slowest([reply.value for reply in replies])
            yield [Timing(rows, path, tuple(times)).to_record() for path, times in measured.items()]


def command(
    backend: Annotated[str, typer.Option(help="The fused kernel: a name of `fusecheck backends`.")] = "flashinfer",
    tp: Annotated[int, typer.Option(help="World size.")] = 2,
    model: Annotated[str, typer.Option(help="Whose hidden size and number of sites.")] = "llama-3.1-8b",
    op: Annotated[str, typer.Option(help="Of `fusecheck backends`, with an FP8 quantiser.")] = STATIC,
    tokens: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,2,4,8,16,64,128,256,512,1024,2048",
    concurrency: Annotated[str, typer.Option(help="Sequences per decode step to predict for.")] = "1,2,16,256",
    replays: Annotated[int, typer.Option(help="Timed repeats of each path, interleaved.")] = 30,
    eager: Annotated[bool, typer.Option(help="Launch call by call instead of CUDA graphs of 20 calls.")] = False,  # noqa: FBT002
    max_regression: Annotated[str | None, typer.Option(help="Fail where fused is slower by more, such as 2%.")] = None,
    recorded: Annotated[Path | None, typer.Option("--from", help="Take the times of this result.json.")] = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Where does fusing the quantiser pay, and where does it cost?

    Writes result.json, policy.yaml (for `fusecheck graph`) and latency.svg into the run's directory.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise Inconclusive("the plot needs matplotlib, which is not installed; pip install 'fusecheck[latency]'")
    shape = model_named(model)
    allowed = _fraction(max_regression)
    sequences = numbers("--concurrency", concurrency)
    earlier = {} if recorded is None else _read(recorded)
    timings = list(earlier.get("timings", ()))
    setting = Setting(backend, tp, shape.hidden, _quantising(op), replays, graphs=not eager)
    source = measure(setting, numbers("--tokens", tokens)) if recorded is None else ()
    directory = make_run_dir("latency", run_dir)
    with Interruption() as stop:
        for times in source:
            timings += times
    if stop.happened and not timings:
        raise KeyboardInterrupt  # nothing was measured yet
    found = analysis.sites(timings)
    measured = setting.to_record()
    measured |= {name: earlier[name] for name in measured if name in earlier}
    static = Operation.named(measured["op"]).quantiser == GIVEN_SCALE
    published = analysis.PUBLISHED.get(shape.name, {}) if static else {}
    rows = analysis.prediction(found, shape, [n for n in sequences if n in found or not stop.happened], published)
    slower = analysis.regressions(found, allowed) if allowed is not None else []
    words = analysis.reading(rows)
    verdict = Verdict.of(failed=bool(slower), complete=not stop.happened)
    write_aside(directory / "policy.yaml", analysis.policy_yaml(found))
    draw(timings, directory / "latency.svg", f"{model}, hidden {shape.hidden}, tp {tp}")
    about = {"model": model, "interrupted": stop.happened} | measured
    summary = about | _summary(timings, found, rows, words)
    write_result(directory, "latency", verdict, summary, [{"message": line} for line in slower], json_file)
    _show(found, timings, rows, [*words, *slower])
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _summary(
    timings: Sequence[Mapping[str, Any]],
    found: Mapping[int, Site],
    rows: Sequence[Mapping[str, Any]],
    words: Sequence[str],
) -> dict[str, Any]:
    """What `result.json` says of the times themselves."""
    return {
        "l2": "warm: every call reads and writes the same buffers",
        "timings": timings,
        "break_even_tokens": analysis.threshold(found),
        "prediction": rows,
        "reading": words,
        "policy": analysis.policy(found),
    }


def _show(
    found: Mapping[int, Site],
    timings: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    lines: Sequence[str],
) -> None:
    console = Console(highlight=False)
    paths = list(dict.fromkeys(t["path"] for t in timings))
    table = Table("tokens", *paths, "gain of fusing", box=None, pad_edge=False)
    for tokens, site in found.items():
        here = {t["path"]: t for t in timings if t["tokens"] == tokens}
        cells = [f"{here[p]['median_us']:.2f}" if p in here else "-" for p in paths]
        table.add_row(str(tokens), *cells, f"{site.gain:+.2f}")
    console.print("microseconds per call, median of the replays", table)
    most = analysis.threshold(found)
    console.print(f"break-even: {'fused is faster at every count' if most is None else f'up to {most} tokens'}")
    for row in rows:
        published = "" if row["published_ms"] is None else f", published {row['published_ms']:+.2f} ms"
        console.out(
            f"concurrency {row['concurrency']}: {row['predicted_ms']:+.3f} ms a step ({row['sites']} sites){published}"
        )
    for line in lines:
        console.out(line)


def _read(path: Path) -> dict[str, Any]:
    """The summary of an earlier run."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["summary"]
        summary["timings"] = list(summary["timings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no timings in it ({error}); expected the result.json of a latency run") from None
    return summary


def _quantising(text: str) -> Operation:
    """The operation of this name, where its quantiser can be left to a kernel of its own."""
    from fusecheck.latency.unfused import Quantise

    op = Operation.named(text)
    if op.collective is not Collective.ALL_REDUCE or not op.returns_quant or not Quantise.takes(op.quantiser):
        families = "static, dynamic, packed group FP8 or MXFP8"
        raise UsageError(f"--op {text}, expected an all-reduce with a norm and a quantiser of {families}")
    return op


def _fraction(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--max-regression {text!r}, expected a share such as 2% or 0.02") from None
