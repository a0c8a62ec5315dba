"""The kernels under test: one file each, found by name, by entry point, or by `package.module:attribute`."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from fusecheck.backends.checked import CheckedBackend, calling
from fusecheck.backends.packages import is_installed
from fusecheck.errors import UsageError
from fusecheck.interface import Backend
from fusecheck.plugins import plug_in

ENTRY_POINTS = "fusecheck.backends"
"""The entry-point group by which an installed package offers its kernels."""

BUILT_IN = {
    "emulated": "fusecheck.backends.emulated:EmulatedBackend",
    "unfused": "fusecheck.backends.unfused:UnfusedBackend",
    "flashinfer": "fusecheck.backends.flashinfer:FlashInferBackend",
    "flashinfer-norm": "fusecheck.backends.flashinfer_norm:FlashInferNormBackend",
    "tokenspeed": "fusecheck.backends.tokenspeed:TokenSpeedBackend",
    "vllm": "fusecheck.backends.vllm:VllmBackend",
    "sglang": "fusecheck.backends.sglang:SglangBackend",
    "torch-symm": "fusecheck.backends.torch_symm:TorchSymmBackend",
    "tensorrt_llm": "fusecheck.backends.tensorrt_llm:TensorRTLLMBackend",
}

SHIPPED = {
    "flashinfer": ("flashinfer", "flashinfer:fp32,pdl"),
    "tokenspeed_kernel": ("tokenspeed",),
    "vllm": ("vllm",),
    "sgl_kernel": ("sglang",),
    "tensorrt_llm": ("tensorrt_llm",),
}
"""The import packages that bring a fused kernel, and how it is asked for: FlashInfer with both accumulations."""

METHODS = ("supports", "dataflow", "open")


def backends() -> dict[str, str]:
    """The known backends: name to `module:attribute`, built-in ones first. Imports none of them.

    Raises:
        UsageError: a plug-in takes the name of a built-in backend.
    """
    plug_ins = _plug_ins()
    for name in BUILT_IN.keys() & plug_ins.keys():
        raise UsageError(
            f"plug-in {plug_ins[name]} takes the name of the built-in backend {name!r}: rename its entry point"
        )
    return BUILT_IN | plug_ins


def backend(name: str) -> Backend:
    """Load the backend called `name`.

    Args:
        name: a name of `backends()`; one followed by a variant (`emulated:flashinfer-fp32`), which the
            backend's class receives; or `package.module:attribute` of a plug-in. The attribute is a
            Backend, or a class or function that makes one.

    Raises:
        UsageError: the name is unknown, the plug-in cannot be imported, or lacks part of the interface.
    """
    head, _, variant = name.partition(":")
    # Reading every package's metadata takes milliseconds: not for a built-in backend.
    known = BUILT_IN if head in BUILT_IN else backends()
    if head in known:
        return _make(name, _attribute(name, known[head]), variant)
    near = difflib.get_close_matches(head, known, n=2, cutoff=0.6)
    if variant and (not near or "." in head):
        return _make(name, _attribute(name, name), "")
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of: {', '.join(known)}"
    raise UsageError(f"unknown backend {name!r}, {hint} (or package.module:attribute)")


def target(name: str) -> str:
    """Where a plug-in's name is found, as `module:attribute`; empty for what is built in, or is no name."""
    head = name.partition(":")[0]
    return "" if head in BUILT_IN else _plug_ins().get(head, "")


def device_of(name: str) -> str:
    """Where the backend called `name` runs: `cpu`, unless it says otherwise.

    Raises:
        UsageError: as `backend`.
    """
    return str(getattr(backend(name), "device", "cpu"))


def shipped() -> list[str]:
    """The names of the kernels for GPUs that installed packages bring: the known ones, then plug-ins' of `cuda`.

    A plug-in that cannot be loaded is among them: whoever asks it is told why, and the others are asked all the same.
    """
    known = [name for package, names in SHIPPED.items() if is_installed(package) for name in names]
    return known + [name for name in backends() if name not in BUILT_IN and _may_need_gpus(name)]


def _may_need_gpus(name: str) -> bool:
    try:
        return device_of(name) == "cuda"
    except UsageError:
        return True


@functools.cache
def _plug_ins() -> dict[str, str]:
    """Entry points of installed packages, by name."""
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return {point.name: point.value for point in points}


def _attribute(name: str, target: str) -> Any:
    module, _, path = target.partition(":")
    try:
        found = plug_in(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"backend {name!r}: importing {module!r} raised {_told(error)}; mend or install it") from error
    try:
        return operator.attrgetter(path)(found)
    except AttributeError:
        raise UsageError(f"backend {name!r}: module {module!r} has no attribute {path!r}") from None


def _make(name: str, made: Any, variant: str) -> Backend:
    """Call a class or function to get the backend, and check that it has the interface."""
    if inspect.isclass(made) or inspect.isroutine(made):
        make: Callable[..., Any] = made
        _check_arguments(name, make, variant)
        try:
            with calling("making it", make):
                made = make(variant) if variant else make()
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"backend {name!r}: making it raised {_told(error)}") from error
    elif variant:
        raise UsageError(f"backend {name!r}: it has no variant {variant!r}")
    missing = [method for method in METHODS if not callable(getattr(made, method, None))]
    if not isinstance(getattr(made, "name", None), str):
        missing.insert(0, "name (a string)")
    if missing:
        raise UsageError(f"backend {name!r}: {type(made).__name__} lacks {', '.join(missing)}; see verify/interface.py")
    return CheckedBackend(made)


def _check_arguments(name: str, made: Callable[..., Any], variant: str) -> None:
    try:
        inspect.signature(made).bind(*([variant] if variant else []))
    except TypeError as error:
        told = f"has no variant {variant!r}" if variant else f"cannot be made without arguments ({error})"
        raise UsageError(f"backend {name!r}: {made.__name__} {told}") from None
    except ValueError:
        return  # a class written in C has no signature; calling it will tell


def _told(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
