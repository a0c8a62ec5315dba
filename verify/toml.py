"""Read TOML files, on every supported Python."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from fusecheck.errors import UsageError


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: it cannot be read, or is not TOML; the message has the file, and the line where there is one.
    """
    parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        document: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({error}), expected a TOML file") from None
    except parser.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    return document
