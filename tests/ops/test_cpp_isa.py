"""The compiled kernels: choice of the instruction set, errors at import, and one OpenMP runtime for all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from balanced_rep.kernels import _supports
from balanced_rep.ops import _cpp

pytestmark = pytest.mark.skipif(
    _supports.missing("balanced_rep._C") is not None, reason="the extension balanced_rep._C is not built"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("BALANCED_REP_")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_the_widest_usable_set_is_chosen():
    c = _cpp.extension()
    assert set(c.isas()) <= set(c.compiled_isas())
    done = python("import torch; from balanced_rep import _C; print(_C.isa())")
    assert done.stdout.strip() == c.isas()[-1], done.stderr


@pytest.mark.parametrize("isa", _cpp.extension().isas())
def test_the_environment_overrides(isa):
    done = python("from balanced_rep import _C; print(_C.isa())", BALANCED_REP_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_an_unknown_set_is_an_import_error_that_is_remembered():
    done = python(
        """
import torch
from balanced_rep.ops import _cpp, moments
for _ in range(2):
    try:
        _cpp.extension()
    except ImportError as error:
        print(error, "|", type(error.__cause__).__name__)
try:
    moments(torch.zeros(3))
except ImportError as error:
    print(error)
""",
        BALANCED_REP_ISA="sse9",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line in lines:
        assert "BALANCED_REP_ISA" in line
        assert "'sse9'" in line
        assert _cpp.extension().isas()[0] in line
    assert lines[0] == lines[1]
    assert lines[0].endswith("| ImportError")


def test_a_set_that_this_processor_lacks_is_refused():
    c = _cpp.extension()
    lacking = sorted(set(c.compiled_isas()) - set(c.isas()))
    for isa in lacking:
        with pytest.raises(ValueError, match=f"'{isa}' cannot be used: this processor runs "):
            c.set_isa(isa)
        assert python("from balanced_rep import _C", BALANCED_REP_ISA=isa).returncode != 0
    with pytest.raises(ValueError, match="'' cannot be used"):
        c.set_isa("")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_loaded():
    done = python(
        """
import re, torch
from balanced_rep.ops import moments
torch.set_num_threads(2)
moments(torch.randn(64, 8192))
maps = open("/proc/self/maps").read()
assert "balanced_rep/_C" in maps, "the kernels did not run"
print(sorted(set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)\\S*", maps))))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/") > 0
    assert len(eval(done.stdout)) == 1, done.stdout


def test_results_are_in_host_memory_whatever_the_default_device():
    """A kernel writes to an address. Without outputs there is nothing to write, so that a failure is no crash."""
    x, items = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    with torch.device("meta"):
        results = (
            _cpp.moments(x, 1, 0, 0, 0.0),
            _cpp.log_histogram(x, items, 1, 0, 0),
            _cpp.energy_entropy(x, 1, 0, 0),
            _cpp.philox_bits(items, 0, 4),
            _cpp.philox_normal(items, 0, 4),
        )
    assert [t.device.type for t in results] == ["cpu"] * 5


def test_bad_arguments_do_not_reach_a_kernel():
    c = _cpp.extension()
    good = [0, 0, (0,), (1,), (3,), (1,), (), (), 0, 0.0, 0, 1]
    for position, value, message in [
        (1, 4, "dtype code"),
        (8, 3, "pool must be"),
        (3, (1, 1), "1 sizes and 2 strides"),
        (5, (-1,), "negative"),
        (6, (2,), "2 sizes|pool|1 sizes and 0"),
    ]:
        bad = list(good)
        bad[position] = value
        with pytest.raises(ValueError, match=message):
            c.moments(*bad)
