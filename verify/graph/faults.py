"""Known mistakes of fusion passes, as passes to check: a list that every check of graphs must live up to.

Identifiers `GT-` are those of published bugs, with their source; `GM-` are mistakes that a count of nodes or a
comparison with a tolerance cannot see. Each differs from the right pass in one overridden step.
"""

from __future__ import annotations

from dataclasses import dataclass

from verify.graph.run import Subject

NORM, QUANT = "verify.graph.faulty_norm", "verify.graph.faulty_quant"
GITHUB = "https://github.com/"
"""Where the sources are; entries give the rest of the address."""


@dataclass(frozen=True)
class GraphFault:
    """A faulty pass.

    Attributes:
        id: of the fault.
        title: what goes wrong, in one clause.
        subject: the faulty pass, and where it stands.
        source: where it was reported.
    """

    id: str
    title: str
    subject: Subject
    source: str


def _norm(identifier: str, name: str, title: str, source: str) -> GraphFault:
    subject = Subject(f"{NORM}:{name}.apply", after_norm=False, quantises=False)
    return GraphFault(identifier, title, subject, _address(source))


def _quant(identifier: str, name: str, title: str, source: str) -> GraphFault:
    return GraphFault(identifier, title, Subject(f"{QUANT}:{name}.apply"), _address(source))


def _address(source: str) -> str:
    return GITHUB + source if "/" in source else source


_COUNTS = "a mistake that node counts or tolerances do not show"

GRAPH_FAULTS: tuple[GraphFault, ...] = (
    _norm("GT-01", "Float32Weight", "a float32 norm weight is accepted", "vllm-project/vllm/issues/48324"),
    _norm(
        "GT-02",
        "UnknownNormAccepted",
        "the guard passes norms it does not know",
        "vllm-project/vllm/pull/44694",
    ),
    _norm("GT-03", "SyntheticResidual", "uninitialised memory as residual", "vllm-project/vllm/pull/41972"),
    _norm("GT-04", "LastReduceMissing", "the last all-reduce is left out", "NVIDIA/TensorRT-LLM/pull/6850"),
    _norm("GT-04b", "WrongGroup", "reduced over the wrong group", "sgl-project/sglang/pull/32012"),
    _norm("GT-05", "DoubleReduce", "reduced twice", "NVIDIA/TensorRT-LLM/pull/14974"),
    _norm("GT-06", "ResidualOnEveryRank", "residual added on every rank", "mirage-project/mirage/pull/371"),
    _norm("GT-06b", "ResidualDivided", "residual split before the sum: rounding", "mlc-ai/mlc-llm/pull/941"),
    _norm("GT-07", "RankLocalResidual", "residual differs between ranks", "vllm-project/vllm/pull/24021"),
    _quant("GT-08", "FirstScale", "the first reader's scale for all", "NVIDIA/TensorRT-LLM/pull/15762"),
    _quant("GT-08b", "SmallestScale", "the smallest scale for all", "NVIDIA/TensorRT-LLM/pull/15762"),
    _quant("GT-08c", "NextScale", "another layer's scale", "vllm-project/vllm-ascend/pull/2772"),
    _quant("GT-09", "MergedScales", "different scales merged to the largest", "vllm-project/vllm/pull/47515"),
    _quant("GT-10", "RankLocalScale", "a scale of each rank's own", "vllm-project/vllm/pull/54683"),
    _quant("GT-11", "NormForCodes", "norm and codes swapped", "NVIDIA/TransformerEngine/pull/738"),
    _quant(
        "GT-12",
        "MixedIgnored",
        "the norm is dropped though somebody reads it",
        "microsoft/onnxruntime/pull/17320",
    ),
    _quant(
        "GT-12b",
        "ResidualAtOne",
        "the residual taken from the wrong index",
        "microsoft/onnxruntime/pull/14156",
    ),
    _norm(
        "GT-12c",
        "ResidualInputReturned",
        "readers get the residual that went in",
        "microsoft/onnxruntime/issues/17689",
    ),
    _norm("GT-13", "BroadcastWeight", "a weight that broadcasts", "microsoft/onnxruntime/issues/31980"),
    _norm("GT-14", "OneAddOrder", "matches one order of the add", "NVIDIA/TensorRT-LLM/pull/7545"),
    _norm("GT-14b", "BlindToReshape", "does not see through a reshape", "NVIDIA/TensorRT-LLM/issues/14781"),
    _norm("GT-14c", "LiveResidualOnly", "misses sites with a dead residual", "vllm-project/vllm/pull/50802"),
    _norm("GT-15", "CastDropped", "a cast to float32 is lost", "vllm-project/vllm/pull/24604"),
    _norm("GT-16", "ShardedNorm", "each part of a row has its own mean square", "axonn-ai/yalis/pull/36"),
    _norm(
        "GT-17",
        "ResidualAddedAgain",
        "one flavour adds the residual again",
        "PaddlePaddle/FastDeploy/pull/7923",
    ),
    _quant("GT-18", "VectorScale", "a vector of scales read as one number", "pytorch/pytorch/issues/136866"),
    _norm("GM-01", "AlphaIgnored", "alpha of the add is ignored", _COUNTS),
    _norm("GM-02", "OtherReaderIgnored", "the sum's other reader is ignored", _COUNTS),
    _norm("GM-03", "BroadcastResidual", "a broadcast residual", _COUNTS),
    _norm("GM-04", "FixedEps", "eps is a constant", _COUNTS),
    _norm("GM-05", "FixedStrategy", "the strategy is a constant", _COUNTS),
    _norm("GM-06", "NoMeta", "no meta values after the norm pass", _COUNTS),
    _norm("GM-07", "FirstRankOnly", "one rank fuses alone", _COUNTS),
    _quant("GM-08", "WeightScale", "the weight scale for the input scale", _COUNTS),
    _quant("GM-09", "BadScaleValue", "zero, negative, infinite and NaN scales", _COUNTS),
    _quant("GM-10", "FixedOutDtype", "the result is always bf16", _COUNTS),
    _quant("GM-11", "ViewDropped", "a view between norm and layer is lost", _COUNTS),
    _quant("GM-12", "AlwaysOutQuant", "the norm is always returned", _COUNTS),
    _quant("GM-13", "DirectReaderOnly", "one direct reader only", _COUNTS),
    _quant("GM-14", "NoMeta", "no meta values after the quantising pass", _COUNTS),
)
"""Every graph fault; GT-19 (block scales) is left out, since none of the operators has scales per block."""
