"""Lay out the import package `fusecheck` as links to the folders of this checkout.

    python ci/links.py OUT       then PYTHONPATH=OUT, where nothing can be installed
    python ci/links.py --mypy    check the types: mypy finds packages by folders alone, not through an editable install

Standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = "verify"
"""The folder whose files lie directly in the package."""
PARTS = ("eval", "golden", "property_tests")
CACHE = ROOT / ".mypy_cache" / "links"


def lay(out: Path) -> Path:
    """Make `out/fusecheck` anew, of one link for each file and folder; returns it.

    Raises:
        FileExistsError: `out/fusecheck` is something else than a layout of links.
    """
    package = out / "fusecheck"
    if package.is_symlink() or (package.exists() and not all(entry.is_symlink() for entry in package.iterdir())):
        raise FileExistsError(f"{package} is not a folder of links: give another place")
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for entry in [*sorted((ROOT / CORE).iterdir()), *(ROOT / part for part in PARTS)]:
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    return package


def check_types(arguments: list[str]) -> int:
    """Run mypy over the package; its messages name the files of the checkout. Returns its exit code."""
    package = lay(CACHE)
    command = [sys.executable, "-m", "mypy", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MYPYPATH": str(CACHE)}, capture_output=True, text=True, check=False
    )
    shown = done.stdout
    for part in PARTS:
        shown = shown.replace(f"{(package / part).relative_to(ROOT)}/", f"{part}/")
    sys.stdout.write(shown.replace(f"{package.relative_to(ROOT)}/", f"{CORE}/"))
    sys.stderr.write(done.stderr)
    return done.returncode


def main(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    if arguments[:1] == ["--mypy"]:
        return check_types(arguments[1:])
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: ci/links.py OUT, or ci/links.py --mypy [ARGUMENTS OF MYPY]", file=sys.stderr)
        return 2
    try:
        print(lay(Path(arguments[0]).resolve()).parent)
    except FileExistsError as refused:
        print(refused, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
