"""Rows of log-probabilities of a bounded size: a large vocabulary is folded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CLASSES = 4096
"""Columns kept of a row of log-probabilities."""


def fold(table: Tensor) -> Tensor:
    """Fold rows of log-probabilities to `CLASSES` columns: the probabilities of tokens equal modulo it add up.

    By the data-processing inequality the KL of folded rows is a lower bound of the KL of the whole rows.

    Args:
        table: float32 [rows, vocabulary], on any device.

    Returns:
        float32 [rows, CLASSES]; `table` itself where the vocabulary is no larger.
    """
    rows, vocabulary = table.shape
    if vocabulary <= CLASSES:
        return table
    wide = functional.pad(table.double(), (0, -vocabulary % CLASSES), value=-torch.inf)
    return wide.view(rows, -1, CLASSES).logsumexp(1).float()
