"""The libraries by the name of their dialect."""

from __future__ import annotations

from torch.fx import GraphModule

from fusecheck.errors import UsageError
from fusecheck.graph import roles
from fusecheck.graph.autodeploy import AutoDeploy
from fusecheck.graph.library import Library
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.vllm import Vllm


class OwnLibrary:
    """Fusecheck's own operators; nothing is rewritten."""

    name = "fusecheck"

    def ready(self) -> None:
        """They are always there."""

    def status(self) -> str:
        """Nothing depends on the installation."""
        return ""

    def enter(self, gm: GraphModule) -> GraphModule:
        """See `Library.enter`."""
        return gm

    def leave(self, gm: GraphModule) -> GraphModule:
        """See `Library.leave`."""
        return gm

    def speaks(self, gm: GraphModule) -> bool:
        """See `Library.speaks`."""
        return any(roles.is_all_reduce(node) for node in gm.graph.nodes)

    def adapt(self, plan: GraphPlan) -> GraphPlan | str:
        """Every plan is one of its own."""
        return plan


LIBRARIES: dict[str, Library] = {library.name: library for library in (OwnLibrary(), AutoDeploy(), Vllm())}
NAMES = tuple(LIBRARIES)


def library_named(name: str) -> Library:
    """A library by name.

    Raises:
        UsageError: there is none.
    """
    if name not in LIBRARIES:
        raise UsageError(f"unknown dialect {name!r}, expected one of: {', '.join(NAMES)}")
    return LIBRARIES[name]
