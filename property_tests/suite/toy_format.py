"""A format of one's own: powers of two in four bits, a float32 scale for eight of them; and a kernel with a fault.

Run it with `fusecheck kernel --backend fusecheck.property_tests.suite.toy_format:ToyBackend`. All that Fusecheck needs
of a format is here: element, groups and layouts in a quantiser, and the arithmetic of its scales in a `QuantFlow`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Operation
from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.formats.element import Element
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import register
from fusecheck.quantisers.scaled import Scaled

E3M0 = Element("e3m0", precision=1, emin=-2, largest=16.0, dtype=torch.uint8, bits=4, nan=None)
TOY = Scaled("toy", E3M0, group=8, scale_dtype=torch.float32, layouts=("linear", "column-major"))
RULES = QuantFlow("toy", scale_rule="multiply", least=2.0**-20, code_rule="reciprocal", code_of_nan="+max")
FLOW = replace(DATAFLOWS["trtllm-fp32"], name="toy", quants=(("toy", RULES),))


class ToyBackend(EmulatedBackend):
    operations = (
        Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_TOY"),
        Operation.named("RESIDUAL_RMS_NORM_QUANT_TOY"),
    )

    def __init__(self, quantising: type[Quantising] = Quantising) -> None:
        register(TOY)
        super().__init__(flow=FLOW, quantising=quantising)


class LastElementLeftOut(Quantising):
    def amax(self, grouped: Tensor) -> Tensor:
        return super().amax(grouped[..., :-1])


class FaultyToy(ToyBackend):
    def __init__(self) -> None:
        super().__init__(LastElementLeftOut)
