"""What `fusecheck verify` runs behind the kernel question: which parts, for how long, and what need not run again."""
