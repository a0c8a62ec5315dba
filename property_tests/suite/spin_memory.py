"""The relaxed memory of `fusecheck protocol` once more, in C inside SPIN's input, and written to be simpler than ours.

Any block that has begun may keep the old value of a cell that it loads anywhere, so that this also holds our windows of
loads against their absence. No order is left out: SPIN's own reduction is off.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusecheck.protocol.language import Kind, Test
from fusecheck.protocol.system import DONE, Node, System

_NONE = -99

_MEMORY = """
c_code {
int seen(int p, int l) {
  int i, r = RANK[p];
  for (i = now.bn[p] - 1; i >= 0; i--) if (LOC[now.be[p * MB + i]] == l) return VAL[now.be[p * MB + i]];
  for (i = now.rn[r] - 1; i >= 0; i--) if (LOC[now.re[r * MR + i]] == l) return VAL[now.re[r * MR + i]];
  return now.m[l];
}
int drained(int p, int l, int rel, int all) {
  int i, r = RANK[p];
  for (i = 0; i < now.bn[p]; i++) {
    int e = now.be[p * MB + i];
    if (all || (rel == GPU && SHARED[e]) || LOC[e] == l) return 0;
  }
  for (i = 0; i < now.rn[r]; i++) {
    int e = now.re[r * MR + i];
    if (rel == SYS || LOC[e] == l || (all && OWNER[e] == p)) return 0;
  }
  return 1;
}
int entry(int kind, int a, int i) { return kind ? now.re[a * MR + i] : now.be[a * MB + i]; }
int able(int kind, int a, int i) {
  int j, e, f;
  if (i >= (kind ? now.rn[a] : now.bn[a])) return 0;
  e = entry(kind, a, i);
  for (j = 0; j < i; j++) {
    f = entry(kind, a, j);
    if (LOC[f] == LOC[e] || REL[e] == SYS || (REL[e] == GPU && !kind && SHARED[f])) return 0;
  }
  if (!kind && REL[e] == SYS && !SHARED[e] && now.rn[RANK[a]]) return 0;
  return 1;
}
void pick(int kind, int a, int i) {
  int q, e = entry(kind, a, i), l = LOC[e], far = kind || !SHARED[e];
  now.kind = kind; now.agent = a; now.place = i; now.cand = 0;
  for (q = 0; q < P; q++) {
    if (!now.begun[q] || now.ended[q] || q == OWNER[e] || (RANK[q] == RANK[OWNER[e]]) == far) continue;
    if (EARLY[q * C + l] && now.kv[q * C + l] == NONE && seen(q, l) != VAL[e]) now.cand |= 1 << q;
  }
}
void leave(void) {
  int q, j, p = now.agent, e = entry(now.kind, p, now.place), l = LOC[e], r = RANK[OWNER[e]], far;
  far = now.kind || !SHARED[e];
  for (q = 0; q < P; q++) if (now.mask >> q & 1) {
    now.kv[q * C + l] = seen(q, l);
    now.ks[q * C + l] = far ? SYS : GPU;
  }
  if (now.kind) {
    for (j = now.place; j + 1 < now.rn[r]; j++) now.re[r * MR + j] = now.re[r * MR + j + 1];
    now.re[r * MR + --now.rn[r]] = 0;
  } else {
    for (j = now.place; j + 1 < now.bn[p]; j++) now.be[p * MB + j] = now.be[p * MB + j + 1];
    now.be[p * MB + --now.bn[p]] = 0;
  }
  if (far) {
    if (OVER[e] != NONE && now.m[l] != OVER[e]) now.bad = 1;
    now.m[l] = VAL[e];
  } else now.re[r * MR + now.rn[r]++] = e;
  now.kind = now.agent = now.place = now.mask = 0;
}
void drop(int p, int l, int acquires, int own) {
  int k;
  for (k = 0; k < C; k++) {
    if (now.kv[p * C + k] == NONE || (now.ks[p * C + k] > acquires && (k != l || own))) continue;
    now.kv[p * C + k] = NONE; now.ks[p * C + k] = 0;
  }
}
void push(int p, int e) { now.be[p * MB + now.bn[p]++] = e; drop(p, LOC[e], -1, 0); }
}
"""


def promela_relaxed(system: System) -> str:
    """The system, whose trees are known in full, under the relaxed memory.

    A process a block and one for the memory, which lets entries leave buffers and chooses who keeps an old value.
    """
    stores = [node for node in system.nodes if node.kind is Kind.STORE]
    entries = {node.number: place for place, node in enumerate(stores)}
    count, cells = len(system.processes), max(1, len(system.cells))
    rank = [process.block.rank for process in system.processes]
    most = [_deepest(system, root) for root in system.roots]
    most_rank = [sum(m for m, r in zip(most, rank, strict=True) if r == one) for one in range(max(rank) + 1)]
    touched = [{node.loc for node in system.nodes if node.process == process} for process in range(count)]
    early = [0] * (count * cells)
    for node in system.nodes:
        if node.early:
            early[node.process * cells + node.loc] = 1
    tables: dict[str, list[int]] = {
        "LOC": [node.loc for node in stores],
        "VAL": [node.op.value or 0 for node in stores],
        "REL": [node.releases for node in stores],
        "OVER": [_NONE if node.op.over is None else node.op.over for node in stores],
        "SHARED": [any(node.loc in touched[mate] for mate in system.mates[node.process]) for node in stores],
        "OWNER": [node.process for node in stores],
        "RANK": rank,
        "EARLY": early,
    }
    sizes = {"P": count, "C": cells, "MB": max(1, *most), "MR": max(1, *most_rank), "NONE": _NONE, "GPU": 0, "SYS": 1}
    decl = "".join(
        f"static const short {k}[] = {{{', '.join(str(int(x)) for x in v or [0])}}};\n" for k, v in tables.items()
    )
    begin = [*(f"m[{place}] = {value}" for place, value in enumerate(system.initial) if value)]
    begin += ["c_code { int i; for (i = 0; i < P * C; i++) now.kv[i] = NONE; }"]
    begin += [*(f"run P{process}()" for process in range(count)), "run Memory()"]
    return "\n".join(
        [
            *(f"#define {name} ({value})" for name, value in sizes.items()),
            "c_decl {\n" + decl + "}",
            "short m[C]; bool ended[P]; bool let[P]; bool begun[P]; bool bad;",
            f"short be[{count * sizes['MB']}]; byte bn[P]; short re[{len(most_rank) * sizes['MR']}];",
            f"byte rn[{len(most_rank)}]; short kv[{count * cells}]; byte ks[{count * cells}];",
            "byte kind; byte agent; byte place; int cand; int mask; int one;",
            _MEMORY,
            *(_process(system, process, entries) for process in range(count)),
            _leaving(most, most_rank),
            "init { atomic { " + "; ".join(begin) + " } }",
            "",
        ]
    )


def _deepest(system: System, root: int) -> int:
    """The most stores of a block on any way through its tree: what its buffer must hold."""
    node = system.nodes[root]
    below = [0 if n == DONE else _deepest(system, n) for n in node.children.values()]
    return (node.kind is Kind.STORE) + max(below, default=0)


def _leaving(most: list[int], most_rank: list[int]) -> str:
    """The process of the memory; it may stop wherever nothing is left to leave."""
    ways = [(0, agent, place) for agent, count in enumerate(most) for place in range(count)]
    ways += [(1, agent, place) for agent, count in enumerate(most_rank) for place in range(count)]
    options = "\n".join(
        f":: atomic {{ c_expr {{ (able({k}, {a}, {i})) }} -> c_code {{ pick({k}, {a}, {i}); }}; goto chosen }}"
        for k, a, i in ways
    )
    keep = "do :: cand == 0 -> break :: else -> one = cand & (-cand); if :: mask = mask | one :: skip fi; "
    keep += "cand = cand & ~one od; one = 0"
    return f"""proctype Memory() {{
end: if
{options or ":: false -> skip"}
fi;
atomic {{ chosen: {keep}; c_code {{ leave(); }}; assert(!bad); goto end }}
}}"""


def _process(system: System, process: int, entries: dict[int, int]) -> str:
    nodes = [node for node in system.nodes if node.process == process]
    steps = [step for node in nodes for step in _step(system, node, entries)]
    return "\n".join([f"proctype P{process}() {{ goto N{system.roots[process]};", *steps, "over: skip }"])


def _step(system: System, node: Node, entries: dict[int, int]) -> Iterator[str]:
    """One operation. Stores join the step in front of them: nobody sees a block's own buffer."""
    process, op, name = node.process, node.op, f"N{node.number}"
    if node.kind is Kind.STORE:
        return
    newest, old = f"seen({process}, {node.loc})", f"now.kv[{process} * C + {node.loc}]"
    drop = f"drop({process}, {node.loc}, {node.acquires}, 0);"
    if node.kind in (Kind.LOAD, Kind.READ):
        yield f"{name}: atomic {{ if"
        yield from _loads(system, node, entries, newest, drop)
        if node.early:
            yield from _loads(system, node, entries, old, drop.replace("0);", "1);"))
        yield "fi }"
        return
    doing = {
        Kind.ADD: f"now.m[{node.loc}] += {op.value};",
        Kind.TRIGGER: f"now.let[{process}] = 1;",
        Kind.START: f"now.begun[{process}] = 1;",
        Kind.END: f"now.ended[{process}] = 1; drop({process}, -1, SYS, 0);",
    }.get(node.kind, "")
    doing += f" now.m[{node.loc}] = {op.put};" if op.put is not None else ""
    right = "" if op.value is None or node.kind is Kind.ADD else f"now.bad = {newest} != {op.value};"
    check = "; assert(!bad)" if right else ""
    yield f"{name}: atomic {{ c_expr {{ ({_guard(system, node, newest)}) }} ->"
    yield f"  c_code {{ {right} {doing} {drop} }}{check}; {_on(system, node.children[None], entries)} }}"


def _on(system: System, number: int, entries: dict[int, int]) -> str:
    """Where it goes on, behind the stores on the way."""
    pushes = ""
    while number != DONE and system.nodes[number].kind is Kind.STORE:
        node = system.nodes[number]
        pushes += f"push({node.process}, {entries[number]}); "
        number = node.children[None]
    target = "over" if number == DONE else f"N{number}"
    return f"c_code {{ {pushes}}}; goto {target}" if pushes else f"goto {target}"


def _loads(system: System, node: Node, entries: dict[int, int], value: str, drop: str) -> Iterator[str]:
    """One way on for each value that may be loaded; any other, or a wrong read, is a failed assertion."""
    right = {node.op.value: node.children[None]} if node.kind is Kind.READ else node.children
    for known, number in right.items():
        yield f":: c_expr {{ ({value} == {known}) }} -> c_code {{ {drop} }}; {_on(system, number, entries)}"
    others = " && ".join(f"!({value} == {known})" for known in (*right, *((_NONE,) if "kv" in value else ())))
    yield f":: c_expr {{ ({others or 1}) }} -> assert(false)"


def _guard(system: System, node: Node, newest: str) -> str:
    me, every = system.processes[node.process], int(node.kind is Kind.END or node.releases == 1)
    drained = f"drained({node.process}, {node.loc}, {node.releases}, {every})"
    if node.kind is Kind.START:
        needs = [f"now.ended[{other}]" for other in me.needs]
        return " && ".join([*needs, *(f"(now.ended[{o}] || now.let[{o}])" for o in me.lets)]) or "1"
    if node.kind is Kind.GRID_WAIT:
        return " && ".join(f"now.ended[{other}]" for other in me.before) or "1"
    if node.kind is Kind.WAIT:
        assert node.op.test is not None
        passed = passes(node.op.test, newest)
        return f"{passed} && {drained}" if node.op.put is not None else passed
    return drained if node.kind in (Kind.ADD, Kind.FENCE, Kind.END) else "1"


def passes(test: Test, cell: str) -> str:
    """Whether a value ends a poll, as an expression of Promela and of C."""
    if isinstance(test.value, int):
        return f"{cell} >= {test.value}"
    equal = " || ".join(f"{cell} == {value}" for value in sorted(test.value))
    return f"({equal})" if test.kind == "among" else f"!({equal})"
