"""Which graphs to check, and what must become of each site under the passes that run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from fusecheck.errors import UsageError
from fusecheck.graph.build import MAX_TOKENS
from fusecheck.graph.collinear import PAIRS, PairPlan
from fusecheck.graph.config import (
    ALL_ENABLED,
    FAMILY_PASS,
    FINALIZE_PASS,
    NORM_PASS,
    QUANT_PASSES,
    SharedConfig,
    TransformConfig,
)
from fusecheck.graph.expectations import EVERY, Expectation, expectation
from fusecheck.graph.family import FINALIZE
from fusecheck.graph.files import FilePlan
from fusecheck.graph.library import Library
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.random_graphs import random_plan
from fusecheck.graph.rows import ROWS
from fusecheck.interface import FusionOp

NORM_OP = FusionOp.RESIDUAL_RMS_NORM


@dataclass(frozen=True)
class Subject:
    """The pass under test and where it stands.

    Attributes:
        name: `package.module:function`, or the short name of one of Fusecheck's own.
        after_norm: it gets the graph that the norm pass made, else the graph as exported.
        quantises: it makes quantising operators, else only norms.
        moves: which kinds of quantisers, and whether sums of experts; see `EVERY`. Left out: what Fusecheck's own
            passes are for, static FP8 for others.
        merges: it makes one sum over ranks of several, and no fused operator.
    """

    name: str = FAMILY_PASS
    after_norm: bool = True
    quantises: bool = True
    moves: tuple[str, ...] = ()
    merges: bool = False

    @property
    def produces(self) -> str:
        """What it makes, as the command line says it."""
        return "one-sum" if self.merges else ",".join(self.moved) or "norm"

    @property
    def passes(self) -> tuple[str, ...]:
        """All passes to run, the subject last."""
        return (NORM_PASS, self.name) if self.after_norm else (self.name,)

    @property
    def moved(self) -> tuple[str, ...]:
        """What it moves into the fused operator besides the norm."""
        own = {FAMILY_PASS: EVERY, FINALIZE_PASS: (FINALIZE,)} | {each: (kind,) for kind, each in QUANT_PASSES.items()}
        return (self.moves or own.get(self.name, ("fp8",))) if self.quantises else ()


Plan = GraphPlan | ModelPlan | FilePlan | PairPlan
"""What a graph is made of, in one line of JSON."""


def read_plan(text: str) -> Plan:
    """A plan from its line of JSON, as a finding prints it.

    Raises:
        UsageError: the line is no plan.
    """
    named: dict[str, type[ModelPlan | PairPlan | FilePlan]] = {"model": ModelPlan, "pair": PairPlan, "file": FilePlan}
    kind = next((kind for name, kind in named.items() if text.startswith(f'{{"{name}":')), GraphPlan)
    try:
        return kind.from_json(text)
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"not a graph plan: {error}; expected the line that a finding prints") from None


@dataclass(frozen=True)
class GraphCase:
    """A graph with a name.

    Attributes:
        name: of the row, the seed or the model.
        plan: what to build.
        title: in words.
        export: whether its rewritten graph is exported again, which takes as long as all else.
        alone: it is one rank's, whatever the number of ranks.
    """

    name: str
    plan: Plan
    title: str = ""
    export: bool = True
    alone: bool = False


def row_cases(world_size: int, pattern: str = "*") -> list[GraphCase]:
    """The named edge cases that this world size can show, of those that a comma-separated pattern names.

    Raises:
        UsageError: a part of the pattern names no row.
    """
    mine = [row for row in ROWS if (row.world_size or max(world_size, 2)) == world_size]
    named = _named(pattern, [row.name for row in ROWS])
    return [GraphCase(row.name, row.plan, row.title) for row in mine if row.name in named]


def lone_cases(pattern: str = "*") -> list[GraphCase]:
    """The named edge cases of one rank, to be asked in the first rank of several."""
    return [replace(case, alone=True) for case in row_cases(1, pattern)]


def pair_cases(pattern: str = "*") -> list[GraphCase]:
    """The named cases of sums over ranks that are added, of those that a comma-separated pattern names.

    Raises:
        UsageError: a part of the pattern names none.
    """
    return [GraphCase(name, PAIRS[name][1], PAIRS[name][0]) for name in _named(pattern, list(PAIRS))]


def _named(pattern: str, names: list[str]) -> list[str]:
    wanted = pattern.split(",")
    for part in wanted:
        if not any(fnmatchcase(name, part) for name in names):
            raise UsageError(f"no row is called {part!r}, expected one of: {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, part) for part in wanted)]


def random_case(name: str, plan: GraphPlan) -> GraphCase:
    """A random graph; one in four is exported again, besides every edge case and model."""
    return GraphCase(name, plan, export=plan.seed % 4 == 0)


def random_cases(count: int, seed: int) -> Iterator[GraphCase]:
    """Random graphs; the same for the same seed."""
    for number in range(seed, seed + count):
        yield random_case(f"random-{number}", random_plan(number))


def adapted(library: Library, cases: list[GraphCase]) -> tuple[list[GraphCase], dict[str, str]]:
    """The cases as a library holds them, and why some do not arise there, by name."""
    kept, absent = [], {}
    for case in cases:
        plan = library.adapt(case.plan) if isinstance(case.plan, GraphPlan) else case.plan
        if isinstance(plan, str):
            absent[case.name] = plan
        else:
            kept.append(replace(case, plan=plan))
    return kept, absent


def expected(
    subject: Subject,
    plan: GraphPlan,
    index: int,
    world_size: int,
    transforms: Mapping[str, TransformConfig] = ALL_ENABLED,
) -> Expectation:
    """What must become of a site, given which passes run and how they are configured."""
    if subject.merges:
        return Expectation(None, (), (), "the pass makes no fused operator")
    if reason := _switched_off(NORM_PASS, plan, transforms):
        full = expectation(plan, index, world_size)
        return full if full.fused is None else Expectation(None, (), ("D8",), reason)
    names = {**QUANT_PASSES, FINALIZE: FINALIZE_PASS}
    off = {each: _switched_off(names[each], plan, transforms) for each in subject.moved}
    full = expectation(plan, index, world_size, [each for each, reason in off.items() if not reason])
    return replace(full, why="; ".join(dict.fromkeys((full.why, *filter(None, off.values())))))


def _switched_off(name: str, plan: GraphPlan, transforms: Mapping[str, TransformConfig]) -> str:
    """Why a transform leaves the whole graph alone; empty where it does not."""
    config = SharedConfig(transforms=transforms).config(name)
    if not config.enabled:
        return f"{name} is not enabled"
    fixed = None if plan.dynamic else plan.tokens
    return config.policy.refusal(fixed, MAX_TOKENS if fixed is None else fixed) or ""
