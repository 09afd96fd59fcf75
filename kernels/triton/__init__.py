"""Triton kernels, one module per op; installed as ``balanced_rep.kernels.triton``."""
