"""Recorded outputs of real kernels, how they are recorded and checked, and the small model."""
