"""Compiles a ``.cu`` file as host C++ and runs its kernels under adversarial warp schedules and sanitizers."""

from .runner import Program, SimtError, compile_program, host_missing

__all__ = ["Program", "SimtError", "compile_program", "host_missing"]
