"""Quantisers, one module each: the element, the rule of its scales, and where each scale lies."""
