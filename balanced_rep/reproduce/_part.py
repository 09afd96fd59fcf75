"""What an experiment leaves behind: claims with what was measured, tables, figures; kept on disk."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Claim", "Figure", "Part", "Settings", "Table", "Tell", "judge"]

Verdict = Literal["agrees", "partly", "does not agree", "measured"]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a run is done.

    Attributes:
        quick: Fewer seeds and no trained UNet or DiT.
        seed: Of everything that is drawn.
    """

    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Claim:
    """A statement and what became of it.

    Attributes:
        statement: What the paper, or its appendix, states.
        source: Where.
        measured: What was measured here, with its uncertainty.
        bar: What was to be reached for "agrees", set beforehand.
        verdict: Whether it was; "measured" where there is nothing to agree with.
    """

    statement: str
    source: str
    measured: str
    bar: str
    verdict: Verdict


@dataclass(frozen=True)
class Table:
    """A table, written as CSV.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Text and numbers.
    """

    caption: str
    header: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Figure:
    """A figure, written as SVG.

    Attributes:
        caption: What it shows and how to read it.
        svg: The drawing.
    """

    caption: str
    svg: str


@dataclass
class Part:
    """An experiment.

    Attributes:
        name: Of its files.
        title: Of its chapter.
        claims: What it is about.
        tables: By name.
        figures: By name.
        notes: What has to be said besides.
        seconds: How long it took.
    """

    name: str
    title: str
    claims: list[Claim] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Writes tables, figures and, last and at once, the record that says that the part is done.

        Args:
            folder: Of the run.
            fingerprint: What the part depends on.
        """
        self.write_files(folder)
        record = folder / "parts" / f"{self.name}.json"
        record.parent.mkdir(exist_ok=True)
        half = record.with_suffix(".half")
        half.write_text(json.dumps({"fingerprint": fingerprint, **asdict(self)}, indent=1), encoding="utf-8")
        os.replace(half, record)

    def write_files(self, folder: Path) -> None:
        """Writes tables and figures.

        Args:
            folder: Of the run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(table.header)
                writer.writerows(table.rows)
        for name, figure in self.figures.items():
            (folder / f"{name}.svg").write_text(figure.svg, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, name: str, fingerprint: dict[str, Any]) -> Part | None:
        """Reads a part that is done.

        Args:
            folder: Of the run.
            name: Of the part.
            fingerprint: What it has to have been made with.

        Returns:
            The part, or `None` if it has to be made.
        """
        try:
            about = json.loads((folder / "parts" / f"{name}.json").read_text(encoding="utf-8"))
            if about.pop("fingerprint") != fingerprint:
                return None
            claims = [Claim(**c) for c in about.pop("claims")]
            tables = {k: Table(**t) for k, t in about.pop("tables").items()}
            figures = {k: Figure(**f) for k, f in about.pop("figures").items()}
            return cls(claims=claims, tables=tables, figures=figures, **about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def judge(reached: bool, partly: bool = False) -> Verdict:
    """The verdict on a claim.

    Args:
        reached: Whether the bar was reached.
        partly: Whether a part of it was.

    Returns:
        The verdict.
    """
    return "agrees" if reached else "partly" if partly else "does not agree"
