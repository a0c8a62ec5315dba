"""`assert_fusion_preserves`: a graph before and after a pass, run on the same inputs, compared bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusecheck.errors import UsageError
from fusecheck.testing.conformity import NotConforming

PLAIN = (int, str, type(None))
"""Of these values it is known when two are the same."""


def assert_fusion_preserves(
    before: Callable[..., Any], after: Callable[..., Any], inputs: Iterable[Sequence[Any]]
) -> int:
    """Demand that a rewritten graph returns what the graph that it was made from returns.

    Outputs are compared in dtype, shape and bits, NaN equal to NaN; so are the inputs after the run, and the buffers
    and parameters that either graph wrote, since a pass must neither add nor drop a write to them. Inputs and outputs
    may lie in lists, tuples and dicts. Every run begins with the inputs and the module as they were given. Give both
    graphs ops that round alike; a kernel that may round elsewhere is judged by `assert_conforms`, and a pass on models
    of its own by `fusecheck graph`.

    Args:
        before: the graph before the pass, a `GraphModule` or any callable.
        after: the graph after it; it may share its tensors with the other.
        inputs: tuples of arguments; give several, with different token counts and values.

    Returns:
        How many elements of outputs were compared.

    Raises:
        NotConforming: the first element that differs.
        UsageError: a graph that cannot be called, no inputs or none of this form, or graphs that return no tensor.
    """
    __tracebackhide__ = True
    for name, graph in (("before", before), ("after", after)):
        if not callable(graph):
            raise UsageError(f"{name} is {type(graph).__name__}, expected a GraphModule or a function")
    compared = number = 0
    for number, arguments in enumerate(inputs if isinstance(inputs, Iterable) else (), 1):
        if not isinstance(arguments, (tuple, list)):
            raise UsageError(f"inputs {number} is {type(arguments).__name__}, expected a tuple of arguments")
        old, new = (_run(graph, arguments) for graph in (before, after))
        for kind in ("output", "input after the run"):
            _compare_all(f"inputs {number}: ", old.of(kind), new.of(kind), kind)
        written = {name: value for name, value in old.state.items() if name in old.written | new.written}
        _compare_all(f"inputs {number}: ", written, {name: new.state.get(name) for name in written}, "buffer")
        compared += sum(leaf.numel() for leaf in old.of("output").values() if isinstance(leaf, Tensor))
    if not number:
        raise UsageError("inputs is empty, expected at least one tuple of arguments")
    if not compared:
        raise UsageError("the graphs returned no element, so nothing was compared; give graphs that return tensors")
    return compared


@dataclass(frozen=True)
class _Run:
    """What a run returned, and left behind.

    Attributes:
        returned: as it was returned; a lone value as a tuple.
        arguments: after the run.
        state: parameters and buffers of a module after the run, by name.
        written: the names of those that the run changed.
    """

    returned: Any
    arguments: Any
    state: dict[str, Tensor]
    written: set[str]

    def of(self, kind: str) -> dict[str, Any]:
        """The outputs or the inputs, however deep they lie, each by its place."""
        found, _ = pytree.tree_flatten_with_path(self.returned if kind == "output" else self.arguments)
        return {f"{kind} {'.'.join(map(_key, path))}": leaf for path, leaf in found}


def _key(key: Any) -> str:
    return next(str(getattr(key, name)) for name in ("idx", "key", "name") if hasattr(key, name))


def _run(graph: Callable[..., Any], arguments: Sequence[Any]) -> _Run:
    leaves, form = pytree.tree_flatten(tuple(arguments))
    # Tensors that share memory share it in the copy, too.
    copies = iter(copy.deepcopy([leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]))
    own = pytree.tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)
    held = {**dict(graph.named_parameters()), **dict(graph.named_buffers())} if isinstance(graph, nn.Module) else {}
    kept = {name: tensor.detach().clone() for name, tensor in held.items()}
    returned = graph(*own)
    written = {name for name, tensor in held.items() if not torch.equal(_bytes(tensor), _bytes(kept[name]))}
    state = kept | {name: held[name].detach().clone() for name in written}
    returned = returned if isinstance(returned, (tuple, list, dict)) else (returned,)
    returned = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, returned)
    for name in written:
        held[name].detach().copy_(kept[name])
    return _Run(returned, own, state, written)


def _compare_all(where: str, old: dict[str, Any], new: dict[str, Any], kind: str) -> None:
    """Hold values by their names against each other: tensors by their bits, whatever else by equality."""
    if len(old) != len(new):
        raise NotConforming(f"{where}{len(new)} {kind}s after the pass, {len(old)} before it")
    if missing := [name for name in old if name not in new]:
        raise NotConforming(f"{where}{missing[0]} is there before the pass, and not after it")
    for name, left in old.items():
        right, place = new[name], f"{where}{name if kind != 'buffer' else f'buffer {name}'}"
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            _compare(place, left, right)
        elif isinstance(left, Tensor) or isinstance(right, Tensor) or (isinstance(left, PLAIN) and left != right):
            raise NotConforming(f"{place} is {_told(right)}, before the pass {_told(left)}")


def _told(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _compare(where: str, old: Tensor, new: Tensor) -> None:
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        raise NotConforming(f"{where} is {new.dtype} {list(new.shape)}, before the pass {old.dtype} {list(old.shape)}")
    left, right = _bytes(old), _bytes(new)
    unequal = (left != right).any(-1)
    if not bool(unequal.any()):
        return
    place = int(torch.nonzero(unequal)[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), old.shape)]
    got, wanted = (bytes(each[place].tolist())[::-1].hex() for each in (right, left))
    count = f"{int(unequal.sum())} of {old.numel()} elements"
    raise NotConforming(f"{where} element{index} got 0x{got}, before the pass 0x{wanted} ({count})")


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of each element, [n, itemsize], every NaN the same one."""
    found = tensor.detach().contiguous().reshape(-1, 1).view(torch.uint8)
    if not tensor.is_floating_point():
        return found
    return found.masked_fill(tensor.to(torch.float32).isnan().reshape(-1, 1), 0xFF)
