"""Triton kernels of xent_ext, imported as `xent_ext.kernels`.

arguments            what kernels are given
math                 the formula
rows, pieces         the rows of a tile and what their targets ask for; what is read of them
outcome              losses, statistics and gradient from a row's summary
saved                summaries in memory, between kernels
resident, streaming  walk the logits
gradient             makes a deferred gradient, and what is left to do for rows that were split
normalizer           what a mean divides by, and the sum of what the others left for each program
device               the GPU, as plans see it
launch, launches     kernels with their numbers, launched again and again; those of calls that are alike, by their plan
setup                from the tensors of a call to launches, for all calls that are alike
implementation       a setup for each kind of call: what the rest of the package sees
"""
