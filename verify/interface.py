"""The plug-in interface: what a kernel under test receives, returns and declares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fusecheck.errors import UsageError
from fusecheck.operations import STATIC_OPS, FusionOp, Operation, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from fusecheck.dataflow import Dataflow
    from fusecheck.problem import Problem
    from fusecheck.stages.experts import Experts

__all__ = [
    "STATIC_OPS",
    "Backend",
    "FusionOp",
    "Kernel",
    "Limits",
    "Operation",
    "Rank",
    "RankInputs",
    "RankOutputs",
    "Strategy",
    "Support",
    "operations_of",
    "overwritten",
    "spared",
]

OPERANDS = ("partial", "residual", "gamma", "scale")
"""The tensors of `RankInputs`."""


@dataclass(frozen=True)
class Support:
    """Whether a backend takes a Problem; `reason` says why not, in one clause."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """The largest call that one workspace must take: `max_tokens` rows of `hidden` elements of `dtype`."""

    max_tokens: int
    hidden: int
    dtype: torch.dtype


class Rank(Protocol):
    """One rank's place in the tensor-parallel group, as a backend sees it."""

    index: int
    world_size: int
    device: torch.device

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of the ranks; None where there is none."""
        ...

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """Map every rank's uint8 buffer of this name, `nbytes` long, in rank order.

        A collective call: every rank of the group asks for the same name and size.
        The memory is zero when first mapped, shared between the rank processes (CPU
        only), and is the same memory when the name is asked for again.

        Raises:
            RuntimeError: the device has no shared memory of this kind, or a peer did not answer.
        """
        ...


@dataclass(frozen=True)
class RankInputs:
    """One rank's operands of one call.

    Attributes:
        partial: this rank's addend of the all-reduce, [tokens, hidden], bf16 or fp16.
        residual: equal on all ranks, [tokens, hidden], the dtype of `partial`; not to be read where the operation has
            no residual.
        gamma: the norm's weight, [hidden], the dtype of `partial`.
        scale: [1], float32: the dequantisation scale (x ~ q * scale) of a quantiser whose scale is given, NVFP4's
            factor of the tensor; not to be read by others.
        eps: added to the mean square before the reciprocal root.
        weight_bias: added to gamma in float32 (1.0 for Gemma, else 0.0).
        experts: what an MoE collective sums into this rank's addend; `partial` is not to be read then.
        layout: the name of the layout that the scales of the codes shall have; empty: the quantiser's first.
    """

    partial: Tensor
    residual: Tensor
    gamma: Tensor
    scale: Tensor
    eps: float
    weight_bias: float
    layout: str = ""
    experts: Experts | None = None


@dataclass(frozen=True)
class RankOutputs:
    """One rank's results; those that the operation does not return are None.

    Attributes:
        residual: the sum over ranks plus the residual, [tokens, hidden], in the activations' dtype.
        norm: the normalised activations, [tokens, hidden], in the activations' dtype.
        quant: their codes: float8_e4m3fn [tokens, hidden]; of four-bit formats uint8 [tokens, hidden / 2], the even
            element in the low half.
        scale: the scales of the codes as stored, packing and padding included; see the quantiser's `layout`.
        total: the sum over ranks alone, [tokens, hidden], in the activations' dtype.
    """

    residual: Tensor | Any  # None is for the operations without one; Any spares all others an assertion
    norm: Tensor | None = None
    quant: Tensor | None = None
    scale: Tensor | None = None
    total: Tensor | None = None


@runtime_checkable
class Kernel(Protocol):
    """An open workspace of a backend on one rank; takes many calls.

    A kernel may also have a method `renew(limits)`, a collective call that returns nothing: afterwards its workspace is
    as one that was just opened with these limits, in their dtype, no flag raised and no data left. They have no more
    rows and no more columns than those that it was opened with, and may have another dtype. It waits for its peers, for
    a rank that returns may call at once. Without it the workspace is closed, and another one opened.
    """

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the fused operation; a collective call.

        On a GPU it is launched on the current stream, which need not be the default one, and may return before the
        device is done; it may be captured in a CUDA graph, so it must not wait for the device. The outputs are its
        caller's: no later call changes them, and closing does not free them. The operands stay as they are, but for
        those that the backend's `overwrites` names; they may be overwritten as soon as the call is done. They may be
        views with strides and an offset; a kernel that cannot read these raises. What a refused input raises, comes
        through.
        """
        ...

    def close(self) -> None:
        """Give back everything that `open` took."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A kernel under test.

    A backend may also have these attributes; `getattr` reads them:

    * `device`: `cpu` or `cuda`, where it runs nowhere else.
    * `overwrites`: names of operands that its kernel changes, `("residual",)` for one that adds in place as vLLM's
      `fused_add_rms_norm` does. It may return the operand itself. Every other operand must stay as it was.
    * `binaries`: what its kernels are in, for certificates: paths of files or folders, or parts of the paths of shared
      objects that a rank has loaded.
    * `pdl`: its kernel is launched by programmatic dependent launch.
    * `one_workspace`: opening it again finds the same workspace; two calls at once are not asked of it.
    * `mixes_dtypes`: calls in bf16 and fp16 may share a workspace.
    * `operations`: a tuple of every `Operation` that its kernel has; left out: the three of the first op.
    """

    name: str

    def supports(self, problem: Problem) -> Support:
        """Say whether this backend takes the Problem, and why not; asked on the parent, without a device."""
        ...

    def dataflow(self, problem: Problem) -> Dataflow:
        """Declare the arithmetic for this Problem; constant over a run, never chosen per element."""
        ...

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make a workspace on this rank; a collective call."""
        ...


def operations_of(backend: Backend) -> tuple[Operation, ...]:
    """The operations that a backend says its kernel has.

    Raises:
        UsageError: it names none, or something else.
    """
    found = getattr(backend, "operations", STATIC_OPS)
    if not isinstance(found, (tuple, list)) or not found or not all(isinstance(each, Operation) for each in found):
        raise UsageError(f"{backend.name}.operations is {found!r}, expected a tuple of one Operation or more")
    return tuple(found)


def overwritten(backend: Backend) -> frozenset[str]:
    """The operands that a backend says its kernel changes.

    Raises:
        UsageError: it names something else.
    """
    names = getattr(backend, "overwrites", ())
    if isinstance(names, str) or not set(names) <= set(OPERANDS):
        raise UsageError(f"{backend.name}.overwrites is {names!r}, expected a tuple of: {', '.join(OPERANDS)}")
    return frozenset(names)


def spared(inputs: RankInputs, names: frozenset[str]) -> RankInputs:
    """The inputs with copies of these operands, for a kernel that may overwrite them."""
    copies: dict[str, Any] = {name: getattr(inputs, name).clone() for name in names}
    return replace(inputs, **copies)
