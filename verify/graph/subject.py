"""The pass under test: found by name, called in the way it wants, held to returning a graph."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecheck.errors import UsageError
from fusecheck.graph.config import FAMILY_PASS, FINALIZE_PASS, NORM_PASS, QUANT_PASSES, SharedConfig
from fusecheck.plugins import plug_in

NAMED = {
    name: f"fusecheck.graph.passes:{name}" for name in (NORM_PASS, *QUANT_PASSES.values(), FINALIZE_PASS, FAMILY_PASS)
}
"""Fusecheck's own transforms by their short names."""


class PassError(Exception):
    """A pass raised, or returned something that is not a graph; the message says which.

    Attributes:
        where: file, line and function in which it raised; empty where it returned.
        node: the nodes that it had in hand there.
        trace: the whole traceback.
    """

    where = node = trace = ""

    @classmethod
    def raised(cls, error: BaseException) -> PassError:
        """What a pass raised, and the place in its own code: the last frame that is not torch's or Python's."""
        told = " ".join(f"{type(error).__name__}: {error}".split())
        frames = [frame for frame in traceback.walk_tb(error.__traceback__) if _is_users(frame[0].f_code.co_filename)]
        made = cls(f"the pass raised {told[:400]}")
        made.trace = "".join(traceback.format_exception(error))
        if frames:
            frame, line = frames[-1]
            made.where = f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
            made.node = ", ".join(f"{name}={held}" for name, held in frame.f_locals.items() if isinstance(held, Node))
            at = f" at node {made.node}" if made.node else ""
            made.args = (f"the pass raised {told[:400]}{at} ({made.where})",)
        return made


_LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"] + "/", __file__)


def _is_users(file: str) -> bool:
    inside = "site-packages" in file or "dist-packages" in file
    return not file.startswith(_LIBRARIES[0]) and file != __file__ and (inside or not file.startswith(_LIBRARIES[1]))


def load_pass(name: str) -> Callable[..., Any]:
    """Find a pass by `package.module:function` or by the short name of one of Fusecheck's own.

    Raises:
        UsageError: it cannot be imported or is not callable.
    """
    module, _, path = NAMED.get(name, name).partition(":")
    if not path:
        raise UsageError(f"pass {name!r}: expected package.module:function, or one of {', '.join(NAMED)}")
    try:
        found: Any = plug_in(module)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"pass {name!r}: importing {module} raised {told}; mend or install it") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"pass {name!r}: {module} has no attribute {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"pass {name!r} is a {type(found).__name__}, expected a function of a GraphModule")
    return found  # type: ignore[no-any-return]


def apply_pass(function: Callable[..., Any], gm: GraphModule, shared: SharedConfig) -> GraphModule:
    """Call a pass with the graph, and with what the ranks share if it takes two arguments.

    It may rewrite in place and return None or a count, or return a graph, alone or first in a tuple.

    Raises:
        PassError: it raised, or what it returned is none of these.
    """
    try:
        result = function(gm, shared) if _takes_shared(function) else function(gm)
    except Exception as error:
        raise PassError.raised(error) from error
    if isinstance(result, tuple) and result:
        result = result[0]
    if result is None or isinstance(result, int):
        return gm
    if not isinstance(result, GraphModule):
        raise PassError(f"the pass returned a {type(result).__name__}, expected a GraphModule or None")
    return result


def _takes_shared(function: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # built-in functions may have no signature
        return False
    return sum(each.kind in kinds and each.default is each.empty for each in parameters) > 1
