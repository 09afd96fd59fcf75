"""A PTX executor in numpy: runs what NVRTC and Triton emit for sm_80, checks it and counts what it does.

``parser`` reads PTX, ``decoder`` turns each instruction into a function once, ``machine`` schedules basic blocks over
all threads of a batch of blocks; ``memory``, ``access``, ``races`` and ``order`` are the memory model, ``ops_*`` hold
the opcodes by family, ``counters`` the statistics and ``report`` the findings. Nothing here needs more than numpy.
"""

from .execute import Result, pack_parameters, run
from .machine import Machine, Options
from .parser import Kernel, parse
from .report import ExecutionError, GpuIssues, Issue, Issues

__all__ = [
    "ExecutionError",
    "GpuIssues",
    "Issue",
    "Issues",
    "Kernel",
    "Machine",
    "Options",
    "Result",
    "pack_parameters",
    "parse",
    "run",
]
