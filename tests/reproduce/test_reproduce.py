"""`balanced-rep reproduce`: what it keeps, what the page holds, and, slowly, what it finds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from balanced_rep.commands import reproduce as shell
from balanced_rep.models import digits_data
from balanced_rep.reproduce import EXPERIMENTS, Claim, Figure, Part, Settings, Table, reproduce
from balanced_rep.reproduce import _run as module
from balanced_rep.reproduce._figures import bars, curves, histograms, image_grid
from balanced_rep.reproduce._page import page

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(shell.reproduce)

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=1>"


def part(name: str = "one", text: str = "text") -> Part:
    svg = '<svg><defs><path id="m"/></defs><use href="#m"/><g clip-path="url(#m)"/></svg>'
    return Part(
        name, text, [Claim(text, text, text, text, "agrees"), Claim("b", "c", "d", "e", "does not agree")],
        {f"{name}_table": Table(text, [text, "b"], [[text, 2]])}, {f"{name}_figure": Figure(text, svg)}, [text], 1.5,
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href") and value]


def test_the_page_is_closed_and_nothing_in_it_runs() -> None:
    tags = Tags()
    text = page([part("one", EVIL), part("two")], {"version": EVIL})
    tags.feed(text)
    assert not tags.found & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not any(name.startswith("on") for name in tags.attributes)
    assert len(tags.ids) == len(set(tags.ids))  # drawings do not share names
    assert all(link.startswith("#") for link in tags.links)
    assert "default-src 'none'" in text
    assert "Of 4 statements 2 agree, 0 agree in part and 2 do not" in text


def test_real_figures_are_closed_too() -> None:
    images = digits_data().images[:4]
    drawings = [
        image_grid({"a": images, "b": images[:3]}),
        image_grid({"a": images}, signed=True),
        bars({"a": torch.rand(5)}, ylabel="y"),
        histograms({"a": {"x": torch.rand(9), "y": torch.rand(4)}}, xlabel="x"),
        curves({"a": {"x": ([1, 2], [3, 4])}}, xlabel="x", ylabel="y", logx=True, level=0.5),
    ]
    tags = Tags()
    tags.feed(page([Part("p", "t", figures={str(i): Figure("c", svg) for i, svg in enumerate(drawings)})], {}))
    assert len(tags.ids) == len(set(tags.ids))
    assert all(link.startswith(("#", "data:image/png")) for link in tags.links)


def test_an_unfinished_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def experiment(name: str):
        def run(settings: Settings, tell) -> Part:
            calls.append(name)
            if name == "two" and len(calls) == 2:
                raise KeyboardInterrupt
            tell("working")
            return part(name)

        return run

    monkeypatch.setattr(module, "EXPERIMENTS", {"one": experiment("one"), "two": experiment("two")})
    with pytest.raises(KeyboardInterrupt):
        reproduce(tmp_path, Settings(quick=True))
    said: list[tuple[str, str]] = []
    parts = reproduce(tmp_path, Settings(quick=True), tell=lambda *what: said.append(what))
    assert calls == ["one", "two", "two"]
    assert said == [("one", "kept"), ("two", "working"), ("two", "done")]
    assert [p.claims for p in parts] == [part().claims] * 2
    assert {p.name for p in tmp_path.iterdir()} == {
        "claims.json", "index.html", "one_figure.svg", "one_table.csv", "parts", "two_figure.svg", "two_table.csv",
    }  # fmt: skip
    (tmp_path / "two_table.csv").unlink()
    assert reproduce(tmp_path, Settings(quick=True), only=["two"])[0].name == "two"
    assert (tmp_path / "two_table.csv").is_file()
    assert (tmp_path / "index.html").read_text().count("<h2") == 2  # what was done before stays on the page
    reproduce(tmp_path, Settings(quick=True, seed=1))  # other settings: all over again
    assert calls[3:] == ["one", "two"]
    (tmp_path / "parts" / "one.json").write_text("{broken")
    reproduce(tmp_path, Settings(quick=True, seed=1))
    assert calls[5:] == ["one"]
    with pytest.raises(ValueError, match="no experiment \\['three'\\]"):
        reproduce(tmp_path, only=["three"])


def test_the_bar_counts_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def progress(n: int) -> None:
        counted.append(n)
        raise ValueError("enough")

    monkeypatch.setattr(shell, "_progress", progress)
    for arguments in (["--quick"], ["--quick", "--only", "dose"]):
        assert "enough" in CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)]).stderr
    assert counted == [len(EXPERIMENTS) - 3, 1]


def test_one_experiment_by_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--quick", "--only", "steering", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.stderr
    claims = json.loads(done.stdout)["claims"]
    assert [c["part"] for c in claims] == ["steering"]
    assert claims[0]["verdict"] == "agrees"
    assert (tmp_path / "responses.csv").read_text().startswith("direction,samples")
    wrong = CliRunner().invoke(app, ["--quick", "--only", "nothing", "--out", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "no experiment" in wrong.stderr


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["--quick", "--only", "corollaries", "--out", str(tmp_path / "file")])
    assert done.exit_code == 1
    assert "Cannot write to the folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--quick", "--only", "unet"], "missing: diffusers. pip install 'balanced-rep[models]'"),
        ([], "missing: diffusers. pip install 'balanced-rep[models]'; or run with --quick"),
    ],
)
def test_what_an_experiment_needs_is_said_first(
    arguments: list[str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "find_spec", lambda name: None if name == "diffusers" else name)
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert " ".join(done.stderr.split()) == f"error: {missing}"


@pytest.mark.slow
def test_the_quick_run_agrees_with_what_is_documented(tmp_path: Path) -> None:
    parts = reproduce(tmp_path, Settings(quick=True))
    verdicts = {c.statement[:40]: c.verdict for p in parts for c in p.claims}
    assert sum(v == "agrees" for v in verdicts.values()) >= len(verdicts) - 4, verdicts
    assert len(parts) == len(EXPERIMENTS) - 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["corollaries", "hybrid", "digits_table", "dose"])
def test_the_figures_of_the_full_run(name: str) -> None:
    """Five training runs each; two statements are documented as not, or not fully, agreeing."""
    verdicts = {c.statement: c.verdict for c in EXPERIMENTS[name](Settings(), lambda what: None).claims}
    below = [
        s
        for s, v in verdicts.items()
        if v != "agrees" and not s.startswith(("Units of the generalizing", "Repeated samples are stored"))
    ]
    assert below == []
