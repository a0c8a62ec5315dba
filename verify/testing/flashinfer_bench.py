"""An evaluator for flashinfer-bench (as of 0.1.2): its RMSNorm definitions, judged as `fusecheck.testing` judges.

    from flashinfer_bench.bench.evaluators import registry
    from fusecheck.testing.flashinfer_bench import ConformanceEvaluator

    registry._EVALUATORS.append(ConformanceEvaluator)

A solution passes where a known dataflow explains every element of its output. A definition says the epsilon in its
reference (`EPS = 1e-6`); one that does not is left to flashinfer-bench's own evaluator.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

import torch
from flashinfer_bench.bench.evaluators.default import DefaultEvaluator
from flashinfer_bench.bench.evaluators.utils import allocate_outputs, normalize_result
from flashinfer_bench.bench.utils import make_eval
from flashinfer_bench.data import Correctness, EvaluationStatus

from fusecheck.errors import UsageError
from fusecheck.testing.conformity import conforms

_NAMES = {"hidden_states": "partials", "residual": "residual_in", "weight": "gamma"}
_EPS = re.compile(r"(?i)\beps(?:ilon)?\s*=\s*([0-9.]+(?:e-?[0-9]+)?)")


class ConformanceEvaluator(DefaultEvaluator):  # type: ignore[misc]
    """Answers with Fusecheck's verdict; timing stays flashinfer-bench's."""

    @classmethod
    def can_evaluate(cls, definition: Any) -> bool:
        """Whether it is a norm whose operands have the names of the published definitions."""
        named = set(definition.inputs) <= set(_NAMES) and {"hidden_states", "weight"} <= set(definition.inputs)
        return "rmsnorm" in definition.name and named and _EPS.search(definition.reference) is not None

    @classmethod
    def check_correctness(
        cls, definition: Any, sol_runnable: Any, inputs: Any, ref_outputs: Any, cfg: Any, log_path: str, device: str
    ) -> tuple[Any, Any]:
        """Run the solution on every trial's inputs, and judge what it returns."""
        del ref_outputs, cfg
        eps, worst = float(_EPS.search(definition.reference)[1]), None  # type: ignore[index]
        for given in inputs:
            try:
                outputs = _outputs(definition, sol_runnable, given, device)
                operands: dict[str, Any] = {
                    _NAMES[name]: tensor for name, tensor in zip(definition.inputs, given, strict=True)
                }
                returned: dict[str, Any] = dict(zip(("norm", "residual"), outputs, strict=False))
                worst = conforms(**returned, **operands, eps=eps)
            except UsageError as error:
                return None, make_eval(EvaluationStatus.INCORRECT_SHAPE, device, log_path, extra_msg=str(error))
            except Exception:
                told = traceback.format_exc()
                return None, make_eval(EvaluationStatus.RUNTIME_ERROR, device, log_path, extra_msg=told)
            if not worst:
                break
        found = Correctness(extra={"fusecheck": str(worst)})
        if worst:
            return found, None
        return found, make_eval(EvaluationStatus.INCORRECT_NUMERICAL, device, log_path, found, extra_msg=str(worst))


def _outputs(definition: Any, runnable: Any, given: list[Any], device: str) -> list[torch.Tensor]:
    """What the solution returns, or writes into outputs that it is given."""
    with torch.no_grad():
        if runnable.metadata.destination_passing_style:
            outputs: list[torch.Tensor] = allocate_outputs(definition, given, device)
            runnable(*given, *outputs)
            return outputs
        made: list[torch.Tensor] = normalize_result(definition, runnable(*given), device)
        return made
