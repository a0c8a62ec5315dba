"""The one-pass judge says no more than the eager one allows, and where it is not to be had the eager one judges."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import torch

from fusecheck.case import alive
from fusecheck.case.run import WORKER, collect, request
from fusecheck.dataflow import DATAFLOWS
from fusecheck.exhaust import (
    POWERS,
    cast_against_table,
    exact_at_powers_of_two,
    positive_normals,
    significands,
    ulps_apart,
    worst_of,
)
from fusecheck.formats.element import E4M3
from fusecheck.onepass import judge
from fusecheck.onepass.arena import FlatArena
from fusecheck.onepass.batch import available, takes
from fusecheck.problem import Call, Problem
from fusecheck.ranks import Pool, Reply

CPU = torch.device("cpu")


def test_one_pass_and_eager_judge_agree_on_random_problems_and_planted_errors() -> None:
    if importlib.util.find_spec("triton") is None:
        assert not available(torch.device("cuda"))  # so that every case goes to the eager judge
        return
    run = subprocess.run(
        [sys.executable, "-m", "fusecheck.property_tests.suite.onepass_cases"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "compared 40" in run.stdout


def test_a_batch_gives_the_records_of_its_cases_one_by_one() -> None:
    cases = [request(Problem(tokens=n, hidden=64, seed=n), "emulated:flashinfer") for n in (1, 3)]
    with Pool(WORKER, 2) as pool:
        together = pool.call("run_many", cases, timeout=60.0)
        for place, case in enumerate(cases):
            alone = collect(case, pool.call("run", case, timeout=60.0))
            ours = collect(case, [Reply(r.rank, value=r.value[place]) for r in together])
            assert ours.passed
            assert alone.passed
            assert (ours.elements, ours.judged, ours.off_nominal) == (alone.elements, alone.judged, alone.off_nominal)


def test_only_plain_cases_of_dataflows_that_the_kernel_forms_are_judged_in_one_pass() -> None:
    problem, flow = Problem(tokens=4, hidden=64), DATAFLOWS["flashinfer"]
    assert takes({}, problem, flow)
    assert not takes({"checks": ["repeat"]}, problem, flow)
    assert not takes({}, replace(problem, schedule=(Call(3),)), flow)
    formed = {name for name, flow in DATAFLOWS.items() if judge.takes(flow, problem.op, problem.hidden)}
    assert {"trtllm", "trtllm-fp32", "flashinfer", "flashinfer-fp32", "unfused"} <= formed
    assert not formed & {"vllm-native", "trtllm-ub", "flashinfer-mnnvl-oneshot", "flashinfer-norm-quant"}


def test_a_write_beyond_any_buffer_of_the_flat_arena_is_found() -> None:
    problem = Problem(tokens=3, hidden=24)
    arena = FlatArena(problem, CPU)
    first = arena.empty((3, 24), torch.bfloat16, "first")
    arena.empty((3, 24), torch.float8_e4m3fn, "second")
    assert first.data_ptr() % 16 == 0
    assert bool((first.view(torch.int16) == alive.POISONS[0][2]).all())
    assert arena.trampled() is None
    assert int(arena.canaries_lost()) == 0
    beyond = first.view(torch.uint8).reshape(-1).as_strided((1,), (1,), first.storage_offset() * 2 + first.numel() * 2)
    beyond[0] = 1
    assert int(arena.canaries_lost()) == 1
    assert arena.trampled() is not None


def test_a_cast_that_truncates_is_told_from_the_table() -> None:
    bits = torch.arange(0x3F800000, 0x3F800000 + 2**20, 97, dtype=torch.int32)

    def right(piece: torch.Tensor) -> torch.Tensor:
        return E4M3.encode(piece.view(torch.float32).to(torch.float64))

    def truncating(piece: torch.Tensor) -> torch.Tensor:
        return E4M3.encode((piece & ~0xFFFFF).view(torch.float32).to(torch.float64))

    assert cast_against_table(right, iter([bits]))["wrong"] == 0
    found = cast_against_table(truncating, iter([bits]))
    assert found["wrong"] > 0
    assert found["first"].endswith("expected 0x39")


def test_an_error_of_one_ulp_is_counted_as_one() -> None:
    x = torch.linspace(1.0, 9.0, 1001)
    exact = x.to(torch.float64).rsqrt()
    nearest = exact.to(torch.float32)
    above = torch.nextafter(nearest, torch.tensor(torch.inf))
    apart, error = ulps_apart(above, exact)
    assert int(apart.min()) == int(apart.max()) == 1
    assert float(error.max()) <= 1.5
    worst = worst_of(lambda _: above, lambda _: exact, iter([x]), 0)
    assert worst["worst_ulps_from_rounded"] == 1
    assert not worst["holds"]
    assert worst_of(lambda _: nearest, lambda _: exact, iter([x]), 0)["holds"]
    assert float(next(positive_normals(CPU))[0]) == 2.0**-126


def test_a_division_that_is_not_exact_at_powers_of_two_is_counted_with_its_first_case() -> None:
    values = significands(CPU)[:: 2**12]
    assert exact_at_powers_of_two(torch.div, values) == {
        "inputs": len(values) * len(POWERS),
        "wrong": 0,
        "first": None,
        "holds": True,
    }

    def low(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        exact = torch.div(a, b)
        return torch.where(b == 0.25, torch.nextafter(exact, torch.zeros_like(exact)), exact)

    found = exact_at_powers_of_two(low, values)
    assert (found["wrong"], found["holds"]) == (len(values), False)
    assert found["first"].startswith("1.0 / 2^-2 -> 3.99999")
