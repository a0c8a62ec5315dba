"""The pass under test: found by name, called in the way it wants, held to returning a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule

from fusecheck.errors import UsageError
from fusecheck.graph.config import NORM_PASS, QUANT_PASS, SharedConfig
from fusecheck.graph.dialect import FUSECHECK, Dialect
from fusecheck.plugins import plug_in

NAMED = {
    NORM_PASS: f"fusecheck.graph.passes:{NORM_PASS}",
    QUANT_PASS: f"fusecheck.graph.passes:{QUANT_PASS}",
}
"""Fusecheck's own transforms by their short names."""


class PassError(Exception):
    """A pass raised, or returned something that is not a graph; the message says which."""


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


def apply_pass(
    function: Callable[..., Any], gm: GraphModule, shared: SharedConfig, dialect: Dialect = FUSECHECK
) -> GraphModule:
    """Call a pass with the graph, with what the ranks share if it takes two arguments, and with `dialect=` if it can.

    It may rewrite in place and return None or a count, or return a graph, alone or first in a tuple.

    Raises:
        PassError: it raised, or what it returned is none of these.
    """
    try:
        options = {"dialect": dialect} if "dialect" in _parameters(function) else {}
        result = function(gm, shared, **options) if _takes_shared(function) else function(gm, **options)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise PassError(f"the pass raised {told[:400]}") from error
    if isinstance(result, tuple) and result:
        result = result[0]
    if result is None or isinstance(result, int):
        return gm
    if not isinstance(result, GraphModule):
        raise PassError(f"the pass returned a {type(result).__name__}, expected a GraphModule or None")
    return result


def _takes_shared(function: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [each for name, each in _parameters(function).items() if name != "dialect"]
    return sum(each.kind in kinds for each in named) > 1


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # built-in functions may have no signature
        return {}
