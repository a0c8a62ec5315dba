"""A library's operators and passes: how a graph gets into its language and back, and which graphs it never holds.

Checks read one language, Fusecheck's operators. A library's pass reads its own. A graph enters the library before the
pass and leaves it after, node by node; what the pass made of it leaves with it.
"""

from __future__ import annotations

from typing import Protocol

from torch.fx import GraphModule

from fusecheck.graph.plan import GraphPlan


class Library(Protocol):
    """The side of a library that the checks need."""

    @property
    def name(self) -> str:
        """How `--dialect` calls it."""
        ...

    def ready(self) -> None:
        """Make its operators known.

        Raises:
            UsageError: an operator that graphs need is missing, or takes other arguments than are known.
        """
        ...

    def status(self) -> str:
        """What this installation allows, in one line."""
        ...

    def enter(self, gm: GraphModule) -> GraphModule:
        """A graph of Fusecheck's operators in the library's; the one that is given stays as it is."""
        ...

    def leave(self, gm: GraphModule) -> GraphModule:
        """A graph of the library's operators in Fusecheck's; the one that is given stays as it is.

        Raises:
            PassError: it calls one of them as nothing in Fusecheck's is called.
        """
        ...

    def speaks(self, gm: GraphModule) -> bool:
        """Whether a graph has the library's sum over ranks."""
        ...

    def adapt(self, plan: GraphPlan) -> GraphPlan | str:
        """The plan as this library would hold it, or why no such graph arises there."""
        ...
