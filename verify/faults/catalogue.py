"""The catalogue of faults: read from TOML, and refused at load where an entry lacks its source or its hook."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fusecheck import toml
from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.errors import UsageError
from fusecheck.quantflow import known_flows

PATH = Path(__file__).parent
GROUPS = ("arithmetic", "quantiser", "protocol", "launcher", "graph", "accuracy", "suite")

KERNEL_HOOKS = {
    "Arithmetic": "fusecheck.backends.emulated_arithmetic",
    "Quantising": "fusecheck.backends.emulated_quantise",
    "Lamport": "fusecheck.backends.emulated_protocol",
    "TwoShot": "fusecheck.backends.emulated_protocol",
    "EmulatedKernel": "fusecheck.backends.emulated",
}
"""The classes of the emulator whose methods are hooks, and where they live; such a fault is a kernel."""

GRAPH_HOOKS = {"FuseNorm": "fusecheck.graph.norm_fusion", "FuseQuant": "fusecheck.graph.quant_fusion"}
"""The same of the graph passes; such a fault is a pass."""

HOOKS = KERNEL_HOOKS | GRAPH_HOOKS

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One published bug, re-created.

    Attributes:
        id: of the catalogue; a letter at its end tells variants of one report apart.
        title: what is wrong, in a few words.
        project: where it was reported.
        links: the reports or changes.
        group: the layer, one of `GROUPS`.
        does: what the re-creation does, in one sentence.
        hook: the method that is overridden, as `Class.method`.
        patch: the overriding class or function, as `package.module:attribute`.
        visible: the property of the input that makes it visible.
        stage: the stage expected to notice it first.
        rank: its place among the thirty of `--quick`, or 0.
        dataflow: what the faulty kernel declares.
        exchange: for a protocol fault, the strategy whose exchange it replaces, where the class does not say.
        note: how the re-creation differs from the original, such as a limit that was scaled down.
        quantiser: the one that is faulty; empty: the first op of the suite.
        rules: the name of the arithmetic that it declares, of those known for the quantiser. In the file, one entry
            stands for several: its table `quantisers` has the rules by quantiser.
    """

    id: str
    title: str
    project: str
    links: tuple[str, ...]
    group: str
    does: str
    hook: str
    patch: str
    visible: str
    stage: str
    rank: int = 0
    dataflow: str = "trtllm"
    exchange: str = ""
    note: str = ""
    quantiser: str = ""
    rules: str = ""

    @property
    def right(self) -> str:
        """The kernel without the fault, as a backend."""
        return f"fusecheck.faults.backend:right-{self.id}" if self.quantiser else f"emulated:{self.dataflow}"

    @property
    def flow(self) -> Dataflow:
        """What both of them declare."""
        flow = DATAFLOWS[self.dataflow]
        if not self.quantiser:
            return flow
        return replace(flow, quants=((self.quantiser, known_flows(self.quantiser)[self.rules]),))

    @property
    def subject(self) -> str:
        """What the fault is in, by its hook: `kernel`, `pass`, `pair` (of evaluation runs) or `judge`."""
        owner = self.hook.partition(".")[0]
        if owner in HOOKS:
            return "kernel" if owner in KERNEL_HOOKS else "pass"
        return "judge" if self.group == "suite" else "pair"


@dataclass(frozen=True)
class LeftOut:
    """A published bug that is not re-created, and why."""

    id: str
    title: str
    links: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Catalogue:
    """All entries, in the order of the file."""

    faults: tuple[Fault, ...]
    left_out: tuple[LeftOut, ...]

    def fault(self, name: str) -> Fault:
        """The fault of this id, in any case of letters.

        Raises:
            UsageError: there is none; the nearest ids are suggested.
        """
        known = {fault.id.upper(): fault for fault in self.faults}
        if name.upper() in known:
            return known[name.upper()]
        plain = {_plain(key): fault.id for key, fault in known.items()}
        near = [plain[key] for key in difflib.get_close_matches(_plain(name.upper()), plain, n=3, cutoff=0.4)]
        near = near or list(plain.values())[:3]
        raise UsageError(f"unknown fault {name!r}, did you mean {', '.join(near)}? (`fusecheck faults --list` has all)")

    def select(self, groups: Sequence[str] = (), ids: Sequence[str] = (), *, quick: bool = False) -> list[Fault]:
        """The faults of some groups or ids; all when nothing is asked for; `quick` keeps one of each ranked kind.

        Raises:
            UsageError: an unknown group or id.
        """
        for group in groups:
            if group not in GROUPS:
                raise UsageError(f"unknown group {group!r}, expected one of: {', '.join(GROUPS)}")
        if ids:
            return [self.fault(name) for name in ids]
        ranked = {fault.rank: fault.id for fault in reversed(self.faults) if fault.rank}
        wanted = [fault for fault in self.faults if not groups or fault.group in groups]
        return [fault for fault in wanted if not quick or ranked.get(fault.rank) == fault.id]


@cache
def catalogue() -> Catalogue:
    """The catalogue that comes with Fusecheck, every entry checked."""
    parts = [load(path) for path in sorted(PATH.glob("catalogue_*.toml"))]
    faults = tuple(fault for part in parts for fault in part.faults)
    _unique([fault.id for fault in faults], "the catalogue")
    order = sorted(faults, key=lambda fault: GROUPS.index(fault.group))
    return Catalogue(tuple(order), tuple(entry for part in parts for entry in part.left_out))


@cache
def kernel_faults() -> dict[str, Fault]:
    """The faults of kernels by id, as rank processes look them up: what they patch is not imported."""
    entries = [entry for path in sorted(PATH.glob("catalogue_*.toml")) for entry in _entries(path, "fault", Fault)]
    return {fault.id: fault for fault in entries if fault.subject == "kernel"}


def load(path: Path) -> Catalogue:
    """Read and check one file of the catalogue.

    Raises:
        UsageError: an entry that lacks a field, a source or its hook; file and line are named.
    """
    faults, left_out = _entries(path, "fault", Fault), _entries(path, "left_out", LeftOut)
    for fault, (_, line) in zip(faults, _records(path, "fault"), strict=True):
        wrong = defect(fault)
        if wrong:
            raise UsageError(f"{path.name}:{line}: fault {fault.id}: {wrong}")
    _unique([fault.id for fault in faults], path.name)
    return Catalogue(tuple(faults), tuple(left_out))


def defect(fault: Fault) -> str:
    """What is wrong with an entry, in one clause; empty where nothing is."""
    if not fault.links or not all(link.startswith("https://") for link in fault.links):
        return f"links={list(fault.links)}, expected at least one https:// source"
    if fault.group not in GROUPS:
        return f"group={fault.group!r}, expected one of: {', '.join(GROUPS)}"
    if fault.dataflow not in DATAFLOWS:
        return f"dataflow={fault.dataflow!r}, expected one of: {', '.join(DATAFLOWS)}"
    if fault.quantiser and fault.rules not in (known := known_flows(fault.quantiser)):
        return f"rules={fault.rules!r} of {fault.quantiser!r}, expected one of: {', '.join(known)}"
    wanted = {"graph": "pass", "accuracy": "", "suite": "judge"}.get(fault.group, "kernel")
    if wanted and fault.subject != wanted:
        return f"hook={fault.hook!r}, expected a hook of a {wanted} in the group {fault.group}"
    return _patch_defect(fault) if fault.hook.partition(".")[0] in HOOKS else _function_defect(fault)


def resolve(target: str) -> Any:
    """Import `package.module:attribute`.

    Raises:
        ImportError: there is no such module or attribute.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"{target!r} cannot be loaded ({error})") from None


def _patch_defect(fault: Fault) -> str:
    owner, _, method = fault.hook.partition(".")
    if owner not in HOOKS or not callable(getattr(resolve(f"{HOOKS[owner]}:{owner}"), method, None)):
        return f"hook={fault.hook!r}, expected a method of {', '.join(HOOKS)}"
    try:
        patch = resolve(fault.patch)
    except ImportError as error:
        return f"patch: {error}"
    base = resolve(f"{HOOKS[owner]}:{owner}")
    if not (isinstance(patch, type) and issubclass(patch, base)):
        return f"patch={fault.patch!r}, expected a subclass of {owner}"
    if getattr(patch, method) is getattr(base, method):
        return f"patch={fault.patch!r} does not override its hook {fault.hook}"
    return ""


def _function_defect(fault: Fault) -> str:
    try:
        hook, patch = resolve(fault.hook), resolve(fault.patch)
    except ImportError as error:
        return f"hook or patch: {error}"
    return (
        "" if callable(hook) and callable(patch) else f"hook={fault.hook!r}, patch={fault.patch!r}: expected callables"
    )


def _entries(path: Path, key: str, kind: type[T]) -> list[T]:
    made = []
    for record, line in _records(path, key):
        known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
        missing = [n for n, f in known.items() if f.default is MISSING and not record.get(n)]
        unknown = [n for n in record if n not in known]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has an unknown field {unknown[0]!r}"
            raise UsageError(f"{path.name}:{line}: {key} {record.get('id', '?')} {what}")
        record = {n: tuple(v) if isinstance(v, list) else v for n, v in record.items()}
        made.append(kind(**record))
    return made


def _records(path: Path, key: str) -> list[tuple[dict[str, Any], int]]:
    """The entries with the lines on which they begin; one that stands for several quantisers is several."""
    found: list[tuple[dict[str, Any], int]] = []
    for record, line in zip(toml.read(path).get(key, []), _lines(path, key), strict=True):
        name, several = record.get("id", "?"), record.pop("quantisers", {})
        each = [record | {"id": f"{name}-{quant}", "quantiser": quant, "rules": r} for quant, r in several.items()]
        found += [(one, line) for one in each or [record]]
    return found


def _lines(path: Path, key: str) -> list[int]:
    """The line on which each entry begins."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, start=1) if line.split("#")[0].strip() == f"[[{key}]]"]


def _plain(name: str) -> str:
    """An id without leading zeros."""
    return re.sub(r"-0+", "-", name)


def _unique(ids: Sequence[str], where: str) -> None:
    twice = {name for name in ids if ids.count(name) > 1}
    if twice:
        raise UsageError(f"{where}: fault {min(twice)} is there twice")
