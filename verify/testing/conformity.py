"""`conforms` and `assert_conforms`: the verdict on the tensors that a test already holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.operations import GIVEN_SCALE
from fusecheck.testing import judging
from fusecheck.testing.call import Call, check
from fusecheck.testing.ranks import Ranks, unequal
from fusecheck.testing.told import Told, check_alike
from fusecheck.verdict import Stage, Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NotConforming(AssertionError):  # noqa: N818 - a verdict, not a defect of the program
    """Raised by the assertions of `fusecheck.testing`.

    Attributes:
        conformity: the verdict with all its findings; None where there is only the message.
    """

    def __init__(self, message: str, conformity: Conformity | None = None) -> None:
        super().__init__(message)
        self.conformity = conformity


@dataclass(frozen=True)
class Conformity:
    """The verdict on one call.

    Attributes:
        dataflow: the declaration by which it was judged: the one given, else the first known one that explains every
            element, else the known one that leaves the fewest outside.
        explanations: gives `explained_by`.
        tallies: what each stage saw, over all ranks.
        findings: what is wrong, a line each, in the order of the stages; empty when the call conforms.
    """

    dataflow: str
    explanations: Callable[[], list[str]] = field(default=list, repr=False, compare=False)
    tallies: list[Tally] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @cached_property
    def explained_by(self) -> list[str]:
        """The known dataflows that explain every element, where none was given or the one given does not.

        Without a group, all of them are looked for when this is read first: the verdict needs but one.
        """
        return self.explanations()

    @property
    def elements(self) -> int:
        """Outputs judged; ranks that hold the same bits share one judgement."""
        return sum(tally.elements for tally in self.tallies)

    @property
    def verdict(self) -> str:
        """`pass` or `fail`."""
        return "fail" if self.findings else "pass"

    def records(self, title: str) -> list[dict[str, str]]:
        """The findings of the call `title` as JSON-ready records."""
        staged = [line.partition(": ") for line in self.findings]
        shared = {"case": title, "dataflow": self.dataflow}
        return [{**shared, "stage": stage, "message": message} for stage, _, message in staged]

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        if not self.findings:
            return f"conforms to {self.dataflow}: {self.elements} elements"
        like = ", ".join(self.explained_by) or "no known dataflow"
        return "\n".join([*self.findings, f"judged by dataflow {self.dataflow}; computes like: {like}"])


def conforms(
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    quant: Tensor | None = None,
    scale_out: Tensor | None = None,
    *,
    partials: Sequence[Tensor] | Tensor,
    group: ProcessGroup | None = None,
    residual_in: Tensor | None = None,
    gamma: Tensor | None = None,
    scale: Tensor | float | None = None,
    eps: float | None = None,
    weight_bias: float = 0.0,
    quantiser: str = GIVEN_SCALE,
    layout: str | None = None,
    dataflow: str | Dataflow | None = None,
) -> Conformity:
    """Judge the outputs of one call of a fused all-reduce + residual + RMSNorm + quantise, any subset of them.

    Every element is held against the interval that the arithmetic allows, given the outputs before it as they were
    returned; there is no tolerance. Tensors are judged where they lie, on CPU or CUDA.

    Args:
        residual: the sum over ranks plus `residual_in`, [tokens, hidden], bf16 or fp16.
        norm: the normalised activations, [tokens, hidden], the dtype of `residual`.
        quant: the codes, [tokens, hidden], float8_e4m3fn or their bits as uint8; of four-bit formats uint8
            [tokens, hidden / 2], the even element in the low half.
        scale_out: the scales as the kernel stored them, packing and padding included, where it makes scales.
        partials: every rank's addend in rank order, each [tokens, hidden]; with `group`, this rank's own.
        group: the ranks that reduced; each of them calls this function, and gets the same verdict.
        residual_in: [tokens, hidden]; None where nothing was added.
        gamma: the norm's weight, [hidden].
        scale: the static dequantisation scale (x ~ q * scale), one float32; NVFP4's factor of the whole tensor.
        eps: added to the mean square.
        weight_bias: added to gamma in float32; 1.0 for Gemma.
        quantiser: by name, as `fusecheck backends` lists them: `dynamic-fp8`, `group-fp8-packed-64`, `mxfp8`, ...
        layout: of `scale_out`, by name; None: the quantiser's first.
        dataflow: the declared arithmetic or its name; None: a known one must explain *all* elements.

    Raises:
        UsageError: an argument that cannot be meant, by name; on every rank alike.
    """
    ranks = Ranks(group)
    given = {"residual": residual, "norm": norm, "quant": quant, "scale_out": scale_out}
    outputs = {name: tensor for name, tensor in given.items() if tensor is not None}
    alone = isinstance(partials, Tensor) or not isinstance(partials, Iterable)
    own: list[Any] = [partials] if alone else list(partials)

    call = Call(tuple(own), residual_in, gamma, scale, eps, weight_bias, outputs, quantiser, layout)
    if group is None:
        return conformity_of(call, dataflow)

    def told() -> Told:
        check(call)
        return Told.of(call, judging.named(dataflow))

    everyones = ranks.alike(told)
    check_alike(everyones)
    call = replace(call.detached(), partials=tuple(ranks.gather(call.partials[0].detach())))
    return _judge(call, ranks, judging.named(dataflow), unequal([each.outputs for each in everyones]))


def assert_conforms(*outputs: Tensor | None, **arguments: Any) -> Conformity:
    """`conforms`, with an error that is the finding; the same arguments.

    Returns:
        The verdict, which names the dataflow that explains the call.

    Raises:
        NotConforming: stage, rank, element, operands, bits, what is admissible, and which known dataflow computes like
            this; on every rank alike.
        UsageError: an argument that cannot be meant, by name; on every rank alike.
    """
    __tracebackhide__ = True
    found = conforms(*outputs, **arguments)
    if not found:
        raise NotConforming(str(found), found)
    return found


def conformity_of(call: Call, dataflow: str | Dataflow | None) -> Conformity:
    """`conforms` for a call of which one process holds every rank's addend.

    Raises:
        UsageError: the call cannot be judged, or no known dataflow has the name.
    """
    check(call)
    return _judge(call.detached(), Ranks(None), judging.named(dataflow))


def _judge(call: Call, ranks: Ranks, declared: Dataflow | None, differing: Sequence[str] = ()) -> Conformity:
    """Judge this rank's outputs and merge what all ranks found; `differing` names outputs that differ between ranks."""
    # Where the ranks hold the same bits, each judges its share of the rows for all.
    rows = range(call.shape[0]) if differing else ranks.share(call.shape[0])
    if declared is None and ranks.count == 1:
        for flow, found in judging.explanations(call, rows):
            return Conformity(flow.name, partial(judging.explaining, call, rows), found)
    explained: list[str] = []
    searched = declared is None
    if declared is None:
        explained = _common(ranks, judging.explaining(call, rows)) if ranks.count > 1 else []
        name = explained[0] if explained else ranks.exchange(judging.nearest(call, rows).name)[0]
        declared = DATAFLOWS[name]
    everyones = ranks.exchange(judging.tallies(call, declared, rows))
    if not searched and any(judging.outside(each) for each in everyones):
        explained = _common(ranks, judging.explaining(call, rows))
    merged = {tally.stage: Tally(tally.stage) for each in everyones for tally in each}
    findings = [f"{Stage.AGREE.value}: {name} differs between ranks" for name in differing]
    for stage, whole in merged.items():
        for rank, tally in ((rank, tally) for rank, each in enumerate(everyones) for tally in each):
            if tally.stage is stage:
                whole.add(tally)
                apart = bool(differing) or stage is Stage.LAYOUT  # padding is each rank's own
                findings += [_line(tally, _who(rank, ranks.count, apart=apart))] if tally.outside else []
    return Conformity(declared.name, partial(list, explained), list(merged.values()), findings)


def _common(ranks: Ranks, mine: list[str]) -> list[str]:
    everyones = ranks.exchange(mine)
    return [name for name in everyones[0] if all(name in each for each in everyones)]


def _who(rank: int, count: int, *, apart: bool) -> str:
    if count == 1:
        return ""
    return f"rank {rank} " if apart else "every rank "


def _line(tally: Tally, where: str) -> str:
    first = tally.shown[0]
    return (
        f"{tally.stage.value}: {where}element[{first.row},{first.column}] {first.context} got {first.got}"
        f" admissible {first.admissible} ({tally.outside} of {tally.elements} elements)"
    )
