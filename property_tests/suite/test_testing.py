"""`fusecheck.testing`: one function judges the tensors that a test already holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.property_tests.suite.testing_ranks import EPS, HIDDEN, SCALE, TOKENS, fused, right_call
from fusecheck.quantflow import QuantFlow
from fusecheck.ranks import Pool, values
from fusecheck.testing import (
    Conforming,
    NotConforming,
    assert_conforms,
    assert_fusion_preserves,
    conforms,
)
from fusecheck.testing.ranks import digests

WORKER = "fusecheck.property_tests.suite.testing_ranks:TestingRank"
RANKS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with Pool(WORKER, RANKS) as pool:
        yield pool


@pytest.fixture
def call() -> dict[str, Any]:
    return right_call()


def test_a_right_call_conforms_and_the_dataflow_that_explains_it_is_named(call: dict[str, Any]) -> None:
    found = assert_conforms(**call)
    assert found
    assert (found.verdict, found.elements) == ("pass", 3 * TOKENS * HIDDEN)
    assert "trtllm-fp32" in found.explained_by
    assert "trtllm" not in found.explained_by
    assert str(conforms(**call, dataflow="trtllm-fp32")) == "conforms to trtllm-fp32: 4608 elements"


@pytest.mark.parametrize("left_out", ["residual", "norm", "quant", "residual norm", "residual quant", "norm quant"])
def test_any_subset_of_the_outputs_is_judged(call: dict[str, Any], left_out: str) -> None:
    given = {name: value for name, value in call.items() if name not in left_out.split()}
    assert conforms(**given, dataflow="trtllm-fp32").elements == (3 - len(left_out.split())) * TOKENS * HIDDEN
    kept = next(name for name in ("quant", "norm", "residual") if name in given)
    given[kept] = spoilt(given[kept])
    with pytest.raises(NotConforming, match=rf"^{kept}: element\[3,5\] .* admissible .* \(1 of 1536 elements\)"):
        assert_conforms(**given, dataflow="trtllm-fp32")


def spoilt(output: Tensor) -> Tensor:
    """The same with one element one step off."""
    bits = output.view(torch.uint8 if output.element_size() == 1 else torch.int16).clone()
    bits[3, 5] ^= 1
    return bits.view(output.dtype)


def test_a_call_without_a_collective_has_one_addend(call: dict[str, Any]) -> None:
    alone = call["partials"][0]
    call["residual"], call["norm"], call["quant"] = fused([alone], call["residual_in"], call["gamma"])
    assert {"trtllm", "trtllm-fp32"} <= set(assert_conforms(**(call | {"partials": alone})).explained_by)


def test_a_wrong_declaration_fails_and_the_right_one_is_named(call: dict[str, Any]) -> None:
    with pytest.raises(NotConforming, match=r"judged by dataflow trtllm; computes like: .*trtllm-fp32") as raised:
        assert_conforms(**call, dataflow="trtllm")
    assert raised.value.conformity is not None
    assert raised.value.conformity.findings[0].startswith("residual: element[")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partials": []}, "partials is empty, expected a tensor a rank"),
        ({"partials": [torch.ones(2, 8)]}, r"partials\[0\] is torch.float32, expected torch.bfloat16 or torch.float16"),
        ({"partials": [torch.ones(8).bfloat16()]}, r"partials\[0\] has shape \[8\], expected \[tokens, hidden\]"),
        ({"residual_in": torch.ones(2, 8).bfloat16()}, r"residual_in has shape \[2, 8\], expected \[6, 256\]"),
        ({"norm": torch.ones(TOKENS, HIDDEN)}, "norm is torch.float32, expected torch.bfloat16"),
        ({"gamma": None}, "gamma is missing, expected it beside norm="),
        ({"eps": None}, "eps is missing, expected it beside norm="),
        ({"scale": None}, "scale is missing, expected it beside quant="),
        ({"scale": torch.ones(3)}, "scale has 3 elements, expected one"),
        ({"quant": torch.ones(TOKENS, HIDDEN)}, "quant is torch.float32, expected torch.float8_e4m3fn or torch.uint8"),
        ({"residual": None, "norm": None, "quant": None}, "got no output, expected at least one"),
        ({"dataflow": "trtlm"}, "unknown dataflow 'trtlm', expected one of: trtllm"),
        ({"dataflow": QuantFlow()}, "dataflow is QuantFlow, expected a Dataflow or the name of a known one"),
        ({"partials": None}, r"partials\[0\] is NoneType, expected a tensor"),
        ({"eps": "1e-6"}, "eps is str, expected a number"),
        ({"eps": float("nan")}, "eps=nan, expected a finite number"),
        ({"weight_bias": None}, "weight_bias is NoneType, expected a number"),
        ({"gamma": torch.ones(HIDDEN, device="meta").bfloat16()}, "gamma is on meta, expected cpu"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_named(call: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        conforms(**(call | change))


def late_nan(_: Tensor, quant: Tensor) -> None:
    """NaN becomes the largest number, which row 12 alone shows, and one code of row 20 is wrong."""
    quant.view(torch.uint8)[12] = 0x7E
    quant.view(torch.uint8)[20, 5] ^= 1


def late_norms(norm: Tensor, quant: Tensor) -> None:
    """From row 20 on the norm is too large by less than a stream leaves open of which only the rounding is known."""
    norm[20:] = (norm[20:].float() * 1.004).bfloat16()
    quant[20:] = (norm[20:].float() * (1 / torch.tensor(SCALE))).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("fault", "stage", "ranks"), [(late_nan, "quant", 1), (late_norms, "norm", 4)])
def test_a_fault_behind_the_first_rows_is_shown_by_the_dataflow_that_explains_all_before_it(
    fault: Callable[[Tensor, Tensor], None], stage: str, ranks: int
) -> None:
    drawn = torch.Generator().manual_seed(1)
    partials = [torch.randn(96, HIDDEN, generator=drawn).bfloat16() for _ in range(ranks)]
    partials[0][12, 7], gamma = torch.nan if stage == "quant" else 0, torch.ones(HIDDEN).bfloat16()
    residual, norm, quant = fused(partials, partials[0], gamma)
    fault(norm, quant)
    found = conforms(
        residual, norm, quant, partials=partials, residual_in=partials[0], gamma=gamma, scale=SCALE, eps=EPS
    )
    assert found.findings[0].startswith(f"{stage}: element[20,")


def test_a_row_that_is_another_ones_is_said_to_be_that() -> None:
    partial, gamma = torch.randn(96, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.ones(HIDDEN)
    residual, norm, _ = fused([partial], partial, gamma.bfloat16())
    norm[90] = norm[7]
    call: dict[str, Any] = {"partials": partial, "residual_in": partial, "gamma": gamma.bfloat16(), "eps": EPS}
    (finding,) = conforms(residual, norm, **call).findings
    assert finding.startswith("norm: element[90,0] ")
    assert "  the row is what row 7 should be got" in finding
    norm[90] = 0
    assert "the row is" not in conforms(residual, norm, **call).findings[0]


def said(replies: Any) -> list[str]:
    return [str(value) for value in values(replies)]


def test_in_a_group_each_rank_gives_its_own_addend_and_gets_the_same_verdict(ranks: Pool) -> None:
    verdicts = said(ranks.call("judge", timeout=60))
    assert len(set(verdicts)) == 1
    assert verdicts[0].endswith(": 4608 elements")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("code", "NotConforming: ranks agree: quant differs between ranks"),
        ("code everywhere", r"NotConforming: quant: every rank element[3,5]"),
        ("gamma", "UsageError: gamma differs between ranks, expected the same on all of them"),
        ("eps", "UsageError: eps differs between ranks"),
        ("dataflow", "UsageError: dataflow differs between ranks"),
        ("shape", "UsageError: rank 1: residual_in has shape [6, 256], expected [5, 256]"),
        ("dtype", "UsageError: rank 1: partials[0] is torch.float64, expected torch.bfloat16 or torch.float16"),
        ("output", "UsageError: rank 1 holds partials [6, 256] torch.bfloat16 and the outputs quant, residual"),
    ],
)
def test_what_one_rank_has_wrong_is_raised_on_every_rank_alike(ranks: Pool, spoil: str, message: str) -> None:
    raised = said(ranks.call("judge", spoil, timeout=30))
    assert len(set(raised)) == 1
    assert raised[0].startswith(message)


def test_padding_that_no_kernel_promises_may_differ_between_ranks(ranks: Pool) -> None:
    (verdict,) = set(said(ranks.call("judge_padded", "flashinfer-fp32", timeout=60)))
    assert verdict.startswith("conforms to flashinfer-fp32")


def test_padding_that_must_be_zero_is_judged_on_every_rank(ranks: Pool) -> None:
    (raised,) = set(said(ranks.call("judge_padded", "trtllm-fp32", timeout=60)))
    assert raised.startswith("NotConforming: layout: rank 1 ")


def test_in_a_group_the_ranks_exchange_what_they_hold_the_partials_and_what_they_found_and_no_more(ranks: Pool) -> None:
    three = "all_gather_into_tensor, all_gather, all_gather_into_tensor"
    assert set(said(ranks.call("collectives", timeout=30))) == {three}


def test_a_message_of_any_length_reaches_every_rank(ranks: Pool) -> None:
    assert set(said(ranks.call("lengths", [0, 1, 4000, 5000, 100_000], timeout=30))) == {"as sent"}


def test_in_a_group_a_wrong_declaration_fails_with_the_right_one_named(ranks: Pool) -> None:
    raised = said(ranks.call("judge", "", 1, "trtllm", timeout=60))
    assert len(set(raised)) == 1
    assert raised[0].startswith("NotConforming: residual: every rank element[")
    assert "computes like: trtllm-fp32" in raised[0]


def test_tensors_that_differ_between_ranks_are_named_with_their_bits(ranks: Pool) -> None:
    assert set(said(ranks.call("same", False, timeout=30))) == {"same"}
    message = (
        "NotConforming: ranks agree: sums[1, 2] differs: rank 0 0x40c0, rank 1 0x4110, rank 2 0x40c0, rank 3 0x40c0"
        " (1 of 12 elements)"
    )
    assert set(said(ranks.call("same", True, timeout=30))) == {message}


def test_a_tensor_that_one_rank_cannot_mean_is_refused_on_every_rank_before_anything_is_exchanged(ranks: Pool) -> None:
    assert set(said(ranks.call("same", False, 2, timeout=30))) == {
        "UsageError: rank 2: sums is NoneType, expected a tensor"
    }
    (raised,) = set(said(ranks.call("judge_padded", "flashinfer-fp32", 1, timeout=60)))
    assert raised.startswith("UsageError: rank 1: scale_out: got scales torch.uint8 [1023] with strides [1], expected")


def test_a_digest_is_of_the_values_whatever_the_stride_of_a_single_column() -> None:
    packed = torch.empty_strided((1, 1), (1, 4), dtype=torch.int32).fill_(3)
    assert digests({"x": packed}) == digests({"x": torch.tensor([[3]], dtype=torch.int32)})


def test_a_session_of_judged_calls_leaves_one_record_and_one_page(call: dict[str, Any], tmp_path: Any) -> None:
    with Conforming(tmp_path) as collector:
        collector.assert_conforms(**call, dataflow="trtllm-fp32", title="right")
        with pytest.raises(NotConforming):
            collector.assert_conforms(**call, dataflow="trtllm", title="wrongly declared")
    assert collector.verdict == "fail"
    page = next(tmp_path.rglob("report.html")).read_text(encoding="utf-8")
    assert "wrongly declared" in page
    assert Conforming().verdict == "inconclusive"


def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """A graph that writes into its residual."""
    residual.add_(x)
    return residual * 2, residual.float().sqrt()


def test_a_pass_that_computes_and_writes_the_same_preserves_and_nan_is_nan() -> None:
    inputs = [(torch.randn(rows, 8).bfloat16(), torch.randn(rows, 8).bfloat16()) for rows in (1, 5)]
    assert assert_fusion_preserves(torch.fx.symbolic_trace(layer), layer, inputs) == 2 * 8 * 6


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            lambda x, r: (r.add_(x) * 2, (r.float() + 1e-3).sqrt()),
            r"inputs 1: output 1 element\[\d, \d\] got 0x[0-9a-f]{8}",
        ),
        (lambda x, r: ((r + x) * 2, (r + x).float().sqrt()), r"inputs 1: input after the run 1 element\["),
        (lambda x, r: (r.add_(x) * 2, r.sqrt()), r"output 1 is torch.bfloat16 \[5, 8\], before the pass torch.float32"),
        (lambda x, r: r.add_(x) * 2, "1 outputs after the pass, 2 before it"),
    ],
    ids=["value", "write dropped", "dtype", "output dropped"],
)
def test_a_pass_that_changes_a_value_a_write_or_a_form_is_named(after: Callable[..., Any], message: str) -> None:
    inputs = [(torch.ones(5, 8).bfloat16(), torch.arange(40).reshape(5, 8).bfloat16())]
    with pytest.raises(NotConforming, match=message):
        assert_fusion_preserves(layer, after, inputs)
    with pytest.raises(UsageError, match="inputs is empty"):
        assert_fusion_preserves(layer, after, [])
    with pytest.raises(UsageError, match="returned no element"):
        assert_fusion_preserves(lambda x: None, lambda x: None, [(torch.ones(1),)])


class Caching(torch.nn.Module):
    """A model that writes into a buffer, and returns what lies deeper than one tuple."""

    def __init__(self, *, writes: bool = True) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(5, 8))
        self.writes = writes

    def forward(self, x: Tensor, caches: list[Tensor]) -> dict[str, Any]:
        if self.writes:
            self.get_buffer("cache").add_(x)
            caches[0].mul_(2).add_(x)
        return {"layers": [x + 1, caches[0] + 1], "rows": x.shape[0]}


def test_buffers_and_caches_are_as_given_before_every_run_and_compared_behind_it() -> None:
    graph, inputs = Caching(), [(torch.ones(5, 8), [torch.ones(5, 8)])] * 2
    assert assert_fusion_preserves(graph, graph, inputs) == 2 * 2 * 40
    assert not graph.get_buffer("cache").any()
    with pytest.raises(
        NotConforming, match=r"output layers.1 element\[0, 0\] got 0x40000000, before the pass 0x40800000"
    ):
        assert_fusion_preserves(graph, Caching(writes=False), inputs)
    with pytest.raises(
        NotConforming, match=r"inputs 1: buffer cache element\[0, 0\] got 0x00000000, before the pass 0x3f"
    ):
        assert_fusion_preserves(graph, Caching(writes=False), [(torch.ones(5, 8), [-torch.ones(5, 8)])])


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda x: {"a": [x, (x * 2,)], "n": 5}, r"inputs 1: output a.1.0 element\[0, 0\] got 0x40000000, before"),
        (lambda x: {"a": [x, (x + 0.0,)], "n": 6}, "inputs 1: output n is 6, before the pass 5"),
        (lambda x: {"a": [x, (None,)], "n": 5}, r"output a.1.0 is None, before the pass a tensor \[5, 8\]"),
        (lambda x: {"b": [x, (x,)], "n": 5}, "output a.0 is there before the pass, and not after it"),
    ],
)
def test_outputs_are_compared_however_deep_they_lie(after: Callable[..., Any], message: str) -> None:
    with pytest.raises(NotConforming, match=message):
        assert_fusion_preserves(lambda x: {"a": [x, (x,)], "n": 5}, after, [(torch.ones(5, 8),)])


def test_arguments_that_share_memory_share_it_in_every_run() -> None:
    one = torch.ones(5, 8)
    with pytest.raises(NotConforming, match=r"output 0 element\[0, 0\] got 0x3f800000, before the pass 0x40000000"):
        assert_fusion_preserves(lambda a, b: (a.add_(1), b * 1)[1], lambda a, b: (b * 1, a.add_(1))[0], [(one, one)])
    with pytest.raises(UsageError, match="inputs 1 is Tensor, expected a tuple of arguments"):
        assert_fusion_preserves(layer, layer, [one])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="after is int, expected a GraphModule or a function"):
        assert_fusion_preserves(layer, 3, [])  # type: ignore[arg-type]


def test_judging_needs_torch_and_numpy_only() -> None:
    script = (
        "import sys, torch, numpy; before = set(sys.modules); import fusecheck.testing as t; "
        "x = torch.ones(2, 16).bfloat16(); assert t.conforms(x + x, partials=[x], residual_in=x); "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'fusecheck', 'torch', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(eval(done.stdout)) <= set(sys.stdlib_module_names)
