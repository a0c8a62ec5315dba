"""Assertions for tests that exist: judge the tensors at hand, without a backend, a pool or a command line.

    from fusecheck.testing import assert_conforms

    assert_conforms(residual_out, norm_out, quant_out, partials=[x0, x1], residual_in=residual, gamma=gamma,
                    scale=scale, eps=1e-6, dataflow="flashinfer-fp32")

Needs torch and numpy only.
"""

from fusecheck.testing.agreement import assert_same_on_ranks
from fusecheck.testing.collecting import Conforming
from fusecheck.testing.conformity import Conformity, NotConforming, assert_conforms, conforms
from fusecheck.testing.fusion import assert_fusion_preserves
from fusecheck.testing.invariant import assert_invariant, sharp_rows
from fusecheck.testing.quantised import assert_quantised

__all__ = [
    "Conforming",
    "Conformity",
    "NotConforming",
    "assert_conforms",
    "assert_fusion_preserves",
    "assert_invariant",
    "assert_quantised",
    "assert_same_on_ranks",
    "conforms",
    "sharp_rows",
]
