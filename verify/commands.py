"""The commands by name: each is imported when it is asked for, so that help and typos cost no torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup

from fusecheck.manual import add_examples

COMMANDS = {
    "kernel": ("fusecheck.kernel.command", "Does the kernel compute what it promises?"),
    "replay": ("fusecheck.kernel.command", "Run the case of a finding again."),
    "backends": ("fusecheck.backends.command", "List backends, dataflows and world sizes."),
    "judge": ("fusecheck.judge.command", "Judge calls that a test or a server wrote to files."),
    "verify": ("fusecheck.verify_command", "Ask every question that this machine can answer."),
    "report": ("fusecheck.report.command", "One page from one run or several."),
    "pace": ("fusecheck.kernel.pace", "How many cases a second are judged?"),
    "exhaust": ("fusecheck.exhaust", "Does the chip compute as its vendor documents?"),
    "latency": ("fusecheck.latency.command", "Where does it pay, and where does it cost?"),
    "golden": ("fusecheck.golden.command", "Record what a real kernel returns; check records."),
    "invariance": ("fusecheck.invariance.command", "Does a row depend on its company?"),
    "graph": ("fusecheck.graph.command", "Does a graph pass fuse what it must, and no more?"),
    "protocol": ("fusecheck.protocol.command", "Is the protocol between ranks right in every interleaving?"),
    "faults": ("fusecheck.faults.command", "Would Fusecheck notice if it were wrong?"),
    "accuracy": ("fusecheck.eval.command", "Does the model answer as before?"),
}
"""Each command's module, whose `register` adds it, and what it asks, in the words of the list of commands."""


class _Imported(MutableMapping[str, Any]):
    """Commands by name, imported on first use."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            holder = typer.Typer(rich_markup_mode=None)
            importlib.import_module(COMMANDS[name][0]).register(holder)
            add_examples(holder)
            self._found |= typer.main.get_group(holder).commands
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*COMMANDS, *self._found]))

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS or name in self._found

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __setitem__(self, name: str, command: Any) -> None:
        self._found[name] = command

    def __delitem__(self, name: str) -> None:
        del self._found[name]


class Commands(TyperGroup):
    """The group of all commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Imported()

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        """List the commands with what they ask."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, asks) for name, (_, asks) in COMMANDS.items()])
