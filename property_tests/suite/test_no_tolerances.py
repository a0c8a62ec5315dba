"""The verifier tunes no tolerance: it judges by enclosures, and only the peers' criteria judge by closeness."""

from __future__ import annotations

import re
from pathlib import Path

import fusecheck

TOLERANCE = re.compile(r"\b(atol|rtol|allclose|isclose|rel_tol|abs_tol|assert_close)\b|\bapprox\(")


def _offences(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        if path.relative_to(folder).parts[0] == "faults":  # the peers' own criteria, shown beside ours
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if TOLERANCE.search(line):
                found.append(f"{path.relative_to(folder)}:{number}: {line.strip()}")
    return found


def test_no_module_of_the_verifier_compares_within_a_tolerance() -> None:
    folder = Path(fusecheck.__path__[0])
    assert len(list(folder.rglob("*.py"))) > 3
    assert _offences(folder) == []


def test_a_planted_tolerance_is_found_except_among_the_peers_criteria(tmp_path: Path) -> None:
    (tmp_path / "verdict.py").write_text("x = 1\nok = torch.allclose(a, b, rtol=1e-2)\n")
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "criteria.py").write_text("ok = torch.allclose(a, b)\n")
    assert _offences(tmp_path) == ["verdict.py:2: ok = torch.allclose(a, b, rtol=1e-2)"]
