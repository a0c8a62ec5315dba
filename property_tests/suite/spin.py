"""The protocols again through SPIN: its input made from the same trees of operations, its verdicts held against ours.

    python -m fusecheck.property_tests.suite.spin     # every kernel and every exhibit; needs spin and a C compiler

Sequential consistency only: SPIN's own memory. A developer's command: CI has no SPIN and does not run it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusecheck.protocol.explorer import Explorer
from fusecheck.protocol.language import Kind, Launch, Model, Size, Test
from fusecheck.protocol.museum import KERNELS, MUSEUM
from fusecheck.protocol.system import DONE, Node, System

SIZES = (Size(2, 1, 3), Size(2, 2, 2), Size(3, 1, 2))
SECONDS = 300
"""Until SPIN is given up on a model."""


def promela(launches: Iterable[Launch]) -> str:
    """The model as SPIN reads it: a process a block, an atomic step an operation, polls as guards.

    The trees are first discovered whole. A load of a value that our exploration never saw is a failed assertion.
    """
    explorer = Explorer(launches, "sc")
    explorer.ends()
    system = explorer.system
    count = len(system.processes)
    cells = "".join(f"  m[{place}] = {value};\n" for place, value in enumerate(system.initial) if value)
    starts = "".join(f"  run P{process}();\n" for process in range(count))
    head = f"short m[{max(1, len(system.cells))}];\nbool ended[{count}];\nbool let[{count}];\n"
    bodies = "".join(_process(system, process) for process in range(count))
    return f"{head}{bodies}init {{ atomic {{\n{cells}{starts}}} }}\n"


def _process(system: System, process: int) -> str:
    lines = [f"proctype P{process}() {{"]
    left, known = [system.roots[process]], set[int]()
    while left:
        number = left.pop()
        if number in known:
            continue
        known.add(number)
        node = system.nodes[number]
        lines += [f"N{number}:", *_step(system, node)]
        left += [following for following in node.children.values() if following != DONE]
    return "\n".join([*lines, "over: skip", "}", ""])


def _step(system: System, node: Node) -> Iterator[str]:
    """One operation: its guard, its checks, what it does, and where it goes on."""
    cell, op = f"m[{node.loc}]", node.op
    if node.kind is Kind.LOAD:
        ways = "".join(f" :: {cell} == {value} -> goto N{n}" for value, n in sorted(node.children.items(), key=str))
        yield f"  atomic {{ if{ways} :: else -> assert(false) fi }}"
        return
    guard, doing = _guard(system, node), []
    if op.over is not None:
        doing.append(f"assert({cell} == {op.over})")
    if node.kind in (Kind.READ, Kind.WAIT) and op.value is not None:
        doing.append(f"assert({cell} == {op.value})")
    if node.kind is Kind.STORE:
        doing.append(f"{cell} = {op.value}")
    if node.kind is Kind.ADD:
        doing.append(f"{cell} = {cell} + {op.value}")
    if op.put is not None:
        doing.append(f"{cell} = {op.put}")
    doing += [f"let[{node.process}] = true"] * (node.kind is Kind.TRIGGER)
    doing += [f"ended[{node.process}] = true"] * (node.kind is Kind.END)
    following = node.children[None]
    target = "over" if following == DONE else f"N{following}"
    yield f"  atomic {{ {guard} -> {'; '.join([*doing, f'goto {target}'])} }}"


def _guard(system: System, node: Node) -> str:
    me = system.processes[node.process]
    if node.kind is Kind.START:
        needs = [f"ended[{other}]" for other in me.needs]
        return " && ".join([*needs, *(f"(ended[{other}] || let[{other}])" for other in me.lets)]) or "true"
    if node.kind is Kind.GRID_WAIT:
        return " && ".join(f"ended[{other}]" for other in me.before) or "true"
    return _passes(node.op.test, f"m[{node.loc}]") if node.op.test is not None else "true"


def _passes(test: Test, cell: str) -> str:
    if isinstance(test.value, int):
        return f"{cell} >= {test.value}"
    equal = " || ".join(f"{cell} == {value}" for value in sorted(test.value))
    return f"({equal})" if test.kind == "among" else f"!({equal})"


def verdict(text: str) -> tuple[str, int]:
    """`pass` or `fail` by SPIN, and the states that it stored.

    Raises:
        RuntimeError: SPIN or the compiler refused the model, or did not come to an end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.pml").write_text(text, encoding="utf-8")
        build = (("spin", "-a", "model.pml"), ("cc", "-O1", "-w", "-DVECTORSZ=8192", "-DSAFETY", "-o", "pan", "pan.c"))
        for command in build:
            _run(command, folder)
        said = _run(("./pan", "-m1000000"), folder)
    errors, states = re.search(r"errors: (\d+)", said), re.search(r"(\d+) states, stored", said)
    if errors is None or states is None or "max search depth too small" in said:
        raise RuntimeError(f"SPIN gave no verdict:\n{said}")
    return "fail" if int(errors[1]) else "pass", int(states[1])


def _run(command: tuple[str, ...], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def models() -> Iterator[tuple[str, Model, Size]]:
    """Every kernel, and every exhibit in both forms, at the sizes that SPIN reaches."""
    for name, (_, model) in KERNELS.items():
        yield from ((name, model, size) for size in SIZES)
    for exhibit in MUSEUM:
        yield exhibit.name, exhibit.faulty, exhibit.size
        sizes = SIZES if exhibit.size.ranks < SIZES[-1].ranks else (exhibit.size,)
        yield from ((f"{exhibit.name}.repaired", exhibit.repaired, size) for size in sizes)


def main() -> int:
    """Print each model with both verdicts; the exit code is 1 if two differ."""
    lacking = [tool for tool in ("spin", "cc") if shutil.which(tool) is None]
    if lacking:
        print(f"needs {' and '.join(lacking)}; on Debian: apt-get install spin gcc", file=sys.stderr)
        return 3
    different, asked, known = 0, 0, set[tuple[str, str]]()
    for name, model, size in models():
        if (repr(model), str(size)) in known:
            continue
        known.add((repr(model), str(size)))
        ours = "fail" if Explorer(model.launches(size), "sc").explore().failure is not None else "pass"
        began = time.monotonic()
        theirs, states = verdict(promela(model.launches(size)))
        asked, different = asked + 1, different + (ours != theirs)
        mark = "" if ours == theirs else "  DIFFERENT"
        print(f"{name} {size}: {ours}, SPIN {theirs} in {states} states, {time.monotonic() - began:.1f} s{mark}")
    print(f"{asked} models, {different} different verdicts")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
