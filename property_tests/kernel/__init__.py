"""The kernel question as property tests: run them against your own kernel with `--backend`."""
