"""The judge in one pass over the rows of a CUDA rank: Triton kernels count, and what they doubt is judged eagerly."""
