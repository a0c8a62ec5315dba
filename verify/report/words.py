"""What the words of a report mean: every word of the page that is not everyday English."""

from __future__ import annotations

WORDS = (
    (
        "verdict",
        "Pass, fail, or inconclusive: what was not judged, or not to its end, is never a pass.",
    ),
    ("emulated", "Arithmetic and protocol of a known kernel, computed again on the CPU. It is not that kernel."),
    ("backend", "A kernel under test, by the name that the command line knows it by. A subject is one at one tp."),
    ("tp", "Tensor-parallel ranks: how many processes or GPUs add up their parts of a sum."),
    (
        "one-shot, two-shot",
        "Every rank reads all parts and adds them up; or each adds up a share and passes it on.",
    ),
    ("case", "One call, or several on one workspace: shape, scale, family of inputs and seed. One line replays it."),
    ("family", "How the inputs of a case are made: what they are large, equal, tiny or special in."),
    (
        "dataflow",
        "The arithmetic that a kernel declares: where it rounds, how it adds up, what becomes of NaN.",
    ),
    ("enclosure", "An interval for each element that holds every value which the declared arithmetic allows there."),
    ("admissible codes", "The codes of the output format between the two ends of the enclosure; mostly it is one."),
    ("nominal", "The value of one plain way to compute what is declared; a kernel may differ from it and be right."),
    ("off nominal", "Elements that are not the nominal value, yet may be inside their enclosure."),
    ("codes apart", "How many codes lie between a fused output and that of the separate ops, where both may be right."),
    ("core plan", "The combinations that a pass must have reached. A cell is one of them."),
    ("refused", "A case that the kernel says it does not take. It is not judged, and counted."),
    ("alive", "The first stage: the kernel returned in time, wrote all of its outputs, and nothing else."),
    ("ranks agree", "The stage after it: the same bits on every rank that promises them."),
    ("experts", "Only for mixtures of experts: the sum over the experts, before the exchange."),
    ("residual, norm, scale, quant, code", "Stages, each judged from what the stage before was seen to return."),
    ("layout, special", "Stages: where scales and padding lie; what is declared for NaN, infinities and zeros."),
    ("property", "A stage of the inputs: that they have what their family is named for."),
    ("unfused", "The separate ops on the same inputs; as a stage, that a difference is one which both may have."),
    ("again", "The last stage: the same bits when repeated, captured, or called by another exchange."),
    ("computes like", "Known dataflows under which every output of the failed case would be right."),
    ("planted fault", "A published bug, put into a right kernel on purpose. Caught: Fusecheck said so, unasked."),
    ("right kernel rejected", "A false alarm: a kernel that keeps its declaration was called wrong."),
    ("claim", "What a row's bits must not depend on: the batch, its place, its neighbours, ranks, exchange, history."),
    ("arm", "One run of the model: unfused (baseline), fused (candidate), or without FP8 (oracle)."),
    ("lost, gained, churn", "Answers right before and wrong now; wrong before and right now; wrong in another way."),
    ("interval, margin", "Where the true change lies with 95 % confidence; the loss that was agreed on beforehand."),
    ("exact p, mid-p, Wilcoxon p", "How likely such a difference is by chance alone, by three tests of that name."),
    ("KL, nat", "How far two distributions over the next word lie apart, and the unit of it."),
    ("seen at 80 %", "The smallest change that this many questions would show in four of five runs."),
    ("site", "A place in the model where the fused op can stand: two in a layer."),
    ("case group", "Cases that stand and fall together: one kernel, graph, task or fault."),
)
"""Pairs of word and meaning, in the order of the page."""
