"""Fake tensors for graphs' meta values, remembered: the graphs of a run are made of few operators on few shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

OPEN_SIZE = 6
"""The example behind every open token count, so that graphs of different examples share their symbol."""


class Fakes:
    """A fake mode, and what was asked of it: equal calls on equal fake tensors get one result, remembered.

    There is one fake of each dtype, shape, strides and device, so that graphs which differ in their order of calls
    still ask the same. Graphs of one process share it, and so the symbol of an open token count. What a pass asks of
    that symbol may specialise it for good: `spoiled` says so, and the next graph then gets a mode of its own.
    """

    def __init__(self) -> None:
        # Not a subclass of the mode: higher-order operators look their rules up by its very type.
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        # torch remembers as well, at a third of what a call costs; what is asked here is asked once.
        self.mode.cache_enabled = False
        self._forms: dict[Any, Tensor] = {}
        self._results: dict[Any, Any] = {}
        self._canonical: dict[Any, Tensor] = {}
        # A result is remembered by the identity of its arguments, so these are kept alive here.
        self._known: dict[int, Tensor] = {}

    def from_form(self, tensor: Tensor, open_dimension: int | None = None) -> Tensor:
        """The fake of a tensor; equal for equal dtype, shape, strides and device."""
        # Of a copy: a fake of the tensor itself would keep its storage from being told apart.
        like = torch.empty_like(tensor)
        options: dict[str, Any] = {"static_shapes": True}
        if open_dimension is not None:
            shape = [OPEN_SIZE if at == open_dimension else size for at, size in enumerate(tensor.shape)]
            like = tensor.new_empty(shape)
            sizes = [DimDynamic.STATIC] * tensor.dim()
            sizes[open_dimension] = DimDynamic.DYNAMIC
            context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
            options = {"symbolic_context": context}
        form = (*_form(like), open_dimension)
        if form not in self._forms:
            self._forms[form] = self._keep(self.mode.from_tensor(like, **options))
        return self._forms[form]

    def result(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the operator returns for these fake tensors."""
        key = self._key(target, args, kwargs)
        if key is not None and key in self._results:
            return self._results[key]
        with self.mode:
            made = target(*args, **kwargs)
        if key is None:
            return made
        self._results[key] = made = _mapped(made, self._keep)
        return made

    @property
    def spoiled(self) -> bool:
        """Whether the open token count was specialised or guarded on."""
        env: Any = self.mode.shape_env
        return bool(env.guards or env.replacements)

    def _keep(self, tensor: Tensor) -> Tensor:
        """The one fake of this form."""
        kept = self._canonical.setdefault(_form(tensor), tensor)
        self._known[id(kept)] = kept
        return kept

    def _key(self, *parts: Any) -> Any:
        """Something hashable that stands for a call, or None where it cannot be remembered."""
        tensors: list[Tensor] = []
        _mapped(parts, tensors.append)
        if any(id(each) not in self._known for each in tensors):
            return None
        try:
            key = _frozen(parts)
            hash(key)
        except TypeError:  # an argument that nobody can compare
            return None
        return key


def _form(tensor: Tensor) -> Any:
    """What tells fakes apart; open sizes by their expression."""
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (tensor.dtype, tensor.dim(), tuple(map(_frozen, sizes)), str(tensor.device))


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with something else in the place of each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_mapped(each, change) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(each, change) for name, each in value.items()}
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", id(value))
    if isinstance(value, torch.SymInt):
        return ("open", value.node.expr)
    if isinstance(value, tuple | list):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(each)) for name, each in sorted(value.items()))
    # No number such as an eps decides a dtype or a shape.
    return float if isinstance(value, float) else (type(value), value)


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
