"""`assert_fusion_preserves`: a graph before and after a pass, run on the same inputs, compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.testing.conformity import NotConforming


def assert_fusion_preserves(
    before: Callable[..., Any], after: Callable[..., Any], inputs: Iterable[Sequence[Any]]
) -> int:
    """Demand that a rewritten graph returns what the graph that it was made from returns.

    Outputs are compared in dtype, shape and bits, NaN equal to NaN; so are the inputs after the run, since a pass must
    neither add nor drop a write to them. Give both graphs ops that round alike; a kernel that may round elsewhere is
    judged by `assert_conforms`, and a pass on models of its own by `fusecheck graph`.

    Args:
        before: the graph before the pass, a `GraphModule` or any callable.
        after: the graph after it.
        inputs: tuples of arguments; give several, with different token counts and values.

    Returns:
        How many elements were compared.

    Raises:
        NotConforming: the first element that differs.
        UsageError: there are no inputs, or the graphs return no tensor.
    """
    __tracebackhide__ = True
    compared = number = 0
    for number, arguments in enumerate(inputs, 1):
        ran = [_run(graph, arguments) for graph in (before, after)]
        for kind in ("output", "input after the run"):
            ours, theirs = (each[kind] for each in ran)
            if len(ours) != len(theirs):
                raise NotConforming(f"inputs {number}: {len(theirs)} {kind}s after the pass, {len(ours)} before it")
            for index, (old, new) in enumerate(zip(ours, theirs, strict=True)):
                _compare(f"inputs {number}: {kind} {index}", old, new)
            compared += sum(tensor.numel() for tensor in ours) if kind == "output" else 0
    if not number:
        raise UsageError("inputs is empty, expected at least one tuple of arguments")
    if not compared:
        raise UsageError("the graphs returned no element, so nothing was compared; give graphs that return tensors")
    return compared


def _run(graph: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, list[Tensor]]:
    own = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    returned = graph(*own)
    every = returned if isinstance(returned, (tuple, list)) else (returned,)
    return {"output": _tensors(every), "input after the run": _tensors(own)}


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value.detach() for value in values if isinstance(value, Tensor)]


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
    found = tensor.contiguous().reshape(-1, 1).view(torch.uint8)
    if not tensor.is_floating_point():
        return found
    return found.masked_fill(tensor.to(torch.float32).isnan().reshape(-1, 1), 0xFF)
