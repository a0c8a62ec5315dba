"""The kernels under test: one file each, found by name, by entry point, or by `package.module:attribute`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
from importlib.metadata import entry_points
from typing import Any

from verify.errors import UsageError
from verify.interface import Backend

ENTRY_POINTS = "fusecheck.backends"
"""The entry-point group by which an installed package offers its kernels."""

BUILT_IN = {
    "emulated": "verify.backends.emulated:EmulatedBackend",
    "unfused": "verify.backends.unfused:UnfusedBackend",
}

METHODS = ("supports", "dataflow", "open")


def backends() -> dict[str, str]:
    """The known backends: name to `module:attribute`, built-in ones first. Imports none of them.

    Raises:
        UsageError: a plug-in takes the name of a built-in backend.
    """
    found = dict(BUILT_IN)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        if point.name in BUILT_IN:
            raise UsageError(
                f"plug-in {point.value} takes the name of the built-in backend {point.name!r}: rename its entry point"
            )
        found[point.name] = point.value
    return found


def backend(name: str) -> Backend:
    """Load the backend called `name`.

    Args:
        name: a name of `backends()`; one followed by a variant (`emulated:flashinfer-fp32`), which the
            backend's class receives; or `package.module:attribute` of a plug-in. The attribute is a
            Backend, or a class or function that makes one.

    Raises:
        UsageError: the name is unknown, the plug-in cannot be imported, or lacks part of the interface.
    """
    known = backends()
    head, _, variant = name.partition(":")
    if head in known:
        return _make(name, _attribute(name, known[head]), variant)
    if variant and all(part.isidentifier() for part in head.split(".")) and (":" not in variant):
        return _make(name, _attribute(name, name), "")
    near = difflib.get_close_matches(head, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of: {', '.join(known)}"
    raise UsageError(f"unknown backend {name!r}, {hint} (or package.module:attribute)")


def _attribute(name: str, target: str) -> Any:
    module, _, path = target.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise UsageError(f"backend {name!r}: importing {module} raised {_told(error)}; mend or install it") from error
    try:
        return operator.attrgetter(path)(found)
    except AttributeError:
        raise UsageError(f"backend {name!r}: {module} has no attribute {path!r}") from None


def _make(name: str, made: Any, variant: str) -> Backend:
    """Call a class or function to get the backend, and check that it has the interface."""
    if inspect.isclass(made) or inspect.isroutine(made):
        try:
            made = made(variant) if variant else made()
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"backend {name!r}: making it raised {_told(error)}") from error
    elif variant:
        raise UsageError(f"backend {name!r}: it has no variants, leave out {':' + variant!r}")
    missing = [method for method in METHODS if not callable(getattr(made, method, None))]
    if not isinstance(getattr(made, "name", None), str):
        missing.insert(0, "name (a string)")
    if missing:
        raise UsageError(f"backend {name!r}: {type(made).__name__} lacks {', '.join(missing)}; see verify/interface.py")
    return made  # type: ignore[no-any-return]


def _told(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
