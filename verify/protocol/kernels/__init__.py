"""The protocols of real kernels, one file each, to be read beside them."""
