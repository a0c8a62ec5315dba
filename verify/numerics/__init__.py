"""The arithmetic that a dataflow declares: one rounding at a time, nominal values, and the ends that enclose them."""
