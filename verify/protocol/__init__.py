"""The protocol between ranks, in every interleaving: a language, an explorer, the kernels and the published faults."""
