"""Rules that the repository itself keeps; collected in a checkout only, for the wheel has no Makefile."""
