"""What each library publishes of its operators, as data, and how an installation is held to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fusecheck import toml
from fusecheck.errors import UsageError

FILE = Path(__file__).with_name("schemas.toml")


@dataclass(frozen=True)
class Published:
    """An operator as its library publishes it.

    Attributes:
        role: what it is to a graph, by the name of Fusecheck's operator where there is one.
        name: `namespace::name`, or `namespace::name.overload`.
        schema: arguments and results.
        file: where that was read.
        required: no graph can do without it.
        unpublished: no release has it.
    """

    role: str
    name: str
    schema: str
    file: str
    required: bool = False
    unpublished: bool = False

    @property
    def overload(self) -> OpOverload | None:
        """The registered operator, None where there is none."""
        namespace, _, leaf = self.name.partition("::")
        name, _, overload = leaf.partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        return getattr(packet, overload or "default", None)

    @property
    def parsed(self) -> Any:
        """The schema as torch reads it."""
        return torch._C.parse_schema(self.name + self.schema)

    def check(self, overload: OpOverload) -> None:
        """Hold a registered operator to what is published: arguments by position and type, whatever their names.

        Raises:
            UsageError: it takes others.
        """
        have, known = overload._schema.arguments, self.parsed.arguments
        same = all(str(mine.type) == str(theirs.type) for mine, theirs in zip(have, known, strict=False))
        more = have[len(known) :] if len(have) > len(known) else known[len(have) :]
        if not same or not all(argument.has_default_value() for argument in more):
            took, knows = (", ".join(f"{each.type} {each.name}" for each in listed) for listed in (have, known))
            raise UsageError(
                f"operator {self.name} takes ({took}), expected ({knows}) as read in {self.file}; "
                f"use a release with that schema, or bring {FILE.name} up to date"
            )


@cache
def published(library: str) -> dict[str, Published]:
    """A library's operators by role."""
    entries = toml.read(FILE)[library]["operators"]
    return {role: Published(role, **entry) for role, entry in entries.items()}


def read_on(library: str) -> str:
    """The day on which the schemas of a library were read."""
    return str(toml.read(FILE)[library]["read"])


def installed(library: str, package: str) -> dict[str, OpOverload]:
    """The registered operators of a library by role, each held to what is published.

    Raises:
        UsageError: one that graphs need is missing, or one takes other arguments.
    """
    found: dict[str, OpOverload] = {}
    for role, entry in published(library).items():
        overload = entry.overload
        if overload is not None:
            entry.check(overload)
            found[role] = overload
        elif entry.required:
            raise UsageError(f"operator {entry.name} is not registered: install {package}, or use --dialect fusecheck")
    return found


def sums(library: str, gm: GraphModule) -> list[Node]:
    """A graph's calls of a library's sum over ranks; none where that is not registered."""
    overload = published(library)["all_reduce"].overload
    return [] if overload is None else [node for node in gm.graph.nodes if node.target == overload]
