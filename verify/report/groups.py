"""What a part of a run showed, as case groups and sentences that JUnit, Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fusecheck.report.record import Part
from fusecheck.report.replays import finding_line
from fusecheck.report.who import judged

QUESTIONS = {
    "kernel": "Does the kernel compute what it promises, on every rank, call after call?",
    "invariance": "Does a row depend on its company?",
    "protocol": "Is the protocol between ranks right in every interleaving?",
    "graph": "Does the graph rewrite put it where it belongs, and nowhere else?",
    "accuracy": "Does the model answer as before?",
    "latency": "Where does it pay, and where does it cost?",
    "faults": "Would Fusecheck notice if it were wrong?",
}


@dataclass(frozen=True)
class Group:
    """Cases that stand and fall together: a subject, a graph, a task, a fault.

    Attributes:
        name: what they are.
        verdict: `pass`, `fail` or `inconclusive`.
        note: one line of figures.
        text: the findings with their replay lines, one a line; empty without any.
        seconds: that they took; 0 where unknown.
    """

    name: str
    verdict: str
    note: str = ""
    text: str = ""
    seconds: float = 0.0


def groups(part: Part) -> list[Group]:
    """The case groups of a part; at least one."""
    found = list(_GROUPS.get(part.question, _plain)(part))
    if part.summary.get("interrupted"):
        found.append(Group("all cases", "inconclusive", "interrupted before the last case"))
    return found or list(_plain(part))


def sentence(part: Part) -> str:
    """What a part showed, in one sentence without its verdict."""
    said = _SENTENCES.get(part.question, _plain_sentence)(part)
    return f"interrupted: {said}" if part.summary.get("interrupted") and not part.findings else said


def with_replay(part: Part) -> list[dict[str, Any]]:
    """The findings of a part; a graph's know which pass they are about."""
    base = part.summary.get("replay")
    return [{"replay": base, **finding} if base else finding for finding in part.findings]


def count(value: Any) -> str:
    """A whole number with thousands separated, or the value as text."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _findings(found: list[dict[str, Any]]) -> str:
    return "1 finding" if len(found) == 1 else f"{len(found)} findings"


def _text(findings: list[dict[str, Any]]) -> str:
    return "\n".join(finding_line(finding) for finding in findings)


def _verdict(findings: list[dict[str, Any]], *, ran: bool = True) -> str:
    return "fail" if findings else "pass" if ran else "inconclusive"


def _of_kernel(part: Part) -> Iterator[Group]:
    subjects = part.summary.get("subjects", [])
    rest = list(part.findings)
    for subject in subjects:
        mine = [f for f in rest if _is_of(f, subject)]
        rest = [f for f in rest if f not in mine]
        flow = f" as {subject['dataflow']}" if subject.get("dataflow") else ""
        note = f"{subject['cases']} cases, {count(subject['elements'])} elements, {subject['refused']} refused"
        name = f"{subject['backend']}{flow} tp {subject['world_size']}"
        yield Group(name, _verdict(mine, ran=subject["cases"] > 0), note, _text(mine), subject["seconds"])
    if rest:
        yield Group("findings", "fail", _findings(rest), _text(rest))


def _is_of(finding: dict[str, Any], subject: dict[str, Any]) -> bool:
    return (
        finding.get("backend") == subject["backend"]
        and finding.get("judged_by") == subject.get("dataflow")
        and f'"world_size":{subject["world_size"]},' in str(finding.get("problem"))
    )


def _of_graph(part: Part) -> Iterator[Group]:
    findings = with_replay(part)
    names = list(dict.fromkeys(str(f.get("case", "run")) for f in findings))
    for name in names:
        mine = [f for f in findings if str(f.get("case", "run")) == name]
        yield Group(name, "fail", _findings(mine), _text(mine))
    rest = part.summary.get("graphs", 0) - len(names)
    if rest > 0:
        yield Group(f"{rest} graphs" if names else "graphs", "pass", f"{rest} graphs without a finding")


def _of_faults(part: Part) -> Iterator[Group]:
    loose = list(part.findings)
    for row in part.summary.get("rows", []):
        if "id" not in row:
            continue
        mine = [f for f in loose if f.get("fault") == row["id"]]
        loose = [f for f in loose if f not in mine]
        note = f"caught by {row.get('stage')} in case {row.get('cases')}" if row.get("killed") else "not caught"
        verdict = _verdict(mine, ran=bool(row.get("killed")))
        yield Group(f"{row['id']} {row.get('title', '')}", verdict, note, _text(mine), float(row.get("seconds", 0)))
    if loose:
        yield Group("right kernels", "fail", _findings(loose), _text(loose))


def _of_protocol(part: Part) -> Iterator[Group]:
    for row in part.summary.get("exhibits", []):
        wrong = [x for x in row["repaired"] if x["verdict"] != "pass"]
        found = row["faulty"]
        note = f"{found['kind']} in {found['memory']} memory" if row["killed"] else "no schedule found"
        verdict = _verdict(wrong) if row["killed"] else "fail"
        yield Group(f"{row['id']}: {row['title']}", verdict, f"{note}; repaired: {'wrong' if wrong else 'right'}")
    for row in part.summary.get("kernels", []):
        for found in row["outcomes"]:
            note = "; ".join(found.get("outcome", [])) or f"{count(found['states'])} states"
            # The museum shows kernels as they are; only what was asked about by name is judged.
            shown = found["verdict"] if not part.summary.get("exhibits") else "pass"
            yield Group(
                f"{row['title']}, {found['size']}, {found['memory']}", shown, note, "" if shown == "pass" else note
            )


def _of_invariance(part: Part) -> Iterator[Group]:
    found = {finding.get("stage"): finding for finding in part.findings}
    for record in part.summary.get("certificate", {}).get("claims", []):
        if claim := record["claim"] if not record["untold"] else "":
            mine = [found[claim]] if claim in found else []
            note = f"breaks from {record['size']} on: {record['how']}" if "size" in record else record["tried"]
            yield Group(claim, _verdict(mine), note, _text(mine))


def _invariance_sentence(part: Part) -> str:
    made = part.summary.get("certificate", {})
    claims = made.get("claims", [])
    broken = [f"{each['claim']} from {each['size']} on" for each in claims if "size" in each and "words" not in each]
    held = [each["claim"] for each in claims if each["verdict"] == "invariant"]
    says = f"breaks {', '.join(broken) or 'nothing'}; invariant over what was tried: {', '.join(held) or 'nothing'}"
    says += "".join(f"; {each['claim']}: {each['words']}" for each in claims if each.get("words"))
    left = [f"{each['claim']} ({each['untold']})" for each in claims if each["untold"]]
    named = [f"{each['file']} {each['sha256'][:16]}" for each in made.get("binaries", [])]
    says += f"; binaries: {', '.join(named) or 'none named'}{'; not told: ' * bool(left)}{', '.join(left)}"
    return f"{made.get('kernel')}, {made.get('operation')}, hidden {made.get('hidden')}: {says}"


def _of_accuracy(part: Part) -> Iterator[Group]:
    asked = {name: (shown(name), task) for name, task in (part.summary.get("tasks") or {}).items()}
    if oracle := part.summary.get("oracle"):
        asked["oracle"] = "distance to the oracle", oracle
    verdicts = []
    for title, (name, found) in asked.items():
        mine, note = [f for f in part.findings if f.get("title") == title], str(found.get("line", ""))
        verdicts.append(found["verdict"] if found.get("verdict") in ("pass", "fail") else "inconclusive")
        yield Group(name, verdicts[-1], note, _text(mine) or note)
    if rest := [f for f in part.findings if f.get("title") not in asked]:
        verdicts.append("fail" if part.verdict == "fail" else "inconclusive")
        yield Group("validity", verdicts[-1], rest[0].get("detail", ""), _text(rest))
    if part.verdict == "inconclusive" and set(verdicts) <= {"pass"} and not part.summary.get("interrupted"):
        yield Group("verdict", part.verdict, str(part.summary.get("headline", "")))


def _of_latency(part: Part) -> Iterator[Group]:
    timings = part.summary.get("timings") or []
    slow = [str(f.get("message") or f.get("detail") or "") for f in part.findings]
    for tokens in sorted({int(t["tokens"]) for t in timings}):
        here = [t for t in timings if int(t["tokens"]) == tokens]
        mine = [f for f, line in zip(part.findings, slow, strict=True) if line.startswith(f"{tokens} tokens")]
        note = ", ".join(f"{t['path']} {t['median_us']} us" for t in here)
        yield Group(f"{tokens} tokens", _verdict(mine), note, _text(mine))


def _plain(part: Part) -> Iterator[Group]:
    yield Group(part.command, part.verdict, _findings(part.findings), _text(part.findings))


_GROUPS: dict[str, Callable[[Part], Iterator[Group]]] = {
    "kernel": _of_kernel,
    "graph": _of_graph,
    "invariance": _of_invariance,
    "protocol": _of_protocol,
    "faults": _of_faults,
    "accuracy": _of_accuracy,
    "latency": _of_latency,
}


def _kernel_sentence(part: Part) -> str:
    s = part.summary
    subjects = s.get("subjects", [])
    cases = f"{count(s.get('cases', 0))} cases"
    if part.findings:
        failed, first = sum(subject["failed"] for subject in subjects), part.findings[0]
        told = f"{count(failed)} of {cases} break the declared arithmetic"
        return f"{told}, first at stage {first.get('stage', 'unknown')}{_like(first)}; judged: {judged(part)}"
    if not s.get("cases"):
        return "no case was run"
    idle = sum(not subject["cases"] for subject in subjects)
    told = f"all {count(s.get('elements', 0))} outputs of {cases} are what the declared arithmetic allows"
    more = _reached(s.get("core") or {}) + (f"; {idle} backends ran nothing" if idle else "")
    return f"{told}; judged: {judged(part)}{more}"


def _like(finding: dict[str, Any]) -> str:
    like = finding.get("computes_like")
    return f" (computes like {', '.join(map(str, like))})" if like else ""


def _reached(core: dict[str, Any]) -> str:
    """How much of the core plan was reached, and how much of it the kernels refuse."""
    if not core.get("cells"):
        return ""
    refused = f" ({count(core['refused'])} refused)" if core["refused"] else ""
    return f"; {count(core['reached'])} of {count(core['cells'])} cells of the core plan reached{refused}"


def _graph_sentence(part: Part) -> str:
    s = part.summary
    graphs = f"{count(s.get('graphs', 0))} graphs through {s.get('pass', 'the pass')}"
    if part.findings:
        return f"{graphs}, {_findings(part.findings)}"
    return f"{graphs}: each was fused where it must be, and computes the same bits as before"


def _faults_sentence(part: Part) -> str:
    s = part.summary
    alarms = s.get("false_alarms", 0)
    rejected = f"{alarms} times a right kernel was rejected" if alarms else "no right kernel was rejected"
    return f"{s.get('killed', 0)} of {s.get('faults', 0)} planted faults were caught, and {rejected}"


def _protocol_sentence(part: Part) -> str:
    s = part.summary
    if s.get("faults"):
        wrong = [row["title"] for row in s["kernels"] if any(x["verdict"] == "fail" for x in row["outcomes"])]
        shown = f"; as they are today, wrong: {'; '.join(wrong)}" if wrong else ""
        return f"{s['killed']} of {s['faults']} published faults shown, {s['false_alarms'] or 'no'} false alarms{shown}"
    names = ", ".join(row["title"] for row in s.get("kernels", []))
    if part.findings:
        return f"{names}: {part.findings[0].get('message', '')}"
    states = sum(x["states"] for row in s.get("kernels", []) for x in row["outcomes"])
    return f"{names}: {count(states)} states, no finding"


def _accuracy_sentence(part: Part) -> str:
    tasks = {n: t for n, t in (part.summary.get("tasks") or {}).items() if isinstance(t.get("lost"), int)}
    if not tasks:
        headline = str(part.summary.get("headline", ""))
        return headline.partition("  ")[2] or headline or _plain_sentence(part)
    lost, gained, asked = (sum(int(task.get(key) or 0) for task in tasks.values()) for key in ("lost", "gained", "n"))
    each = ", ".join(f"{shown(name)} {_points(task)}" for name, task in tasks.items())
    return f"of {count(asked)} answers {count(lost)} became wrong and {count(gained)} became right; {each}"


def _points(task: dict[str, Any]) -> str:
    """The accuracy of the two arms in percent, as far as the record has it."""
    ends = [task.get(arm) for arm in ("baseline", "candidate")]
    return " to ".join(f"{100 * end:.2f} %" for end in ends if isinstance(end, (int, float)))


OWN_TASKS = {
    "golden_mmlu": "generated choices for Fusecheck's own small model, not MMLU",
    "golden_gsm8k": "generated sums for Fusecheck's own small model, not GSM8K",
}
"""What the tasks of the small model are; their names are those of the command line, and they are no benchmark."""


def shown(task: str) -> str:
    """A task as readers of a report shall see it, who must not take ours for the benchmark that it is named after."""
    return f"{task} ({OWN_TASKS[task]})" if task in OWN_TASKS else task


def _latency_sentence(part: Part) -> str:
    s = part.summary
    counts = [int(t["tokens"]) for t in s.get("timings") or []]
    if not counts:
        return "nothing was timed"
    most = s.get("break_even_tokens")
    if most is None:
        pays = f"pays at every measured token count, {min(counts):,} to {max(counts):,}"
    else:
        pays = f"pays up to {count(most)} tokens" if most else f"does not pay, not even at {min(counts):,} tokens"
    steps = [f"{row['predicted_ms']:+.2f} ms at {row['concurrency']}" for row in s.get("prediction") or []]
    predicted = f"; predicted change of a decode step: {', '.join(steps)}" if steps else ""
    slower = f"; {_findings(part.findings)}" if part.findings else ""
    return f"fusing the quantiser {pays}{predicted}{slower}"


def _plain_sentence(part: Part) -> str:
    return _findings(part.findings) if part.findings else "no finding"


_SENTENCES: dict[str, Callable[[Part], str]] = {
    "kernel": _kernel_sentence,
    "graph": _graph_sentence,
    "invariance": _invariance_sentence,
    "protocol": _protocol_sentence,
    "faults": _faults_sentence,
    "accuracy": _accuracy_sentence,
    "latency": _latency_sentence,
}


def verdict_sentence(all_parts: list[Part], verdict: str) -> str:
    """The verdict of a whole record, in one sentence: that of the part that decides it."""
    deciding = next((part for part in all_parts if part.verdict == verdict), all_parts[0] if all_parts else None)
    if deciding is None:
        return f"{verdict.capitalize()}: nothing was run."
    left = [left for part in all_parts for left in part.summary.get("not_run") or [] if left.get("unanswered")]
    if left and verdict == "inconclusive":
        why: dict[str, list[str]] = {}
        for each in left:
            why.setdefault(str(each["reason"]), []).append(str(each["part"]))
        told = "; ".join(f"asked for and not answered: {', '.join(names)} ({reason})" for reason, names in why.items())
        return f"Inconclusive: {told}. What was run: {'; '.join(map(sentence, all_parts))}."
    run = f"{deciding.run}: " if deciding.run else ""
    others = len([part for part in all_parts if part.verdict == verdict]) - 1
    more = f" {_more(others, verdict)}" if others > 0 else ""
    return f"{verdict.capitalize()}: {run}{sentence(deciding)}.{more}"


def _more(others: int, verdict: str) -> str:
    of = "1 more question has" if others == 1 else f"{others} more questions have"
    return f"{of} the same verdict: {verdict}."
