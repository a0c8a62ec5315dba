"""Fake tensors for graphs' meta values, remembered: the graphs of a run are made of few operators on few shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


class Fakes:
    """A fake mode, and what was asked of it: the same call on the same fake tensors gets the same result, remembered.

    Graphs of one process share it, and so the symbol of an open token count. What a pass asks of that symbol may
    specialise it for good: `spoiled` says so, and the next graph then gets a mode of its own.
    """

    def __init__(self) -> None:
        # Not a subclass of the mode: higher-order operators look their rules up by its very type.
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self._forms: dict[Any, Tensor] = {}
        self._results: dict[Any, Any] = {}
        # A result is remembered by the identity of its arguments, so these are kept alive here.
        self._known: dict[int, Tensor] = {}

    def from_form(self, tensor: Tensor, open_dimension: int | None = None) -> Tensor:
        """The fake of a tensor; equal for equal dtype, shape, strides and device."""
        form = (tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device), open_dimension)
        if form not in self._forms:
            options: dict[str, Any] = {"static_shapes": True}
            if open_dimension is not None:
                sizes = [DimDynamic.STATIC] * tensor.dim()
                sizes[open_dimension] = DimDynamic.DYNAMIC
                context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
                options = {"symbolic_context": context}
            # Of a copy: a fake of the tensor itself would keep its storage from being told apart.
            self._forms[form] = self._keep(self.mode.from_tensor(torch.empty_like(tensor), **options))
        return self._forms[form]

    def result(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the operator returns for these fake tensors."""
        key = self._key(target, args, kwargs)
        if key is None:
            with self.mode:
                return target(*args, **kwargs)
        if key not in self._results:
            with self.mode:
                made = target(*args, **kwargs)
            for each in _tensors(made):
                self._keep(each)
            self._results[key] = made
        return self._results[key]

    @property
    def spoiled(self) -> bool:
        """Whether the open token count was specialised or guarded on."""
        env: Any = self.mode.shape_env
        return bool(env.guards or env.replacements)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._known[id(tensor)] = tensor
        return tensor

    def _key(self, *parts: Any) -> Any:
        """Something hashable that stands for a call, or None where it cannot be remembered."""
        if any(id(each) not in self._known for each in _tensors(parts)):
            return None
        try:
            key = _frozen(parts)
            hash(key)
        except TypeError:  # a symbolic number
            return None
        return key


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", id(value))
    if isinstance(value, tuple | list):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(each)) for name, each in sorted(value.items()))
    return (type(value), value)


_shared: list[Fakes] = []
_known: weakref.WeakKeyDictionary[FakeTensorMode, Fakes] = weakref.WeakKeyDictionary()


def shared_fakes() -> Fakes:
    """Those that this process's graphs share; others after a pass has spoiled them."""
    if not _shared or _shared[-1].spoiled:
        _shared[:] = [Fakes()]
        _known[_shared[-1].mode] = _shared[-1]
    return _shared[-1]


def fakes_of(mode: object) -> Fakes | None:
    """What is remembered of a mode, None for one that is not shared."""
    return _known.get(mode) if isinstance(mode, FakeTensorMode) else None
