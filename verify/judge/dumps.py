"""The dumps of FlashInfer's API logger (FLASHINFER_LOGLEVEL=10), read without FlashInfer and without pickle.

Form as of flashinfer-python 0.7.4, `flashinfer/api_logging.py`, read on 28 November 2026: a folder for each call,
`<time>_pid<pid>_<function>_call<n>`, with `metadata.jsonl` (its last line is the fullest), `inputs.*` written before
the call and `outputs.*` with what the function returned, as safetensors or by torch.save. Positional arguments are
called `arg_<n>`, others `kwarg_<name>`. Output buffers are among the inputs, with what they held before the call.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.judge.recorded import RankCall

SESSION = "session.jsonl"
FUSION, WORKSPACE = "allreduce_fusion", "create_allreduce_fusion_workspace"
PARAMETERS = {
    FUSION: (
        *("input", "workspace", "pattern", "launch_with_pdl", "trigger_completion_at_end", "output", "residual_out"),
        *("norm_out", "quant_out", "scale_out", "residual_in", "rms_gamma", "rms_eps", "scale_factor", "layout_code"),
        *("use_oneshot", "fp32_acc"),
    ),
    WORKSPACE: ("backend", "world_size", "rank"),
}
"""The functions' first parameters, for those that were given by position."""
RETURNED = {1: "norm", 2: "quant", 4: "norm"}
"""By pattern: what the function returns, as the suite calls it."""


def is_dump(folder: Path) -> bool:
    """Whether FlashInfer's logger wrote into this folder."""
    return (folder / SESSION).is_file()


def read_dumps(folder: Path) -> dict[int, list[RankCall]]:
    """The fused calls in a folder of dumps, by rank, in the order in which they were made.

    Raises:
        UsageError: a dump that cannot be read, or a process that made no workspace, whose rank is therefore unknown.
    """
    calls: dict[int, list[tuple[Path, dict[str, Any]]]] = {}
    ranks: dict[int, int] = {}
    for place, metadata in _dumps(folder):
        process = int(metadata["process_id"])
        if metadata["function_name"] == WORKSPACE:
            ranks[process] = int(_plain(_arguments(metadata, WORKSPACE), place)["rank"])
        elif metadata["function_name"] == FUSION:
            calls.setdefault(process, []).append((place, metadata))
    for process, mine in calls.items():
        if process not in ranks:
            raise UsageError(
                f"{mine[0][0]}: process {process} made no workspace that was dumped, so its rank is unknown;"
                f" let FLASHINFER_DUMP_INCLUDE name {WORKSPACE} too"
            )
    return {ranks[process]: [_read(index, *dump) for index, dump in enumerate(mine)] for process, mine in calls.items()}


def _dumps(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for place in sorted(path.parent for path in folder.glob("*/metadata.jsonl")):
        lines = (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        try:
            metadata = json.loads(lines[-1])
            function = metadata["function_name"]
        except (IndexError, ValueError, KeyError, TypeError):
            raise UsageError(f"{place}/metadata.jsonl is cut short; dump again, or delete this folder") from None
        if function in PARAMETERS:
            yield place, metadata


def _arguments(metadata: dict[str, Any], function: str) -> dict[str, Any]:
    named = {}
    for key, value in metadata.get("input_metadata", {}).items():
        named[_name(key, function)] = value
    return named


def _name(key: str, function: str) -> str:
    kind, _, rest = key.partition("_")
    return PARAMETERS[function][int(rest)] if kind == "arg" and int(rest) < len(PARAMETERS[function]) else rest


def _plain(named: dict[str, Any], place: Path) -> dict[str, Any]:
    if "rank" not in named:
        raise UsageError(f"{place}/metadata.jsonl names no rank; was it written by flashinfer-python 0.7?")
    return named


def _read(index: int, place: Path, metadata: dict[str, Any]) -> RankCall:
    """One dump of the fused function.

    Raises:
        UsageError: a file is missing or cut short, or the pattern is one that cannot be judged from a dump.
    """
    given = _arguments(metadata, FUSION)
    given |= {_name(key, FUSION): tensor for key, tensor in _tensors(place, "inputs").items()}
    pattern = given.get("pattern")
    if pattern not in RETURNED:
        known = ", ".join(map(str, RETURNED))
        raise UsageError(f"{place}: pattern {pattern} cannot be judged from a dump, expected of: {known}")
    result = _tensors(place, "outputs").get("result")
    if result is None:
        raise UsageError(f"{place}: the dump holds no result; did the call return? dump again, or delete this folder")
    names = {"input": "partial", "residual_in": "residual_in", "rms_gamma": "gamma", "scale_factor": "scale"}
    tensors = {ours: given[theirs] for theirs, ours in names.items() if isinstance(given.get(theirs), Tensor)}
    if isinstance(given.get("scale_factor"), (int, float)):
        tensors["scale"] = torch.tensor([given["scale_factor"]], dtype=torch.float32)
    tensors[RETURNED[pattern]] = result
    return RankCall(
        name=f"call{index:04d}",
        tensors=tensors,
        eps=float(given.get("rms_eps", 1e-6)),
        weight_bias=float(given.get("weight_bias", 0.0)),
        dataflows=("flashinfer-fp32",) if given.get("fp32_acc") else ("flashinfer",),
        place=place,
    )


def _tensors(place: Path, kind: str) -> dict[str, Tensor]:
    plain, pickled = place / f"{kind}.safetensors", place / f"{kind}.pt"
    try:
        if plain.exists():
            return load_file(plain)
        if pickled.exists():
            loaded: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            return loaded
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        path = plain if plain.exists() else pickled
        told = str(error).splitlines()[0]
        raise UsageError(f"{path} is cut short or no file of tensors ({told}); dump again") from None
    return {}
