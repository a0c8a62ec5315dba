"""A backend between checks: what its methods return must be what the interface says, and what they raise is named.

Each method of a plug-in is called here. So a mistake is said of the method that made it, where it is first used, and
never as an error of what came after.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusecheck.backends import floating
from fusecheck.dataflow import Dataflow
from fusecheck.errors import RAISED_IN, BreachError, UsageError
from fusecheck.interface import Backend, Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support

if TYPE_CHECKING:
    from fusecheck.problem import Problem

T = TypeVar("T")

_noticed: list[str] = []
"""What calls left switched in the floating-point state, since it was asked for last."""


def noticed() -> list[str]:
    """What the backend's calls on this process left switched, in words; told once, and set back already."""
    words = list(dict.fromkeys(_noticed))
    _noticed.clear()
    return words


@contextlib.contextmanager
def calling(method: str, act: object) -> Any:
    """Around a call of a backend's method: whatever is raised is marked, and the floating-point state set back."""
    before = floating.state()
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(AttributeError, TypeError):  # an exception with slots cannot be marked
            setattr(error, RAISED_IN, (method, place_of(error, act)))
        raise
    finally:
        changed = floating.state().differs(before)
        if changed:
            before.restore()
            _noticed.append(f"{method} left {' and '.join(changed)} switched")


def place_of(error: BaseException, act: object) -> str:
    """File and line where an exception was raised: the last in the file of the method, if it passed through that."""
    frames = traceback.extract_tb(error.__traceback__)
    source = inspect.getsourcefile(act) if inspect.isroutine(act) else None
    own = [frame for frame in frames if frame.filename == source] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


class CheckedBackend:
    """A backend whose methods are checked; its other attributes are its own.

    Args:
        backend: what was loaded.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name = backend.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def supports(self, problem: Problem) -> Support:
        """As the backend says.

        Raises:
            BreachError: it raised, or returned something else than a Support.
        """
        return self._said("supports", self._backend.supports, problem, Support, "return Support(ok, reason)")

    def dataflow(self, problem: Problem) -> Dataflow:
        """As the backend declares.

        Raises:
            BreachError: it raised, or returned something else than a Dataflow.
        """
        what = "return one of DATAFLOWS, or a Dataflow of your own"
        return self._said("dataflow", self._backend.dataflow, problem, Dataflow, what)

    def _said(self, method: str, act: Callable[[Problem], Any], problem: Problem, kind: type[T], what: str) -> T:
        try:
            with calling(method, act):
                found = act(problem)
        except UsageError:
            raise
        except Exception as error:
            told = f"raised {type(error).__name__} ({place_of(error, act)}): {error}"
            raise BreachError(f"{self.name}: {method} {told}; it is asked about every case and must answer") from error
        return _expect(self.name, method, found, kind, what)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """As the backend opens a workspace.

        Raises:
            BreachError: what it returned has no `run` or no `close`.
        """
        with calling("open", self._backend.open):
            kernel = self._backend.open(rank, limits)
        missing = [name for name in ("run", "close") if not callable(getattr(kernel, name, None))]
        if missing:
            raise BreachError(
                f"{self.name}: open returned {_shown(kernel)}, which has no {' and no '.join(missing)}; "
                "expected a kernel; return an object with run and close"
            )
        return CheckedKernel(self.name, kernel)


class CheckedKernel:
    """A kernel whose methods are checked; its other attributes are its own.

    Args:
        name: of the backend.
        kernel: what `open` returned.
    """

    def __init__(self, name: str, kernel: Kernel) -> None:
        self._name, self._kernel = name, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """As the kernel runs.

        Raises:
            BreachError: it returned something else than RankOutputs.
        """
        with calling("run", self._kernel.run):
            outputs = self._kernel.run(inputs, op=op, strategy=strategy)
        return _expect(self._name, "run", outputs, RankOutputs, "return RankOutputs(residual, norm, quant)")

    @property
    def renew(self) -> Callable[[Limits], None]:
        """As the kernel begins anew, where it can."""
        act: Callable[[Limits], None] = self._kernel.renew  # type: ignore[attr-defined]
        if not callable(act):
            raise AttributeError(f"{self._name}: renew is {act!r}")

        def renewed(limits: Limits) -> None:
            with calling("renew", act):
                act(limits)

        return renewed

    def close(self) -> None:
        """As the kernel closes."""
        with calling("close", self._kernel.close):
            self._kernel.close()


def _expect(name: str, method: str, found: Any, kind: type[T], what: str) -> T:
    if not isinstance(found, kind):
        raise BreachError(f"{name}: {method} returned {_shown(found)}, expected a {kind.__name__}; {what}")
    return found


def _shown(value: Any) -> str:
    """A value in few words: its type, and itself where that is short."""
    text = repr(value)
    kind = type(value).__name__
    return "None" if value is None else f"the {kind} {text}" if len(text) < 24 else f"a {kind}"
