"""The table of what is verified, from the record of a whole run: states, seconds and memory of every right form.

fusecheck protocol --json golden/protocol.json
python -m fusecheck.property_tests.suite.protocol_table      # the rows of verify/protocol/README.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusecheck.protocol.museum import KERNELS, MUSEUM

RECORD = Path(__file__).parents[2] / "golden" / "protocol.json"


def record() -> dict[str, Any]:
    """The summary of the recorded run."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found["summary"]  # type: ignore[no-any-return]


def right_forms() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each right form once: the first kernel or exhibit that has it, and its records by size and memory."""
    summary, known = record(), set[str]()
    kernels = zip(KERNELS.items(), summary["kernels"], strict=True)
    exhibits = zip(MUSEUM, summary["exhibits"], strict=True)
    forms = [(name, model, row["outcomes"]) for (name, (_, model)), row in kernels]
    forms += [(f"{x.name}.repaired", x.repaired, row["repaired"]) for x, row in exhibits]
    for name, model, found in forms:
        if repr(model) not in known and all(outcome["verdict"] == "pass" for outcome in found):
            known.add(repr(model))
            yield name, found


def rows() -> list[str]:
    """The table in Markdown: a form and size a row; states, seconds and megabytes in either memory."""
    lines = []
    for name, found in right_forms():
        for size in dict.fromkeys(outcome["size"] for outcome in found):
            of = {
                x["memory"]: f"{x['states']:,} | {x['seconds']:.1f} | {x['peak_mb']}"
                for x in found
                if x["size"] == size
            }
            lines.append(f"| `{name}` | {size} | {of['sc']} | {of['relaxed']} |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
