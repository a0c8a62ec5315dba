"""Every composition judged without ranks: what conforms passes, and a fault is found at the stage that it is of."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Operation, Problem, RankOutputs
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.case.returned import decoded, misshapen
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.errors import UsageError
from fusecheck.faults.quantising import FloorsExponent, LeavesPadding, RoundsStoredScale, TiesAway
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.oracle import Oracle
from fusecheck.property_tests.suite import toy_format
from fusecheck.property_tests.suite.command_line import run
from fusecheck.property_tests.suite.family import Given, emulated, judged, outside
from fusecheck.quantflow import QUANT_FLOWS
from fusecheck.quantisers.known import QUANTISERS, quantiser, register, scope
from fusecheck.stages.judgement import raw
from fusecheck.verdict import admissible_codes

KNOWN = [
    pytest.param(quantiser, name, id=f"{quantiser}-{name}")
    for quantiser, flows in QUANT_FLOWS.items()
    if quantiser != "static-fp8"
    for name in flows
]


def problem_of(quantiser: str, *, norm_out: bool = True, **fields: object) -> Problem:
    suffix = quantiser.upper().replace("-", "_")
    op = Operation.named(f"RESIDUAL_RMS_NORM{'_OUT' * norm_out}_QUANT_{suffix}")
    shape: dict[str, object] = {"world_size": 2, "tokens": 5, "hidden": 256, "scale": 700.0} | fields
    return Problem(op=op, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(("quantiser", "name"), KNOWN)
def test_the_emulated_kernel_conforms_to_every_known_quantiser(quantiser: str, name: str) -> None:
    flow = replace(DATAFLOWS["flashinfer-fp32"], quants=((quantiser, QUANT_FLOWS[quantiser][name]),))
    for index, family in enumerate(FAMILIES):
        gamma = FAMILIES[family].gamma or "spread"
        problem = problem_of(quantiser, norm_out=index % 2 == 0, family=family, gamma=gamma, seed=index)
        source = Given(problem, *large_ones(family, gamma, index))
        tallies = judged(
            problem, flow, emulated(problem, flow, source=source), operands=source.operands(range(problem.tokens))
        )
        assert {stage: tally for stage, tally in tallies.items() if tally.outside} == {}, family


@cache
def large_ones(family: str, gamma: str, seed: int) -> tuple[list[Tensor], Tensor]:
    """Partial sums and residual of a problem of any format, made once for all of them."""
    problem = problem_of("mxfp8", family=family, gamma=gamma, seed=seed)
    source, rows = Inputs(problem, torch.device("cpu")), range(problem.tokens)
    return source.partials(rows), source.residual(rows)


@pytest.mark.parametrize("moe", ["", "MOE_FINALIZE_"])
@pytest.mark.parametrize("quantiser", [name for name in QUANT_FLOWS if name != "static-fp8"])
def test_the_twin_that_does_not_return_the_norm_gives_the_same_bits(quantiser: str, moe: str) -> None:
    flow = DATAFLOWS["flashinfer-fp32"]
    twins = [problem_of(quantiser, norm_out=norm_out, family="outliers") for norm_out in (True, False)]
    problems = [replace(twin, op=Operation.named(f"{moe}{twin.op.name}")) for twin in twins]
    with_norm, without = (decoded(emulated(problem, flow), problem) for problem in problems)
    assert with_norm.norm is not None
    assert without.norm is None
    for name in ("residual", "quant", "scale"):
        first, second = getattr(with_norm, name), getattr(without, name)
        assert torch.equal(raw(first), raw(second))


def test_a_dataflow_takes_another_implementations_quantisers_behind_a_slash() -> None:
    chosen = dataflow("vllm-c/deepgemm")
    assert chosen.quant("group-fp8-64") == QUANT_FLOWS["group-fp8"]["deepgemm"]
    assert chosen.quant("dynamic-fp8") == DATAFLOWS["vllm-c"].quant("dynamic-fp8")
    assert (chosen.name, chosen.accumulate) == ("vllm-c/deepgemm", DATAFLOWS["vllm-c"].accumulate)
    for unknown in ("vllm-c/nobody", "nobody"):
        with pytest.raises(UsageError, match="expected one of"):
            dataflow(unknown)


class NextGroupsScale(Quantising):
    """The codes are made with the scale of the next row."""

    def scaled(self, grouped: Tensor, stored: Tensor, amax: Tensor) -> Tensor:
        return super().scaled(grouped, stored.roll(1, 0), amax.roll(1, 0))


class SignedMaximum(Quantising):
    """The largest value, not the largest magnitude."""

    def amax(self, grouped: Tensor) -> Tensor:
        return grouped.amax(-1).clamp(min=0)


class KeepsNan(Quantising):
    """A NaN becomes the NaN code, where the largest value of negative sign is declared."""

    def cast(self, scaled: Tensor) -> Tensor:
        return torch.where(scaled.isnan(), 0x7F, super().cast(scaled)).to(torch.uint8)


@pytest.mark.parametrize(
    ("fault", "quantiser", "family", "stages"),
    [
        (RoundsStoredScale, "dynamic-fp8", "gaussian", {"scale", "code"}),
        (RoundsStoredScale, "group-fp8", "gaussian", {"scale", "code"}),
        (FloorsExponent, "mxfp8", "gaussian", {"scale"}),
        (FloorsExponent, "group-fp8-packed", "gaussian", {"scale"}),
        (NextGroupsScale, "mxfp4", "outliers", {"code"}),
        (NextGroupsScale, "nvfp4", "outliers", {"code"}),
        (NextGroupsScale, "dynamic-fp8", "outliers", {"code"}),
        (SignedMaximum, "group-fp8", "gaussian", {"scale"}),
        (SignedMaximum, "nvfp4", "gaussian", {"scale"}),
        (KeepsNan, "dynamic-fp8", "special", {"special"}),
        (KeepsNan, "mxfp8", "special", {"special"}),
        (TiesAway, "mxfp4", "gaussian", {"code"}),
        (LeavesPadding, "group-fp8-packed", "gaussian", {"layout"}),
    ],
)
def test_a_fault_of_a_quantiser_is_found_at_its_own_stage(
    fault: type[Quantising], quantiser: str, family: str, stages: set[str]
) -> None:
    flow = DATAFLOWS["flashinfer-fp32"]
    problem = problem_of(quantiser, tokens=5, hidden=640, family=family)
    assert set(outside(problem, flow, emulated(problem, flow, quantising=fault))) == stages


def test_one_float32_scale_a_step_beyond_its_last_place_is_found() -> None:
    """Where the division is correctly rounded, exactly one scale is admissible."""
    flow, problem = DATAFLOWS["vllm-c"], problem_of("group-fp8")
    outputs = emulated(problem, flow)
    assert outputs.scale is not None
    outputs.scale.view(torch.int32)[3, 1] += 1
    assert outside(problem, flow, outputs).get("scale") == 1


@pytest.mark.parametrize(
    "name",
    ["MOE_FINALIZE_QUANT_FP8", "RESIDUAL_QUANT_FP8", "RMS_NORM_OUT", "", "RESIDUAL_RMS_NORM_QUANT_"],
)
def test_what_is_no_composition_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(UsageError, match="op="):
        Operation.named(name)


def test_an_operation_that_no_library_has_is_named_as_such() -> None:
    with pytest.raises(UsageError, match="no library has one that adds a residual or quantises without a norm"):
        Operation(norm=False, quantiser="mxfp8", returns=("quant", "scale"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "RESIDUAL_RMS_NORM_QUANT_FP3"}, "quantiser='fp3', expected one of: none, static-fp8, dynamic-fp8"),
        (
            {"op": "RESIDUAL_RMS_NORM_QUANT_MXFP8", "hidden": 72},
            "hidden=72, expected a multiple of mxfp8's group of 32",
        ),
        ({"op": "RESIDUAL_RMS_NORM_QUANT_MXFP8", "layout": "packed"}, "layout='packed', expected one that mxfp8 has"),
        (
            {"op": "RESIDUAL_RMS_NORM", "layout": "linear"},
            "layout='linear', expected none: the operation makes no scales",
        ),
    ],
)
def test_a_problem_that_a_quantiser_does_not_have_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Problem.from_json(json.dumps(json.loads(Problem(hidden=64).to_json()) | fields))


def test_outputs_of_a_wrong_form_are_said_in_the_interfaces_words() -> None:
    flow, problem = DATAFLOWS["flashinfer"], problem_of("mxfp4")
    outputs = emulated(problem, flow)
    cpu = torch.device("cpu")
    assert misshapen(outputs, problem, cpu) == []
    assert outputs.scale is not None
    assert outputs.quant is not None
    quant, scale = misshapen(replace(outputs, scale=outputs.scale[:-1], quant=outputs.quant[:, :-1]), problem, cpu)
    assert quant == "quant [5, 127] torch.uint8, expected [5, 128] torch.uint8"
    assert "got scales torch.uint8" in scale
    assert "expected torch.uint8" in scale
    assert misshapen(RankOutputs(outputs.residual, outputs.norm), problem, cpu) == [
        "quant = NoneType, expected a tensor",
        "scale = NoneType, expected a tensor",
    ]


def test_a_scale_that_was_made_of_the_unrounded_norm_bounds_the_root_behind_it() -> None:
    """G6: with squares added up in any order, codes are as sharp as with the depth declared."""
    rules = QUANT_FLOWS["dynamic-fp8"]["flashinfer-mnnvl-twoshot"]
    deep = replace(DATAFLOWS["flashinfer-mnnvl-twoshot"], quants=(("dynamic-fp8", rules),))
    problem = problem_of("dynamic-fp8", norm_out=False, tokens=8, hidden=4096)
    outputs = decoded(emulated(problem, deep), problem)
    assert outside(problem, deep, emulated(problem, deep)) == {}
    assert outputs.scale is not None
    doubled = replace(outputs, scale=outputs.scale * 2)  # no scale of this row says nothing of its root

    def beyond_one(flow: Dataflow, seen: RankOutputs) -> int:
        oracle = Oracle(flow, Inputs(problem, torch.device("cpu")).operands(range(problem.tokens)))
        codes, elements = admissible_codes(oracle, seen)
        return codes - elements

    any_order = replace(deep, depth=None)
    assert beyond_one(any_order, outputs) == beyond_one(deep, outputs)
    assert beyond_one(any_order, doubled) > 2 * beyond_one(any_order, outputs)


@pytest.mark.parametrize(
    ("name", "neighbour", "quantiser", "stage"),
    [
        ("trtllm", "trtllm-fp32", "static-fp8", "residual"),
        ("trtllm-fp32", "trtllm", "static-fp8", "residual"),
        ("vllm-native", "vllm-c", "static-fp8", "norm"),
        ("vllm-c", "vllm-native", "static-fp8", "norm"),
        ("trtllm-fp32", "flashinfer-mnnvl-oneshot", "static-fp8", "norm"),
        ("trtllm", "trtllm-ub", "static-fp8", "quant"),
        ("multimem-fp32", "torch-symm", "none", "residual"),
        ("multimem-bf16", "unfused", "none", "residual"),
        ("nccl-nvls", "torch-symm", "none", "residual"),
        ("trtllm-ub", "trtllm", "none", "residual"),
        ("trtllm-mnnvl", "trtllm-fp32", "mxfp8", "norm"),
        ("flashinfer-mnnvl-chunked", "flashinfer", "mxfp8", "residual"),
        ("flashinfer-cutedsl", "flashinfer-cake-fp4", "dynamic-fp8", "residual"),
        ("flashinfer-cake-fp4", "flashinfer-cutedsl", "nvfp4", "residual"),
        ("flashinfer-norm-block", "flashinfer-norm-quant", "group-fp8-128", "scale"),
        ("vllm-fused-quant", "vllm-c", "group-fp8-128", "norm"),
        ("vllm-fused-quant", "vllm-c", "dynamic-fp8", "norm"),
        ("sglang", "vllm-c", "group-fp8-128", "norm"),
        ("aiter", "vllm-c", "mxfp4", "norm"),
        ("aiter", "vllm-fused-quant", "dynamic-fp8", "norm"),
    ],
)
def test_the_emulated_kernel_conforms_to_each_producers_dataflow_and_not_to_a_neighbours(
    name: str, neighbour: str, quantiser: str, stage: str
) -> None:
    """Family 4.2: what one kernel returns is rejected by the declaration of the one most like it."""
    ops = {"none": Operation.RESIDUAL_RMS_NORM, "static-fp8": Operation.RESIDUAL_RMS_NORM_OUT_QUANT_FP8}
    op = ops.get(quantiser) or problem_of(quantiser).op
    scale = 0.02 if quantiser == "static-fp8" else 700.0
    problem = Problem(op=op, tokens=16, hidden=1024, world_size=4, scale=scale)
    outputs = emulated(problem, DATAFLOWS[name])
    assert outside(problem, DATAFLOWS[name], outputs) == {}
    assert next(iter(outside(problem, DATAFLOWS[neighbour], outputs))) == stage


def test_a_format_of_ones_own_is_judged_emulated_and_faulted_in_under_60_lines(tmp_path: Path) -> None:
    assert len(Path(toy_format.__file__).read_text(encoding="utf-8").splitlines()) < 60
    asked = ["--tp", "2", "--hidden", "136", "--tokens", "1,5", "--family", "gaussian"]
    for name, code, stages in (("ToyBackend", 0, set()), ("FaultyToy", 1, {"scale"})):
        where = tmp_path / name
        with scope():
            arguments = ["kernel", "--backend", f"{toy_format.__name__}:{name}", *asked, "--run-dir", where]
            assert run(*arguments) == code
            assert "toy" in QUANTISERS
        result = json.loads((where / "result.json").read_text())
        assert {finding["stage"] for finding in result["findings"]} == stages
        assert result["summary"]["cases"] > 0


def test_a_format_of_ones_own_is_known_inside_its_scope_only_and_takes_no_others_name() -> None:
    assert "toy" not in QUANTISERS
    with scope():
        toy_format.ToyBackend()
        assert quantiser("toy") is toy_format.TOY
        with pytest.raises(UsageError, match="registered already, as another format"):
            register(replace(toy_format.TOY, group=16))
    with pytest.raises(UsageError, match="quantiser='toy', expected one of"):
        quantiser("toy")
