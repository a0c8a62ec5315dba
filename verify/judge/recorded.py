"""Calls on disk: what one rank kept of one call, and the calls of all ranks side by side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.operations import GIVEN_SCALE
from fusecheck.testing.call import Call

INPUTS = ("partial", "residual_in", "gamma", "scale")
OUTPUTS = ("residual", "norm", "quant", "scale_out")
SCALARS = ("eps", "weight_bias")
WORDS = ("quantiser", "layout")


@dataclass(frozen=True)
class RankCall:
    """One rank's tensors of one call.

    Attributes:
        name: of the call; the same on every rank.
        tensors: by the names of `INPUTS` and `OUTPUTS`.
        eps: None where it is not recorded.
        weight_bias: added to gamma.
        dataflows: the known dataflows that the record leaves open; empty: any.
        place: the file, for messages.
        quantiser: what made the codes, by name.
        layout: of its scales, by name; None: the quantiser's first.
    """

    name: str
    tensors: dict[str, Tensor]
    eps: float | None
    weight_bias: float
    dataflows: tuple[str, ...]
    place: Path
    quantiser: str = GIVEN_SCALE
    layout: str | None = None


def read_safetensors(path: Path) -> RankCall:
    """Read a file of one rank and call: tensors by the names of `INPUTS` and `OUTPUTS`, the rest in its metadata.

    Raises:
        UsageError: it cannot be read, or a name in it is unknown.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: no readable safetensors file ({error}); write it again") from None
    unknown = set(tensors) - {*INPUTS, *OUTPUTS}
    if unknown:
        names = ", ".join((*INPUTS, *OUTPUTS))
        raise UsageError(f"{path} holds a tensor {sorted(unknown)[0]!r}, expected of: {names}; rename or drop it")
    if "partial" not in tensors:
        raise UsageError(
            f"{path} holds no tensor 'partial', expected this rank's addend [tokens, hidden] under that name"
        )
    scalars = {name: _number(path, name, metadata[name]) for name in SCALARS if name in metadata}
    words = {name: metadata[name] for name in WORDS if name in metadata}
    return RankCall(path.stem, tensors, scalars.get("eps"), scalars.get("weight_bias", 0.0), (), path, **words)


def _number(path: Path, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{path}: {name} in its metadata is {text!r}, expected a number") from None


def joined(everyones: list[list[RankCall]]) -> Iterable[list[RankCall]]:
    """The calls with every rank's part, in the order of rank 0.

    Raises:
        UsageError: a call is missing on a rank.
    """
    by_name = [{call.name: call for call in calls} for calls in everyones]
    for rank, named in enumerate(by_name):
        for other, theirs in enumerate(by_name):
            missing = [name for name in theirs if name not in named]
            if missing:
                place = theirs[missing[0]].place
                raise UsageError(
                    f"call {missing[0]} of rank {other} ({place}) is missing for rank {rank}; record it on every rank"
                )
    for name in by_name[0]:
        yield [named[name] for named in by_name]


def as_call(parts: list[RankCall], rank: int, eps: float | None) -> Call:
    """What `fusecheck.testing` judges of one rank: every rank's addend, this rank's operands and outputs."""
    own = parts[rank]
    return Call(
        partials=tuple(part.tensors["partial"] for part in parts),
        residual_in=own.tensors.get("residual_in"),
        gamma=own.tensors.get("gamma"),
        scale=own.tensors.get("scale") if "quant" in own.tensors else None,
        eps=own.eps if eps is None else eps,
        weight_bias=own.weight_bias,
        outputs={name: own.tensors[name] for name in OUTPUTS if name in own.tensors},
        quantiser=own.quantiser,
        layout=own.layout,
    )
