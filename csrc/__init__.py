"""CUDA sources and C++ headers, installed as ``balanced_rep._csrc``: a package, so importlib.resources finds them."""
