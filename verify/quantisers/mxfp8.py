"""MXFP8: E4M3 in groups of 32, each with a UE8M0 scale (OCP MX); FlashInfer's patterns 13 and 14."""

from __future__ import annotations

import torch

from fusecheck.formats.element import E4M3
from fusecheck.quantisers.scaled import Scaled

MXFP8 = Scaled("mxfp8", E4M3, 32, torch.uint8, ("128x4", "linear"))
