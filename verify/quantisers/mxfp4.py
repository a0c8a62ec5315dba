"""MXFP4: E2M1 in groups of 32, each with a UE8M0 scale (OCP MX), two codes a byte."""

from __future__ import annotations

import torch

from fusecheck.formats.element import E2M1
from fusecheck.quantisers.scaled import Scaled

MXFP4 = Scaled("mxfp4", E2M1, 32, torch.uint8, ("128x4", "linear"))
