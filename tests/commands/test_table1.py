"""`balanced-rep table1`: on the embedded model, on a folder with images and prompts, and what it says of bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from balanced_rep.commands.table1 import table1
from balanced_rep.detection import PAPER_TABLE_1
from balanced_rep.detection import table1 as run
from balanced_rep.models import digits, digits_data

CONDITIONAL = {"noise_difference", "sharpness", "condition_jacobian", "nemo"}  # generation_density is slow

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(table1)


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_embedded_model(tmp_path: Path) -> None:
    done = _invoke("--out", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows)[:2] == ["representation_std", "representation_std, calibrated"]
    assert {"denoising_error", "jacobian_norm", "flipd", "nearest_reference"} < rows.keys()
    assert rows["representation_std"]["auc"] >= 0.98
    assert rows["representation_std"]["n_memorized"] == 10
    assert rows["flipd"]["tangents"] == 16
    with (tmp_path / "table1.csv").open() as file:
        assert [r["method"] for r in csv.DictReader(file)] == list(rows)
    with (tmp_path / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 417
    assert sum(int(r["judged"]) for r in scores) == rows["flipd"]["n_memorized"] + rows["flipd"]["n_other"]
    printed = _invoke("--out", tmp_path, "--paper", "edm", "--method", "flipd")
    assert "0.713" in printed.stdout
    assert "unstated hardware" in " ".join(printed.stdout.split())


def write_images(folder: Path, n: int, size: int, seed: int) -> None:
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")


def test_a_stable_diffusion_folder_with_prompts(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.models.networks import save_pipeline

    save_pipeline(tmp_path)
    write_images(tmp_path / "memorized", 4, 16, 0)
    write_images(tmp_path / "other", 6, 16, 1)
    (tmp_path / "memorized.jsonl").write_text("\n".join(json.dumps({"caption": "low"}) for _ in range(4)))
    (tmp_path / "other.txt").write_text("\n".join(["low low", "low l", "l", "o", "lo", "low o"]))
    done = _invoke(
        "--model", tmp_path / "model", "--memorized", tmp_path / "memorized", "--other", tmp_path / "other",
        "--memorized-prompts", tmp_path / "memorized.jsonl", "--other-prompts", tmp_path / "other.txt",
        "--paper", "sd14", "--time", "50", "--out", tmp_path / "out", "--json",
        *(f"--method={name}" for name in CONDITIONAL | {"representation_std", "flipd"}),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    assert CONDITIONAL < rows.keys()
    assert rows["representation_std, calibrated"]["setting"].startswith("net.")
    assert rows["flipd"]["paper_auc"] == 0.956
    assert rows["noise_difference"]["prompt_free"] is False
    assert all(row["n_without_score"] == 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--paper", "sdxl"], "--paper is one of sd14, dit, edm, got 'sdxl'"),
        (["--sigma", "1", "--time", "50"], "Give --sigma or --time, not both"),
        (["--time", "50", "--half"], "--time, --half: not for the embedded digits model"),
        (["--device", "cuda:99"], "table1: the device 'cuda:99' cannot be used here"),
        (["--layer", "net.blocks"], "'net.blocks', a module without a label, is not among the layers"),
        (["--out", "FILE"], "Give another with --out DIR"),
        (["--model", "MODEL", "--device", "cuda:99"], "load: the device 'cuda:99' cannot be used here"),
        (
            ["--model", "MODEL", "--memorized", "IMAGES", "--other", "IMAGES", "--time", "5000"],
            "time 5000 is outside what this network knows, 0 to 999",
        ),
        (
            ["--model", "MODEL", "--memorized", "IMAGES", "--other", "IMAGES", "--resize"],
            "1 memorized and 1 other samples are too few: of each at least 2",
        ),
        (["--model", "owner/name"], "hf download owner/name"),
        (["--model", "MODEL"], "Give --memorized and --other"),
        (["--model", "MODEL", "--memorized", "IMAGES"], "Give both sides"),
        (["--model", "MODEL", "--memorized", "NONE", "--other", "IMAGES"], "no images in it"),
        (
            ["--model", "MODEL", "--memorized", "IMAGES", "--other", "IMAGES"],
            "8 x 8 pixels, and the model takes 16 x 16",
        ),
    ],
)
def test_bad_input_is_a_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.models.networks import network, scheduler

    if "MODEL" in arguments:
        network("unet2d").save_pretrained(tmp_path / "model", safe_serialization=True)
        scheduler("unet2d").save_pretrained(tmp_path / "model" / "scheduler")
        write_images(tmp_path / "images", 1, 8, 0)
        (tmp_path / "none").mkdir()
    (tmp_path / "file").touch()
    places = {name.upper(): tmp_path / name for name in ("model", "images", "none", "file")}
    done = _invoke("--out", tmp_path / "out", *(places.get(a, a) for a in arguments))
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_chain_without_the_times_of_the_paper(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from tests.models.networks import network

    network("unet2d").save_pretrained(tmp_path / "model", safe_serialization=True)
    diffusers.DDPMScheduler(num_train_timesteps=60).save_pretrained(tmp_path / "model" / "scheduler")
    write_images(tmp_path / "images", 2, 16, 0)
    folders = ["--model", tmp_path / "model", "--memorized", tmp_path / "images", "--other", tmp_path / "images"]
    done = _invoke(*folders, "--out", tmp_path / "out")
    assert "0 to 59. The default is the times 10, 50 and 100: give --time or --sigma." in " ".join(done.stderr.split())
    done = _invoke(*folders, "--time", "59", "--method", "denoising_error", "--out", tmp_path / "out", "--json")
    assert len(json.loads(done.stdout)["rows"]) == 1


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    from PIL import Image

    from balanced_rep.commands._images import image_batches, read_prompts

    def read(**options: bool) -> torch.Tensor:
        return torch.cat(list(image_batches(tmp_path, (1, 8, 8), **{"resize": False, "batch_size": 2, **options})))

    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    assert torch.equal(read(), torch.ones(1, 1, 8, 8))
    Image.new("1", (8000, 5000)).save(tmp_path / "b.png")  # 40 million pixels in a few kilobytes
    with pytest.raises(ValueError, match=r"b.png: 8000 x 5000 pixels are more than"):
        read()
    (tmp_path / "b.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"b.png: not a readable PNG"):
        read()
    Image.new("RGB", (16, 12)).save(tmp_path / "b.png")
    assert read(resize=True).shape == (2, 1, 8, 8)
    Image.new("I;16", (8, 8), 3000).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png: its mode is 'I.*'; give 8 bits a channel"):
        read()
    (tmp_path / "p.jsonl").write_text('{"caption": "x"}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"p.txt: no text in UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    from PIL import Image

    from balanced_rep.commands._images import image_batches

    for name, value in {"1.png": 0, "2.png": 1, "10.png": 2, "a2b10.png": 4, "a2b9.png": 3, "b.png": 5}.items():
        Image.new("L", (1, 1), value).save(tmp_path / name)
    (pixels,) = image_batches(tmp_path, (1, 1, 1), resize=False, batch_size=9)
    assert ((pixels.flatten() + 1) * 127.5).round().tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_are_judged_on_the_same_samples() -> None:
    D, data = digits(), digits_data()
    found = run(
        D, data.repeated, data.held_out[:200], sigma=0.1, layer=D.score_layer, methods=["representation_std", "flipd"],
        paper="CIFAR10-EDM",
    )  # fmt: skip
    assert [row.method for row in found.rows] == ["representation_std", "representation_std, calibrated", "flipd"]
    assert {(r.evaluation.n_positive, r.evaluation.n_negative) for r in found.rows} == {(10, 100)}
    assert found["flipd"].paper == PAPER_TABLE_1["CIFAR10-EDM"]["flipd"]
    assert found.rows[0].comparison is None
    assert found["flipd"].comparison is not None
    with pytest.raises(ValueError, match="the paper has columns"):
        run(D, data.repeated, data.held_out, sigma=0.1, paper="ImageNet")
    with pytest.raises(ValueError, match="give both memorized and other"):
        run(D, data.repeated, None, sigma=0.1)
    with pytest.raises(ValueError, match=r"nemo requires .*reference.*: not all of it is there"):
        run(D, data.repeated, data.held_out, sigma=0.1, methods=["nemo"])
    with pytest.raises(ValueError, match="no score 'flipt'"):
        run(D, data.repeated, data.held_out, sigma=0.1, options={"flipt": {"n_probes": 4}})


def test_few_samples() -> None:
    D, data = digits(), digits_data()
    one, others = data.repeated[:1], data.held_out[:20]
    with pytest.raises(ValueError, match=r"1 memorized and 20 other samples are too few: of each at least 2 .* judges"):
        run(D, one, others, sigma=0.1)
    assert run(D, one, others, sigma=0.1, methods=["flipd"]).rows[0].evaluation.n_positive == 1  # chooses nothing
    with pytest.raises(ValueError, match="0 memorized and 20 other samples are too few: of each at least 1"):
        run(D, one[:0], others, sigma=0.1, methods=["flipd"])
