"""The public names: all there, and the heavy ones only when asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import balanced_rep as br


def test_every_public_name_is_there():
    for name in br.__all__:
        assert getattr(br, name) is not None
    assert dir(br) == sorted(br.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = br.no_such_name


def test_lazy_names_are_not_imported_with_the_package():
    code = "import sys, balanced_rep; print([m for m in sys.modules if m.startswith('balanced_rep.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("autodiff", "linalg", "models", "theory", "detection", "steering", "demo"):
        assert f"balanced_rep.{name}'" not in loaded


def test_jvp_and_operator_from_the_top():
    x, tangents = torch.linspace(-1, 1, 5), torch.eye(5)
    y, jv = br.jvp(torch.tanh, x, tangents)
    torch.testing.assert_close(jv, torch.diag(1 - y.square()))
    torch.testing.assert_close(br.JacobianOperator(torch.tanh, x) @ tangents, torch.diag(1 - y.square()))
