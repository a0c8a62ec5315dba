"""The question whether a row's bits depend on its company: `fusecheck invariance`."""
