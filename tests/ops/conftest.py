"""Fixtures of the ops."""

import pytest

from balanced_rep.ops import _cpp
from balanced_rep.ops._registry import missing

ISAS = _cpp.extension().isas() if missing("balanced_rep._C") is None else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that runs here, in use."""
    c = _cpp.extension()
    before = c.isa()
    c.set_isa(request.param)
    yield request.param
    c.set_isa(before)
