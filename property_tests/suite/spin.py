"""The protocols again through SPIN: its input made from the same trees of operations, its verdicts held against ours.

    python -m fusecheck.property_tests.suite.spin     # every kernel and every exhibit; needs spin and a C compiler

Sequential consistency is SPIN's own memory; the relaxed one is written out in its input (`spin_memory.py`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusecheck.property_tests.suite.spin_memory import passes, promela_relaxed
from fusecheck.protocol.explorer import Explorer
from fusecheck.protocol.language import Kind, Launch, Model, Size
from fusecheck.protocol.museum import KERNELS, MUSEUM
from fusecheck.protocol.system import DONE, Node, System

SIZES = {
    "relaxed": (Size(1, 2, 1), Size(2, 1, 1), Size(2, 1, 2)),
    "sc": (Size(2, 1, 3), Size(2, 2, 2), Size(3, 1, 2)),
}
SECONDS = 45
"""Until SPIN is given up on a model."""


def promela(launches: Iterable[Launch], memory: str = "sc") -> str:
    """The model as SPIN reads it: a process a block, an atomic step an operation, polls as guards.

    The trees are first discovered whole. A load of a value that our exploration never saw is a failed assertion.
    """
    explorer = Explorer(launches, memory)
    explorer.ends()
    system = explorer.system
    if memory == "relaxed":
        return promela_relaxed(system)
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
    return passes(node.op.test, f"m[{node.loc}]") if node.op.test is not None else "true"


def verdict(text: str) -> tuple[str, int]:
    """`pass` or `fail` by SPIN, and the states that it stored.

    Raises:
        RuntimeError: SPIN or the compiler refused the model, or did not come to an end.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.pml").write_text(text, encoding="utf-8")
        build = (
            ("spin", "-a", "-o3", "model.pml"),
            (
                "cc",
                "-O1",
                "-w",
                "-DVECTORSZ=8192",
                "-DSAFETY",
                "-DNOREDUCE",
                *("-DMEMLIM=4000", "-DCOLLAPSE"),
                "-o",
                "pan",
                "pan.c",
            ),
        )
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


def models() -> Iterator[tuple[str, Model, Size, str]]:
    """Every kernel, and every exhibit in both forms, at the sizes that SPIN may reach, in both memories."""
    for memory, sizes in SIZES.items():
        for exhibit in MUSEUM:
            yield exhibit.name, exhibit.faulty, exhibit.size, memory
        for name, (_, model) in KERNELS.items():
            yield from ((name, model, size, memory) for size in sizes)
        for exhibit in MUSEUM:
            for size in sizes if exhibit.size.ranks < 3 else (exhibit.size,):
                yield f"{exhibit.name}.repaired", exhibit.repaired, size, memory


def agreement(model: Model, size: Size, memory: str) -> tuple[str, str, int]:
    """Our verdict, SPIN's (`no end` where it does not come to one in time), and the states that it stored."""
    ours = "fail" if Explorer(model.launches(size), memory).explore().failure is not None else "pass"
    try:
        return ours, *verdict(promela(model.launches(size), memory))
    except subprocess.TimeoutExpired:
        return ours, "no end", 0


def lacking() -> str:
    """What has to be installed first; empty if nothing."""
    missing = [tool for tool in ("spin", "cc") if shutil.which(tool) is None]
    return f"needs {' and '.join(missing)}; on Debian: apt-get install spin gcc" if missing else ""


def main() -> int:
    """Print each model with both verdicts; the exit code is 1 if two differ."""
    if lacking():
        print(lacking(), file=sys.stderr)
        return 3
    counts, known = Counter[tuple[str, str]](), set[tuple[str, str, str]]()
    for name, model, size, memory in models():
        if (repr(model), str(size), memory) in known:
            continue
        known.add((repr(model), str(size), memory))
        began = time.monotonic()
        ours, theirs, states = agreement(model, size, memory)
        word = "no end" if theirs == "no end" else "agree" if ours == theirs else "DIFFERENT"
        counts[memory, word] += 1
        seconds = time.monotonic() - began
        print(f"{name} {size} {memory}: {ours}, SPIN {theirs} in {states} states, {seconds:.1f} s: {word}", flush=True)
    print("; ".join(f"{memory}: {count} {word}" for (memory, word), count in sorted(counts.items())))
    return 1 if any(word == "DIFFERENT" for _, word in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
