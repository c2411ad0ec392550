"""Triton kernels of xent_ext, imported as `xent_ext.kernels`.

`math` holds the formula, `tile` where a program's tile lies and what its rows ask for; `resident` and `streaming` walk
the logits, `gradient` makes a deferred gradient and what is left to do for rows that were split, `normalizer` makes
what a mean divides by and sums what the others left per program; `launch` is the only module here that knows torch
tensors.
"""
