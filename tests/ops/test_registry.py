"""Every op on every backend against its float64 reference, and the rules of dispatch."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

import balanced_rep as br
from balanced_rep.ops._registry import ENV_VAR, ORDER, REGISTRY, Impl, OpSpec, missing, register
from balanced_rep.testing import agreement

CASES = [
    pytest.param(spec, name, dtype, id=f"{spec.name}-{name}-{str(dtype).removeprefix('torch.')}")
    for spec in REGISTRY.values()
    for name in ORDER
    for dtype in spec.tolerance
]


@pytest.mark.parametrize(("spec", "name", "dtype"), CASES)
def test_agrees_with_reference(spec, name, dtype):
    args = spec.inputs(torch.Generator().manual_seed(0), dtype)
    if (why := spec.why_not(name, *args)) is not None:
        pytest.skip(why)
    with br.backend(name):
        got = spec(*args)
    assert agreement(spec, got, args) is None


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_a_wrong_result_does_not_agree(spec):
    args = spec.inputs(torch.Generator().manual_seed(0), next(iter(spec.tolerance)))
    for leaf in range(1 if isinstance(spec.reference(*args), torch.Tensor) else 2):
        wrong = spec.reference(*args)
        changed = wrong if isinstance(wrong, torch.Tensor) else wrong[leaf]
        changed[(0,) * (changed.ndim - 1)][1] += 1
        assert agreement(spec, wrong, args) is not None


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_opcheck(spec):
    args = spec.inputs(torch.Generator().manual_seed(0), next(iter(spec.tolerance)))
    torch.library.opcheck(getattr(torch.ops.balanced_rep, spec.name).default, args)


@pytest.fixture
def spec():
    """An op with one backend that fits and one that never does; not in the registry."""
    return OpSpec(
        name="probe",
        reference=lambda x: "reference",
        impls={
            "cpp": Impl("operator:neg", lambda x: None),
            "cuda": Impl("operator:pos", lambda x: "there is no such device"),
        },
    )


def test_automatic_choice_takes_the_first_that_fits(spec):
    assert spec.choose(1) == "cpp"
    assert spec(1) == -1
    assert dataclasses.replace(spec, impls={})(1) == "reference"


def test_forcing_a_backend(spec):
    with br.backend("reference"):
        assert spec(1) == "reference"
        with br.backend(None):
            assert spec(1) == -1
        assert spec(1) == "reference"
    assert spec(1) == -1


def test_a_forced_backend_that_cannot_run_says_why_and_what_can(spec):
    with br.backend("cuda"), pytest.raises(br.BackendError, match=r"there is no such device.*can: cpp, reference"):
        spec(1)
    with br.backend("triton"), pytest.raises(br.BackendError, match="not implemented for this op"):
        spec(1)


def test_unknown_backend_is_named_at_once():
    with pytest.raises(
        br.BackendError, match=r"asks for backend 'metal'; known backends: cuda, triton, cpp, reference"
    ):
        with br.backend("metal"):
            pass


def test_environment_variable(spec, monkeypatch):
    monkeypatch.setenv(ENV_VAR, "reference")
    assert spec(1) == "reference"
    with br.backend("cpp"):
        assert spec(1) == -1
    with br.backend(None):
        assert spec(1) == -1
    monkeypatch.setenv(ENV_VAR, "fpga")
    with pytest.raises(br.BackendError, match=f"{ENV_VAR} asks for backend 'fpga'"):
        spec(1)
    monkeypatch.setenv(ENV_VAR, "")
    assert spec(1) == -1


def test_a_forced_backend_stays_in_its_thread(spec):
    seen = []
    with br.backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(spec(1)))
        worker.start()
        worker.join()
    assert seen == [-1]


def test_the_block_ends_on_an_error(spec):
    with pytest.raises(RuntimeError, match="boom"), br.backend("reference"):
        raise RuntimeError("boom")
    assert spec(1) == -1


def test_register_refuses_a_second_op_of_a_name_and_unknown_backends():
    with pytest.raises(ValueError, match="registered twice"):
        register(REGISTRY["moments"])
    with pytest.raises(ValueError, match=r"unknown backends \['metal'\]"):
        register(OpSpec("new", reference=abs, impls={"metal": Impl("m:f", lambda x: None)}))
    assert "new" not in REGISTRY


def test_missing_names_the_module():
    assert missing("torch") is None
    assert missing("no_such_module_here") == "no_such_module_here is not installed"
    assert missing("no_such_package.sub") == "no_such_package.sub is not installed"


def test_the_chosen_backend_is_logged_once(spec, caplog):
    probe = dataclasses.replace(spec, name="probe_logged_once")
    with caplog.at_level("INFO", logger="balanced_rep"):
        probe(1)
        probe(2)
    assert [r.getMessage() for r in caplog.records] == ["probe_logged_once runs on backend 'cpp'"]


@pytest.mark.parametrize("spec", [s for s in REGISTRY.values() if "triton" in s.impls], ids=lambda s: s.name)
def test_the_interpreter_is_never_chosen_by_itself(spec, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dtype = torch.float32 if torch.float32 in spec.tolerance else next(iter(spec.tolerance))
    args = spec.inputs(torch.Generator().manual_seed(0), dtype)
    assert spec.choose(*args) != "triton"
    with br.backend("triton"):
        assert spec.choose(*args) == "triton"
