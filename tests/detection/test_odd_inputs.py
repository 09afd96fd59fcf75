"""Inputs that were once passed over, or ended in an error of torch: each is refused, and says what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import balanced_rep as br
from balanced_rep import detection
from balanced_rep.models import Tap

INNER = br.models.digits()
LAYER = "net.blocks.2.act"


class Wrapped(nn.Module):
    """The embedded model with its result changed."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = INNER, change
        self.null_condition, self.sample_shape = None, INNER.sample_shape
        self.data_range, self.sigma_range = INNER.data_range, INNER.sigma_range

    @property
    def layers(self) -> Mapping[str, Tap]:
        return {f"inner.{name}": tap for name, tap in INNER.layers.items()}

    def forward(self, y: Tensor, sigma: float | Tensor, cond: Any = None) -> Any:
        return self.change(self.inner(y, sigma))


@pytest.fixture(scope="module")
def x() -> Tensor:
    data = br.models.digits_data()
    return torch.cat([data.repeated[:4], data.held_out[:4]])


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("representation_std", {"layers": [LAYER, LAYER]}, ValueError, "layer 'net.blocks.2.act' is given twice"),
        ("representation_std", {"layers": 3}, TypeError, "layers must be a name or a sequence of names, got 3"),
        ("representation_std", {"layers": [3]}, TypeError, r"layers must be a name or a sequence of names, got \[3\]"),
        ("representation_std", {"batch_size": 2.5}, ValueError, "batch_size must be at least 1, a whole number"),
        ("representation_std", {"first": 1.5}, ValueError, "first= is the number of a sample, at least 0, got 1.5"),
        ("representation_std", {"reference": torch.zeros(2, 1, 8, 8)}, ValueError, "takes no reference"),
        ("representation_std", {"cond": "a prompt"}, ValueError, "tensors with a leading batch dim, got str"),
        ("nearest_reference", {"reference": torch.zeros(2, 1, 8, 8)}, ValueError, "takes no noise level"),
    ],
)  # fmt: skip
def test_what_a_score_does_not_take(x: Tensor, name: str, given: dict, error, message: str) -> None:
    D = None if name == "nearest_reference" else INNER
    with pytest.raises(error, match=message):
        detection.get(name)(D, x, **{"sigma": 0.1, **given})


@pytest.mark.parametrize("name", ["representation_std", "denoising_error", "flipd", "jacobian_norm"])
def test_samples_of_another_dtype_or_device(x: Tensor, name: str) -> None:
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=f"Samples are {dtype} on cpu, the weights of this model torch.float32"):
            detection.get(name)(INNER, x.to(dtype), sigma=0.1)
    with pytest.raises(ValueError, match="samples are on meta and the model on cpu"):
        detection.get(name)(INNER, x.to("meta"), sigma=0.1)


@pytest.mark.parametrize("name", ["denoising_error", "flipd", "jacobian_norm", "jacobian_rank"])
def test_a_denoiser_that_returns_something_else(x: Tensor, name: str) -> None:
    score = detection.get(name)
    for change, got in ((lambda d: d[:, :, :4], r"\(8, 1, 4, 8\)"), (lambda d: d.mean(dim=0), r"\(1, 8, 8\)")):
        with pytest.raises(ValueError, match=rf"{name}: Wrapped returned {got} for samples \(8, 1, 8, 8\)"):
            score(Wrapped(change), x, sigma=0.1)
    with pytest.raises(TypeError, match=f"{name}: Wrapped returned tuple, a denoiser returns a tensor"):
        score(Wrapped(lambda d: (d,)), x, sigma=0.1)


def test_the_stable_rank_of_one_broken_sample_does_not_stop_the_others(x: Tensor) -> None:
    score = detection.get("jacobian_rank", kind="stable", n_probes=8)
    x = x.clone()
    x[2] = 1.0
    whole = score(INNER, x, sigma=0.1)

    def overflows(d: Tensor) -> Tensor:
        bright = d.flatten(1).mean(dim=1) > 0.2
        return d * torch.where(bright, math.inf, 1.0).view(-1, 1, 1, 1)

    broken = score(Wrapped(overflows), x, sigma=0.1)
    kept = torch.arange(8) != 2
    assert broken.status[2] == "the score is not finite"
    torch.testing.assert_close(broken.values[kept], whole.values[kept], rtol=1e-3, atol=0.0)
    assert not score(Wrapped(lambda d: d * math.nan), x, sigma=0.1).ok.any()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "n_draws") for name in ("representation_std", "denoising_error", "noise_difference")),
        *((name, "n_probes") for name in ("jacobian_norm", "jacobian_rank", "flipd")),
        *(("generation_density", option) for option in ("n_images", "n_steps", "tiles")),
        ("nearest_reference", "k"),
    ],
)
def test_numbers_of_things_are_whole(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: {option} must be at least 1, a whole number, got 2.5"):
        detection.get(name, **{option: 2.5})


def test_a_score_of_ones_own_that_returns_something_else(x: Tensor) -> None:
    class Own(detection.Score):
        name, formula, source, cost = "own", "", "", ""
        requires, direction = frozenset({"model", "samples", "sigma"}), "high"

        def __init__(self, result: Any) -> None:
            self.result = result

        def compute(self, D: Any, batch: detection.Batch) -> Any:
            return self.result

    assert Own(torch.zeros(8))(INNER, x, sigma=0.1).values.shape == (8,)
    for result, got in ((torch.zeros(8, 1), r"\(8, 1\)"), (torch.zeros(1), r"\(1,\)"), (3.0, "float")):
        with pytest.raises(TypeError, match=rf"own: compute must return a tensor \(b,\) or .* for b = 8 .*, got {got}"):
            Own(result)(INNER, x, sigma=0.1)


def test_no_samples_have_the_shape_of_some(x: Tensor) -> None:
    for name, rows in (("representation_std", 6), ("denoising_error", 1)):
        none = detection.get(name)(INNER, x[:0], sigma=[0.1, 0.2])
        assert none.values.shape == (rows, 2, 0)
        assert len(none.at(0, 1)) == 0


VALUES, LABELS = torch.arange(8.0), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: detection.evaluate(VALUES, LABELS, direction="high", confidence=95), ValueError, "confidence must be"),
        (lambda: detection.evaluate(VALUES, LABELS, direction="high", fprs=0.01), TypeError, "fprs must be a sequence"),
        (lambda: detection.evaluate(VALUES[0], LABELS, direction="high"), ValueError, r"got shape \(\)"),
        (
            lambda: detection.evaluate(VALUES, LABELS, direction="high", groups=torch.full((8,), math.nan)),
            ValueError,
            "groups must be a number for each of 8 samples",
        ),
        (
            lambda: detection.evaluate(VALUES, LABELS, direction="high", groups=torch.arange(8), n_boot=0),
            ValueError,
            "n_boot must be at least 1",
        ),
        (lambda: detection.compare(VALUES, VALUES, LABELS, confidence=2.0), ValueError, "confidence must be between"),
        (lambda: detection.threshold(torch.rand(20, 20), direction="high"), ValueError, r"got shape \(20, 20\)"),
        (
            lambda: detection.threshold(torch.rand(400), direction="high", groups=torch.arange(3)),
            ValueError,
            r"groups must be a number for each of 400 samples, got \(3,\)",
        ),
        (lambda: detection.get(None), TypeError, "a score is named by a text"),
        (lambda: detection.get("nemo", theta=math.nan), ValueError, "theta >= 0"),
    ],
)  # fmt: skip
def test_judging_with_odd_numbers(call: Callable[[], Any], error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_scores_that_no_sample_has_both_of_are_not_told_apart() -> None:
    """The difference was NaN, and said to be distinguishable."""
    a, b = VALUES.clone(), VALUES.clone()
    a[4:6], b[6:] = math.nan, math.nan
    with pytest.raises(ValueError, match="both classes are needed, got 0 memorized and 4 other samples that both"):
        detection.compare(a, b, LABELS, directions=("high", "high"))


def test_why_no_sample_has_a_score_is_said(x: Tensor) -> None:
    scores = detection.get("denoising_error")(Wrapped(lambda d: d * math.nan), x, sigma=0.1)
    with pytest.raises(ValueError, match=r"got 0 memorized and 0 other .* The first status: the score is not finite"):
        detection.evaluate(scores, LABELS)


def test_lists_and_arrays_are_taken_for_groups_and_scores() -> None:
    given = [0, 0, 1, 1, 2, 2, 3, 3]
    want = detection.evaluate(VALUES, LABELS, direction="high", groups=torch.tensor(given))
    for groups in (given, torch.tensor(given).numpy()):
        assert detection.evaluate(VALUES, LABELS, direction="high", groups=groups) == want  # pyright: ignore
    scores = torch.rand(400, generator=torch.Generator().manual_seed(0))
    limit = detection.threshold(scores, direction="high")
    assert detection.threshold(scores.tolist(), direction="high") == limit  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("nearest_reference", {"sigmas": [0.1]}, ValueError, "nearest_reference: takes no noise level"),
        ("denoising_error", {"sigmas": [0.1], "layers": [LAYER]}, ValueError, "denoising_error: takes no layers"),
        ("denoising_error", {"sigmas": 0.1}, TypeError, "sigmas must be a sequence of noise levels"),
        ("denoising_error", {"sigmas": [0.1], "x": None}, ValueError, "nothing to score: give samples x or cond="),
        ("denoising_error", {"sigmas": [0.1], "groups": torch.arange(3)}, ValueError, "groups must be a number for"),
    ],
)  # fmt: skip
def test_calibrating_with_odd_inputs(name: str, given: dict, error, message: str) -> None:
    data = br.models.digits_data()
    x = torch.cat([data.repeated, data.held_out])
    inputs = {"x": x, "labels": torch.arange(len(x)) < 20, "fpr": 0.05, "reference": None, **given}
    if name == "nearest_reference":
        inputs["reference"] = data.ordinary
    with pytest.raises(error, match=message):
        detection.calibrate(name, INNER, **inputs)


def test_a_detector_keeps_what_was_decided(x: Tensor, tmp_path: Path) -> None:
    limit = detection.threshold(torch.rand(400), direction="high")
    detector = detection.Detector("representation_std", {}, LAYER, 0.1, "high", limit)
    with pytest.raises(TypeError, match="a detector has its own sigma, seed"):
        detector(INNER, x, sigma=0.2, seed=1)
    path = tmp_path / "detector.json"
    for wrong in (replace(detector, layer=3), replace(detector, seed="1"), replace(detector, seed=-1)):  # pyright: ignore
        wrong.save(path)
        with pytest.raises(ValueError, match=r"not a detector that this version reads: its layer is .* and its seed"):
            detection.Detector.load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="it holds no JSON object"):
        detection.Detector.load(path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"methods": "flipd"}, TypeError, "methods must be a sequence of names, got 'flipd'"),
        ({"methods": ["flipd", "nemo"]}, ValueError, "nemo requires .*: not all of it is there"),
        ({"methods": ["jacobian_rank"]}, ValueError, "jacobian_rank is not among the methods of the table"),
        (
            {"cond": (torch.zeros(3, 2), torch.zeros(5, 2))},
            ValueError,
            r"samples are \(4, 4\) in number, memorized and other, and conditions \(3, 5\)",
        ),
    ],
)
def test_a_table_of_odd_inputs(x: Tensor, given: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        detection.table1(INNER, x[:4], x[4:], sigma=0.1, **given)


def test_numbers_of_numpy_and_torch_and_names_from_a_generator_are_taken(x: Tensor, tmp_path: Path) -> None:
    """Found once: checks that were made for lists refused arrays, or used a generator up before it was read."""
    score = detection.get("representation_std", n_draws=np.int64(2))
    plain = detection.get("representation_std", n_draws=2)(INNER, x, sigma=0.2, layers=[LAYER], batch_size=4)
    found = score(INNER, x, sigma=0.2, layers=(name for name in (LAYER,)), batch_size=torch.tensor(4))
    assert torch.equal(found.values, plain.values)
    labels = torch.arange(8) < 4
    values = found.values.flatten()
    for fprs in (np.array([0.1, 0.3]), torch.tensor([0.1, 0.3], dtype=torch.float64), (f for f in (0.1, 0.3))):
        rates = detection.evaluate(values, labels, direction="low", fprs=fprs).rates
        assert rates == detection.evaluate(values, labels, direction="low", fprs=(0.1, 0.3)).rates
    many = br.models.digits_data().held_out[:60]
    for sigmas in (np.array([0.2, 0.5]), (s for s in (0.2, 0.5))):
        kept = detection.calibrate(
            detection.get("jacobian_norm", n_probes=1), INNER, many, torch.arange(60) % 2 == 0, sigmas=sigmas, fpr=0.3,
            seed=np.int64(3),
        ).detector  # fmt: skip
        kept.save(tmp_path / "detector.json")
        assert detection.Detector.load(tmp_path / "detector.json") == kept
