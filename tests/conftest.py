"""Before anything else runs: no spinning threads, no network, no compiled Triton; uninitialised memory that shows."""

from __future__ import annotations

import os

# Read once, when torch loads OpenMP and when the hub client is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported and when a kernel is decorated
for _name in [name for name in os.environ if name.startswith("BALANCED_REP_")]:
    del os.environ[_name]  # what the person at this machine prefers is not what the tests are about

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)


def _set_state() -> None:
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    # torch.empty then holds NaN (integers: the largest one), inside the package too: a kernel that leaves a part of its
    # output unwritten is seen. torch fills only in deterministic mode; a warning is enough where it has no such kernel.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session", autouse=True)
def _session_state() -> Iterator[None]:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    _set_state()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Whatever a test does to torch's or the process's state ends with it."""
    environment = os.environ.copy()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    _set_state()
