"""What a Problem draws, as the properties of the input families see it."""

from __future__ import annotations

import torch

from fusecheck.inputs.properties import Sample
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.problem import Problem


def sample_of(problem: Problem) -> Sample:
    """All rows of a Problem, as the properties see them."""
    inputs = Inputs(problem, torch.device("cpu"))
    partials = torch.stack(inputs.partials(range(problem.tokens))).double()
    gamma = inputs.gamma().double()
    return Sample(
        partials, inputs.residual().double(), gamma, problem.eps, problem.scale, problem.format, problem.gamma
    )
