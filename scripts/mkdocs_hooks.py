"""What the documentation build adds to MkDocs: formulas as MathML, so that no page loads a script for them.

Formulas are written ``$...$`` and ``$$...$$`` in pages (as GitHub shows them) and ``:math:`...``` in docstrings.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

__all__ = ["on_page_content", "on_page_markdown"]

# Code is matched first, and left alone.
_PAGE = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])",
    re.DOTALL | re.MULTILINE,
)
_ROLE_MATH = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
_ROLE_CODE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>[~.]?(.*?)</code>", re.DOTALL)
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}


def _formula(match: re.Match[str]) -> str:
    if match["code"]:
        return match["code"]
    if match["block"]:
        return f'\n<div class="formula">{convert(match["block"].strip(), display="block")}</div>\n'
    return convert(match["inline"])


def _docstring_formula(match: re.Match[str]) -> str:
    return convert(re.sub("&(?:lt|gt|amp);", lambda m: _ENTITIES[m[0]], match[1]))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas of a page to MathML."""
    return _PAGE.sub(_formula, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx roles of docstrings: ``:math:`` to MathML, references to code."""
    return _ROLE_CODE.sub(r"<code>\1</code>", _ROLE_MATH.sub(_docstring_formula, html))
