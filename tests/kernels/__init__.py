"""The GPU kernels through their launchers, on devices made of the executors in ``tests/gpusim``."""
