"""Published bugs as injectable faults, the pass criteria of the field beside ours, and who notices what."""
