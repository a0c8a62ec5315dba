"""Stage `experts`: each rank's sum of expert outputs, which the ranks then exchange.

The terms are added in a named order and every operation is correctly rounded, so a rank's sum is one number, computed
here bit for bit (an interval would be useless: family of criteria, section 3.5). Reduction adds the tokens of each
expert, weighted; finalize gathers the rows of a token's routes from a permuted table, and skips a route of -1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.dataflow import ExpertFlow
from fusecheck.numerics.nominal import flush

EXPERT_TENSORS = ("tokens", "scale", "rows", "shared")
"""The tensors of `Experts`."""


@dataclass(frozen=True)
class Experts:
    """One rank's expert tensors; `scale` weighs the terms.

    Attributes:
        tokens: [experts, tokens, hidden] to be reduced, or [rows, hidden] to be gathered from; the activations' dtype.
        scale: [experts, tokens] float32, or [tokens, routes] in the activations' dtype.
        rows: int32 [tokens, routes], each a row of `tokens` or -1; None where nothing is gathered.
        shared: the shared expert's output, [tokens, hidden]; zeros on all ranks but one where it is replicated.
        routed_scaling: a factor of the routed experts' sum.
    """

    tokens: Tensor
    scale: Tensor
    rows: Tensor | None
    shared: Tensor | None
    routed_scaling: float = 1.0

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Experts:
        """The same experts with each tensor that is there changed; `change` gets its name, too."""
        tensors = {name: getattr(self, name) for name in EXPERT_TENSORS}
        changed: dict[str, Any] = {name: None if x is None else change(name, x) for name, x in tensors.items()}
        return replace(self, **changed)

    def terms(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Per term: what is weighed, [tokens, hidden], its weight, [tokens, 1], and where the route is missing."""
        if self.rows is None:
            return [(x, w[:, None], None) for x, w in zip(self.tokens, self.scale, strict=True)]
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for route in range(self.rows.shape[1]):
            row = self.rows[:, route].to(torch.int64)
            gathered = self.tokens[row.clamp(min=0)]
            found.append((gathered, self.scale[:, route, None], (row < 0)[:, None]))
        return found


def expert_sum(experts: Experts, flow: ExpertFlow) -> Tensor:
    """One rank's addend of the exchange, [tokens, hidden], in the activations' dtype."""
    native = experts.tokens.dtype
    kept = native if flow.accumulate == "native" else torch.float32
    total: Tensor | None = None
    for x, weight, missing in experts.terms():
        product = _settled(_settled(x, flow) * _settled(weight, flow), flow)
        product = product.to(native if flow.product_rounded else torch.float32).to(torch.float32)
        product = product if missing is None else product.masked_fill(missing, 0.0)
        added = product if total is None else total.to(torch.float32) + product
        total = (added if kept is native else _settled(added, flow)).to(kept)
    assert total is not None
    if flow.scaling == "after_experts" and experts.routed_scaling != 1.0:
        factor = torch.tensor(experts.routed_scaling, dtype=torch.float32)
        total = _settled(_settled(total, flow) * factor, flow).to(kept)
    if flow.shared and experts.shared is not None:
        total = _settled(_settled(total, flow) + _settled(experts.shared, flow), flow).to(kept)
    return total.to(native)


def _settled(x: Tensor, flow: ExpertFlow) -> Tensor:
    """An operand or a result in float32, without subnormals where the flow flushes them."""
    return flush(x.to(torch.float32)) if flow.flush else x.to(torch.float32)


WRONG = {
    "experts summed in float32": {"accumulate": "fp32", "product_rounded": False},
    "experts summed in the activations' dtype": {"accumulate": "native", "product_rounded": True},
    "routed scaling left out": {"scaling": "never"},
    "shared expert left out": {"shared": False},
}
"""Other ways to sum experts, by which a wrong sum is told from a wrong exchange."""
