"""The binaries of a kernel, by their hashes: a certificate holds for these, not for a version's name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

Binary: TypeAlias = "dict[str, str | int]"

MAPS = Path("/proc/self/maps")


def hashed(named: Sequence[str], maps: Path = MAPS) -> list[Binary]:
    """The binaries that a backend names, each with `file` (no path), `bytes` and `sha256`.

    Args:
        named: each a file, a folder (of a compiler's cache), or a part of the paths of shared objects that this process
            has loaded.
        maps: lists what it has loaded.
    """
    found = sorted({path for name in named for path in _files(name, maps)})
    return [_hashed(path) for path in found]


def _files(name: str, maps: Path) -> Iterator[Path]:
    path = Path(name)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (each for each in path.rglob("*") if each.is_file())
    elif maps.exists():
        for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
            loaded = line.split(maxsplit=5)[5:]
            if loaded and name in loaded[0] and ".so" in Path(loaded[0]).name and Path(loaded[0]).is_file():
                yield Path(loaded[0])


def _hashed(path: Path) -> Binary:
    whole = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            whole.update(block)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": whole.hexdigest()}
