"""Executes, race-checks and measures the package's GPU code on machines without a GPU.

``triton_interpreter`` mends Triton's interpreter, ``ptx`` runs the PTX that NVRTC and Triton emit, ``simt`` compiles
the same ``.cu`` source as host C++, ``static`` reads what the assembler says about every kernel on every
architecture. ``kernels`` is the one list of kernels that all of them read. Start with ``docs/gpu/index.md``.
"""
