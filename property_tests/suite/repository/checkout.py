"""Where the checkout is, and what git tracks in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""The top of the checkout; in an installed wheel merely the folder that holds the packages."""


def tracked_files() -> list[Path]:
    """Every file that git tracks and that exists, as absolute paths; all files where git does not work here."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return [path for path in sorted(ROOT.rglob("*")) if path.is_file() and not _is_generated(path)]
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def module_name(path: Path) -> str:
    """The name that a Python file of the checkout is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["fusecheck", *parts[1:]] if parts[0] == "verify" else ["fusecheck", *parts])


def python_files() -> list[Path]:
    """The tracked Python files."""
    return [path for path in tracked_files() if path.suffix == ".py"]


def _is_generated(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return any(
        part in {".git", ".venv", "runs", "build", "dist", "__pycache__"} or part.endswith("_cache") for part in parts
    )
