"""Counter-based randomness: published known answers, the same bits everywhere, and the right distribution."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

import balanced_rep as br
from balanced_rep.ops import philox_bits, philox_normal, philox_rademacher
from balanced_rep.ops._registry import ORDER
from balanced_rep.ops.philox import PHILOX_NORMAL, philox_bits_reference, philox_normal_reference

HERE = [b for b in ORDER if PHILOX_NORMAL.why_not(b, torch.zeros(1, dtype=torch.int64), 0, 1) is None]


@pytest.fixture(params=HERE)
def on(request):
    with br.backend(request.param):
        yield request.param


# Known answers of the Random123 distribution for philox4x32-10: counter words, key words, result words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_known_answer_of_item_0(on):
    assert philox_bits(0, 4, seed=0).tolist() == list(KNOWN[0][2])


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want, monkeypatch):
    """The reference at any counter: the block number is the low half, which a patched arange supplies."""
    block, item = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32
    signed = [v - 2**64 if v >= 2**63 else v for v in (block, item, key[0] | key[1] << 32)]
    monkeypatch.setattr(torch, "arange", lambda n, device: torch.tensor([signed[0]]))
    assert philox_bits_reference(torch.tensor([signed[1]]), signed[2], 4).tolist() == [list(want)]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 257, 4096])
@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_the_same_bits_on_every_backend(on, n, seed):
    items = torch.tensor([0, 1, 2**31, 2**40 + 3, -1])
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert torch.equal(philox_bits(items, n, seed=seed), philox_bits_reference(items, signed, n))
    got, want = philox_normal(items, n, seed=seed), philox_normal_reference(items, signed, n)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_an_item_does_not_depend_on_the_others_or_on_how_much_is_drawn(on):
    many = philox_normal(torch.arange(10), 100, seed=5)
    assert torch.equal(philox_normal(7, 100, seed=5), many[7])
    assert torch.equal(philox_normal(torch.tensor([9, 7]), 33, seed=5), many[[9, 7], :33])
    assert not torch.equal(philox_normal(7, 100, seed=6), many[7])


def test_distribution(on):
    z = philox_normal(torch.arange(50), 20_000, seed=11)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(torch.corrcoef(z[:2])[0, 1]) < 0.03
    assert z.abs().max() < 5.78
    assert stats.chisquare(torch.bincount(philox_bits(3, 64_000, seed=11) >> 24).numpy()).pvalue > 1e-3


def test_normal_polynomials_against_float64():
    words = philox_bits_reference(torch.arange(4), 3, 20_000).double()
    u, turn = ((words[:, ::2] / 256).floor() + 1) / 2**24, words[:, 1::2] / 2**32 * 2 * torch.pi
    radius = (-2 * u.log()).sqrt()
    z = philox_normal_reference(torch.arange(4), 3, 20_000).double()
    torch.testing.assert_close(z[:, ::2], radius * turn.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(z[:, 1::2], radius * turn.sin(), rtol=0, atol=2e-6)


def test_rademacher(on):
    signs = philox_rademacher(torch.arange(3), 10_000, seed=1)
    assert signs.dtype == torch.float32
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean(1).abs().max() < 0.05


def test_vmap_and_compile():
    items = torch.arange(6).reshape(2, 3)
    assert torch.equal(torch.vmap(lambda i: philox_normal(i, 5, seed=3))(items)[1], philox_normal(items[1], 5, seed=3))
    f = torch.compile(lambda i: philox_normal(i, 5, seed=3) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(items[0]), philox_normal(items[0], 5, seed=3) * 2)


def test_no_global_generator_is_touched():
    before = torch.random.get_rng_state()
    philox_normal(0, 1000, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^64\), got -1"):
        philox_bits(0, 4, seed=-1)
    with pytest.raises(ValueError, match="n must not be negative"):
        philox_normal(0, -4, seed=1)
    with pytest.raises(TypeError, match=r"int64 tensor \(b,\), got torch.float32"):
        philox_bits(torch.zeros(2), 4, seed=1)
    with pytest.raises(ValueError, match=r"item number must be in \[-2\^63, 2\^63\)"):
        philox_bits(2**63, 4, seed=1)
    for items, n, seed, message in [
        ([1, 2], 4, 0, "got list"),
        (0, 4.0, 0, "n must be an int, got float"),
        (0, 4, 1.5, "seed must be an int, got float"),
    ]:
        with pytest.raises(TypeError, match=message):
            philox_normal(items, n, seed=seed)
    with pytest.raises(TypeError, match="of shape"):
        philox_bits(torch.zeros(2, 2, dtype=torch.int64), 4, seed=1)
