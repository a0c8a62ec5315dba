"""The museum: published faults of protocols between ranks, each as a variant of a model, beside its repaired form."""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.protocol.arrangements import Alternating, Crossed, Stray
from fusecheck.protocol.kernels.gather import Gather
from fusecheck.protocol.kernels.handover import HandOver
from fusecheck.protocol.kernels.moe_finalize import MoeFinalize
from fusecheck.protocol.kernels.oneshot import OneShot
from fusecheck.protocol.kernels.pull import Pull
from fusecheck.protocol.kernels.push_twoshot import PushTwoShot
from fusecheck.protocol.kernels.signal_pad import SignalPad
from fusecheck.protocol.kernels.twoshot import TwoShot
from fusecheck.protocol.language import GPU, RELAXED, SENTINEL, SUBNORMAL, Model, Size, outside

FULL = (Size(2, 2, 7), Size(3, 1, 5))
"""Ranks, blocks and calls at which what is right is verified."""


@dataclass(frozen=True)
class Exhibit:
    """A fault and its repair.

    Attributes:
        name: as `fusecheck protocol` takes it.
        title: what is wrong.
        link: where it was published.
        faulty: the model with the fault.
        repaired: the model without.
        size: the smallest that shows it.
        sizes: at which the repaired form is verified.
    """

    name: str
    title: str
    link: str
    faulty: Model
    repaired: Model
    size: Size
    sizes: tuple[Size, ...] = FULL


GITHUB = "https://github.com/"
ONE, TWO = Size(2, 1, 1), Size(2, 1, 2)

MUSEUM = (
    Exhibit(
        "pdl-early-read",
        "the fused kernel reads its residual before it waits for the kernel that writes it",
        GITHUB + "flashinfer-ai/flashinfer/pull/5081",
        HandOver(reads_early=True),
        HandOver(),
        ONE,
    ),
    Exhibit(
        "barrier-slot-order",
        "two-shot stores its own slot before those of blocks that it lacks, and a larger grid follows a small one",
        GITHUB + "flashinfer-ai/flashinfer/blob/v0.6.13/include/flashinfer/comm/trtllm_allreduce_fusion.cuh",
        TwoShot(own_slot="first"),
        TwoShot(),
        Size(2, 2, 3),
    ),
    Exhibit(
        "clear-overflow",
        "the offset of what is cleared wraps at 2 GiB, and another place is cleared",
        GITHUB + "NVIDIA/TensorRT-LLM/pull/10499",
        OneShot(overflows=True),
        OneShot(),
        Size(2, 1, 6),
    ),
    Exhibit(
        "sentinel-flushed",
        "a comparison that flushes subnormals takes a payload for the sentinel",
        GITHUB + "flashinfer-ai/flashinfer/pull/3304",
        OneShot(published=SUBNORMAL, arrived=outside(SENTINEL, SUBNORMAL)),
        OneShot(published=SUBNORMAL),
        ONE,
    ),
    Exhibit(
        "negative-zero",
        "a payload of -0.0 is published as it is, and is the sentinel",
        GITHUB + "flashinfer-ai/flashinfer/pull/1136",
        OneShot(published=SENTINEL),
        OneShot(),
        ONE,
    ),
    Exhibit(
        "reduced-negative-zero",
        "a sum that rounds to -0.0 is broadcast as it is",
        GITHUB + "flashinfer-ai/flashinfer/pull/3304",
        PushTwoShot(total=SENTINEL),
        PushTwoShot(),
        ONE,
    ),
    Exhibit(
        "early-trigger",
        "completion is signalled before the output is stored, and the next kernel does not wait",
        GITHUB + "vllm-project/vllm/pull/45448",
        HandOver(triggers="start", consumer_waits=False),
        HandOver(triggers="start"),
        ONE,
    ),
    Exhibit(
        "trigger-no-flush",
        "completion is signalled behind stores that need not be visible yet, and the next kernel does not wait",
        GITHUB + "NVIDIA/TensorRT-LLM/pull/14668",
        HandOver(consumer_waits=False),
        HandOver(),
        ONE,
    ),
    Exhibit(
        "unequal-grids",
        "ranks launch different numbers of blocks, and a block waits for a peer that is not there",
        GITHUB + "vllm-project/vllm/pull/43616",
        Pull(short=(1,)),
        Pull(),
        Size(2, 2, 1),
    ),
    Exhibit(
        "wrong-group",
        "the rendezvous is over the whole world, of which this is one group of two",
        GITHUB + "vllm-project/vllm/pull/45917",
        Stray(OneShot()),
        OneShot(),
        Size(3, 1, 1),
    ),
    Exhibit(
        "relaxed-flag",
        "two-stage: the flag between the stages is stored and awaited relaxed",
        GITHUB + "ROCm/aiter/pull/2890",
        Pull(release=RELAXED, acquire=RELAXED),
        Pull(),
        ONE,
    ),
    Exhibit(
        "flag-not-acquired",
        "two-stage: the flag is released, but awaited without acquire",
        GITHUB + "vllm-project/vllm/issues/57059",
        Pull(acquire=RELAXED),
        Pull(),
        ONE,
    ),
    Exhibit(
        "flag-not-released",
        "a flag between ranks that is awaited with acquire, but stored without release",
        GITHUB + "NVIDIA/TensorRT-LLM/pull/8612",
        TwoShot(release=RELAXED),
        TwoShot(),
        ONE,
    ),
    Exhibit(
        "device-scope",
        "the flag between ranks is ordered at the scope of one device",
        GITHUB + "vllm-project/vllm/issues/57059",
        Pull(scope=GPU),
        Pull(),
        ONE,
    ),
    Exhibit(
        "no-end-sync",
        "one stage: a rank returns before the others have read its rows",
        GITHUB + "ROCm/aiter/pull/4346",
        Pull(stages=1, end_barrier=False),
        Pull(stages=1),
        TWO,
    ),
    Exhibit(
        "no-end-barrier",
        "one-shot over signal pads has no barrier at its end",
        GITHUB + "pytorch/pytorch/pull/137257",
        SignalPad(end_barrier=False),
        SignalPad(),
        TWO,
    ),
    Exhibit(
        "slot-collision",
        "two groups over one pad use the same slots, and a signal of one ends a wait of the other",
        GITHUB + "pytorch/pytorch/issues/192581",
        SignalPad(groups=((0, 2), (0, 1, 2)), own_slots=False),
        SignalPad(groups=((0, 2), (0, 1, 2))),
        Size(3, 1, 2),
        (Size(3, 1, 5), Size(3, 2, 3)),
    ),
    Exhibit(
        "channel-bound",
        "the bound of channels is multiplied by the ranks instead of divided: signals land in the tensor",
        GITHUB + "pytorch/pytorch/issues/191618",
        SignalPad(channels=1),
        SignalPad(channels=2),
        Size(2, 2, 1),
    ),
    Exhibit(
        "pad-zeroed-late",
        "a rank zeroes its pad when its peers may already have signalled",
        GITHUB + "pytorch/pytorch/pull/196546",
        SignalPad(zeroed="late"),
        SignalPad(),
        ONE,
    ),
    Exhibit(
        "two-streams",
        "calls from two streams that nothing orders share their slots",
        GITHUB + "pytorch/pytorch/issues/189228",
        SignalPad(streams=2, own_slots=False),
        SignalPad(streams=2),
        TWO,
    ),
    Exhibit(
        "clear-size",
        "a call clears as many slots as it fills itself, not as the call before has filled",
        GITHUB + "NVIDIA/TensorRT-LLM/pull/6237",
        PushTwoShot(clears="current"),
        PushTwoShot(),
        Size(2, 1, 4),
    ),
    Exhibit(
        "flag-wrap",
        "the kept flag counts on where the barriers' flag goes round in 0, 1, 2",
        GITHUB + "NVIDIA/TensorRT-LLM/pull/13158",
        TwoShot(wraps=False),
        TwoShot(),
        Size(2, 1, 3),
    ),
    Exhibit(
        "clear-after-fence",
        "a rank clears its buffer behind the fence, when its peers may already have written",
        GITHUB + "NVIDIA/Megatron-LM/pull/7263",
        Gather(clears="after"),
        Gather(),
        ONE,
    ),
    Exhibit(
        "flag-turned-early",
        "block 0 turns the flag before the other blocks have read it",
        GITHUB + "flashinfer-ai/flashinfer/pull/4586",
        OneShot(waits_for_blocks=False),
        OneShot(),
        Size(2, 2, 2),
    ),
    Exhibit(
        "baked-count",
        "the count of the barrier is the host's, baked into a captured graph",
        GITHUB + "ROCm/aiter/pull/3928",
        Pull(counted=False),
        Pull(),
        TWO,
    ),
    Exhibit(
        "one-buffer",
        "a single buffer is used again before anybody knows that it was read",
        GITHUB + "NVIDIA/nccl/issues/1924",
        OneShot(thirds=1),
        OneShot(),
        TWO,
    ),
    Exhibit(
        "cleared-at-start",
        "a call fills its own third with the sentinel again before it starts",
        GITHUB + "flashinfer-ai/flashinfer/pull/1111",
        OneShot(clears="current", clear_third=0, clear_first=True),
        OneShot(),
        ONE,
    ),
    Exhibit(
        "issue-order",
        "the ranks issue two collectives in different orders",
        GITHUB + "pytorch/pytorch/issues/189228",
        Crossed(OneShot()),
        OneShot(),
        TWO,
    ),
    Exhibit(
        "polls-the-senders",
        "MoE finalize polls the copy of the sender, who may clear it in his next call",
        GITHUB + "flashinfer-ai/flashinfer/pull/1159",
        MoeFinalize(),
        MoeFinalize(polls_senders=False),
        TWO,
    ),
)

LEFT_OUT = {
    "pytorch/pytorch/pull/131244": "ranks add up in different orders: no value is rounded here; `ranks agree` sees it",
    "vllm-project/vllm/pull/50941": "a fence that one lane of a block issues: a block is one thread here",
    "flashinfer-ai/flashinfer/pull/3361": "a fence missing between the generic and the async proxy: there is one here",
    "NVIDIA/TensorRT-LLM/pull/4594": "what it mended could not be read",
    "vllm-project/vllm/pull/2760": "flags as bytes of one word: a cell is never smaller than a store",
    "NVIDIA/TensorRT-LLM/pull/18834": "more blocks than are resident: all blocks of a launch may run here",
}
"""Published faults that need what the models lack, and what that is."""

KERNELS: dict[str, tuple[str, Model]] = {
    "one-shot": ("FlashInfer 0.7.4 and TensorRT-LLM, one-shot", OneShot()),
    "two-shot": ("FlashInfer 0.7.4, two-shot", TwoShot()),
    "two-shot-trtllm": ("TensorRT-LLM and FlashInfer 0.6.13, two-shot", TwoShot(own_slot="first")),
    "by-turns": ("FlashInfer 0.7.4, one-shot and two-shot by turns", Alternating()),
    "moe-reduction": ("FlashInfer 0.7.4, MoE reduction", OneShot(name="MoE reduction")),
    "moe-finalize": ("FlashInfer 0.7.4, MoE finalize", MoeFinalize()),
    "hand-over": ("FlashInfer 0.7.4, one-shot under PDL", HandOver()),
    "hand-over-trtllm": ("TensorRT-LLM and FlashInfer 0.6.13, one-shot under PDL", HandOver(reads_early=True)),
    "signal-pad": ("torch symmetric memory, one-shot", SignalPad()),
    "push-two-shot": ("MNNVL and SGLang, push two-shot", PushTwoShot()),
    "pull": ("vLLM and AITER, two stages", Pull()),
    "pull-one-stage": ("vLLM and AITER, one stage", Pull(stages=1)),
    "push-all-gather": ("Megatron-LM, routing buffer", Gather()),
}
"""Kernels as they are, by name."""
