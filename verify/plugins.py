"""Plug-ins by `package.module`: also from the folder one stands in, which hides nothing that is installed."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


def plug_in(module: str) -> ModuleType:
    """Import a plug-in's module. The current folder is searched last: an `eval/` or `torch/` in it shadows nothing.

    Raises:
        Exception: whatever the import raises.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(module)
