"""`fusecheck judge`: calls that were written to files, by a test of one's own or by FlashInfer's logger."""
