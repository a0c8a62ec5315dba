"""`fusecheck pace`: how many cases a second are judged, and where the time goes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console

from fusecheck import backends
from fusecheck.case.calls import shard
from fusecheck.case.finding import Finding
from fusecheck.case.run import collect, request
from fusecheck.inputs.cells import hash64
from fusecheck.inputs.scales import draw_scale
from fusecheck.interface import STATIC_OPS, FusionOp, Strategy
from fusecheck.interrupts import Interruption
from fusecheck.listed import numbers
from fusecheck.problem import Problem
from fusecheck.ranks import Pool, Reply, require_gpus
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir

PEER_RATE = 79
"""Cases a second of FlashInfer's own test of this kernel on two H200s, measured; it compares no codes."""

WORKER = "fusecheck.onepass.pace_worker:PaceWorker"


@dataclass
class Pace:
    """What a measurement showed; times are sums over cases, of the slowest rank, in seconds."""

    cases: int = 0
    elements: int = 0
    seconds: float = 0.0
    making: float = 0.0
    kernel: float = 0.0
    judge: float = 0.0
    copy: float = 0.0
    one_pass: int = 0
    off_nominal: dict[str, list[int]] = field(default_factory=dict)
    judge_of: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    interrupted: bool = False


def problems(tokens: Sequence[int], hidden: Sequence[int], world_size: int, seed: int) -> Iterator[Problem]:
    """An endless mix of every shape, op and strategy, with fresh data each."""
    ops, strategies = STATIC_OPS, (Strategy.ONESHOT, Strategy.TWOSHOT, Strategy.AUTO)
    for index, (op, strategy, rows, columns) in enumerate(
        itertools.cycle(itertools.product(ops, strategies, tokens, hidden))
    ):
        if strategy is Strategy.TWOSHOT and rows <= world_size:
            strategy = Strategy.ONESHOT
        own = hash64(seed, index) >> 2
        yield Problem(
            op=op,
            strategy=strategy,
            world_size=world_size,
            tokens=rows,
            hidden=columns,
            scale=draw_scale("random", own),
            seed=own,
        )


def measure(pool: Pool, backend: str, mix: Iterator[Problem], *, seconds: float, batch: int, method: str) -> Pace:
    """Judge batches until time is up or Ctrl-C; while the ranks work on one, the replies of the last one are read."""
    pace = Pace()

    def more() -> list[dict[str, Any]]:
        return [request(problem, backend) for problem in itertools.islice(mix, batch)]

    def replies() -> list[Any]:
        while (got := pool.poll()) is None:
            time.sleep(0.0001)
        return got

    cases, following = more(), more() if seconds else []
    began = time.perf_counter()
    pool.submit(method, cases, timeout=120.0)
    with Interruption() as stop:
        while True:
            got, done = replies(), cases
            late = time.perf_counter() - began >= seconds
            if not late and all(reply.ok for reply in got):
                cases = following
                pool.submit(method, cases, timeout=120.0)
                following = more()
            _read(pace, done, got)
            if pace.findings:
                pool.cancel()  # the batch that follows is under way
            if late or pace.findings:
                break
    pace.interrupted = stop.happened
    pace.seconds = time.perf_counter() - began
    return pace


def _read(pace: Pace, cases: list[dict[str, Any]], replies: list[Reply]) -> None:
    if not all(reply.ok for reply in replies):
        pace.findings.extend(collect(cases[0], replies).findings)
        return
    for index, case in enumerate(cases):
        outcome = collect(case, [Reply(reply.rank, value=reply.value[index]) for reply in replies])
        pace.cases += 1
        pace.elements += outcome.elements
        pace.findings.extend(outcome.findings)
        pace.kernel += outcome.kernel_seconds
        pace.judge += outcome.judge_seconds
        records = [reply.value[index]["calls"][0] for reply in replies]
        pace.making += max(record.get("making_seconds", 0.0) for record in records)
        pace.one_pass += all("making_seconds" in record for record in records)
        problem = outcome.problem
        if problem.op is FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8:
            pace.judge_of.setdefault((problem.tokens, problem.hidden), []).append(outcome.judge_seconds)
        for stage, judged in outcome.judged.items():
            total = pace.off_nominal.setdefault(stage, [0, 0])
            total[0] += outcome.off_nominal[stage]
            total[1] += judged


def judged_bytes(tokens: int, hidden: int, world_size: int) -> int:
    """The fewest bytes that judging all three outputs reads on the busiest rank: operands, copies, outputs."""
    whole = tokens * hidden * (4 * 2 + 2 + 2 + 1)
    return whole + len(shard(tokens, 0, world_size)) * hidden * 2 * world_size


def summary(pace: Pace, world_size: int) -> dict[str, Any]:
    """The figures of `result.json`."""
    largest = max(pace.judge_of, key=lambda shape: shape[0] * shape[1], default=None)
    rate = 0.0
    if largest is not None and pace.one_pass:
        rate = judged_bytes(*largest, world_size) / statistics.median(pace.judge_of[largest])
    spent = {name: getattr(pace, name) for name in ("making", "kernel", "judge")}
    # Each is that of the slowest rank, so together they may exceed the whole.
    whole = max(pace.seconds, sum(spent.values()))
    shares = {name: seconds / whole for name, seconds in spent.items()}
    return {
        "cases": pace.cases,
        "elements": pace.elements,
        "seconds": round(pace.seconds, 3),
        "cases_per_second": round(pace.cases / pace.seconds, 1),
        "elements_per_second": round(pace.elements / pace.seconds),
        "peer_cases_per_second": PEER_RATE,
        "judged_in_one_pass": pace.one_pass,
        "off_nominal": pace.off_nominal,
        "share_of_time": {**shares, "rest": 1 - sum(shares.values())},
        "judge_bytes_per_second": round(rate),
        "copy_bytes_per_second": round(pace.copy),
        "largest": largest,
        "interrupted": pace.interrupted,
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pace")(command)


def command(
    backend: Annotated[str, typer.Option(help="A name of `fusecheck backends`.")] = "flashinfer",
    tp: Annotated[int, typer.Option(help="World size.")] = 2,
    tokens: Annotated[str, typer.Option(help="Rows, comma-separated.")] = "1,128,1024,2048",
    hidden: Annotated[str, typer.Option(help="Hidden sizes, comma-separated.")] = "1024,2048,4096,8192",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure, after a warm-up.")] = 10.0,
    batch: Annotated[int, typer.Option(min=1, help="Cases per message.")] = 144,
    at_least: Annotated[float, typer.Option(help="Fail below so many cases a second.")] = 0.0,
    one_by_one: Annotated[bool, typer.Option(help="Use the eager judge, and wait after each case.")] = False,  # noqa: FBT002
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """How many cases a second are judged, all outputs of all ranks, and where does the time go?

    The default mix is that of FlashInfer's own test of this kernel, which runs 79 cases a second on two H200s.
    """
    rows, columns = numbers("--tokens", tokens), numbers("--hidden", hidden)
    device = str(getattr(backends.backend(backend), "device", "cpu"))
    if device == "cuda":
        require_gpus(tp)
    directory = make_run_dir("pace", run_dir)
    method = "run_one_by_one" if one_by_one else "run_many"
    mix = problems(rows, columns, tp, seed)
    with Pool(WORKER, tp, device=device) as pool:
        # Every kernel of the mix is compiled, and the workspace grown, before the clock starts.
        largest = Problem(world_size=tp, tokens=max(rows), hidden=max(columns))
        grown = iter([largest, *itertools.islice(mix, 9 * len(rows) * len(columns))])
        pace = measure(pool, backend, grown, seconds=0.0, batch=10**6, method=method)
        if pace.interrupted:
            raise KeyboardInterrupt  # nothing was measured yet
        if not pace.findings:
            pace = measure(pool, backend, mix, seconds=seconds, batch=batch, method=method)
        ended = pace.interrupted or pace.findings
        copied = [] if ended else pool.call("copy_bandwidth", timeout=60.0)
    pace.copy = min((reply.value for reply in copied if reply.ok), default=0.0)
    found = summary(pace, tp)
    fast = found["cases_per_second"] >= at_least
    verdict = Verdict.of(failed=bool(pace.findings) or not (fast or pace.interrupted), complete=not pace.interrupted)
    _show(found, pace.findings)
    record = [finding.to_record() for finding in pace.findings]
    write_result(directory, "pace", verdict, found, record, json_file)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _show(found: dict[str, Any], findings: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    for finding in findings[:3]:
        console.out(finding.line())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["share_of_time"].items())
    console.out(
        f"{found['cases_per_second']} cases a second ({found['cases']} in {found['seconds']} s, all outputs judged); "
        f"FlashInfer's own test: {PEER_RATE}"
    )
    console.out(f"time: {shares}; judged in one pass: {found['judged_in_one_pass']}")
    console.out(
        f"the judge reads {found['judge_bytes_per_second'] / 1e12:.2f} TB/s at {found['largest']}; "
        f"a copy moves {found['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    )
