"""GPU kernels, one subpackage per language; Triton sources live in ``kernels/`` at the top of the repository."""
