"""One case: what a rank does with it, and what the parent makes of the ranks' records."""
