"""Autograd, compilers and transforms: one layer as a node of torch's graphs, on whichever backend computes it."""
