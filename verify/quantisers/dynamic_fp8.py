"""E4M3 with a float32 scale for each token, from the largest magnitude of its row."""

from __future__ import annotations

import torch

from fusecheck.formats.element import E4M3
from fusecheck.quantisers.scaled import Scaled

DYNAMIC_FP8 = Scaled("dynamic-fp8", E4M3, None, torch.float32, ("linear",))
