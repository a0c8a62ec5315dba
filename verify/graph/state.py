"""torch's own settings around a pass: a compiler that leaves one changed changes the program that called it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]

SETTINGS: dict[str, Setting] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
}
"""What holds for the whole process, by name: how it is read, and how it is set."""


@contextmanager
def settings_kept() -> Iterator[list[str]]:
    """Put torch's settings back; the list then names, in words, those that were left changed."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    left: list[str] = []
    try:
        yield left
    finally:
        for name, (read, write) in SETTINGS.items():
            if (now := read()) != before[name]:
                left.append(f"{name} at {now}, it was {before[name]}")
                write(before[name])
