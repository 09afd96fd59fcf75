"""One page of a reproduction: claim by claim, with tables and figures; nothing is loaded, and nothing runs."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balanced_rep.reproduce._part import Claim, Part, Table

__all__ = ["page", "write_page"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; font-size: 1.3rem; }
small, figcaption, .caption { color: #555; } figcaption, .caption { font-size: .88rem; max-width: 50rem; }
.caption { margin: 1.5rem 0 .3rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top; }
th { border-bottom: 1.5px solid #888; vertical-align: bottom; font-weight: 600; } td { border-bottom: 1px solid #eee; }
.claims { width: 100%; font-size: .9rem; } .claims td { padding: .5rem 1rem .5rem 0; } 
.claims td:first-child { width: 42%; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
.verdict a { font-weight: 600; white-space: nowrap; color: inherit; text-decoration: none; }
.agrees { color: #00705a; } .partly { color: #8a5a00; } .does-not-agree { color: #a63200; } .measured { color: #555; }
"""


def page(parts: Sequence[Part], about: dict[str, Any]) -> str:
    """The page.

    Args:
        parts: Experiments.
        about: Facts for its foot: versions, seed, time.

    Returns:
        HTML.
    """
    claims = [(part, claim) for part in parts for claim in part.claims]
    counts = {v: sum(c.verdict == v for _, c in claims) for v in ("agrees", "partly", "does not agree")}
    body = [
        "<h1>Balanced representations: what the paper states and what was measured here</h1>",
        "<p>Zhang et al., <cite>Generalization of Diffusion Models Arises with a Balanced Representation "
        "Space</cite>, ICLR 2026, on models that this package trains: two-layer autoencoders and small denoisers "
        "of 8 x 8 digits. That a statement holds here does not mean that it holds for Stable Diffusion, whose "
        "weights were not used.</p>",
        f"<p>Of {len(claims)} statements {counts['agrees']} agree, {counts['partly']} agree in part and "
        f"{counts['does not agree']} do not. The bars stand in the code of the experiments.</p>",
        _claims(claims),
    ]
    body += [_chapter(part) for part in parts]
    facts = ", ".join(f"{html.escape(str(k))} {html.escape(str(v))}" for k, v in about.items())
    body.append(f"<hr><small>{facts}. Tables are CSV files in the same folder.</small>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width"><title>Balanced representations, reproduced</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def write_page(parts: Sequence[Part], folder: Path, about: dict[str, Any]) -> Path:
    """Writes the page.

    Args:
        parts: Experiments.
        folder: Of the run.
        about: Facts for its foot.

    Returns:
        The file.
    """
    path = folder / "index.html"
    path.write_text(page(parts, about), encoding="utf-8")
    return path


def _claims(claims: list[tuple[Part, Claim]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(c.statement)}<br><small>{html.escape(c.source)}</small></td>"
        f"<td>{html.escape(c.measured)}<br><small>to be reached: {html.escape(c.bar)}</small></td>"
        f'<td class="verdict {c.verdict.replace(" ", "-")}">'
        f'<a href="#{html.escape(part.name)}">{html.escape(c.verdict)}</a></td></tr>'
        for part, c in claims
    )
    head = "<tr><th>the paper states</th><th>measured here</th><th></th></tr>"
    return f'<table class="claims"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _chapter(part: Part) -> str:
    figures = "".join(
        f"<figure>{_unique(figure.svg, name)}<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
        for name, figure in part.figures.items()
    )
    tables = "".join(_table(table) for table in part.tables.values())
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in part.notes)
    return (
        f'<h2 id="{html.escape(part.name)}">{html.escape(part.title)}</h2>{notes}{figures}{tables}'
        f"<small>{part.seconds:.0f} s</small>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(h))}</th>" for h in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in table.rows)
    caption = html.escape(table.caption)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<p class="caption">{caption}</p><div class="wide">{body}</div>'


def _unique(svg: str, name: str) -> str:
    """Ids of a drawing with a prefix: several drawings in a page share one name space."""
    prefix = re.sub(r"\W", "_", name) + "-"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{prefix}\2"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", svg)
